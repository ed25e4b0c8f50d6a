"""Policies that change within an episode: against hand numbers, slow loops and real unrolls."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv

from asyncrl.actor import Actor, ActorConfig, context_fields
from asyncrl.env_config import EnvConfig
from asyncrl.envs import make_envs
from asyncrl.models import ModelConfig
from asyncrl.policies import (
    Context,
    EpsilonGreedy,
    Greedy,
    Mixture,
    Part,
    Random,
    Softmax,
    as_mixture,
    unroll_rng,
)
from asyncrl.schedules import Exponential, Linear, Piecewise
from asyncrl.switch_policies import Certainty, RandomSwitch, Switch
from asyncrl.transport.ring import Ring, UnrollReader
from asyncrl.transport.weights import WeightsBuffer, WeightsReader, WeightsWriter, weights_fields
from asyncrl.types import Spec, tree_map
from tests.test_policies import assert_drawn_by

INF = np.inf


class Always:
    """One action, with a log-probability that tells who chose it, and a count of calls."""

    def __init__(self, action: int):
        self.action = action

    def initial_state(self, num_envs):
        return np.zeros(num_envs, int)

    def __call__(self, outputs, state, first, step, context, rng):
        B = len(first)
        log_prob = np.full(B, -0.5 * (self.action + 1), np.float32)
        return np.full(B, self.action), log_prob, np.where(first, 0, state) + 1


ZERO, ONE = Always(0), Always(1)


def episodes(B: int, num_steps: int, seed: int = 0):
    """`first` and `step` (T, B) of environments whose episodes end at random."""
    rng = np.random.default_rng(seed)
    first = np.concatenate([np.ones((1, B), bool), rng.random((num_steps - 1, B)) < 0.1])
    step = np.zeros((num_steps, B), np.int64)
    for t in range(1, num_steps):
        for env in range(B):
            step[t, env] = 0 if first[t, env] else step[t - 1, env] + 1
    return first, step


# -- Certainty -----------------------------------------------------------------------------------

# By hand with margin 1 and base 0.1: relu(q - 2 + 1) + 0.1 of q = 2, 1.5, 1, -7.
Q = np.float32([2.0, 1.5, 1.0, -7.0])
SCORES = np.array([1.1, 0.6, 0.1, 0.1])


def test_certainty_draws_by_the_margin_under_the_best():
    B, policy = 40_000, Certainty(1.0, 0.1)
    rng = unroll_rng(0, 0, 0)
    action, log_prob, _ = policy({"q": np.tile(Q, (B, 1))}, (), None, None, Context(0), rng)
    want = SCORES / SCORES.sum()
    assert_drawn_by(np.bincount(action, minlength=4), B * want)
    assert log_prob.dtype == np.float32
    assert log_prob == pytest.approx(np.log(want)[action], abs=1e-5)


def test_certainty_follows_its_schedules_and_knows_absent_actions():
    policy = Certainty(Linear(2.0, 0.5, 100), Linear(0.1, 0.0, 100))
    B, q = 30_000, np.float32([0.0, -0.25, -1.0, -INF])
    # After 100 steps margin 0.5 and no base: 0.5 and 0.25; the absent one never, whatever the base.
    for env_steps, scores in ((0, [2.1, 1.85, 1.1, 0]), (100, [0.5, 0.25, 0, 0])):
        rng, outputs = unroll_rng(0, 0, env_steps), {"logits": np.tile(q, (B, 1))}
        action, log_prob, _ = policy(outputs, (), None, None, Context(env_steps), rng)
        want = np.array(scores) / sum(scores)
        assert_drawn_by(np.bincount(action, minlength=4), B * want)
        assert log_prob == pytest.approx(np.log(want[action]), abs=1e-5)


def test_certainty_of_vectors_of_actions():
    """Each of the two by its own margin, independently; the log-probability is of both."""
    values = np.float32([[0, -0.5, -3], [1, 0.2, -INF]])
    first, second = np.array([1.02, 0.52, 0.02]), np.array([1.02, 0.22, 0])
    want = np.outer(first / first.sum(), second / second.sum())
    B, rng = 40_000, unroll_rng(0, 0, 0)
    outputs = {"logits": np.tile(values, (B, 1, 1))}
    action, log_prob, _ = Certainty()(outputs, (), None, None, Context(0), rng)
    counts = np.zeros((3, 3), int)
    np.add.at(counts, tuple(action.T), 1)
    assert_drawn_by(counts.ravel(), B * want.ravel())
    assert log_prob == pytest.approx(np.log(want[tuple(action.T)]), abs=1e-5)


# -- RandomSwitch --------------------------------------------------------------------------------


def test_random_switch_equals_a_slow_loop():
    B, T, policy = 50, 200, RandomSwitch(ZERO, ONE, 0.2)
    first, step = episodes(B, T)
    rng, same_rng = unroll_rng(0, 0, 0), unroll_rng(0, 0, 0)
    state, other = policy.initial_state(B), [False] * B
    for t in range(T):
        draws = same_rng.random(B)
        for env in range(B):
            if first[t, env]:
                other[env] = False
            elif draws[env] < 0.2:
                other[env] = not other[env]
        action, log_prob, state = policy({}, state, first[t], step[t], Context(0), rng)
        assert action.tolist() == [int(x) for x in other]
        assert log_prob.tolist() == [-1.0 if x else -0.5 for x in other]
        # Both are asked at every step, so neither loses its memory.
        assert state.parts[0].tolist() == state.parts[1].tolist() == (step[t] + 1).tolist()


def test_random_switch_changes_as_often_as_it_says():
    B, policy = 2_000, RandomSwitch(ZERO, ONE, Linear(0.0, 0.25, 100))
    state, rng, none = policy.initial_state(B), unroll_rng(0, 0, 1), np.zeros(B, bool)
    before, _, state = policy({}, state, ~none, none, Context(100), rng)
    assert not before.any()  # the first one opens each episode
    changes = 0
    for _ in range(50):
        action, _, state = policy({}, state, none, none, Context(100), rng)
        changes, before = changes + (action != before).sum(), action
    assert_drawn_by(np.array([changes, 50 * B - changes]), 50 * B * np.array([0.25, 0.75]))
    same, _, state = policy({}, state, none, none, Context(0), rng)
    assert np.array_equal(same, before)  # a probability of 0 by now


def test_log_prob_is_of_the_policy_that_acted():
    B = 30_000
    policy = RandomSwitch(EpsilonGreedy(0.3), Softmax(2.0), 0.4)
    outputs = {"q": np.tile(np.float32([0.0, 1.0, -1.0]), (B, 1))}
    powers = np.exp(np.array([0.0, 0.5, -0.5]))
    want = np.array([[0.1, 0.8, 0.1], powers / powers.sum()])
    state, rng, none = policy.initial_state(B), unroll_rng(0, 0, 2), np.zeros(B, bool)
    for first in (~none, none, none):
        action, log_prob, state = policy(outputs, state, first, none, Context(0), rng)
        who = state.other.astype(int)
        assert log_prob == pytest.approx(np.log(want[who, action]), abs=1e-5)
        for i in range(2):
            counts = np.bincount(action[who == i], minlength=3)
            assert_drawn_by(counts, counts.sum() * want[i])
    assert 0 < who.mean() < 1


# -- Switch --------------------------------------------------------------------------------------

LENGTHS = {"master": np.array([4, 15, 30, 30, 11], np.int32), "other": np.array([99], np.int32)}
POINTS = {0: 1, 5: 1, 20: 2, 1: 1}  # less 10 steps each, and how often of five


def test_switch_equals_a_slow_loop():
    """A point drawn as an episode opens, from the reference's lengths; `after` from there on."""
    B, T, policy = 40, 300, Switch(ZERO, ONE, "master")
    first, step = episodes(B, T)
    rng, same_rng = unroll_rng(0, 0, 0), unroll_rng(0, 0, 0)
    context = Context(0, recent_lengths=LENGTHS)
    state, points, switched = policy.initial_state(B), [0] * B, 0
    for t in range(T):
        if first[t].any():
            drawn = same_rng.choice(LENGTHS["master"], B)
            for env in range(B):
                if first[t, env]:
                    points[env] = max(int(drawn[env]) - 10, 0)
        action, log_prob, state = policy({}, state, first[t], step[t], context, rng)
        want = [int(step[t, env] >= points[env]) for env in range(B)]
        assert action.tolist() == want and log_prob.tolist() == [-0.5 * (a + 1) for a in want]
        assert state.switch_at.tolist() == points
        assert state.parts[0].tolist() == state.parts[1].tolist() == (step[t] + 1).tolist()
        switched += sum(want)
    assert 0 < switched < B * T


