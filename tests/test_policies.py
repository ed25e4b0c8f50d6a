"""Policies: the log-probability that is sent is that of the actions really drawn."""

from __future__ import annotations

import re
import subprocess
import sys
from math import atanh, exp, inf, log, nan, prod, tanh
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from gymnasium import spaces

from asyncrl.algorithms import distributions
from asyncrl.env_group import Actions
from asyncrl.policies import (
    Context,
    EpsilonGreedy,
    EpsilonLadder,
    Greedy,
    Mixture,
    Part,
    Random,
    Sample,
    Softmax,
    as_mixture,
    unroll_rng,
)
from asyncrl.policy_contract import check_policy
from asyncrl.schedules import Linear, Piecewise, value_at
from asyncrl.switch_policies import RandomSwitch, Switch

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
    """Pearson's test of at most 5 degrees of freedom; by chance one in 10 ** 5 fails."""
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


# -- vectors of discrete actions: (B, D) --------------------------------------------------------

# Two environments by turns; the second of the two actions has two categories only.
LOGITS = np.float32([[[1, 0, 2], [0.5, 0, -inf]], [[0, -1, 0.5], [-2, 1, -inf]]])  # (2, D, A)
BEST = ((2, 0), (2, 1))


def softmax(logits, temperature: float) -> list[float]:
    powers = [exp(float(logit) / temperature) for logit in logits]
    return [power / sum(powers) for power in powers]


def of_vectors(name: str, env: int) -> np.ndarray:
    """(3, 3) probabilities of both actions at once, by hand, in lane 1 of 2 lanes of 600."""
    if name in ("sample", "soft"):
        temperature = {"sample": 1.0, "soft": 0.5}[name]
        first, second = (softmax(logits, temperature) for logits in LOGITS[env % 2])
        return np.outer(first, second)
    ladder = 0.4 ** (1 + 7 * (600 + env) / 1199)
    epsilon = {"random": 1.0, "constant": 0.3, "ladder": ladder, "greedy": 0.0}[name]
    joint = np.full((3, 3), epsilon / 6)
    joint[:, 2] = 0
    joint[BEST[env % 2]] += 1 - epsilon
    return joint


def test_vectors_of_actions_are_drawn_as_they_say():
    B, num_draws = 600, 200
    mixture = Mixture(
        (
            Part("sample", Sample()),
            Part("soft", Softmax(0.5)),
            Part("random", Random()),
            Part("constant", EpsilonGreedy(0.3)),
            Part("ladder", EpsilonLadder()),
            Part("greedy", Greedy()),
        )
    )
    names = mixture.names
    want = np.array([[of_vectors(name, env) for env in range(B)] for name in names])
    rng, state, env = unroll_rng(0, 1, 0), mixture.initial_state(B), np.arange(B)
    outputs, counts = {"logits": LOGITS[env % 2]}, np.zeros(want.shape, int)
    opens, step = np.ones(B, bool), np.zeros(B, np.int64)
    for _ in range(num_draws):
        action, log_prob, state = mixture(outputs, state, opens, step, Context(0, 1, 2), rng)
        assert action.shape == (B, 2) and action.dtype.kind == "i"
        assert log_prob.shape == (B,) and log_prob.dtype == np.float32
        place = (state.choice, env, action[:, 0], action[:, 1])
        assert np.allclose(log_prob, np.log(want[place]), rtol=0, atol=1e-5)
        counts[place] += 1
    mean = counts.sum((2, 3), keepdims=True) * want
    for part in range(len(names)):
        for group in range(0, B, 100):
            for some in (slice(group, group + 100, 2), slice(group + 1, group + 100, 2)):
                assert_drawn_by(counts[part, some].sum(0).ravel(), mean[part, some].sum(0).ravel())


