"""Acrobot-v1 with PPO.

    ./run_main.sh acrobot launch/acrobot_ppo.py

Hardware: 2 cores, no GPU; 3 minutes.
Score: -83.6 (interquartile mean of seeds 0 to 4, 95 % interval -87.3 to -80.9, worst -87.7); 100
greedy games with the last checkpoint. Curves: docs/results/acrobot_ppo.
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
    env=EnvConfig("Acrobot-v1"),
    model=ModelConfig(hidden=(64, 64), activation="tanh", shared=False, normalize_obs=True),
    algorithm=PPOConfig(
        lambda_=0.94,
        learning_rate=Linear(1e-3, 0.0, 300_000),
        num_minibatches=16,
    ),
    actor=ActorConfig(lanes_per_actor=2, envs_per_lane=8, unroll_length=128),
    evaluation=EvaluationConfig(period_steps=50_000, num_episodes=20, epsilon=0.0),
    total_env_steps=300_000,
)

if __name__ == "__main__":
    main(__file__)
