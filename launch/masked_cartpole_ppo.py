"""CartPole-v1 without its velocities: PPO with an LSTM has to remember them.

    ./run_main.sh masked launch/masked_cartpole_ppo.py

Hardware: 2 cores, no GPU; 4 to 9 minutes, two runs at a time.
Score: 500, 500, 500, 479 and 500 for seeds 0 to 4; 100 greedy games with the last checkpoint.
Without the LSTM (--model.lstm 0): 43, 42, 44, 44 and 44.
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
    env=EnvConfig("asyncrl/MaskedCartPole-v1"),
    model=ModelConfig(
        hidden=(64,), activation="tanh", lstm=64, normalize_obs=True, normalize_returns=True
    ),
    algorithm=PPOConfig(
        gamma=0.98,
        lambda_=0.95,
        epochs=10,
        num_minibatches=4,
        learning_rate=Linear(1e-3, 0.0, 150_000),
    ),
    actor=ActorConfig(lanes_per_actor=2, envs_per_lane=4, unroll_length=32),
    evaluation=EvaluationConfig(period_steps=25_000, num_episodes=20, epsilon=0.0),
    total_env_steps=150_000,
)

if __name__ == "__main__":
    main(__file__)
