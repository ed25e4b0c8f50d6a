"""A small run in turns: CartPole with PPO, frame stack + LSTM and both normalisers."""

from asyncrl import (
    ActorConfig,
    Config,
    EnvConfig,
    EvaluationConfig,
    LearnerConfig,
    Linear,
    Mixture,
    ModelConfig,
    Part,
    PPOConfig,
    Sample,
    Softmax,
)

config = Config(
    env=EnvConfig("CartPole-v1"),
    model=ModelConfig(
        frame_stack=2, hidden=(32,), lstm=16, normalize_obs=True, normalize_returns=True
    ),
    policy=Mixture((Part("own", Sample(), 2.0), Part("hot", Softmax(2.0)))),
    algorithm=PPOConfig(learning_rate=Linear(1e-3, 0.0, 4_000), epochs=2, num_minibatches=2),
    actor=ActorConfig(num_actors=2, lanes_per_actor=2, envs_per_lane=2, unroll_length=8),
    learner=LearnerConfig(device="cpu", checkpoint_steps=1_000, log_seconds=0.2, tensorboard=False),
    evaluation=EvaluationConfig(period_steps=0),
    total_env_steps=4_000,
    schedule="lockstep",
)
