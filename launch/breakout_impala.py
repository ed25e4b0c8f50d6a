"""Atari Breakout with IMPALA: A2C with V-trace, actors free to run ahead.

    ./run_main.sh breakout_impala launch/breakout_impala.py

Hardware: one GPU and 8 or more cores, 4 GB of memory. Profile home: 2 cores, no GPU.
Score: profile home: 103.6 after 2,000,107 env steps (30 games, epsilon 0.01), in 38
minutes on two cores with bfloat16, in part beside an evaluation. The full length was not run yet.
"""

from dataclasses import replace

from asyncrl import (
    A2CConfig,
    ActorConfig,
    Config,
    EnvConfig,
    EvaluationConfig,
    Linear,
    ModelConfig,
    RolloutConfig,
    main,
)

config = Config(
    env=EnvConfig("ALE/Breakout-v5", protocol="classic"),
    model=ModelConfig(frame_stack=4),
    algorithm=A2CConfig(
        estimator="vtrace",
        entropy_coef=0.01,
        reward_clip=1.0,
        optimizer="adam",
        learning_rate=Linear(5e-4, 0.0, 10_000_000),
        rollout=RolloutConfig(ahead=2),
    ),
    actor=ActorConfig(lanes_per_actor=2, envs_per_lane=16, unroll_length=20),
    evaluation=EvaluationConfig(period_steps=100_000),
    total_env_steps=10_000_000,
)

# For weak machines: a fifth of the env steps, annealed over them. With 160 of them in a rollout,
# not 640, there are 12,500 updates.
home = replace(
    config,
    algorithm=replace(config.algorithm, learning_rate=Linear(5e-4, 0.0, 2_000_000)),
    actor=replace(config.actor, envs_per_lane=4),
    total_env_steps=2_000_000,
)

if __name__ == "__main__":
    main(__file__)