def test_switch_points_come_from_recent_episodes_and_are_never_negative():
    B, policy = 20_000, Switch(ZERO, ONE, "master")
    opens, step = np.ones(B, bool), np.zeros(B, np.int64)
    context = Context(0, recent_lengths=LENGTHS)
    _, _, state = policy({}, policy.initial_state(B), opens, step, context, unroll_rng(0, 0, 0))
    counts = np.bincount(state.switch_at, minlength=21)  # which refuses negative ones
    want = np.zeros(21)
    want[list(POINTS)] = list(POINTS.values())
    assert_drawn_by(counts, B * want / 5)
    assert state.switch_at.dtype == np.int64


@pytest.mark.parametrize("recent", [{}, {"master": np.array([], np.int32)}])
@pytest.mark.parametrize("initial_length, point", [(0, 0), (7, 0), (42, 32)])
def test_a_reference_without_episodes_stands_at_the_initial_length(recent, initial_length, point):
    policy = Switch(ZERO, ONE, "master", initial_length=initial_length)
    state, rng = policy.initial_state(3), unroll_rng(0, 0, 0)
    context, actions = Context(0, recent_lengths=recent), []
    for t in range(60):
        step, first = np.full(3, t), np.full(3, t == 0)
        action, _, state = policy({}, state, first, step, context, rng)
        assert len(set(action)) == 1
        actions.append(action[0])
    assert actions == [0] * point + [1] * (60 - point)


