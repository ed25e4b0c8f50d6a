"""An environment whose observations say where they come from: (seed, episode, step).

Registered as "tests.counting_env:Counting-v0". Episodes have varying lengths and end in turn by
termination and truncation; rewards differ from row to row.
"""

from __future__ import annotations

import time

import gymnasium as gym
import numpy as np
from gymnasium import spaces


def length_of(seed: int, episode: int) -> int:
    return 1 + (3 * seed + 2 * episode) % 5


def terminates(seed: int, episode: int) -> bool:
    return (seed + episode) % 2 == 0


def reward_of(seed: int, episode: int, step: int) -> float:
    return 100.0 * seed + 10.0 * episode + step - 50.0


class CountingEnv(gym.Env):
    """`kind`: "float", "uint8", "dict" or "tuple" observations. Never ends where `endless`.

    `reward`: "count", "zero" or "nan". From step `fails_at` of env 1 on it raises, sleeps or
    shows an observation of the wrong shape, as `failure` says.
    """

    def __init__(self, kind="float", endless=False, reward="count", failure="", fails_at=3):
        self.kind, self.endless, self.reward_kind = kind, endless, reward
        self.failure, self.fails_at = failure, fails_at
        where = spaces.Box(0, 255, (3,), np.uint8 if kind == "uint8" else np.float32)
        self.observation_space = {
            "dict": spaces.Dict({"where": where, "step": spaces.Discrete(256)}),
            "tuple": spaces.Tuple((where, spaces.Dict({"step": spaces.MultiBinary(8)}))),
        }.get(kind, where)
        self.action_space = spaces.Discrete(3, start=5)
        self.identity, self.episode, self.count = 0, -1, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.identity, self.episode = seed, -1
        self.episode, self.count = self.episode + 1, 0
        return observation(self.kind, self.identity, self.episode, 0), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.count += 1
        if self.failure and self.identity == 1 and self.count >= self.fails_at:
            if self.failure == "raise":
                raise RuntimeError("the cartridge caught fire")
            time.sleep(60)
        obs = observation(self.kind, self.identity, self.episode, self.count)
        reward = {
            "count": reward_of(self.identity, self.episode, self.count),
            "zero": 0.0,
            "nan": float("nan"),
        }[self.reward_kind]
        ended = not self.endless and self.count == length_of(self.identity, self.episode)
        terminated = ended and terminates(self.identity, self.episode)
        return obs, reward, terminated, ended and not terminated, {}


def observation(kind: str, identity: int, episode: int, count: int):
    dtype = np.uint8 if kind == "uint8" else np.float32
    where = np.array([identity, episode, count], dtype)
    if kind == "dict":
        return {"where": where, "step": np.int64(count)}
    if kind == "tuple":
        return where, {"step": np.array([count >> bit & 1 for bit in range(8)], np.int8)}
    return where


def make_one() -> CountingEnv:
    """Not a vector env: what a user gets wrong first."""
    return CountingEnv()


gym.register("Counting-v0", entry_point=CountingEnv)
