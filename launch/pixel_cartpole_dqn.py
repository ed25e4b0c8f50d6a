"""CartPole-v1 from pictures of 40 x 80 pixels: DQN with four stacked frames.

    ./run_main.sh pixels launch/pixel_cartpole_dqn.py

Hardware: 2 cores, no GPU; 13 minutes on one of them, beside other work.
Score: 500.0 for seed 1; 100 greedy games with the last checkpoint.
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
    env=EnvConfig("asyncrl/PixelCartPole-v1"),
    model=ModelConfig(frame_stack=4, features=256, dueling=True),
    policy=EpsilonGreedy(Linear(1.0, 0.04, 20_000)),
    algorithm=DQNConfig(
        gamma=0.99,
        n_step=3,
        learning_rate=Linear(5e-4, 0.0, 150_000),
        target_period=1,
        polyak=0.01,
        reward_clip=0,
        reward_scale=0.1,  # values of at most 10 instead of 100
        replay=ReplayConfig(capacity=100_000, samples_per_insert=8, learning_starts=1_000),
    ),
    actor=ActorConfig(lanes_per_actor=2, envs_per_lane=4, unroll_length=8),
    evaluation=EvaluationConfig(period_steps=10_000, num_episodes=20, epsilon=0.0),
    total_env_steps=150_000,
)

if __name__ == "__main__":
    main(__file__)
