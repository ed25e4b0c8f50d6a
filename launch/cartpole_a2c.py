"""CartPole-v1 with A2C.

    ./run_main.sh cart_a2c launch/cartpole_a2c.py

Hardware: 2 cores, no GPU; one minute.
Score: 500.0 for each of seeds 0 to 4; 100 greedy games with the last checkpoint.
"""

from asyncrl import (
    A2CConfig,
    ActorConfig,
    Config,
    EnvConfig,
    EvaluationConfig,
    Linear,
    ModelConfig,
    main,
)

config = Config(
    env=EnvConfig("CartPole-v1"),
    model=ModelConfig(hidden=(64, 64), activation="tanh", shared=False),
    algorithm=A2CConfig(
        learning_rate=Linear(1e-3, 0.0, 500_000),
        entropy_coef=0.0,
    ),
    actor=ActorConfig(lanes_per_actor=2, envs_per_lane=4, unroll_length=8),
    evaluation=EvaluationConfig(period_steps=50_000, num_episodes=20, epsilon=0.0),
    total_env_steps=500_000,
)

if __name__ == "__main__":
    main(__file__)
