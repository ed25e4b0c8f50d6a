"""Random streams with ends of every kind, and the slow bookkeeping that knows what is in them."""

from __future__ import annotations

import numpy as np
from gymnasium import spaces

from asyncrl.types import Field, Spec


class Stream:
    """One lane of B environments whose observation is its own moment number, unique in the run.

    Plays by the rules of the wire: an ended row is followed by a reset step, a lost life
    (terminated, game goes on) is not. `rows` remembers each moment of each environment:
    what was seen, whether it opened an episode, and what the row at that moment held. Where the
    spec has a "memory", it says before which moment of which environment it is one.
    """

    def __init__(self, spec: Spec, lane: int, seed: int, frame_stack: int = 1):
        self.spec, self.lane, self.k = spec, lane, frame_stack
        self.rng = np.random.default_rng([seed, lane])
        self.sequence, self.generation, self.moment = 0, 0, 0
        self.rows: dict[int, dict] = {}  # row moment -> (B,) arrays
        self.restart()

    def restart(self) -> None:
        """A new actor: everything opens anew."""
        B = self.spec.num_envs
        self.first, self.ended = np.ones(B, bool), np.zeros(B, bool)
        self.frames = np.zeros((B, max(self.k - 1, 0)), np.int32)
        self.generation += 1
        self.moment += 1  # the moments before and after a restart are different ones

    def obs_of(self, moment: int) -> np.ndarray:
        """(B,) int32, different for every lane, environment and moment."""
        B = self.spec.num_envs
        return (self.lane * 1_000_000 + moment * 10 + np.arange(B)).astype(np.int32)

    def memory_of(self, moment: int) -> dict:
        """The state before a moment: a tree whose floats have an exact half."""
        env = np.arange(self.spec.num_envs)
        where = np.stack([env * 0 + moment % 2_000, 10 * self.lane + env], 1).astype(np.float32)
        return {"where": where, "moment": (np.full(len(env), moment),)}

    def unroll(self, buffer):
        """Fill one unroll of the lane into `buffer` and return its views."""
        T, B = self.spec.unroll_length, self.spec.num_envs
        unroll = self.spec.layout.views(buffer)
        if self.k > 1:
            unroll.state["frames"][0] = self.frames
        period = T // self.spec.num_states
        for t in range(T):
            if t % period == 0 and "memory" in self.spec.state:
                memory, slot = self.memory_of(self.moment), unroll.state["memory"]
                slot["where"][t // period] = memory["where"]
                slot["moment"][0][t // period] = memory["moment"][0]
            obs, first = self.obs_of(self.moment), self.first.copy()
            unroll.obs[t], unroll.first[t] = obs, first
            for env in range(B):
                past = [obs[env]] * self.k if first[env] else [*self.frames[env], obs[env]]
                self.frames[env] = past[1:]
            valid = ~self.ended
            end = self.rng.random(B)
            terminated = valid & (end < 0.08)
            life = valid & (end >= 0.08) & (end < 0.16)
            truncated = valid & (end >= 0.16) & (end < 0.22)
            row = {
                "obs": obs,
                "first": first,
                "action": self.rng.integers(0, self.spec.action_space.n, B),
                "reward": np.where(valid, self.rng.normal(size=B), 0).astype(np.float32),
                "terminated": terminated | life,
                "truncated": truncated,
                "valid": valid,
            }
            for name in ("action", "reward", "terminated", "truncated", "valid"):
                getattr(unroll, name)[t] = row[name]
            self.rows[self.moment] = row
            self.first, self.ended = self.ended.copy(), terminated | truncated
            self.moment += 1
        unroll.obs[T], unroll.first[T] = self.obs_of(self.moment), self.first
        self.rows[self.moment] = {"obs": self.obs_of(self.moment), "first": self.first.copy()}
        unroll.episode_length[...] = 0
        unroll.header.sequence[...] = self.sequence
        unroll.header.lane[...] = self.lane
        unroll.header.generation[...] = self.generation
        self.sequence += 1
        return unroll

    def stack(self, moment: int, env: int) -> list[int]:
        """The k observations a model sees at a moment, by walking back to the opening one."""
        seen, at = [], moment
        for _ in range(self.k):
            seen.append(int(self.rows[at]["obs"][env]))
            if not self.rows[at]["first"][env]:
                at -= 1
        return seen[::-1]


def make_spec(unroll_length=5, num_envs=3, frame_stack=1, num_states=1, recurrent=False) -> Spec:
    """A spec whose observation is one number."""
    low, high = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    state = {"frames": Field((frame_stack - 1,), "int32")} if frame_stack > 1 else {}
    if recurrent:
        state["memory"] = {"where": Field((2,), "float32"), "moment": (Field((), "int64"),)}
    obs = spaces.Box(low, high, (), np.int32)
    return Spec(unroll_length, num_envs, obs, spaces.Discrete(6), state, num_states)
