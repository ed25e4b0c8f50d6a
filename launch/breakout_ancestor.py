"""Atari Breakout as asyncrl's main ancestor learned it (Quickblink's RLframework, 2021).

    ./run_main.sh ancestor launch/breakout_ancestor.py                    LSTM + stack, its best
    ./run_main.sh ancestor_lstm launch/breakout_ancestor.py --profile lstm        or stack, or plain

Its environment, its mix (greedy, greedy that explores near the end of its recent lives, epsilon
0.1) and its hyper-parameters: 7.5 million updates of 64 sequences, 7.5 env steps each. `plain` is
feed-forward without a stack. What differs: a layer of 512 lies between convolutions and LSTM.

An episode is a life, five are a game. The ancestor's measure is 5 x mean return of a life of the
greedy policy: `asyncrl eval RUN --epsilon 0` tells it beside the score of whole games, and so do
evaluations beside training (`eval/life_score`, `eval/return`). Its figure, over the lives that the
greedy policy plays in training, is that of one seed: LSTM + stack 742, LSTM 634, stack 568, plain
14. The same figure of the four small ones:

    ./run_main.sh home launch/breakout_ancestor.py --profile home
    ./run_main.sh home_lstm launch/breakout_ancestor.py --profile home_lstm
    ./run_main.sh home_stack launch/breakout_ancestor.py --profile home_stack
    ./run_main.sh home_plain launch/breakout_ancestor.py --profile home_plain
    asyncrl plot home home_lstm home_stack home_plain --policy greedy --lives 5

Hardware: one GPU and 8 or more cores, 12 GB of memory, 13 of disk.
Profiles home*: 2 cores, 4 GB, no GPU.
Score: of 30 greedy games after 300,000 env steps (22 to 42 minutes), mean of seeds 0 to 2: home
42.6, home_lstm 44.9, home_stack 21.7, home_plain 9.5 (docs/results). No run of the full length was
made yet.
"""

from dataclasses import replace

from asyncrl import (
    ActorConfig,
    Config,
    DQNConfig,
    EnvConfig,
    EpsilonGreedy,
    EvaluationConfig,
    Exponential,
    Greedy,
    Mixture,
    ModelConfig,
    Part,
    Piecewise,
    Random,
    ReplayConfig,
    Switch,
    main,
)

ENV_STEPS_AN_UPDATE = 7.5  # the ancestor let it vary from 5 to 10
UNROLL_LENGTH = 16


def mix(random_steps: int) -> Mixture:
    """At random for so many env steps, then the three others alike, drawn for each life."""
    later = Piecewise((random_steps,), (0.0, 1.0))
    frontier = Switch(Greedy(), EpsilonGreedy(0.1), "greedy", margin=10, initial_length=42)
    return Mixture(
        (
            Part("greedy", Greedy(), later),
            Part("frontier", frontier, later),
            Part("epsilon", EpsilonGreedy(0.1), later),
            Part("random", Random(), Piecewise((random_steps,), (1.0, 0.0))),
        )
    )


def variant(of: Config, frame_stack: int, lstm: int, length: int, loss_on: str = "last") -> Config:
    """One network of the four. An LSTM learns from the last of `length` steps, or from all in as
    many fewer sequences, and a state is stored for each step; without one, single transitions
    are the same."""
    batch, steps = of.algorithm.batch_size, length if lstm else 1
    if lstm and loss_on == "all":
        batch //= length
    algorithm = replace(
        of.algorithm,
        batch_size=batch,
        sequence_length=length if lstm else 0,
        loss_on=loss_on if lstm else "all",
        num_states=UNROLL_LENGTH if lstm else 1,
        replay=replace(of.algorithm.replay, samples_per_insert=batch * steps / ENV_STEPS_AN_UPDATE),
    )
    return replace(of, model=ModelConfig(frame_stack=frame_stack, lstm=lstm), algorithm=algorithm)


plain = Config(
    env=EnvConfig("asyncrl/AncestorBreakout-v0"),
    model=ModelConfig(),
    policy=mix(random_steps=100_000),
    algorithm=DQNConfig(
        double=False,
        huber=False,
        batch_size=64,
        learning_rate=Exponential(1e-4, 1e-5, 0.998, period=37_500),  # 5,000 updates
        adam_eps=1e-8,
        max_grad_norm=0,
        target_period=5_000,
        replay=ReplayConfig(
            capacity=500_000, samples_per_insert=64 / ENV_STEPS_AN_UPDATE, learning_starts=50_000
        ),
    ),
    actor=ActorConfig(lanes_per_actor=2, envs_per_lane=8, unroll_length=UNROLL_LENGTH),
    evaluation=EvaluationConfig(period_steps=500_000, num_episodes=10, num_envs=5, epsilon=0.0),
    total_env_steps=56_250_000,
)
stack = variant(plain, frame_stack=4, lstm=0, length=8)
lstm = variant(plain, frame_stack=1, lstm=512, length=8)
config = variant(plain, frame_stack=4, lstm=512, length=8)

# For weak machines, as the ancestor's own profile of this name. All four learn from 32 steps an
# update, which costs twice as much with an LSTM; by returns of three steps, or 40,000 updates would
# not be enough to tell them apart.
home_plain = replace(
    plain,
    policy=mix(random_steps=30_000),
    algorithm=replace(
        plain.algorithm,
        n_step=3,
        batch_size=32,
        learning_rate=Exponential(2e-4, 2e-5, 0.998, period=3_750),  # 500 updates
        target_period=500,
        replay=ReplayConfig(
            capacity=100_000, samples_per_insert=32 / ENV_STEPS_AN_UPDATE, learning_starts=5_000
        ),
    ),
    actor=ActorConfig(lanes_per_actor=2, envs_per_lane=4, unroll_length=UNROLL_LENGTH),
    evaluation=EvaluationConfig(period_steps=100_000, num_episodes=10, num_envs=5, epsilon=0.0),
    total_env_steps=300_000,
)
home_stack = variant(home_plain, frame_stack=3, lstm=0, length=8)
home_lstm = variant(home_plain, frame_stack=1, lstm=256, length=8, loss_on="all")
home = variant(home_plain, frame_stack=3, lstm=256, length=8, loss_on="all")

if __name__ == "__main__":
    main(__file__)
