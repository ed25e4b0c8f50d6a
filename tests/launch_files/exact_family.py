"""A small run in turns: all of the value-based family at once, on sequences with a memory."""

from asyncrl import (
    ActorConfig,
    Config,
    DQNConfig,
    EnvConfig,
    EpsilonGreedy,
    EvaluationConfig,
    LearnerConfig,
    Linear,
    ModelConfig,
    ReplayConfig,
)

config = Config(
    env=EnvConfig("CartPole-v1"),
    model=ModelConfig(frame_stack=2, hidden=(32,), lstm=16, dueling=True, noisy=True),
    policy=EpsilonGreedy(Linear(1.0, 0.0, 2_000)),
    algorithm=DQNConfig(
        distribution="iqn",
        munchausen=0.9,
        value_rescaling=True,
        n_step=2,
        sequence_length=6,
        burn_in=2,
        num_states=4,
        batch_size=8,
        target_period=20,
        replay=ReplayConfig(
            capacity=1_500,
            samples_per_insert=1,
            learning_starts=200,
            priority_exponent=0.9,
            importance_exponent=Linear(0.4, 1.0, 4_000),
        ),
    ),
    actor=ActorConfig(num_actors=2, lanes_per_actor=2, envs_per_lane=2, unroll_length=8),
    learner=LearnerConfig(device="cpu", checkpoint_steps=1_000, log_seconds=0.2, tensorboard=False),
    evaluation=EvaluationConfig(period_steps=0),
    total_env_steps=4_000,
    schedule="lockstep",
)
