"""CartPole-v1 with DQN.

    ./run_main.sh cart_dqn launch/cartpole_dqn.py

Hardware: 2 cores, no GPU; 2 to 3 minutes on one of them.
Score: 500.0 for each of the seeds 0 to 4; 100 greedy games with the last checkpoint.
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
    env=EnvConfig("CartPole-v1"),
    model=ModelConfig(hidden=(256, 256), dueling=True),
    policy=EpsilonGreedy(Linear(1.0, 0.04, 16_000)),
    algorithm=DQNConfig(
        gamma=0.99,
        n_step=3,
        learning_rate=Linear(1e-3, 0.0, 100_000),
        batch_size=64,
        target_period=1,
        polyak=0.01,
        reward_scale=0.1,  # values of at most 10 are learned sooner and kept better than of 100
        reward_clip=0,
        replay=ReplayConfig(capacity=100_000, samples_per_insert=16, learning_starts=1_000),
    ),
    actor=ActorConfig(lanes_per_actor=1, envs_per_lane=4, unroll_length=8),
    evaluation=EvaluationConfig(period_steps=5_000, num_episodes=20, epsilon=0.0),
    total_env_steps=100_000,
)

if __name__ == "__main__":
    main(__file__)
