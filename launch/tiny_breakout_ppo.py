"""Breakout on 10 x 10 fields by the rules of MinAtar: PPO.

    ./run_main.sh tiny_ppo launch/tiny_breakout_ppo.py

Hardware: 2 cores, no GPU; 7 to 15 minutes on one of them.
Score: 21.1, interquartile mean of seeds 0 to 4 (19.4 to 21.9); 100 greedy games each with the last
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
    env=EnvConfig("asyncrl/TinyBreakout-v0"),
    model=ModelConfig(features=128),
    algorithm=PPOConfig(
        entropy_coef=0.01,
        num_minibatches=8,
        learning_rate=Linear(1e-3, 0.0, 2_000_000),
    ),
    actor=ActorConfig(lanes_per_actor=2, envs_per_lane=16, unroll_length=64),
    evaluation=EvaluationConfig(period_steps=100_000, num_episodes=50, num_envs=10, epsilon=0.0),
    total_env_steps=2_000_000,
)

if __name__ == "__main__":
    main(__file__)
