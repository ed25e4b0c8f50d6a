"""Atari Breakout with R2D2, protocol classic: an LSTM learned from prioritised sequences.

    ./run_main.sh r2d2_01 launch/breakout_r2d2.py

Stored states, burn-in, rescaled values of unclipped rewards, double, dueling, 5-step, a ladder of
epsilons (Kapturowski et al. 2019). For more updates on one machine, sequences are half as long as
there, 20 steps of burn-in and 40 learned from, batches are of 32 (there 64), and the target net is
copied every 500 updates (2,500). Also, errors are Huber's (squared), lost lives end returns (games
alone), the replay holds a million env steps (4), and the LSTM is not told the last action and
reward. The target net refreshes the states. New sequences have the largest priority so far, not
one that actors work out. R2D2 sums its loss over a sequence's steps. Here it is the mean of 40, so
its usual epsilon of Adam, 1e-3, and clipped norm, 40, are divided by 40.

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
    EpsilonLadder,
    EvaluationConfig,
    ModelConfig,
    ReplayConfig,
    main,
)

config = Config(
    env=EnvConfig("ALE/Breakout-v5", protocol="classic"),
    model=ModelConfig(frame_stack=4, lstm=512, dueling=True),
    policy=EpsilonLadder(base=0.4, alpha=7.0),
    algorithm=DQNConfig(
        gamma=0.997,
        n_step=5,
        sequence_length=40,
        burn_in=20,
        batch_size=32,
        value_rescaling=True,
        reward_clip=0.0,
        learning_rate=1e-4,
        adam_eps=2.5e-5,
        max_grad_norm=1.0,
        target_period=500,
        replay=ReplayConfig(
            capacity=1_000_000,
            samples_per_insert=8,
            learning_starts=20_000,
            priority_exponent=0.9,
            importance_exponent=0.6,
        ),
    ),
    actor=ActorConfig(lanes_per_actor=2, envs_per_lane=8, unroll_length=20),
    evaluation=EvaluationConfig(period_steps=100_000),
    total_env_steps=10_000_000,
)

# For weak machines: a fifth of the memory, a small LSTM, small batches: 24,500 updates in all.
home = replace(
    config,
    model=replace(config.model, features=256, lstm=256),
    algorithm=replace(
        config.algorithm,
        batch_size=8,
        target_period=100,
        replay=replace(config.algorithm.replay, capacity=200_000),
    ),
    total_env_steps=1_000_000,
)

if __name__ == "__main__":
    main(__file__)
