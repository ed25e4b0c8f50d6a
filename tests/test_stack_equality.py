"""Frame stacks that the replay gathers, bit by bit beside those of Gymnasium's own wrapper."""

from __future__ import annotations

from collections.abc import Callable

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import FrameStackObservation

from asyncrl.algorithms.dqn import DQNConfig
from asyncrl.envs import seed_for
from asyncrl.models import ModelConfig
from asyncrl.policies import Random
from asyncrl.stores.replay import ReplayConfig
from tests.test_on_policy import Box, envs_of


class Tally(gym.Env):
    """Shows (seed, episode, step, the actions so far as one number); 1 to 7 steps, both ends."""

    observation_space = spaces.Box(-1, 2**31 - 1, (4,), np.int32)
    action_space = spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.identity, self.episode = seed, -1
        self.episode, self.count, self.actions = self.episode + 1, 0, 0
        return self._observation(), {}

    def step(self, action):
        self.count, self.actions = self.count + 1, 3 * self.actions + int(action)
        place = self.identity + 3 * self.episode
        ended, terminates = self.count == 1 + place % 7, place % 2 == 0
        return self._observation(), 1.0, ended and terminates, ended and not terminates, {}

    def _observation(self) -> np.ndarray:
        return np.array([self.identity, self.episode, self.count, self.actions], np.int32)


def wrapped(k: int, num_envs: int) -> SyncVectorEnv:
    makers: list[Callable] = [lambda: FrameStackObservation(Tally(), k)] * num_envs
    return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.NEXT_STEP)


class Wrapped:
    """The wrapped environments of one lane, played after the actor's unrolls."""

    def __init__(self, k: int, lane: int):
        self.k, self.lane, self.generation = k, lane, -1
        self.stacks: dict[tuple, np.ndarray] = {}  # by what the newest frame shows
        self.padded = 0

    def follow(self, unroll) -> None:
        T, B = unroll.action.shape
        if int(unroll.header.generation) != self.generation:
            self.generation = int(unroll.header.generation)
            self.envs = wrapped(self.k, B)
            self.obs, _ = self.envs.reset(seed=seed_for(1, self.lane, self.generation))
        for t in range(T + 1):
            assert np.array_equal(self.obs[:, -1], unroll.obs[t])
            for stack in self.obs:
                self.stacks[tuple(stack[-1].tolist())] = stack.copy()
                self.padded += bool((stack[0] == stack[1]).all())
            if t < T:
                self.obs, *_ = self.envs.step(unroll.action[t].copy())


@pytest.mark.parametrize("k, n", [(2, 3), (4, 1)])
def test_stacks_are_those_of_gymnasiums_wrapper(k, n, tmp_path):
    """Across ends of episodes, the wrap-around of lanes, unrolls that are lost, and actors that die
    between the commits of their lanes; and the later stack is that of some steps later."""
    replay = ReplayConfig(capacity=150, learning_starts=100_000)  # it is only filled
    config = DQNConfig(n_step=n, batch_size=64, precision="float32", replay=replay)
    model = ModelConfig(frame_stack=k, hidden=(8,))
    box = Box(tmp_path, config, model, envs_of(Tally), Random())
    lanes = [Wrapped(k, lane) for lane in range(2)]
    take = box.learner._take

    def taken(lane, unroll, raw):
        lanes[lane].follow(unroll)
        if turn % 4 != 1 or lane:  # else it is lost on the way: its memory goes on all the same
            take(lane, unroll, raw)

    box.learner._take = taken
    compared, seen = 0, set()
    for turn in range(25):
        if turn % 4 == 3:  # killed: one lane's unroll is in, the other's never was
            (actor,) = box.actors
            actor.lanes[1].writer.commit = lambda: (_ for _ in ()).throw(SystemExit)
            with pytest.raises(SystemExit):
                while True:
                    box.collect()
            box.actors = [box.make_actor(0, generation=1 + turn)]
        box.collect()
        stacks = lanes[0].stacks | lanes[1].stacks
        sample = box.store.sample()
        assert sample.weight.all()
        begun = sample.obs[0].tolist()
        for obs, state in ((sample.obs, sample.state), (sample.next_obs, sample.next_state)):
            got = torch.cat([state["frames"], obs[0].unsqueeze(1)], 1).numpy()
            for stack in got:
                key = tuple(stack[-1].tolist())
                seen.add(key)
                want = stacks[key]
                assert stack.dtype == want.dtype and stack.tobytes() == want.tobytes()
                compared += 1
        ended = sample.next_obs[0].tolist()
        for one, other, steps in zip(begun, ended, sample.steps.tolist(), strict=True):
            assert other[:3] == [*one[:2], one[2] + steps]
            assert other[3] // 3**steps == one[3]
        actions = sample.next_obs[0, :, 3] // 3 ** (sample.steps - 1) % 3
        assert torch.equal(actions, sample.action)
    assert compared > 2_000 and len(seen) > 300 and min(lane.padded for lane in lanes) > 50
    assert min(lane.end for lane in box.store.lanes) > 3 * box.store.rows
    assert len({identity for identity, *_ in seen}) > 12  # two lanes of two, seven actors
