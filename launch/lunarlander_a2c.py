"""LunarLander-v3 with A2C.

    ./run_main.sh lander_a2c launch/lunarlander_a2c.py

Hardware: 2 cores, no GPU; 5 to 11 minutes beside other runs.
Score: 117.8 (interquartile mean of seeds 0 to 4; 95 % interval -16.7 to 147.4) over 100 greedy
games with the last checkpoint; with the policy's own draws 89 to 196. With normalised returns it
falls back to -80 to -140 after a peak near 350,000 env steps.
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
    env=EnvConfig("LunarLander-v3"),
    model=ModelConfig(hidden=(64, 64), activation="tanh", shared=False),
    algorithm=A2CConfig(
        gamma=0.995,
        lambda_=0.95,
        entropy_coef=1e-3,
        normalize_advantage=True,
        optimizer="adam",
        learning_rate=Linear(1e-3, 0.0, 1_000_000),
    ),
    actor=ActorConfig(lanes_per_actor=2, envs_per_lane=8, unroll_length=16),
    evaluation=EvaluationConfig(period_steps=100_000, num_episodes=20, epsilon=0.0),
    total_env_steps=1_000_000,
)

if __name__ == "__main__":
    main(__file__)