def test_an_episode_keeps_its_point_whatever_is_published_meanwhile():
    policy, rng = Switch(ZERO, ONE, "master", margin=0), unroll_rng(0, 0, 0)
    first, none = np.ones(2, bool), np.zeros(2, bool)

    def context(length):
        return Context(0, recent_lengths={"master": np.array([length])})

    _, _, state = policy({}, policy.initial_state(2), first, none * 1, context(5), rng)
    _, _, state = policy({}, state, none, none + 1, context(50), rng)
    assert state.switch_at.tolist() == [5, 5]
    _, _, state = policy({}, state, np.array([False, True]), none + 2, context(50), rng)
    assert state.switch_at.tolist() == [5, 50]


# -- in unrolls ----------------------------------------------------------------------------------


class Long(gym.Env):
    """Episodes of 17 steps; observations count them."""

    observation_space, action_space = spaces.Box(0, 99, (1,), np.float32), spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.count += 1
        return np.float32([self.count]), 1.0, self.count == 17, False, {}


LONG = EnvConfig(lambda num_envs: SyncVectorEnv([Long] * num_envs))
FRONTIER = Part("frontier", Switch(ZERO, ONE, "master", margin=3))
MIX = Mixture((Part("master", ZERO, 1e-12), FRONTIER))
LONG_LENGTHS = {8, 11, 14}


def play(num_unrolls: int, mix: Mixture = MIX) -> list:
    """Copies of unrolls of 5 steps of 4 environments, with lengths published by hand."""
    config = ActorConfig(lanes_per_actor=1, envs_per_lane=4, unroll_length=5)
    envs = make_envs(LONG, 1)
    spec = Spec(5, 4, envs.observation_space, envs.action_space, {})
    model = ModelConfig(hidden=(4,))(envs.observation_space, envs.action_space)
    ring = Ring(bytearray(Ring.nbytes(spec, config.slots_per_lane)), spec, config.slots_per_lane)
    fields = weights_fields(model.state_dict(), context_fields(2))
    buffer = WeightsBuffer(bytearray(WeightsBuffer.nbytes(fields)), fields)
    writer, reader, unrolls = WeightsWriter(buffer), UnrollReader(ring), []
    for name, tensor in model.state_dict().items():
        writer.back()["model"][name][...] = tensor.numpy()
    writer.back()["context"]["recent_lengths"][0, :3] = sorted(LONG_LENGTHS)
    writer.publish()
    actor = Actor(
        0, config, {0: ring}, WeightsReader(buffer), model, mix, lambda: make_envs(LONG, 4), seed=1
    )
    for unroll in range(num_unrolls):
        reader.permit(unroll + 1)
        actor.play()
        taken, _ = reader.take()
        unrolls.append(tree_map(np.copy, taken))
        reader.release()
    return unrolls


def test_a_switch_lasts_from_unroll_to_unroll():
    """In each whole episode, of 17 steps over 4 unrolls or 5, `after` begins at one point."""
    unrolls = play(60)
    obs = np.concatenate([unroll.obs[:-1, :, 0] for unroll in unrolls])
    action = np.concatenate([unroll.action for unroll in unrolls])
    log_prob = np.concatenate([unroll.log_prob for unroll in unrolls])
    valid = np.concatenate([unroll.valid for unroll in unrolls])
    assert (np.concatenate([unroll.policy for unroll in unrolls]) == 1).all()
    assert np.array_equal(log_prob, np.float32([-0.5, -1.0])[action])
    points = []
    for env in range(4):
        rows = np.nonzero(obs[:, env] == 0)[0]
        for begin in rows[rows + 17 <= len(obs)]:
            episode = action[begin : begin + 17, env]
            assert valid[begin : begin + 17, env].all()
            points.append(int((episode == 0).sum()))
            assert episode.tolist() == [0] * points[-1] + [1] * (17 - points[-1])
    assert len(points) > 50 and {point + 3 for point in points} == LONG_LENGTHS


