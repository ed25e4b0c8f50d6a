"""CartPole-v1 with PPO.

    ./run_main.sh cart launch/cartpole_ppo.py

Hardware: 2 cores, no GPU; 80 seconds where they are fast and idle, 3 to 6 minutes on a busy one.
Score: 500.0 for each of seeds 0 to 4; 100 greedy games with the last checkpoint.
"""

from asyncrl import (
    ActorConfig,
    Config,
    EnvConfig,
    EvaluationConfig,
    Linear,
    ModelConfig,
    PPOConfig,
    main,
)

config = Config(
    env=EnvConfig("CartPole-v1"),
    model=ModelConfig(hidden=(64, 64), activation="tanh", shared=False),
    algorithm=PPOConfig(
        gamma=0.98,
        lambda_=0.8,
        epochs=10,
        num_minibatches=4,
        learning_rate=Linear(1e-3, 0.0, 100_000),
        clip_ratio=0.2,
    ),
    actor=ActorConfig(lanes_per_actor=2, envs_per_lane=4, unroll_length=32),
    evaluation=EvaluationConfig(period_steps=20_000, num_episodes=20, epsilon=0.0),
    total_env_steps=100_000,
)

if __name__ == "__main__":
    main(__file__)
