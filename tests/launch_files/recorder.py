"""A run whose replay also writes down every unroll it was given; environments that count."""

import os

import gymnasium as gym
import numpy as np

from asyncrl.actor import ActorConfig
from asyncrl.algorithms.dqn import DQN, DQNConfig
from asyncrl.config import Config
from asyncrl.envs import EnvConfig
from asyncrl.evaluate import EvaluationConfig
from asyncrl.learner_config import LearnerConfig
from asyncrl.models import ModelConfig
from asyncrl.policies import Random
from asyncrl.stores.replay import Replay, ReplayConfig
from asyncrl.types import tree_map
from tests.counting_env import CountingEnv


class Moments(CountingEnv):
    """Shows (identity, episode, step); the reward says which step it was and what was done."""

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=None if seed is None else seed % 10_000)

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, 10.0 * self.count + (action - 5), *rest


class RecordingReplay(Replay):
    def insert(self, lane, unroll):
        layout = self.spec.layout
        record = bytearray(layout.nbytes)
        tree_map(lambda copy, part: np.copyto(copy, part), layout.views(record), unroll)
        with open(os.environ["RECORD"], "ab") as file:
            file.write(record)
        return super().insert(lane, unroll)


class RecordingDQN(DQN):
    def store(self, spec, num_lanes, seed):
        store = super().store(spec, num_lanes, seed)
        store.__class__ = RecordingReplay
        return store


class RecordingConfig(DQNConfig):
    def build(self, model, device):
        return RecordingDQN(self, model, device)


def make(num_envs):
    return gym.vector.SyncVectorEnv([Moments] * num_envs)


config = Config(
    env=EnvConfig(make),
    model=ModelConfig(hidden=(8,)),
    policy=Random(),
    algorithm=RecordingConfig(
        batch_size=8,
        replay=ReplayConfig(capacity=5_000, samples_per_insert=0.05, learning_starts=500),
    ),
    actor=ActorConfig(num_actors=2, lanes_per_actor=2, envs_per_lane=3, unroll_length=7),
    learner=LearnerConfig(log_seconds=0.2, checkpoint_seconds=2, tensorboard=False),
    evaluation=EvaluationConfig(period_steps=0),
    total_env_steps=10_000_000,
)
