"""LunarLander-v3 with PPO.

    ./run_main.sh lander launch/lunarlander_ppo.py

Hardware: 2 cores, no GPU; 7 to 9 minutes, two runs at a time.
Score: 257.8 (interquartile mean over seeds 0 to 4, worst 234.5); 100 greedy games with the last
checkpoint.
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
    env=EnvConfig("LunarLander-v3"),
    model=ModelConfig(hidden=(64, 64), activation="tanh", shared=False, normalize_returns=True),
    algorithm=PPOConfig(
        gamma=0.999,
        lambda_=0.98,
        entropy_coef=0.01,
        learning_rate=Linear(1e-3, 0.0, 1_000_000),
        num_minibatches=32,
    ),
    actor=ActorConfig(lanes_per_actor=2, envs_per_lane=8, unroll_length=512, slots_per_lane=2),
    evaluation=EvaluationConfig(period_steps=100_000, num_episodes=20, epsilon=0.0),
    total_env_steps=1_000_000,
)

if __name__ == "__main__":
    main(__file__)