def test_an_unroll_draws_by_its_key_alone():
    """Played again from the start it is the same; another lane or unroll draws otherwise."""
    for one, again in zip(play(20), play(20), strict=True):
        assert np.array_equal(one.action, again.action)
    policy, context = as_mixture(Switch(ZERO, ONE, "Switch")), Context(0)
    context = context._replace(recent_lengths={"Switch": np.arange(10, 5_000)})
    opens, step, points = np.ones(64, bool), np.zeros(64, np.int64), []
    for key in ((0, 0, 0), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        rng = unroll_rng(*key)
        _, _, state = policy({}, policy.initial_state(64), opens, step, context, rng)
        points.append(state.parts[0].switch_at.tolist())
    assert points[0] == points[1]
    assert len({tuple(row) for row in points}) == 4


def test_an_actor_knows_names_and_only_lengths_that_are_there():
    seen = []

    class Spy(Always):
        def __call__(self, outputs, state, first, step, context, rng):
            seen.append(context.recent_lengths)
            return super().__call__(outputs, state, first, step, context, rng)

    play(2, Mixture((Part("master", Spy(0)), Part("frontier", ONE))))
    assert {name: row.tolist() for name, row in seen[-1].items()} == {
        "master": [8, 11, 14], "frontier": [],
    }  # fmt: skip


# -- refusals ------------------------------------------------------------------------------------


def test_refusals():
    switch = Switch(Greedy(), Random(), "master")
    words = r"reference that the mixture draws, got 'master' for \('greedy', 'far'\); name one"
    with pytest.raises(ValueError, match=words):
        Mixture((Part("greedy", Greedy()), Part("far", switch)))
    with pytest.raises(ValueError, match=r"got 'master' for \('Switch',\)"):
        as_mixture(switch)  # alone it has nobody to refer to
    for outer in (RandomSwitch(Greedy(), switch), Switch(Greedy(), switch, "greedy")):
        with pytest.raises(ValueError, match="got 'master'"):
            Mixture((Part("greedy", Greedy()), Part("far", outer)))
    assert Mixture((Part("master", Greedy()), Part("far", switch))).names == ("master", "far")
    for reference in ("", None, 3):
        with pytest.raises(ValueError, match="name of a policy of the mixture as reference, got"):
            Switch(Greedy(), Random(), reference)
    for numbers in ({"margin": -1}, {"initial_length": -1}):
        with pytest.raises(ValueError, match="at least 0 env steps"):
            Switch(Greedy(), Random(), "master", **numbers)
    for probability in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="expected probability of at least 0"):
            RandomSwitch(Greedy(), Random(), probability)
    for numbers in ({"margin": 0}, {"base": -0.1}, {"margin": Linear(-1, 2, 9)}):
        with pytest.raises(ValueError, match=r"expected (margin above 0|base of at least 0), got"):
            Certainty(**numbers)
    never = Part("master", Greedy(), Piecewise((100,), (0.0, 0.0)))
    with pytest.raises(ValueError, match=r"that the mixture draws, got 'master' for \('far',\)"):
        Mixture((never, Part("far", switch)))
    inner = Mixture((Part("master", Greedy()),))
    for outer in (inner, RandomSwitch(Greedy(), inner), Switch(inner, Random(), "master")):
        with pytest.raises(ValueError, match="expected no Mixture inside another policy"):
            Mixture((Part("outer", outer), Part("master", Greedy())))


def test_exponential_schedule_by_hand():
    schedule = Exponential(1.0, 0.1, 0.5, 100)
    assert [schedule.at(steps) for steps in (0, 100, 200, 300, 10**9)] == [1, 0.5, 0.25, 0.125, 0.1]
    assert schedule.at(50) == pytest.approx(0.5**0.5)
    for start, end, factor, period in (
        (1, 0, 0.5, 9), (1, 2, 0.5, 9), (1, 0.5, 1.0, 9), (1, 0.5, 0, 9), (1, 0.5, 0.5, 0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="0 < end <= start, 0 < factor < 1 and a period"):
            Exponential(start, end, factor, period)


ALONE = """
from asyncrl import Config, EnvConfig, Greedy, Random, Switch
config = Config(EnvConfig("CartPole-v1"), policy=Switch(Greedy(), Random(), "greedy"))
"""


def test_a_switch_that_refers_to_none_is_refused_at_the_start(start, tmp_path):
    (tmp_path / "alone.py").write_text(ALONE)
    status, output = start("alone", tmp_path / "alone.py").finish()
    assert status == 2 and "Traceback" not in output
    assert "expected a reference that the mixture draws, got 'greedy'" in output