def test_sample_draws_single_actions_by_their_logits():
    B, rng = 20_000, unroll_rng(0, 0, 1)
    logits = np.float32([0.3, -inf, 2.0, -1.0])
    outputs = {"logits": np.tile(logits, (B, 1)), "q": -np.tile(logits, (B, 1))}
    action, log_prob, _ = Sample()(outputs, (), None, None, Context(0), rng)
    want = np.array(softmax(logits, 1.0))
    assert log_prob == pytest.approx(np.log(want[action]), abs=1e-6)
    assert_drawn_by(np.bincount(action, minlength=4), B * want)
    assert action.shape == (B,) and log_prob.dtype == np.float32


def test_absent_actions_are_never_taken_at_random():
    values = np.tile(np.float32([-inf, 1, 2, -inf, 0]), (9_000, 1))
    action, log_prob, _ = Random()({"q": values}, (), None, None, Context(0), unroll_rng(0, 0, 2))
    assert_drawn_by(np.bincount(action, minlength=5), 3_000 * np.array([0, 1, 1, 0, 1]))
    assert log_prob == pytest.approx(np.full(9_000, log(1 / 3)))


def test_vectors_too_many_for_a_probability_have_a_log_probability():
    outputs = {"logits": np.zeros((2, 2_000, 2), np.float32)}
    for policy in (Random(), EpsilonGreedy(0.5)):
        _, log_prob, _ = policy(outputs, (), ALL, STEP, Context(0), unroll_rng(0, 0, 0))
        epsilon = getattr(policy, "epsilon", 1.0)
        expected = [log(epsilon) - 2_000 * log(2), log(0.5)]  # explored, or all of it greedy
        assert all(min(abs(value - want) for want in expected) < 1e-3 for value in log_prob)


# -- continuous actions: Box ---------------------------------------------------------------------

# Bounded, bounded elsewhere, bounded on one side, not at all.
LOW, HIGH = np.float32([-1, 0.1, 0, -inf]), np.float32([1, 9.7, inf, inf])
MEAN, LOG_STD = np.float32([0.5, -1.0, 3.0, -2.0]), np.float32([0.3, -0.7, 0.0, 1.0])


def box(B: int, low=LOW, high=HIGH, mean=MEAN, log_std=LOG_STD) -> dict[str, np.ndarray]:
    parts = {"low": low, "high": high, "mean": mean, "log_std": log_std}
    return {name: np.tile(np.float32(part), (B, 1)) for name, part in parts.items()}


def u_of(action: float, low: float, high: float) -> float:
    if not np.isfinite(low) or not np.isfinite(high):
        return action
    return atanh(min(max(2 * (action - low) / (high - low) - 1, -1 + 1e-6), 1 - 1e-6))


