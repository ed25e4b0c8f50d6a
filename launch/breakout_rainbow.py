"""Atari Breakout with Rainbow, protocol classic: C51, double, dueling, 3-step, prioritised, noisy.

    ./run_main.sh rainbow_01 launch/breakout_rainbow.py

Numbers of Hessel et al. 2018. Noisy nets explore, after random play until learning starts; there
they do so from the first step.

Hardware: one GPU and 8 or more cores, 12 GB of memory, 11 of disk.
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
    Piecewise,
    ReplayConfig,
    main,
)

config = Config(
    env=EnvConfig("ALE/Breakout-v5", protocol="classic"),
    model=ModelConfig(frame_stack=4, dueling=True, noisy=True),
    policy=EpsilonGreedy(Piecewise((20_000,), (1.0, 0.0))),
    algorithm=DQNConfig(
        distribution="c51",
        learning_rate=6.25e-5,
        n_step=3,
        target_period=2_000,
        replay=ReplayConfig(
            capacity=1_000_000,
            samples_per_insert=8,
            learning_starts=20_000,
            priority_exponent=0.5,
            importance_exponent=Linear(0.4, 1.0, 10_000_000),
        ),
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
        learning_rate=1e-4,
        target_period=500,
        replay=replace(
            config.algorithm.replay,
            capacity=200_000,
            samples_per_insert=4,
            importance_exponent=Linear(0.4, 1.0, 1_000_000),
        ),
    ),
    total_env_steps=1_000_000,
)

if __name__ == "__main__":
    main(__file__)
