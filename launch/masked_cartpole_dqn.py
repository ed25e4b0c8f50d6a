"""CartPole-v1 without its velocities: DQN with an LSTM on sequences has to remember them.

    ./run_main.sh masked_dqn launch/masked_cartpole_dqn.py
    ./run_main.sh masked_dqn_plain launch/masked_cartpole_dqn.py --profile feed_forward

Hardware: 2 cores, no GPU; 12 to 25 minutes on one of them, beside other work.
Score: 490.6, interquartile mean of seeds 0 to 4 (385 to 500); 100 greedy games each with the last
checkpoint. In training, where one action in 25 is random, the last hundred came to 357 to 476.
feed_forward: 35.2 (35 to 41) in 3 to 4 minutes.
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
    env=EnvConfig("asyncrl/MaskedCartPole-v1"),
    model=ModelConfig(hidden=(128,), lstm=128, dueling=True),
    policy=EpsilonGreedy(Linear(1.0, 0.04, 30_000)),
    algorithm=DQNConfig(
        gamma=0.99,
        n_step=3,
        learning_rate=Linear(1e-3, 0.0, 200_000),
        batch_size=32,
        target_period=1,
        polyak=0.01,
        reward_clip=0,
        reward_scale=0.1,  # values of at most 10 instead of 100
        sequence_length=16,
        burn_in=4,
        num_states=2,
        replay=ReplayConfig(capacity=100_000, samples_per_insert=64, learning_starts=1_000),
    ),
    actor=ActorConfig(lanes_per_actor=1, envs_per_lane=4, unroll_length=16),
    evaluation=EvaluationConfig(period_steps=10_000, num_episodes=20, epsilon=0.0),
    total_env_steps=200_000,
)

# The same without memory: positions and angles alone.
feed_forward = replace(
    config,
    model=ModelConfig(hidden=(256, 256), dueling=True),
    algorithm=replace(
        config.algorithm,
        sequence_length=0,
        burn_in=0,
        num_states=1,
        replay=replace(config.algorithm.replay, samples_per_insert=8),
    ),
)

if __name__ == "__main__":
    main(__file__)
