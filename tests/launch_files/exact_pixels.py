"""A small run in turns: DQN from pixels, with layers as wide as usual."""

from asyncrl import (
    ActorConfig,
    Config,
    DQNConfig,
    EnvConfig,
    EpsilonGreedy,
    EvaluationConfig,
    LearnerConfig,
    ModelConfig,
    ReplayConfig,
)

config = Config(
    env=EnvConfig("asyncrl/TinyBreakout-v0"),
    model=ModelConfig(frame_stack=2, features=256),
    policy=EpsilonGreedy(0.3),
    algorithm=DQNConfig(
        distribution="iqn",
        batch_size=8,
        target_period=20,
        replay=ReplayConfig(capacity=1_500, samples_per_insert=1, learning_starts=200),
    ),
    actor=ActorConfig(num_actors=2, lanes_per_actor=2, envs_per_lane=2, unroll_length=8),
    learner=LearnerConfig(device="cpu", checkpoint_steps=1_000, log_seconds=0.2, tensorboard=False),
    evaluation=EvaluationConfig(period_steps=0),
    total_env_steps=4_000,
    schedule="lockstep",
)
