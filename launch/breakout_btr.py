"""Atari Breakout after Beyond the Rainbow, protocol classic: the strongest recipe for one GPU.

    ./run_main.sh btr_01 launch/breakout_btr.py

A wide residual torso with spectral norm and max-pooling, IQN, Munchausen, dueling, 3-step,
prioritised, noisy; a batch of 256 every 64 env steps. Numbers of Clark et al. 2024, who took half
a day for as many env steps on one desktop GPU. They play with sticky actions and let no lost life
end a return. They switch epsilon off after half of the run; here its floor of 0.01 stays. They
draw the noise of an actor at each step; here it is drawn for each unroll. Their priorities are
means of absolute errors; here they are the loss. Their Munchausen takes its policy from the online
net; here, as in its paper, from the target net.

Hardware: one GPU and 8 or more cores, 12 GB of memory, 13 of disk.
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
    Exponential,
    ModelConfig,
    ReplayConfig,
    main,
)

config = Config(
    env=EnvConfig("ALE/Breakout-v5", protocol="classic"),
    model=ModelConfig(
        frame_stack=4,
        torso="impala",
        torso_width=2,
        torso_pool=6,
        spectral_norm=True,
        dueling=True,
        noisy=True,
    ),
    policy=EpsilonGreedy(Exponential(1.0, 0.01, 0.999, 2_000)),
    algorithm=DQNConfig(
        distribution="iqn",
        num_tau=8,
        num_acting_tau=8,
        munchausen=0.9,
        gamma=0.997,
        n_step=3,
        batch_size=256,
        learning_rate=1e-4,
        adam_eps=2e-5,
        target_period=500,
        replay=ReplayConfig(
            capacity=1_000_000,
            samples_per_insert=4,
            learning_starts=200_000,
            priority_exponent=0.2,
            importance_exponent=0.45,
        ),
    ),
    actor=ActorConfig(num_actors=4, lanes_per_actor=2, envs_per_lane=8, unroll_length=8),
    evaluation=EvaluationConfig(period_steps=250_000),
    total_env_steps=50_000_000,
)

# For weak machines: half the channels, an eighth of the batch, half the draws an env step; epsilon
# falls twenty times as fast.
home = replace(
    config,
    model=replace(config.model, torso_width=1, features=256),
    policy=EpsilonGreedy(Exponential(1.0, 0.01, 0.999, 100)),
    algorithm=replace(
        config.algorithm,
        batch_size=32,
        replay=replace(
            config.algorithm.replay,
            capacity=200_000,
            samples_per_insert=2,
            learning_starts=20_000,
        ),
    ),
    actor=ActorConfig(lanes_per_actor=2, envs_per_lane=8, unroll_length=16),
    evaluation=EvaluationConfig(period_steps=100_000),
    total_env_steps=1_000_000,
)

if __name__ == "__main__":
    main(__file__)
