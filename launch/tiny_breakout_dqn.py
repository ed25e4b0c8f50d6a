"""Breakout on 10 x 10 fields by the rules of MinAtar: double, dueling, 3-step DQN.

    ./run_main.sh tiny launch/tiny_breakout_dqn.py

Hardware: 2 cores, no GPU.
Score: no run of the full length was made yet.
"""

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

config = Config(
    env=EnvConfig("asyncrl/TinyBreakout-v0"),
    model=ModelConfig(features=128, dueling=True),
    policy=EpsilonGreedy(Linear(1.0, 0.02, 100_000)),
    algorithm=DQNConfig(
        n_step=3,
        learning_rate=2.5e-4,
        target_period=1_000,
        replay=ReplayConfig(capacity=100_000, samples_per_insert=8, learning_starts=5_000),
    ),
    actor=ActorConfig(lanes_per_actor=2, envs_per_lane=8, unroll_length=16),
    evaluation=EvaluationConfig(period_steps=50_000, num_episodes=50, num_envs=10, epsilon=0.0),
    total_env_steps=2_000_000,
)

if __name__ == "__main__":
    main(__file__)
