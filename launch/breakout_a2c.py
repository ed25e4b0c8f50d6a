"""Atari Breakout with A2C, protocol classic: four stacked frames, unrolls of five steps.

    ./run_main.sh breakout_a2c launch/breakout_a2c.py

Hardware: one GPU and 8 or more cores, 4 GB of memory. Profile home: 2 cores, no GPU.
Score: profile home: 300.6 after 2,000,019 env steps (30 games, epsilon 0.01), in 16 minutes on two
cores with bfloat16. The full length was not run yet.
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
        lambda_=0.95,
        entropy_coef=0.01,
        reward_clip=1.0,
        learning_rate=Linear(7e-4, 0.0, 10_000_000),
    ),
    actor=ActorConfig(lanes_per_actor=2, envs_per_lane=8, unroll_length=5),
    evaluation=EvaluationConfig(period_steps=100_000),
    total_env_steps=10_000_000,
)

# For weak machines: a fifth of the env steps, annealed over them. On two cores one row of sixteen
# costs less than two of eight, and with a second rollout under way they wait less for each other.
home = replace(
    config,
    algorithm=replace(
        config.algorithm,
        learning_rate=Linear(7e-4, 0.0, 2_000_000),
        rollout=RolloutConfig(ahead=2),
    ),
    actor=replace(config.actor, lanes_per_actor=1, envs_per_lane=16),
    total_env_steps=2_000_000,
)

if __name__ == "__main__":
    main(__file__)
