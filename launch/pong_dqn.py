"""Atari Pong with DQN, protocol classic: double, 3-step, four stacked frames.

    ./run_main.sh pong_01 launch/pong_dqn.py

Hardware: one GPU and 8 or more cores, 6 GB of memory, 5 of disk.
Profile home: 2 cores, 4 GB, no GPU.
Score: no run of the full length was made yet.
"""

from dataclasses import replace

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
    env=EnvConfig("ALE/Pong-v5", protocol="classic"),
    model=ModelConfig(frame_stack=4),
    policy=EpsilonGreedy(Linear(1.0, 0.01, 100_000)),
    algorithm=DQNConfig(
        learning_rate=1e-4,
        n_step=3,
        target_period=2_000,
        replay=ReplayConfig(capacity=500_000, samples_per_insert=8, learning_starts=20_000),
    ),
    actor=ActorConfig(lanes_per_actor=2, envs_per_lane=8, unroll_length=16),
    evaluation=EvaluationConfig(period_steps=100_000),
    total_env_steps=10_000_000,
)

# For weak machines: a fifth of the memory, half the arithmetic an env step.
home = replace(
    config,
    algorithm=replace(
        config.algorithm,
        double=False,
        learning_rate=2e-4,
        target_period=500,
        replay=ReplayConfig(capacity=100_000, samples_per_insert=4, learning_starts=20_000),
    ),
    total_env_steps=1_000_000,
)

if __name__ == "__main__":
    main(__file__)
