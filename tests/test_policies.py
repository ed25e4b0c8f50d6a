"""Policies: the log-probability that is sent is that of the actions really drawn."""

from __future__ import annotations

from math import exp, log

import numpy as np
import pytest

from asyncrl.policies import (
    Context,
    EpsilonGreedy,
    EpsilonLadder,
    Greedy,
    Linear,
    Mixture,
    Part,
    Piecewise,
    Random,
    Softmax,
    as_mixture,
    unroll_rng,
    value_at,
)

Q = np.float32([[0.5, 2.0, 1.0], [3.0, 2.5, -1.0]])  # (B, A): best are 1 and 0
STEP = np.zeros(2, np.int64)
ALL, NONE = np.ones(2, bool), np.zeros(2, bool)

EVERY_KIND = Mixture(
    (
        Part("random", Random(), 3),
        Part("constant", EpsilonGreedy(0.3), Piecewise((500, 1000), (1, 2, 0))),
        Part("annealed", EpsilonGreedy(Linear(1.0, 0.1, 1000)), 2),
        Part("ladder", EpsilonLadder(0.4, 7.0), 2),
        Part("cooling", Softmax(Linear(2.0, 0.5, 1000)), Linear(0, 4, 1000)),
    )
)


def probabilities(name: str, env: int, env_steps: int) -> list[float]:
    """By hand, in lane 1 of 3 lanes of 600 environments that see the two rows of Q by turns."""
    if name == "cooling":
        temperature = {0: 2.0, 500: 1.25, 4000: 0.5}[env_steps]
        powers = [exp(float(q) / temperature) for q in Q[env % 2]]
        return [power / sum(powers) for power in powers]
    annealed = {0: 1.0, 500: 0.55, 4000: 0.1}[env_steps]
    ladder = 0.4 ** (1 + 7 * (600 + env) / 1799)
    epsilon = {"random": 1.0, "constant": 0.3, "annealed": annealed, "ladder": ladder}[name]
    return [epsilon / 3 + (1 - epsilon) * (action == (1, 0)[env % 2]) for action in range(3)]


def assert_drawn_by(counts: np.ndarray, mean: np.ndarray) -> None:
    """Pearson's test of at most 4 degrees of freedom; by chance one in 10 ** 6 fails."""
    assert not counts[mean == 0].any()
    counts, mean = counts[mean > 0], mean[mean > 0]
    assert ((counts - mean) ** 2 / mean).sum() < 33, (counts, mean)


@pytest.mark.parametrize("env_steps", [0, 500, 4000])
def test_log_prob_is_that_of_the_actions_drawn(env_steps):
    B, num_draws, names = 600, 300, EVERY_KIND.names
    want = np.array([[probabilities(name, i, env_steps) for i in range(B)] for name in names])
    rng, state, env = unroll_rng(0, 1, env_steps), EVERY_KIND.initial_state(B), np.arange(B)
    opens, step, context = np.ones(B, bool), np.zeros(B, np.int64), Context(env_steps, 1, 3)
    counts = np.zeros(want.shape, int)
    for _ in range(num_draws):
        action, log_prob, state = EVERY_KIND({"q": Q[env % 2]}, state, opens, step, context, rng)
        assert log_prob.dtype == np.float32 and state.choice.dtype == np.uint8
        assert np.allclose(log_prob, np.log(want[state.choice, env, action]), rtol=0, atol=1e-5)
        counts[state.choice, env, action] += 1

    weights = np.array({0: (3, 1, 2, 2, 0), 500: (3, 2, 2, 2, 2), 4000: (3, 0, 2, 2, 4)}[env_steps])
    assert_drawn_by(counts.sum((1, 2)), B * num_draws * weights / weights.sum())
    mean = counts.sum(2, keepdims=True) * want
    for part in range(len(names)):
        for group in range(0, B, 100):  # neighbours on the ladder that see the same row of Q
            for some in (slice(group, group + 100, 2), slice(group + 1, group + 100, 2)):
                assert_drawn_by(counts[part, some].sum(0), mean[part, some].sum(0))


def test_greedy_takes_the_best_of_q_or_else_of_logits():
    outputs = {"q": Q, "logits": -Q}
    for seen, best in ((outputs, [1, 0]), ({"logits": -Q}, [0, 2])):
        action, log_prob, _ = Greedy()(seen, (), ALL, STEP, Context(0), unroll_rng(0, 0, 0))
        assert action.tolist() == best and log_prob.tolist() == [0, 0]


def test_an_epsilon_of_zero_and_a_cold_softmax_are_greedy():
    for policy in (EpsilonGreedy(0.0), Softmax(1e-3)):
        for sequence in range(50):
            rng = unroll_rng(0, 0, sequence)
            action, log_prob, _ = policy({"q": Q}, (), ALL, STEP, Context(0), rng)
            assert action.tolist() == [1, 0] and log_prob.tolist() == [0, 0]


