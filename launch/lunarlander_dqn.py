"""LunarLander-v3 with DQN: double, dueling, prioritised replay.

    ./run_main.sh lander_dqn launch/lunarlander_dqn.py

Hardware: 2 cores, no GPU; 17 minutes on one of them, beside other work.
Score: 264.0, interquartile mean of seeds 0 to 4 (252 to 272); 100 greedy games each with the last
checkpoint. A quarter of the transitions an env step, in batches of half the size, came to 234.5.
Single steps instead of three learn much later.
"""

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
    env=EnvConfig("LunarLander-v3"),
    model=ModelConfig(hidden=(256, 256), dueling=True),
    policy=EpsilonGreedy(Linear(1.0, 0.05, 50_000)),
    algorithm=DQNConfig(
        n_step=3,
        learning_rate=Linear(5e-4, 0.0, 300_000),
        batch_size=128,
        target_period=1,
        polyak=0.005,
        reward_clip=0,
        reward_scale=0.1,  # values of about 25 instead of 250
        replay=ReplayConfig(
            capacity=100_000,
            samples_per_insert=64,
            learning_starts=5_000,
            priority_exponent=0.6,
            importance_exponent=Linear(0.4, 1.0, 200_000),
        ),
    ),
    actor=ActorConfig(lanes_per_actor=1, envs_per_lane=8, unroll_length=8),
    evaluation=EvaluationConfig(period_steps=50_000, num_episodes=20, epsilon=0.0),
    total_env_steps=300_000,
)

if __name__ == "__main__":
    main(__file__)
