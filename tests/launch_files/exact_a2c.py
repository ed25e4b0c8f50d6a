"""A small run in turns: A2C with V-trace; observations are a Dict, actions have two parts."""

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv

from asyncrl import (
    A2CConfig,
    ActorConfig,
    Config,
    EnvConfig,
    EvaluationConfig,
    LearnerConfig,
    Mixture,
    ModelConfig,
    Part,
    Sample,
    Softmax,
)


class Points(gym.Env):
    """Name the sum and the difference of two numbers: one is a vector's length, one a category."""

    observation_space = spaces.Dict({
        "vector": spaces.Box(-1, 1, (2,)),
        "more": spaces.Tuple((spaces.Discrete(3, start=1), spaces.MultiBinary(2))),
    })  # fmt: skip
    action_space = spaces.MultiDiscrete([4, 3])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 6
        return self._look(), {}

    def _look(self) -> dict:
        self.number = int(self.np_random.integers(1, 4))
        bits = self.np_random.integers(0, 2, 2).astype(np.int8)
        vector = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return {"vector": vector, "more": (self.number, bits)}

    def step(self, action):
        reward = float(action[0] == self.number) + float(action[1] == self.number - 1)
        self.left -= 1
        return self._look(), reward, self.left == 0 and self.number == 1, self.left == 0, {}


config = Config(
    env=EnvConfig(lambda num_envs: SyncVectorEnv([Points] * num_envs)),
    model=ModelConfig(hidden=(32,)),
    policy=Mixture((Part("own", Sample(), 2.0), Part("warm", Softmax(2.0)))),
    algorithm=A2CConfig(estimator="vtrace", learning_rate=3e-3),
    actor=ActorConfig(num_actors=2, lanes_per_actor=2, envs_per_lane=2, unroll_length=8),
    learner=LearnerConfig(device="cpu", checkpoint_steps=1_000, log_seconds=0.2, tensorboard=False),
    evaluation=EvaluationConfig(period_steps=0),
    total_env_steps=4_000,
    schedule="lockstep",
)