def test_the_ladder_counts_environments_of_all_lanes():
    rungs = [EpsilonLadder().rungs(2, Context(0, lane, 4)) for lane in range(4)]
    want = [0.4 ** (1 + 7 * i / 7) for i in range(8)]
    assert np.concatenate(rungs) == pytest.approx(want)
    assert EpsilonLadder().rungs(1, Context(0)) == pytest.approx([0.4])


def test_a_mixture_draws_each_environment_alone_and_only_where_first():
    mixture = Mixture((Part("greedy", Greedy(), 1), Part("random", Random(), 3)))
    B, rng, state = 1000, unroll_rng(0, 0, 0), mixture.initial_state(1000)

    def act(first: np.ndarray) -> np.ndarray:
        nonlocal state
        outputs, step = {"q": np.repeat(Q[:1], B, 0)}, np.zeros(B, np.int64)
        action, log_prob, state = mixture(outputs, state, first, step, Context(0), rng)
        greedy = state.choice == 0
        assert (action[greedy] == 1).all() and not (action == 1)[~greedy].all()
        assert log_prob == pytest.approx(np.where(greedy, 0, log(1 / 3)))
        return state.choice

    opened = act(np.ones(B, bool))
    assert_drawn_by(np.bincount(opened, minlength=2), np.array([250, 750]))
    assert np.array_equal(act(np.zeros(B, bool)), opened)
    even = np.arange(B) % 2 == 0
    later = act(even)
    assert np.array_equal(later[~even], opened[~even])
    pairs = 2 * opened[even] + later[even]  # drawn anew, whatever it was before
    assert_drawn_by(np.bincount(pairs, minlength=4), 500 / 16 * np.array([1, 3, 3, 9]))


class Counting:
    """A policy with a memory: how often each environment was asked since its episode opened."""

    def initial_state(self, num_envs):
        return np.zeros(num_envs, int)

    def __call__(self, outputs, state, first, step, context, rng):
        state = np.where(first, 0, state) + 1
        return state, np.zeros(len(state)), state


@pytest.mark.parametrize("others", [(), (Part("random", Random(), 0),)])
def test_a_mixture_keeps_the_memory_of_its_parts(others):
    mixture = Mixture((Part("counting", Counting()), *others))
    state, rng, actions = mixture.initial_state(2), unroll_rng(0, 0, 0), []
    for first in (ALL, NONE, np.array([False, True]), NONE):
        action, _, state = mixture({"q": Q}, state, first, STEP, Context(0), rng)
        actions.append(action.tolist())
    assert actions == [[1, 1], [2, 2], [3, 1], [4, 2]]


def test_names():
    assert EVERY_KIND.names == ("random", "constant", "annealed", "ladder", "cooling")
    assert as_mixture(EpsilonGreedy(0.1)).names == ("EpsilonGreedy",)
    assert as_mixture(EVERY_KIND) is EVERY_KIND


def test_schedules():
    assert [Linear(2, 1, 10).at(steps) for steps in (0, 5, 10, 99)] == [2, 1.5, 1, 1]
    piecewise = Piecewise((10, 20), (1.0, 5.0, 3.0))
    assert [value_at(piecewise, steps) for steps in (0, 9, 10, 19, 20, 99)] == [1, 1, 5, 5, 3, 3]
    assert value_at(0.25, 7) == 0.25


def test_refusals():
    greedy, falling = Part("greedy", Greedy()), Linear(1, 0, 50)
    with pytest.raises(ValueError, match="distinct names, got \\['greedy', 'greedy'\\]"):
        Mixture((greedy, greedy))
    with pytest.raises(ValueError, match=r"1 to 255 parts with distinct names, got \[\]"):
        Mixture(())
    with pytest.raises(ValueError, match='"game" or "life", got \'episode\''):
        Mixture((greedy,), scope="episode")
    # Weights that vanish together for a while only, or go below zero at last.
    rising = Piecewise((100,), (0, 1))
    with pytest.raises(ValueError, match=r"sum > 0, got \[0.0, 0.0\] for .* at 50 env steps"):
        Mixture((Part("a", Greedy(), falling), Part("b", Random(), rising)))
    with pytest.raises(ValueError, match="at 30 env steps"):
        Mixture((Part("a", Greedy(), Piecewise((10, 30), (1, 2, 0))),))
    with pytest.raises(ValueError, match=r"weights >= 0 .* got \[1.0, -0.5\]"):
        Mixture((greedy, Part("b", Random(), Linear(1, -0.5, 9))))
    with pytest.raises(ValueError, match="at least 1 env step, got 0"):
        Linear(1, 0, 0)
    for boundaries, values in (((5, 3), (1, 2, 3)), ((3, 5), (1, 2))):
        with pytest.raises(ValueError, match="growing boundaries and one value more"):
            Piecewise(boundaries, values)


def test_the_generator_of_an_unroll_is_its_key_and_nothing_else():
    keys = [
        (seed, lane, sequence) for seed in range(3) for lane in range(3) for sequence in range(3)
    ]
    streams = {key: tuple(unroll_rng(*key).random(4)) for key in keys}
    assert len(set(streams.values())) == len(keys)
    assert all(tuple(unroll_rng(*key).random(4)) == stream for key, stream in streams.items())
