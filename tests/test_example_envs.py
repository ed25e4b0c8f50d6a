"""The example environments are what they say, and are found by their ids in any process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import asyncrl.example_envs
from asyncrl.envs import EnvConfig, make_envs

MASKED = "asyncrl/MaskedCartPole-v1"
gym.register_envs(asyncrl.example_envs)
ALL = sorted(name for name in gym.registry if name.startswith("asyncrl/"))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ALL)
def test_gymnasium_s_own_check(name):
    check_env(gym.make(name).unwrapped, skip_render_check=True)


def record(env: gym.Env, seed: int, num_steps: int = 400) -> list:
    """All that an environment says to actions drawn by `seed`, over several episodes."""
    obs, _ = env.reset(seed=seed)
    rng, said = np.random.default_rng(seed), [obs.tobytes()]
    for _ in range(num_steps):
        obs, *others, _ = env.step(int(rng.integers(env.action_space.n)))
        said.append((obs.tobytes(), *others))
        if any(others[1:]):
            said.append(env.reset()[0].tobytes())
    return said


@pytest.mark.parametrize("name", ALL)
def test_equal_seeds_make_equal_games(name):
    """Also in an environment that was played before."""
    env, other = gym.make(name), gym.make(name)
    first = record(env, 3)
    assert record(other, 3) == first
    assert record(env, 4) != first
    assert record(env, 3) == first


def test_all_are_listed():
    words = asyncrl.example_envs.__doc__
    assert len(ALL) == 6 and all(f"    {name} " in words for name in ALL)


@pytest.mark.filterwarnings("error")
def test_masked_cartpole_is_an_environment_by_gymnasium_s_own_check():
    env = gym.make(MASKED)
    check_env(env.unwrapped, skip_render_check=True)
    whole = gym.make("CartPole-v1").observation_space
    assert env.observation_space.low.tolist() == whole.low[[0, 2]].tolist()
    assert env.observation_space.high.tolist() == whole.high[[0, 2]].tolist()


def test_masked_cartpole_is_cartpole_less_its_velocities():
    """Equal games for equal actions: random ones to a fall, balanced ones to the time limit."""
    whole, masked = gym.make("CartPole-v1"), gym.make(MASKED)
    rng, ends = np.random.default_rng(0), []
    for episode in range(12):
        seed = episode if episode % 3 == 0 else None  # else it goes on from the last game's draws
        (obs, *expected), (seen, *others) = whole.reset(seed=seed), masked.reset(seed=seed)
        length, ended = 0, False
        while not ended:
            assert seen.dtype == np.float32 and seen.tolist() == [obs[0], obs[2]]
            balancing = obs @ [0.1, 0.3, 1.0, 1.0] > 0
            action = int(balancing) if episode % 2 else int(rng.integers(2))
            (obs, *expected), (seen, *others) = whole.step(action), masked.step(action)
            assert others == expected
            length, ended = length + 1, expected[1] or expected[2]
        assert seen.tolist() == [obs[0], obs[2]]
        ends.append((length, *expected[1:3]))
    assert ends[1::2] == [(500, False, True)] * 6
    assert all(length < 100 and terminated for length, terminated, _ in ends[::2])


def test_arguments_go_to_cartpole():
    masked = gym.make(MASKED, sutton_barto_reward=True)
    masked.reset(seed=0)
    rewards, terminated = [], False
    while not terminated:
        _, reward, terminated, _, _ = masked.step(0)
        rewards.append(reward)
    assert rewards[:-1] == [0.0] * (len(rewards) - 1) and rewards[-1] == -1.0


OTHER_PROCESS = f"""
import numpy as np
from asyncrl.envs import EnvConfig, make_envs
for vectorization in ("sync", "async"):
    envs = make_envs(EnvConfig({MASKED!r}, vectorization=vectorization), 2)
    print(envs.reset(7).tolist())
    envs.send(np.array([0, 1]))
    print(envs.recv().obs.tolist())
    envs.close()
"""


def test_its_id_is_known_in_a_process_that_imported_nothing_of_it():
    output = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS], cwd=Path(__file__).parents[1],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    expected = [[], []]
    for env in range(2):
        whole = gym.make("CartPole-v1")
        expected[0].append(whole.reset(seed=7 + env)[0][[0, 2]].tolist())
        expected[1].append(whole.step(env)[0][[0, 2]].tolist())
    assert output == [str(rows) for rows in expected] * 2


@pytest.mark.parametrize("name", ["MaskedCartPol-v1", "MaskedCartPole-v2", "MaskedCartPole"])
def test_unknown_ids_are_refused_with_the_nearest(name):
    words = f"no environment 'asyncrl/{name}'; did you mean asyncrl/MaskedCartPole-v1"
    with pytest.raises(ValueError, match=words):
        make_envs(EnvConfig(f"asyncrl/{name}"), 1)
