"""The ancestor's Breakout against ALE's own single environment, driven by a slow loop."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch

import asyncrl.example_envs
from asyncrl.env_config import EnvConfig
from asyncrl.envs import make_envs
from asyncrl.eval import table
from asyncrl.evaluate import first_seed, play_games, summarise
from asyncrl.video import Recorder

ale_py = pytest.importorskip("ale_py")
gym.register_envs(ale_py)
gym.register_envs(asyncrl.example_envs)
NAME = "asyncrl/AncestorBreakout-v0"
NOOP, FIRE, RIGHT, LEFT = range(4)


class Slowly:
    """The same rules on "ALE/Breakout-v5", written without looking at the environment's code."""

    def __init__(self, seed: int):
        self.env = gym.make(
            "ALE/Breakout-v5", frameskip=(3, 5), repeat_action_probability=0.0,
            full_action_space=False, obs_type="grayscale",
        ).unwrapped  # fmt: skip
        self.env.reset(seed=seed)
        self.begin()

    def look(self) -> np.ndarray:
        screen = self.env.ale.getScreenGrayscale()
        return np.array([[screen[26 + 2 * y, 4 + 2 * x] for x in range(76)] for y in range(92)])

    def begin(self) -> np.ndarray:
        if self.env.ale.lives() == 0:
            self.env.reset()
        self.lives = self.env.ale.lives()
        while True:
            self.env.ale.act(ale_py.Action.FIRE)
            if any(self.look()[y, x] for y in range(34, 82) for x in range(2, 74)):
                return self.look()

    def step(self, action: int) -> tuple[float, bool]:
        _, reward, *_ = self.env.step((NOOP, RIGHT, LEFT)[action])
        return reward, self.env.ale.lives() < self.lives


def test_it_plays_as_a_slow_loop_does():
    env, slow, rng = gym.make(NAME), Slowly(5), np.random.default_rng(0)
    obs, info = env.reset(seed=5)
    lives, frames, rewards = [info["lives"]], [], 0
    assert obs.shape == (92, 76) and obs.dtype == np.uint8
    for step in range(450):
        before = info["frame_number"]
        action = int(rng.integers(3))
        obs, reward, terminated, truncated, info = env.step(action)
        assert slow.step(action) == (reward, terminated) and not truncated
        if step % 10 == 0 or terminated:
            assert np.array_equal(obs, slow.look())
        if info["lives"]:  # a game that is over stands still
            frames.append(info["frame_number"] - before)
        rewards += reward
        if terminated:
            bricks, ended = (obs[8:34] > 0).sum(), lives[-1] == 1
            obs, info = env.reset()
            assert np.array_equal(obs, slow.begin())
            # The ball is there, and the bricks are those that were left, or all in a new game.
            assert obs[34:-10, 2:-2].any()
            assert ((obs[8:34] > 0).sum() == bricks) or ended
            lives.append(info["lives"])
    assert set(frames) == {3, 4} and 0.4 < np.mean(np.array(frames) == 3) < 0.6
    assert lives[:6] == [5, 4, 3, 2, 1, 5] and rewards > 0


def test_a_life_without_reward_is_ended_by_random_play():
    env = gym.make(NAME, stall_steps=6)
    _, info = env.reset(seed=0)
    for life in range(7):
        assert info["lives"] == 5 - life % 5
        for step in range(1, 7):
            _, reward, terminated, truncated, after = env.step(0)
            assert (terminated, truncated, reward) == (step == 6, False, 0.0)
            last_frame, info = info["frame_number"], after
        assert info["lives"] == 4 - life % 5 and info["frame_number"] - last_frame > 4
        _, info = env.reset()


def test_reward_puts_the_end_off():
    """An agent that follows the ball scores now and then, and lives longer than `stall_steps`."""
    env = gym.make(NAME, stall_steps=150)
    obs, _ = env.reset(seed=1)
    steps, rewarded = 0, []
    for steps in range(1, 601):
        air, paddle = obs[34:80, 2:-2], obs[82, 2:-2]
        ball, own = np.nonzero(air.any(0))[0], np.nonzero(paddle)[0]
        go = ball.mean() - own.mean() if len(ball) and len(own) else 0
        obs, reward, terminated, *_ = env.step(0 if abs(go) < 2 else 1 if go > 0 else 2)
        rewarded += [steps] if reward else []
        if terminated:
            break
    gaps = np.diff([0, *rewarded, steps])
    assert steps > 150 and len(rewarded) > 2 and max(gaps) <= 150


