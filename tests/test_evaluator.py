"""The evaluator beside training outlives environments that fail and games that never end."""

from __future__ import annotations

import signal

LAUNCH_FILE = """
import asyncrl
import gymnasium as gym
from tests.counting_env import CountingEnv

made = 0  # vector environments of the evaluator, which are of three


class Third(CountingEnv):
    def step(self, action):
        if made == 1 and self.count == 2:
            raise RuntimeError("the cartridge caught fire")
        return super().step(action)


def make(num_envs):
    global made
    made += num_envs == 3
    kind, endless = (Third, made == 2) if num_envs == 3 else (CountingEnv, False)
    return gym.vector.SyncVectorEnv([lambda: kind(endless=endless)] * num_envs)


config = asyncrl.Config(
    env=asyncrl.EnvConfig(make),
    model=asyncrl.ModelConfig(hidden=(8,)),
    algorithm=asyncrl.DQNConfig(
        replay=asyncrl.ReplayConfig(capacity=1_000, learning_starts=100, samples_per_insert=0.5)
    ),
    actor=asyncrl.ActorConfig(envs_per_lane=2, unroll_length=8),
    learner=asyncrl.LearnerConfig(num_threads=1, log_seconds=0.2, tensorboard=False, device="cpu"),
    evaluation=asyncrl.EvaluationConfig(period_steps=500, num_episodes=3, num_envs=3),
    total_env_steps=10**9,
)
"""


def test_an_evaluation_that_cannot_end_is_left_for_the_next(start, tmp_path):
    (tmp_path / "odd.py").write_text(LAUNCH_FILE)
    run = start("odd", tmp_path / "odd.py")
    run.wait_until(lambda: run.count("warning", "evaluation given up: 0 of 3 games ended"))
    told = "evaluator: environments made anew: RuntimeError: the cartridge caught fire"
    assert run.count("env", told) == 1 and not run.count("death") and not run.count("evaluated")
    run.signal(signal.SIGTERM)
    assert run.finish(60)[0] == 143
