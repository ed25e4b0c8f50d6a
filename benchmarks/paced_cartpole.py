"""CartPole-v1 at the pace of a simulator in real time: what faults.py --soak watches.

Every step takes 20 ms whatever the machine does beside it, so a rate that falls is the fault of the
run, not of the neighbours.
"""

import time

import gymnasium as gym

from asyncrl import (
    ActorConfig,
    Config,
    DQNConfig,
    EnvConfig,
    EpsilonGreedy,
    EvaluationConfig,
    Linear,
    ModelConfig,
    ReplayConfig,
    main,
)

STEP_SECONDS = 0.02


class PacedCartPole(gym.vector.SyncVectorEnv):
    """CartPole-v1 whose steps begin 20 ms apart, or later where the actor was late."""

    def __init__(self, num_envs: int):
        super().__init__(
            [lambda: gym.make("CartPole-v1")] * num_envs,
            autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP,
        )
        self._due = time.monotonic()

    def step(self, actions):
        self._due = max(self._due + STEP_SECONDS, time.monotonic())
        time.sleep(max(0.0, self._due - time.monotonic()))
        return super().step(actions)


config = Config(
    env=EnvConfig(PacedCartPole),
    model=ModelConfig(hidden=(64, 64), dueling=True),
    policy=EpsilonGreedy(Linear(1.0, 0.04, 16_000)),
    algorithm=DQNConfig(
        gamma=0.97,
        n_step=3,
        target_period=1,
        polyak=0.01,
        reward_clip=0,
        replay=ReplayConfig(capacity=50_000, samples_per_insert=4, learning_starts=1_000),
    ),
    actor=ActorConfig(lanes_per_actor=1, envs_per_lane=4, unroll_length=8),
    evaluation=EvaluationConfig(period_steps=100_000, num_episodes=20, epsilon=0.0),
    total_env_steps=10_000_000,
)

if __name__ == "__main__":
    main(__file__)