def test_seeding_begins_a_new_game_and_options_are_checked():
    env = gym.make(NAME, stall_steps=5)
    env.reset(seed=0)
    while not env.step(0)[2]:
        pass
    assert env.reset()[1]["lives"] == 4
    assert env.reset(seed=0)[1]["lives"] == 5
    assert gym.spec(NAME).max_episode_steps == 10_000
    for numbers in ({"num_frames": (4, 4)}, {"num_frames": (0, 3)}, {"stall_steps": 0}):
        with pytest.raises(ValueError, match=r"expected num_frames .* and stall_steps"):
            gym.make(NAME, **numbers)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_in_a_group_each_life_is_an_episode_and_five_are_a_game(vectorization):
    config = EnvConfig(NAME, vectorization=vectorization, kwargs={"stall_steps": 40})
    envs = make_envs(config, 2)
    singles = [gym.make(NAME, stall_steps=40) for _ in range(2)]
    obs = envs.reset(seed=11)
    for env, single in enumerate(singles):
        assert np.array_equal(obs[env], single.reset(seed=11 + env)[0])
    rng, lengths = np.random.default_rng(0), np.zeros(2, int)
    resets, ended, games = np.zeros(2, bool), 0, 0
    for _ in range(250):
        action = rng.integers(3, size=2)
        envs.send(action)
        step = envs.recv()
        assert step.valid.tolist() == (~resets).tolist() and step.first.tolist() == resets.tolist()
        for env, single in enumerate(singles):
            if resets[env]:
                expected, reward, terminated = single.reset()[0], 0.0, False
            else:
                expected, reward, terminated, *_ = single.step(int(action[env]))
            lengths[env] += not resets[env]
            assert np.array_equal(step.obs[env], expected)
            assert (step.reward[env], step.terminated[env]) == (reward, terminated)
            assert step.episode_length[env] == (lengths[env] if terminated else 0)
            lives = single.unwrapped.ale.lives()
            assert step.game_over[env] == terminated
            assert step.goes_on[env] == (terminated and lives > 0)
            games += terminated and lives == 0
            lengths[env] *= not terminated
            resets[env], ended = terminated, ended + terminated
    envs.close()
    assert ended >= 6 and games >= 1


class Stays(torch.nn.Module):
    """Likes all actions alike, and so takes the first: it stands still."""

    def initial_state(self, num_envs):
        return {}

    def forward(self, obs, first, state):
        return {"q": torch.zeros(*first.shape, 3)}, state


def test_an_evaluation_tells_lives_and_whole_games():
    """Each game is five lives of a single environment, and five times a life is the mean score."""
    config = EnvConfig(NAME, kwargs={"stall_steps": 40})
    envs, recorder = make_envs(config, 2), Recorder(config, 2, seed=3)
    games = play_games(Stays(), envs, 4, 3, epsilon=0.5, on_step=recorder)
    envs.close()
    env, rows, expected = gym.make(NAME, stall_steps=40), iter(recorder.rows), []
    env.reset(seed=first_seed(3))
    for _ in range(2):
        lives, length = [0.0], 0
        for row in rows:
            _, reward, terminated, _, info = env.step(int(row.action[0]))
            lives[-1], length = lives[-1] + reward, length + 1
            if terminated:
                next(rows)  # the reset step
                env.reset()
                if info["lives"] == 0:
                    break
                lives.append(0.0)
        expected.append((sum(lives), length, tuple(lives), False))
    assert len(games) == 4 and all(len(game.lives) == 5 for game in games)
    assert set(expected) <= set(games) and sum(game.score for game in games) > 0
    means = summarise(games)
    assert means["eval/life_score"] == pytest.approx(5 * means["eval/life_return"])
    assert means["eval/life_score"] == pytest.approx(means["eval/return"])
    words = dict(table(games, config.resolved()))["per life"]
    assert words.endswith(f"; 5 x per life = {means['eval/return']:.2f}")
    assert recorder.best(2).score == max(game.score for game in games)
