"""Atari Breakout with PPO, protocol classic: four stacked frames, 4 epochs of 4 minibatches.

    ./run_main.sh breakout_ppo launch/breakout_ppo.py

Hardware: one GPU and 8 or more cores, 4 GB of memory; profile gpu uses 8 to 16 of them.
Profile home: 2 cores, no GPU.
Score: profile home: 96.2 and 108.2 (seeds 1 and 2, 30 games, epsilon 0.01) after 2,000,000 env
steps, half an hour on two cores with bfloat16. The full length was not run yet.
"""

from dataclasses import replace

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
    env=EnvConfig("ALE/Breakout-v5", protocol="classic"),
    model=ModelConfig(frame_stack=4),
    algorithm=PPOConfig(
        learning_rate=Linear(2.5e-4, 0.0, 10_000_000),
        clip_ratio=0.1,
        entropy_coef=0.01,
        reward_clip=1.0,
    ),
    actor=ActorConfig(lanes_per_actor=2, envs_per_lane=4, unroll_length=128),
    evaluation=EvaluationConfig(period_steps=100_000),
    total_env_steps=10_000_000,
)

# For weak machines: a fifth of the env steps, annealed over them. The learner has most of the time
# of two cores, so actors give it their values, and 32 environments are evaluated at once for a
# quarter of the steps each: rollouts and minibatches stay what they are.
home = replace(
    config,
    algorithm=replace(
        config.algorithm, learning_rate=Linear(2.5e-4, 0.0, 2_000_000), values_by="actor"
    ),
    actor=ActorConfig(lanes_per_actor=1, envs_per_lane=32, unroll_length=32),
    total_env_steps=2_000_000,
)

# For a GPU and 8 to 16 cores, all of which act: rollouts as of `home`, by eight actors. Never run
# on a GPU.
gpu = replace(
    config,
    algorithm=replace(config.algorithm, values_by="actor"),
    actor=ActorConfig(num_actors=8, lanes_per_actor=1, envs_per_lane=4, unroll_length=32),
    evaluation=EvaluationConfig(period_steps=1_000_000),
)

if __name__ == "__main__":
    main(__file__)
