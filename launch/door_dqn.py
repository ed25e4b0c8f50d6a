"""Remember which door flashed: DQN with an LSTM on sequences; without one it opens any.

    ./run_main.sh doors launch/door_dqn.py
    ./run_main.sh doors_plain launch/door_dqn.py --profile feed_forward

Hardware: 2 cores, no GPU; 2 minutes with one of them to itself.
Score: 1.00 of 1 for each of the seeds 0 to 4, 100 greedy games each with the last checkpoint.
feed_forward: 0.25, interquartile mean of the same seeds (0.23 to 0.28): what blind play has.
"""

from dataclasses import replace

from asyncrl import (
    ActorConfig,
    Config,
    DQNConfig,
    EnvConfig,
    EpsilonGreedy,
    EvaluationConfig,
    Linear,
    ModelConfig,
    ReplayConfig,
    main,
)

config = Config(
    env=EnvConfig("asyncrl/DoorMemory-v0"),
    model=ModelConfig(hidden=(64,), lstm=64),
    policy=EpsilonGreedy(Linear(1.0, 0.05, 50_000)),
    algorithm=DQNConfig(
        gamma=0.97,
        learning_rate=1e-3,
        sequence_length=16,  # an episode takes 8 to 12 steps
        num_states=2,
        target_period=100,
        replay=ReplayConfig(capacity=20_000, samples_per_insert=32, learning_starts=1_000),
    ),
    actor=ActorConfig(lanes_per_actor=1, envs_per_lane=8, unroll_length=16),
    evaluation=EvaluationConfig(period_steps=5_000, num_episodes=100, num_envs=10, epsilon=0.0),
    total_env_steps=150_000,
)

# The same without memory; a stack of four frames is shorter than the delay and helps no more.
feed_forward = replace(
    config,
    model=ModelConfig(hidden=(64, 64)),
    algorithm=replace(config.algorithm, sequence_length=0, num_states=1),
)

if __name__ == "__main__":
    main(__file__)