def all_u(action: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    rows = action.tolist()
    ends = list(zip(low.tolist(), high.tolist(), strict=True))
    return np.array([[u_of(a, *end) for a, end in zip(row, ends, strict=True)] for row in rows])


def as_learned(outputs: dict[str, np.ndarray], action: np.ndarray) -> np.ndarray:
    """The log-probability that a learner finds."""
    as_torch = {name: torch.from_numpy(part) for name, part in outputs.items()}
    as_torch["value"] = torch.zeros(len(action))
    return distributions.log_prob(as_torch, torch.from_numpy(action)).numpy()


def test_sample_draws_from_a_squashed_normal_distribution():
    B = 20_000
    action, log_prob, _ = Sample()(box(B), (), None, None, Context(0), unroll_rng(0, 0, 3))
    assert action.shape == (B, 4) and action.dtype == log_prob.dtype == np.float32
    u, normals = all_u(action, LOW, HIGH), []
    for mean, log_std in zip(MEAN.tolist(), LOG_STD.tolist(), strict=True):
        normals.append(NormalDist(mean, exp(log_std)))
    want = [sum(log(n.pdf(x)) for n, x in zip(normals, row, strict=True)) for row in u]
    assert log_prob == pytest.approx(want, abs=2e-4)  # u in float32 is off by up to 1e-6
    for i, normal in enumerate(normals):
        fifth = np.searchsorted([normal.inv_cdf(share) for share in (0.2, 0.4, 0.6, 0.8)], u[:, i])
        assert_drawn_by(np.bincount(fifth, minlength=5), np.full(5, B / 5))
        above = (u[:, [i, (i + 1) % 4]] > [MEAN[i], MEAN[(i + 1) % 4]]) @ [1, 2]
        assert_drawn_by(np.bincount(above, minlength=4), np.full(4, B / 4))  # independent


def test_random_fills_a_box_and_tells_the_density_of_u():
    B, low, high = 20_000, np.float32([-1, 0.1]), np.float32([1, 9.7])
    outputs = box(B, low, high, [0, 0], [0, 0])
    action, log_prob, _ = Random()(outputs, (), None, None, Context(0), unroll_rng(0, 0, 4))
    assert action.dtype == log_prob.dtype == np.float32
    fifth = np.minimum((action - low) / (high - low) * 5, 4).astype(int)
    for i in range(2):
        assert_drawn_by(np.bincount(fifth[:, i], minlength=5), np.full(5, B / 5))
    both = np.bincount((fifth > 1) @ [1, 2], minlength=4)
    assert_drawn_by(both, B / 25 * np.array([4, 6, 6, 9]))
    # The slope of u's distribution function, (1 + tanh u) / 2.
    step = 1e-4
    for row, got in zip(all_u(action, low, high)[:200], log_prob[:200], strict=True):
        slopes = [(tanh(u + step) - tanh(u - step)) / 4 / step for u in row]
        assert got == pytest.approx(log(prod(slopes)), abs=1e-3)


def test_random_and_sample_tell_densities_of_the_same_thing():
    """Actions of one policy, weighed by the ratio of densities, are draws of the other."""
    B, low, high = 100_000, [-1, 0], [1, 10]
    outputs = box(B, low, high, [0.4, -0.3], [-0.5, 0.2])
    action, log_prob, _ = Random()(outputs, (), None, None, Context(0), unroll_rng(0, 0, 5))
    ratio = np.exp(as_learned(outputs, action) - log_prob)
    assert abs(ratio.mean() - 1) < 5 * ratio.std() / B**0.5 < 0.05


def test_greedy_takes_the_middle_of_a_box():
    action, log_prob, _ = Greedy()(box(2), (), ALL, STEP, Context(0), None)
    expected = [tanh(0.5), 0.1 + (tanh(-1) + 1) / 2 * 9.6, 3.0, -2.0]
    assert action == pytest.approx(np.tile(expected, (2, 1)), abs=1e-6)
    assert action.dtype == np.float32 and log_prob.tolist() == [inf, inf]  # a density


def test_actions_stay_in_the_box_however_sure_the_model_is():
    low, high = np.float32([0.1, -3e7, -1e30]), np.float32([0.7, 1.1, -1e-30])
    outputs = box(1_000, low, high, [0, 0, 0], [3, 3, 3])
    for policy in (Sample(), Random(), Greedy()):
        action, log_prob, _ = policy(outputs, (), None, None, Context(0), unroll_rng(0, 0, 6))
        assert (action >= low).all() and (action <= high).all()
        assert np.isfinite(log_prob).all() != isinstance(policy, Greedy)
        if isinstance(policy, Sample):
            assert (action == low).any(0).all() and (action == high).any(0).all()


def test_a_mixture_of_continuous_policies():
    B, low, high = 400, [-2, 5], [2, 6]
    outputs, rng = box(B, low, high, [0.2, 0.3], [-1, -1]), unroll_rng(0, 0, 7)
    mixture = Mixture((Part("a", Sample()), Part("b", Random()), Part("c", Greedy())))
    state, opens = mixture.initial_state(B), np.ones(B, bool)
    action, log_prob, state = mixture(outputs, state, opens, None, Context(0), rng)
    assert action.shape == (B, 2) and action.dtype == log_prob.dtype == np.float32
    u = all_u(action, np.float32(low), np.float32(high))
    normals = (NormalDist(0.2, exp(-1)), NormalDist(0.3, exp(-1)))
    want = [
        sum(log(normal.pdf(x)) for normal, x in zip(normals, row, strict=True))
        if chosen == 0
        else (inf if chosen == 2 else sum(log((1 - tanh(x) ** 2) / 2) for x in row))
        for row, chosen in zip(u, state.choice, strict=True)
    ]
    assert log_prob == pytest.approx(want, abs=1e-4)
    greedy = u[state.choice == 2]
    assert greedy == pytest.approx(np.tile([0.2, 0.3], (len(greedy), 1)), abs=1e-5)
    assert set(state.choice) == {0, 1, 2}


# -- both sides of the wire ----------------------------------------------------------------------

FOUR = box(2, low=[-3] * 4, high=[5] * 4)
KINDS = {
    "discrete": (spaces.Discrete(3), {"logits": LOGITS[:, 0]}),
    "vectors": (spaces.MultiDiscrete([3, 2]), {"logits": LOGITS}),
    "flags": (spaces.MultiBinary(2), {"logits": LOGITS[:, :, :2]}),
    "box": (spaces.Box(LOW, HIGH), box(2)),
    "a sure box": (spaces.Box(LOW, HIGH), box(2, mean=[4, -9, 1e3, 0], log_std=[1, 0, 2, -3])),
    "matrices": (spaces.Box(-3, 5, (2, 2)), {k: v.reshape(2, 2, 2) for k, v in FOUR.items()}),
    "numbers": (spaces.Box(-3, 5, ()), {name: part[:, 0] for name, part in FOUR.items()}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_learner_finds_the_log_probability_that_the_actor_sent(kind):
    """And the environments take the actions."""
    space, outputs = KINDS[kind]
    actions, B = Actions(space, kind), 2_000
    outputs = {name: np.repeat(part, B // 2, 0) for name, part in outputs.items()}
    action, log_prob, _ = Sample()(outputs, (), None, None, Context(0), unroll_rng(0, 0, 8))
    stored = action.astype(space.dtype)  # as the wire has it
    assert np.array_equal(stored, action)
    assert as_learned(outputs, stored) == pytest.approx(log_prob, rel=1e-6, abs=2e-6)
    # A bound whose other side is infinite binds the environment, and no policy.
    is_box = isinstance(space, spaces.Box)
    taken = np.clip(stored, space.low, space.high) if is_box else stored
    assert np.array_equal(actions.for_env(stored), taken)


# -- the best, the ladder, mixtures --------------------------------------------------------------


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


def test_acting_needs_no_torch_beyond_the_model():
    code = "import sys, asyncrl.policies; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.filterwarnings("ignore:invalid value")
def test_refusals_at_the_outputs_of_a_model():
    def act(policy, outputs):
        return policy(outputs, (), ALL, STEP, Context(0), unroll_rng(0, 0, 0))

    for policy in (EpsilonGreedy(), EpsilonLadder(), Softmax()):
        with pytest.raises(ValueError, match=r"'q' or 'logits' .*'mean'\]; use Sample, Greedy or"):
            act(policy, box(2))
    for policy in (EpsilonGreedy(), EpsilonLadder(), Softmax(), Greedy(), Random()):
        with pytest.raises(ValueError, match=r"'q' or 'logits' of .* got \['value'\]"):
            act(policy, {"value": Q[:, 0]})
    with pytest.raises(ValueError, match=r"'logits' or 'mean', got \['q'\].*use EpsilonGreedy"):
        act(Sample(), {"q": Q})
    with pytest.raises(ValueError, match=r"finite bounds, got infinite ones.*or use Sample"):
        act(Random(), box(2))
    for name, value in (("mean", nan), ("mean", inf), ("log_std", nan)):
        with pytest.raises(ValueError, match="finite log-probability"):
            act(Sample(), box(2, **{name: [0, 0, value, 0]}))
    for policy in (Sample(), Softmax()):
        with pytest.raises(ValueError, match=r"finite log-probability, got .*nan"):
            act(policy, {"logits": np.float32([[0, nan, 1], [0, 1, 2]])})


def test_the_generator_of_an_unroll_is_its_key_and_nothing_else():
    keys = [
        (seed, lane, sequence) for seed in range(3) for lane in range(3) for sequence in range(3)
    ]
    streams = {key: tuple(unroll_rng(*key).random(4)) for key in keys}
    assert len(set(streams.values())) == len(keys)
    assert all(tuple(unroll_rng(*key).random(4)) == stream for key, stream in streams.items())


class Vanishing:
    """A schedule of a user's own, which says nothing of its turns."""

    def __init__(self, after: float):
        self.after = after

    def at(self, env_steps: int) -> float:
        return 1.0 if env_steps < 600 else self.after


def test_numbers_and_schedules_that_leave_their_range_are_refused():
    nan = float("nan")
    for make, bad in (
        (EpsilonGreedy, (1.5, -0.5, nan, Linear(0.5, 1.01, 9), Piecewise((9,), (0.1, 2.0)))),
        (EpsilonLadder, (2.0, -0.1, nan)),
        (Softmax, (0.0, -1.0, nan, np.inf, Linear(1, 0, 9), Vanishing(0.0))),
        (lambda weight: Mixture((Part("only", Random(), weight),)), (np.inf, nan, Vanishing(0.0))),
    ):
        for value in bad:
            with pytest.raises(ValueError, match=r"expected .*, got"):
                make(value)
    EpsilonGreedy(Linear(1, 0, 9)), Softmax(Vanishing(0.1)), EpsilonLadder(1.0)
    with pytest.raises(ValueError, match=r"expected epsilon of .* got 2 at 9 env steps of Piece"):
        EpsilonGreedy(Piecewise((9,), (0.1, 2.0)))


# -- what a policy of a user's own gets wrong ----------------------------------------------------

TWO, SURE = spaces.Discrete(2), np.zeros(3, np.float32)
OUTPUTS = {"q": np.float32([[0, 1], [1, 0], [2, 1]])}


class Own:
    """Begins with one state, and returns what it was given."""

    def __init__(self, *returned, begins=()):
        self.returned, self.begins = returned, begins

    def initial_state(self, num_envs):
        return self.begins

    def __call__(self, outputs, state, first, step, context, rng):
        return self.returned


def zeros(dtype=np.int64, shape=3) -> np.ndarray:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    "own, words",
    [
        (Own(np.full(3, 0.5), SURE, ()), r"actions int64 \(3,\) .* got float64 \(3,\) and float32"),
        (Own([0, 0, 0], SURE, ()), "numpy arrays, .* got list and float32"),
        (Own(zeros(), None, ()), "numpy arrays, .* got int64 .* and NoneType"),
        (Own(zeros(shape=2), SURE, ()), r"got int64 \(2,\) and"),
        (Own(zeros(), SURE + nan, ()), r"log-probabilities from the policy odd, got \[nan, nan"),
        (Own(zeros() + 2, SURE, ()), r"policy odd: actions: expected 0 to 1, got \[2, 2, 2\] for"),
        (Own(zeros() - 1, SURE, ()), r"policy odd: actions: expected 0 to 1, got \[-1, -1, -1\]"),
        (Own(zeros(), SURE), r"to return \(action, log_prob, state\), got a tuple of 2"),
        (Own(zeros(), SURE, zeros()), r"like its initial_state\(3\), \(\), got int64 \(3,\)"),
        (Own(zeros(), SURE, (), begins={"h": zeros()}), r"\{'h': 'int64 \(3,\)'\}, got \(\)"),
        (Own(zeros(), SURE, zeros(int, 4), begins=zeros()), r"int64 \(3,\), got int64 \(4,\)"),
        (Own(zeros(), SURE, zeros(float), begins=zeros()), r"int64 \(3,\), got float64 \(3,\)"),
        (Own(zeros(), SURE, 1.0, begins=1), "int, got float"),
        (lambda *x: None, r"with initial_state\(B\) for odd, got .*<lambda> without it: a policy"),
        (Greedy, r"a policy for odd, got the class Greedy; write Greedy\(\)"),
    ],
)
def test_what_a_policy_of_ones_own_gets_wrong_is_said_with_its_name(own, words):
    part = Part("odd", own)
    with pytest.raises(ValueError, match=words):
        check_policy(Mixture((Part("fine", Random()), part)), OUTPUTS, TWO)
    inside = (RandomSwitch(Greedy(), own), Switch(own, Greedy(), "odd"))
    for switch, name in zip(inside, ("odd.other", "odd.before"), strict=True):
        with pytest.raises(ValueError, match=name):
            check_policy(Mixture((Part("odd", switch),)), OUTPUTS, TWO)


def test_what_a_policy_of_ones_own_may_do():
    for space in (TWO, spaces.Discrete(2, start=5), spaces.Discrete(2, dtype=np.int32)):
        for dtype in (np.int64, np.int32, np.uint8, bool):
            own = Own(zeros(dtype) + dtype(1), SURE.astype(float), {"a": (zeros(), 2)},
                      begins={"a": (zeros(), 1)})  # fmt: skip
            check_policy(as_mixture(own), OUTPUTS, space)
    mean = np.zeros((3, 2), np.float32)
    outputs = {"mean": mean, "log_std": mean, "low": mean - 1, "high": mean + np.array([1, inf])}
    half = spaces.Box(np.float32([-1, -1]), np.float32([1, inf]))
    check_policy(as_mixture(Sample()), outputs, half)  # its second may be less than -1
    check_policy(as_mixture(Own(mean.astype(float), SURE, ())), outputs, half)
    with pytest.raises(ValueError, match=r"the policy Own: actions: expected \[-1.0"):
        check_policy(as_mixture(Own(mean + 2, SURE, ())), outputs, half)


@pytest.mark.parametrize("others", [(), (Part("fine", Random()),)])
def test_actions_that_later_become_fractions_are_refused_too(others):
    mixture = Mixture((Part("odd", Own(np.full(3, 0.5), SURE, ())), *others))
    state, rng, first = mixture.initial_state(3), unroll_rng(0, 0, 0), np.ones(3, bool)
    with pytest.raises(ValueError, match=r"integers as actions of \('odd'.*got \['float64'"):
        mixture(OUTPUTS, state, first, zeros(), Context(0), rng)


class Failing(Own):
    def __call__(self, outputs, state, first, step, context, rng):
        raise ValueError("my own trouble")


def test_an_error_within_a_policy_keeps_its_traceback():
    """A ValueError is taken for a refusal in words, which asyncrl's own is."""
    for own in (Failing(), RandomSwitch(Greedy(), Failing())):
        with pytest.raises(RuntimeError, match="raised ValueError: my own trouble") as caught:
            check_policy(as_mixture(own), OUTPUTS, TWO)
        assert "my own trouble" in str(caught.traceback[-1].statement)
    with pytest.raises(ValueError, match="this model has no distribution"):
        check_policy(as_mixture(Sample()), OUTPUTS, TWO)


def test_the_policy_of_the_documentation():
    text = (Path(__file__).parents[1] / "docs" / "algorithms" / "mixtures.md").read_text()
    named: dict = {}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(code, named)
    assert named["policy"].names == ("own", "warm", "bold")
    sticky = named["Sticky"]()
    check_policy(as_mixture(sticky), OUTPUTS, TWO)
    B, rng = 30_000, unroll_rng(0, 0, 0)
    outputs, state, context = {"q": zeros(np.float32, (B, 3))}, np.arange(B) % 3, Context(0)
    first, step = np.arange(B) % 2 == 0, zeros(shape=B)
    action, log_prob, after = sticky(outputs, state, first, step, context, rng)
    assert np.array_equal(after, action)
    for opens, stays in ((True, 1 / 3), (False, 0.75 + 0.25 / 3)):
        here, same = first == opens, action == state
        assert same[here].mean() == pytest.approx(stays, abs=0.02)
        assert log_prob[here & same] == pytest.approx(log(stays))
        assert log_prob[here & ~same] == pytest.approx(log((1 - stays) / 2))


def test_a_policy_that_was_not_made_is_told_so():
    with pytest.raises(ValueError, match=r"for Greedy, got the class Greedy; write Greedy\(\)"):
        check_policy(as_mixture(Greedy), {"q": np.zeros((3, 2), np.float32)}, spaces.Discrete(2))
