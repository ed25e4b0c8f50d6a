"""A small run in turns: CartPole with DQN, checkpoints every 1,000 env steps."""

from asyncrl import (
    ActorConfig,
    Certainty,
    Config,
    DQNConfig,
    EnvConfig,
    EpsilonGreedy,
    EvaluationConfig,
    Greedy,
    LearnerConfig,
    Linear,
    Mixture,
    ModelConfig,
    Part,
    Random,
    RandomSwitch,
    ReplayConfig,
    Softmax,
    Switch,
)

config = Config(
    env=EnvConfig("CartPole-v1"),
    model=ModelConfig(frame_stack=2, hidden=(32,)),
    policy=Mixture(
        (
            Part("eager", EpsilonGreedy(Linear(1.0, 0.1, 3_000)), 2.0),
            Part("soft", Softmax(0.5), Linear(0.0, 1.0, 2_000)),
            Part("frontier", Switch(Certainty(), RandomSwitch(Greedy(), Random()), "soft"), 2.0),
        )
    ),
    algorithm=DQNConfig(
        n_step=2,
        target_period=50,
        replay=ReplayConfig(capacity=1_500, samples_per_insert=4, learning_starts=200),
    ),
    actor=ActorConfig(num_actors=2, lanes_per_actor=2, envs_per_lane=2, unroll_length=8),
    learner=LearnerConfig(device="cpu", checkpoint_steps=1_000, log_seconds=0.2, tensorboard=False),
    evaluation=EvaluationConfig(period_steps=0),
    total_env_steps=4_000,
    schedule="lockstep",
)
