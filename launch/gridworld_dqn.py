"""Goals and fire under a partial view: DQN with an LSTM on sequences and a mix of policies.

    ./run_main.sh grid launch/gridworld_dqn.py
    asyncrl plot grid --by policy

Hardware: 2 cores, no GPU; 4 minutes on one of them.
Score: 7.35 for seed 1, 100 greedy games of 50 steps with the last checkpoint; random play has 0.5.
"""

from asyncrl import (
    ActorConfig,
    Certainty,
    Config,
    DQNConfig,
    EnvConfig,
    EpsilonGreedy,
    EvaluationConfig,
    Greedy,
    Linear,
    Mixture,
    ModelConfig,
    Part,
    Random,
    RandomSwitch,
    ReplayConfig,
    main,
)

config = Config(
    env=EnvConfig("asyncrl/GridWorld-v0"),
    model=ModelConfig(features=128, lstm=64),
    policy=Mixture(
        (
            Part("greedy", Greedy(), Linear(0.0, 1.0, 20_000)),
            Part("epsilon", EpsilonGreedy(Linear(1.0, 0.05, 40_000)), 2.0),
            Part("certainty", Certainty(margin=0.2, base=0.005)),
            Part("by turns", RandomSwitch(Greedy(), Random(), 0.1)),
        )
    ),
    algorithm=DQNConfig(
        gamma=0.95,
        n_step=3,
        learning_rate=Linear(5e-4, 0.0, 200_000),
        sequence_length=16,
        num_states=2,
        target_period=250,
        replay=ReplayConfig(capacity=50_000, samples_per_insert=32, learning_starts=2_000),
    ),
    actor=ActorConfig(lanes_per_actor=2, envs_per_lane=4, unroll_length=16),
    evaluation=EvaluationConfig(period_steps=20_000, num_episodes=100, num_envs=10, epsilon=0.02),
    total_env_steps=200_000,
)

if __name__ == "__main__":
    main(__file__)
