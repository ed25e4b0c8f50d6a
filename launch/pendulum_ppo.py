"""Pendulum-v1 with PPO: continuous actions, squashed into their bounds.

    ./run_main.sh pendulum launch/pendulum_ppo.py

Hardware: 2 cores, no GPU; 5 minutes, beside others up to 23.
Score: -195, -178, -173, -174 and -170 for seeds 0 to 4; 100 greedy games with the last checkpoint.
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
    env=EnvConfig("Pendulum-v1"),
    model=ModelConfig(
        hidden=(64, 64), activation="tanh", shared=False, normalize_obs=True, normalize_returns=True
    ),
    algorithm=PPOConfig(
        gamma=0.9,
        epochs=10,
        num_minibatches=32,
        learning_rate=Linear(1e-3, 0.0, 300_000),
    ),
    actor=ActorConfig(lanes_per_actor=2, envs_per_lane=4, unroll_length=256),
    evaluation=EvaluationConfig(period_steps=50_000, num_episodes=20, epsilon=0.0),
    total_env_steps=300_000,
)

if __name__ == "__main__":
    main(__file__)
