"""Every row of an EnvGroup is what the environment did, and it says so when it is not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from asyncrl.env_group import EnvDataError, EnvDied, EnvGroup
from asyncrl.envs import EnvConfig, make_envs, seed_for
from tests import counting_env

COUNTING = "tests.counting_env:Counting-v0"


def counting(vectorization="sync", **kwargs) -> EnvConfig:
    guard = kwargs.pop("max_idle_steps", None)
    return EnvConfig(COUNTING, kwargs=kwargs, vectorization=vectorization, max_idle_steps=guard)


@pytest.fixture
def make():
    groups = []

    def build(config: EnvConfig, num_envs: int) -> EnvGroup:
        groups.append(make_envs(config, num_envs))
        return groups[-1]

    yield build
    for group in groups:
        group.close()


def play(group: EnvGroup, actions):
    for action in actions:
        group.send(action)
        yield group.recv()


def expected_rows(kind: str, seed: int, rows: int):
    """What a single counting env does under NEXT_STEP, told slowly."""
    episode, count, ended = 0, 0, False
    total = 0.0
    for _ in range(rows):
        row = dict.fromkeys(("first", "terminated", "truncated"), False)
        row |= {"reward": 0.0, "episode_return": 0.0, "episode_length": 0}
        if ended:
            episode, count, ended, total = episode + 1, 0, False, 0.0
            row["first"] = True
        else:
            count += 1
            row["reward"] = counting_env.reward_of(seed, episode, count)
            total += row["reward"]
            ended = count == counting_env.length_of(seed, episode)
            if ended:
                terminated = counting_env.terminates(seed, episode)
                row |= {"terminated": terminated, "truncated": not terminated}
                row |= {"episode_return": total, "episode_length": count}
        row["valid"], row["game_over"] = not row["first"], ended
        row["obs"] = counting_env.observation(kind, seed, episode, count)
        yield row


def same_tree(batch, index, single) -> bool:
    if isinstance(single, dict):
        assert set(batch) == set(single)
        return all(same_tree(batch[key], index, single[key]) for key in single)
    if isinstance(single, tuple):
        return all(same_tree(b, index, s) for b, s in zip(batch, single, strict=True))
    return batch[index].dtype == single.dtype and np.array_equal(batch[index], single)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("kind", ["float", "uint8", "dict", "tuple"])
def test_every_row_against_a_slow_simulation(make, vectorization, kind):
    B, T, seed = 4, 40, 7
    group = make(counting(vectorization, kind=kind), B)
    obs = group.reset(seed)
    for b in range(B):
        assert same_tree(obs, b, counting_env.observation(kind, seed + b, 0, 0))
    steps = list(play(group, np.random.default_rng(0).integers(0, 3, (T, B))))
    for b in range(B):  # compared at the end: nothing handed out earlier was overwritten
        for t, row in enumerate(expected_rows(kind, seed + b, T)):
            assert same_tree(steps[t].obs, b, row.pop("obs")), (t, b)
            assert {name: getattr(steps[t], name)[b] for name in row} == row, (t, b)
    assert sum(step.game_over.sum() for step in steps) > 20
    dtypes = {name: getattr(steps[0], name).dtype for name in steps[0]._fields[1:]}
    assert dtypes.pop("episode_length") == np.int32
    assert dtypes.pop("reward") == dtypes.pop("episode_return") == np.float32
    assert set(dtypes.values()) == {np.dtype(bool)}


def test_reset_starts_anew(make):
    group = make(counting(), 2)
    first = group.reset(3)
    actions = np.zeros((5, 2), int)
    rows = list(play(group, actions))
    assert np.array_equal(group.reset(3), first)
    for old, new in zip(rows, play(group, actions), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(old, new, strict=True))


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_idle_games_are_truncated(make, vectorization):
    limit = 4
    group = make(counting(vectorization, endless=True, reward="zero", max_idle_steps=limit), 2)
    group.reset(0)
    for t, step in enumerate(play(group, np.zeros((15, 2), int))):
        place = t % (limit + 1)  # rows 0 to 3 of an episode, then its reset step
        assert step.truncated.tolist() == step.game_over.tolist() == [place == limit - 1] * 2
        assert step.first.tolist() == [place == limit] * 2
        assert step.valid.tolist() == [place != limit] * 2
        assert step.episode_length.tolist() == [limit if place == limit - 1 else 0] * 2
        episode = t // (limit + 1) + (place == limit)
        assert step.obs[:, 1].tolist() == [episode] * 2
        assert step.obs[:, 2].tolist() == [0 if place == limit else place + 1] * 2


def test_rewards_reset_the_idle_guard(make):
    plain = make(counting(), 3)
    guarded = make(counting(max_idle_steps=1), 3)  # every reward of these seeds differs from 0
    assert np.array_equal(plain.reset(1), guarded.reset(1))
    actions = np.zeros((30, 3), int)
    for a, b in zip(play(plain, actions), play(guarded, actions), strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# --- Atari


def atari(**kwargs) -> EnvConfig:
    return EnvConfig("ALE/Breakout-v5", num_threads=1, **kwargs)


def test_classic_a_lost_life_ends_the_return_but_not_the_game(make):
    B, T = 2, 700
    group = make(atari(), B)
    assert group.observation_space == spaces.Box(0, 255, (84, 84), np.uint8)
    assert group.action_space == spaces.Discrete(4)
    assert group.env_step_frames == 4
    obs = group.reset(1)
    assert obs.shape == (B, 84, 84) and obs.dtype == np.uint8

    lives = np.full(B, 5)
    score, length = np.zeros(B), np.zeros(B, int)
    was_over = np.zeros(B, bool)
    lives_lost = games = 0
    for step in play(group, np.random.default_rng(2).integers(0, 4, (T, B))):
        assert np.array_equal(step.first, was_over)  # exactly one reset step, and only then
        assert np.array_equal(step.valid, ~was_over)
        assert not (step.terminated | step.truncated)[step.first].any()
        assert not step.reward[step.first].any()
        lives[step.first] = 5
        lives = lives - step.terminated
        assert np.array_equal(step.game_over, step.terminated & (lives == 0))
        score, length = score + step.reward, length + step.valid
        assert np.array_equal(step.episode_return, np.where(step.game_over, score, 0))
        assert np.array_equal(step.episode_length, np.where(step.game_over, length, 0))
        score, length = score * ~step.game_over, length * ~step.game_over
        was_over = step.game_over
        lives_lost += step.terminated.sum()
        games += step.game_over.sum()
    assert games >= 3 and lives_lost >= 5 * games


def test_classic_the_final_observation_is_the_game_that_ended(make):
    group = make(atari(), 1)
    group.reset(3)
    last = None
    for step in play(group, np.random.default_rng(0).integers(0, 4, (600, 1))):
        if step.first[0]:
            break
        last = step.obs
    bricks = (slice(None), slice(24, 42))  # a reset puts back those that were shot
    assert (step.obs[bricks] > 0).sum() >= (last[bricks] > 0).sum()
    assert not np.array_equal(step.obs, last)


def test_a_life_lost_as_the_time_is_up_ends_the_game(make):
    free = make(atari(), 1)
    free.reset(5)
    actions = np.ones((400, 1), int)
    rows = list(play(free, actions))
    t = next(t for t, step in enumerate(rows) if step.terminated[0])
    timed = make(atari(atari={"max_num_frames_per_episode": 4 * (t + 1)}), 1)
    timed.reset(5)
    rows = list(play(timed, actions[: t + 2]))
    assert rows[t].terminated[0] and rows[t].game_over[0] and rows[t].episode_length[0] == t + 1
    assert rows[t + 1].first[0]


def test_the_time_limit_truncates(make):
    group = make(atari(protocol="machado", atari={"max_num_frames_per_episode": 40}), 2)
    group.reset(0)
    rows = list(play(group, np.zeros((22, 2), int)))
    assert [t for t, step in enumerate(rows) if step.truncated.all()] == [9, 20]
    assert [t for t, step in enumerate(rows) if step.first.all()] == [10, 21]


def test_machado(make):
    B = 2
    group = make(atari(protocol="machado"), B)
    assert group.action_space == spaces.Discrete(18)
    group.reset(1)
    was_over, games = np.zeros(B, bool), 0
    for step in play(group, np.random.default_rng(2).integers(0, 18, (600, B))):
        assert np.array_equal(step.first, was_over)
        assert np.array_equal(step.game_over, step.terminated | step.truncated)
        was_over, games = step.game_over, games + step.game_over.sum()
    assert games >= 2


def test_a_breakout_agent_that_never_fires_is_cut(make):
    group = make(atari(max_idle_steps=60), 2)
    group.reset(0)
    rows = list(play(group, np.zeros((200, 2), int)))
    cut = np.array([step.truncated for step in rows])
    first = np.array([step.first for step in rows])
    over = np.array([step.game_over for step in rows])
    assert (cut.sum(0) >= 3).all()
    assert np.array_equal(first[1:], over[:-1])
    reset_again = np.array([step.episode_length for step in rows])[over]
    assert (reset_again <= 60).all() and (reset_again > 0).all()


@pytest.mark.parametrize("protocol", ["classic", "machado"])
def test_equal_seeds_give_equal_streams(make, protocol):
    B, T = 2, 200
    actions = np.random.default_rng(1).integers(0, 4, (T, B))
    streams = []
    for seed in (9, 9, 10):
        group = make(atari(protocol=protocol, max_idle_steps=40), B)
        start = group.reset(seed)
        rows = list(play(group, actions[: T if seed == 9 else T // 4]))
        streams.append([(start,), *rows])
    for a, b in zip(streams[0], streams[1], strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert any(not np.array_equal(a[0], c[0]) for a, c in zip(*streams[::2], strict=False))


def test_atari_actions_out_of_range_are_refused(make):
    group = make(atari(), 2)  # ALE itself would wait for ever
    group.reset(0)
    with pytest.raises(ValueError, match=r"expected 0 to 3, got \[4\] for environments \[1\]"):
        group.send(np.array([0, 4]))
    with pytest.raises(ValueError, match="expected shape"):
        group.send(np.array([0]))
    with pytest.raises(TypeError):
        group.send(np.array([0.5, 1.0]))


# --- actions


class Echo(gym.Env):
    """Shows the action it was given last, which must lie in its action space as it is."""

    def __init__(self, space):
        self.action_space = space
        size = int(np.prod(space.shape))
        self.observation_space = spaces.Box(-np.inf, np.inf, (size,), np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(self.observation_space.shape), {}

    def step(self, action):
        assert self.action_space.contains(action), (action, type(action))
        assert action.dtype == self.action_space.dtype
        return np.ravel(action).astype(float), 0.0, False, False, {}


gym.register("Echo-v0", entry_point=Echo)

INT8 = np.array([[2, 3], [100, 5]], np.int8)
ACTIONS = {  # own space, the policies' space, a policy's actions of 2 envs, what the envs get
    "discrete": (
        spaces.Discrete(3, start=-4, dtype=np.int32), spaces.Discrete(3), [0, 2], [[-4], [-2]],
    ),
    "multi-discrete": (
        spaces.MultiDiscrete(INT8, np.int8, start=[[0, 1], [27, -9]]),
        spaces.MultiDiscrete([2, 3, 100, 5]),
        [[0, 0, 0, 0], [1, 2, 99, 4]],
        [[0, 1, 27, -9], [1, 3, 126, -5]],
    ),
    "multi-binary": (
        spaces.MultiBinary((2, 2)), spaces.MultiBinary(4),
        [[0, 1, 1, 0], [1, 1, 0, 1]], [[0, 1, 1, 0], [1, 1, 0, 1]],
    ),
    "box": (
        spaces.Box(np.float32([[-1], [0]]), np.float32([[1], [9]])), None,
        [[[-1], [9]], [[0.25], [3]]], [[-1, 9], [0.25, 3]],
    ),
    # float32 knows no 0.1: a policy's action of full strength lies just outside.
    "rounded": (
        spaces.Box(-0.1, 0.1, (1,), np.float64), None,
        np.float32([[-0.1], [0.1]]), [[-0.1], [0.1]],
    ),
    "half bounded": (
        spaces.Box(np.float32([0, -np.inf]), np.float32([np.inf, 3])), None,
        [[-7, -1e30], [1e30, 4]], [[0, -1e30], [1e30, 3]],
    ),
    "unbounded": (spaces.Box(-np.inf, np.inf, (1,)), None, [[-1e30], [1e-30]], [[-1e30], [1e-30]]),
    "whole numbers": (spaces.Box(0, 9, (1,), np.uint8), None, np.uint8([[0], [9]]), [[0], [9]]),
}  # fmt: skip


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("kind", ACTIONS)
def test_actions_reach_the_environments_in_their_own_space(make, vectorization, kind):
    own, seen, actions, received = ACTIONS[kind]
    config = EnvConfig(f"{__name__}:Echo-v0", {"space": own}, vectorization)
    group = make(config, 2)
    assert group.action_space == (seen or own)
    group.reset(0)
    actions = np.array(actions)
    before = actions.copy()
    (step,) = play(group, [actions])
    # Exactly within float64 spaces; as float32 has it in those of float32.
    expected = np.array(received).astype(own.dtype).astype(float)
    assert step.obs.tolist() == expected.tolist()
    assert np.array_equal(actions, before)  # what an unroll keeps is what the policy chose


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize(
    ("kind", "actions", "words"),
    [
        ("discrete", [-1, 0], r"expected 0 to 2, got \[-1\] for environments \[0\]"),
        ("multi-discrete", [[0, 3, 0, 0], [0, 2, 0, 0]], r"to \[1, 2, 99, 4\], got .* \[0\]"),
        ("multi-discrete", [[0, 0, 0, 0], [0, 0, 0, -1]], r"got \[\[0, 0, 0, -1\]\] .* \[1\]"),
        ("multi-discrete", [[[0, 0], [0, 0]]] * 2, r"shape \(2, 4\), got \(2, 2, 2\)"),
        ("multi-binary", [[0, 1, 1, 0], [0, 2, 0, 0]], r"0 to 1, got \[\[0, 2, 0, 0\]\]"),
        ("box", [[[0], [0]], [[0], [9.01]]], r"\[9.0\d*\]\]\] for environments \[1\]"),
        ("box", [[[-1.1], [0]], [[0], [0]]], r"to \[\[1.0\], \[9.0\]\], got .* \[0\]"),
        ("box", [[[0], [0]], [[np.nan], [0]]], r"finite numbers, got .*nan.* environments \[1\]"),
        ("half bounded", [[np.inf, 0], [0, 0]], r"finite numbers, got .*inf.* \[0\]"),
        ("unbounded", [[0], [1e300]], r"finite numbers, got .*inf.* \[1\]"),  # in float32
        ("whole numbers", [[10], [0]], r"expected \[0\] to \[9\], got \[\[10\]\]"),
    ],
)
def test_actions_that_the_space_rules_out_are_refused(make, kind, actions, words):
    group = make(EnvConfig(f"{__name__}:Echo-v0", {"space": ACTIONS[kind][0]}), 2)
    group.reset(0)
    with pytest.raises(ValueError, match=words):
        group.send(np.array(actions))


def test_numbers_that_are_no_categories_are_refused(make):
    for kind in ("discrete", "multi-binary", "multi-discrete"):
        own, _, actions, _ = ACTIONS[kind]
        group = make(EnvConfig(f"{__name__}:Echo-v0", {"space": own}), 2)
        group.reset(0)
        with pytest.raises(TypeError):
            group.send(np.array(actions) * 0.5)


# --- configuration


def test_resolved_writes_everything_out():
    classic = atari().resolved()
    assert (classic.protocol, classic.vectorization, classic.max_idle_steps) == (
        "classic", "native", 4500,
    )  # fmt: skip
    assert classic.atari["life_loss_info"] and classic.atari["noop_max"] == 30
    assert classic.atari["repeat_action_probability"] == 0.0 and classic.atari["frameskip"] == 4
    assert classic.resolved() == classic
    machado = atari(protocol="machado", kwargs={"frameskip": 5}).resolved()
    assert machado.atari["repeat_action_probability"] == 0.25 and machado.atari["frameskip"] == 5
    assert machado.max_idle_steps == 0 and not machado.atari["use_fire_reset"]
    plain = EnvConfig("CartPole-v1").resolved()
    assert (plain.protocol, plain.vectorization, plain.atari) == ("none", "sync", {})
    assert EnvConfig(lambda n: None).resolved().vectorization == "native"
    assert EnvConfig("package.module:make_it").is_callable
    assert not EnvConfig(COUNTING).is_callable


def test_seeds_differ_by_lane_and_generation():
    seeds = {seed_for(s, lane, g) for s in range(3) for lane in range(20) for g in range(5)}
    assert len(seeds) == 300
    assert all(0 <= seed < 2**31 - 2**15 for seed in seeds)
    assert seed_for(1, 2, 3) == seed_for(1, 2, 3)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (EnvConfig("CartPoll-v1"), "did you mean CartPole-v1"),
        (EnvConfig("ALE/Breakot-v5"), "did you mean ALE/Breakout-v5"),
        (EnvConfig("no_such_module:make"), "No module named 'no_such_module'"),
        (EnvConfig("tests.counting_env:nothing"), "no attribute 'nothing'"),
        (EnvConfig(lambda n: counting_env.make_one()), "VectorEnv, got CountingEnv"),
        (EnvConfig("CartPole-v1", protocol="classic"), "starts with 'ALE/'"),
        (EnvConfig("CartPole-v1", atari={"noop_max": 1}), "use env.kwargs"),
        (EnvConfig(lambda n: None, vectorization="async"), r"<lambda> \(.*test_envs.py:\d+\) is"),
        (
            EnvConfig("tests.counting_env:CountingEnv", vectorization="async"),
            "called with num_envs to make a vector env itself; for single environments gymnasium",
        ),
        (EnvConfig(counting_env.CountingEnv), r"got CountingEnv, a class of single environments"),
        (
            EnvConfig("tests.counting_env:CountingEnv"),
            r"as lambda num_envs: SyncVectorEnv\(\[CountingEnv\] \* num_envs\), or gymnasium.reg",
        ),
        (
            EnvConfig("tests.counting_env:make_one"),
            r"expected tests.counting_env:make_one to take num_envs, got \(\); write def make\(",
        ),
        (EnvConfig(lambda: None), r"expected .*<lambda> \(.*:\d+\) to take num_envs, got \(\);"),
        (EnvConfig(lambda n: 3), r"expected .*<lambda> \(.*:\d+\) to make a .*VectorEnv, got int"),
        (atari(kwargs={"stack_num": 4}), "expected stack_num=1, got 4"),
        (atari(atari={"reward_clipping": True}), "expected reward_clipping=False"),
        (atari(kwargs={"episodic_life": True}), "expected episodic_life=False"),
        (atari(protocol="none", kwargs={"episodic_life": True}), "expected episodic_life=False"),
        (atari(protocol="none", kwargs={"reward_clipping": True}), "expected reward_clipping=Fal"),
        (atari(kwargs={"autoreset_mode": AutoresetMode.SAME_STEP}), "NEXT_STEP, got"),
        (atari(kwargs={"batch_size": 1}), "in batches of 1"),
        (EnvConfig("CartPole-v1", max_idle_steps=-1), "0 or more"),
        (EnvConfig("CartPole"), "no environment 'CartPole'; did you mean CartPole-v"),
    ],
)
def test_refusals(config, words):
    with pytest.raises(ValueError, match=words):
        make_envs(config, 2)


class Foreign(VectorEnv):
    """A user's own vector env: one buffer, written again at each step."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012
    single_observation_space = spaces.Box(0, 9, (2,), np.float32)
    single_action_space = spaces.MultiDiscrete([2, 3])

    def __init__(self, num_envs, **spaces):
        self.num_envs = num_envs
        self.__dict__.update(spaces)
        self.buffer = np.zeros((num_envs, 2), np.float32)
        self.reward = np.zeros(num_envs)

    def reset(self, *, seed=None, options=None):
        self.buffer[:] = 0
        return self.buffer, {}

    def step(self, actions):
        self.buffer += 1
        no = np.zeros(self.num_envs, bool)
        return self.buffer, self.reward, no, no, {}


def test_a_foreign_vector_env(make):
    group = make(EnvConfig(Foreign), 2)
    obs = [group.reset(0)]
    obs += [step.obs for step in play(group, np.zeros((3, 2, 2), int))]
    assert [o[0, 0] for o in obs] == [0, 1, 2, 3]
    assert group.action_space.shape == (2,)


@pytest.mark.parametrize(
    ("spaces_", "words"),
    [
        ({"single_observation_space": spaces.Text(3)}, "obs: expected Box"),
        ({"single_observation_space": spaces.Dict(a=spaces.Graph(spaces.Box(0, 1), None))}, "'a'"),
        ({"single_observation_space": spaces.Dict()}, r"named by strings, got Dict\(\)"),
        ({"single_observation_space": spaces.Dict({0: spaces.Box(0, 1)})}, "got the key 0"),
        ({"single_action_space": spaces.Dict(a=spaces.Discrete(2))}, "action space Discrete"),
        ({"single_action_space": spaces.Box(0, 1, (0,))}, "an action space of some numbers, got"),
        ({"metadata": {"autoreset_mode": AutoresetMode.SAME_STEP}}, "NEXT_STEP, got"),
        ({"metadata": {"autoreset_mode": AutoresetMode.DISABLED}}, "NEXT_STEP, got"),
    ],
)
def test_foreign_refusals(spaces_, words):
    with pytest.raises(ValueError, match=words):
        make_envs(EnvConfig(lambda n: Foreign(n, **spaces_)), 2)


def test_an_idle_guard_needs_single_resets():
    with pytest.raises(ValueError, match="cannot be asked to reset single environments"):
        make_envs(EnvConfig(Foreign, max_idle_steps=5), 2)


@pytest.mark.parametrize("metadata", [{}, VectorEnv.metadata])
def test_no_autoreset_mode_is_taken_for_next_step(make, metadata):
    with pytest.warns(UserWarning, match="taken for NEXT_STEP"):
        make(EnvConfig(lambda n: Foreign(n, metadata=metadata)), 2)


def test_a_step_after_an_end_that_is_no_reset_is_refused(make):
    """What an env that resets in the same step, unsaid, looks like from outside."""

    class Unsaid(Foreign):
        def step(self, actions):
            yes = np.ones(self.num_envs, bool)
            return self.buffer, self.reward + 1, yes, ~yes, {}

    group = make(EnvConfig(Unsaid), 2)
    group.reset(0)
    with pytest.raises(EnvDataError, match="the step after an end"):
        list(play(group, np.zeros((2, 2, 2), int)))


# --- failures


class Astray(gym.Env):
    """In its second step `what` it tells is not a finite number, if it is told to go astray."""

    observation_space = spaces.Dict(
        place=spaces.Box(-9, 9, (2,)), others=spaces.Tuple((spaces.Discrete(2), spaces.Box(-9, 9)))
    )
    action_space = spaces.MultiDiscrete([2, 2])

    def __init__(self, what, value):
        self.what, self.value = what, value

    def reset(self, *, seed=None, options=None):
        self.count = 0
        return self.obs(), {}

    def obs(self):
        astray = self.what if self.count == 2 else ""
        place = np.float32([0, self.value if astray == "place" else 0])
        height = np.float32([self.value if astray == "height" else 0])
        return {"place": place, "others": (np.int64(0), height)}

    def step(self, action):
        self.count += 1
        reward = self.value if self.what == "reward" and self.count == 2 else 0.0
        return self.obs(), reward, False, False, {}


@pytest.mark.filterwarnings("ignore:.*reward is a", "ignore:overflow encountered")
@pytest.mark.parametrize(
    ("what", "value", "words"),
    [
        ("reward", np.inf, r"rewards, got \[inf\] of environments \[1\] for .* \[\[1, 0\]\]"),
        ("reward", -1e300, r"finite rewards, got \[-inf\] of environments \[1\]"),  # in float32
        ("place", np.nan, r"obs\['place'\]: .* got \[nan\] from environments \[1\]"),
        ("height", -np.inf, r"obs\['others'\]\[1\]: .* got \[-inf\] from environments \[1\]"),
    ],
)
def test_what_is_not_finite_is_refused_by_environment_and_field(make, what, value, words):
    def three(num_envs):
        kinds = ["", what, ""]
        return SyncVectorEnv([lambda kind=kind: Astray(kind, value) for kind in kinds])

    group = make(EnvConfig(three), 3)
    group.reset(0)
    actions = np.array([[0, 0], [1, 0], [0, 1]])
    list(play(group, [actions]))
    with pytest.raises(EnvDataError, match=words):
        list(play(group, [actions]))


@pytest.mark.filterwarnings("ignore:.*reward is a NaN")
def test_nan_reward_and_wrong_observation_are_named(make):
    group = make(counting(reward="nan"), 2)
    group.reset(0)
    with pytest.raises(EnvDataError, match=r"finite rewards, got.*for actions"):
        list(play(group, np.zeros((1, 2), int)))
    wrong = spaces.Box(0, 9, (3,), np.float32)
    group = make(EnvConfig(lambda n: Foreign(n, single_observation_space=wrong)), 2)
    with pytest.raises(EnvDataError, match=r"expected float32 of shape \(2, 3\)"):
        group.reset(0)


def test_a_stalled_environment_does_not_keep_the_others_from_closing(make):
    group = make(counting("async", endless=True, failure="sleep"), 3)
    group.reset(0)
    pipes, processes = group._env.parent_pipes, group._env.processes
    for _ in range(5):
        group.send(np.zeros(3, int))
        if not pipes[1].poll(2):
            break
        group.recv()
    else:
        pytest.fail("environment 1 never fell asleep")
    start = time.monotonic()
    group.close()
    assert time.monotonic() - start < 4
    assert not any(process.is_alive() for process in processes)


def test_a_killed_worker_is_named(make):
    group = make(counting("async", endless=True), 3)
    group.reset(0)
    pid = group._env.processes[2].pid
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EnvDied, match=rf"environment 2 \(pid {pid}, exit code -9\) died"):
        list(play(group, np.zeros((3, 3), int)))


@pytest.mark.filterwarnings("ignore")
def test_a_worker_s_own_words_come_through(make):
    group = make(counting("async", endless=True, failure="raise"), 3)
    group.reset(0)
    with pytest.raises(RuntimeError, match="the cartridge caught fire"):
        list(play(group, np.zeros((5, 3), int)))


OWNER = """
import sys, time
from asyncrl.envs import EnvConfig, make_envs
group = make_envs(EnvConfig("CartPole-v1", vectorization="async"), 3)
group.reset(0)
print(*[process.pid for process in group._env.processes], flush=True)
time.sleep(60)
"""


def is_running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_workers_die_with_their_owner():
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    ) as owner:  # fmt: skip
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(pids) == 3 and all(map(is_running, pids))
        os.kill(owner.pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_running, pids))


def test_close_twice_and_in_the_middle_of_a_step(make):
    for config in (counting("sync"), counting("async"), atari()):
        group = make(config, 2)
        group.reset(0)
        group.send(np.zeros(2, int))
        group.close()
        group.close()


def test_what_ale_plays_before_the_first_observation():
    """As `eval` says it: up to 29 no-ops, the first of which is FIRE in Breakout."""
    config = EnvConfig("ALE/Breakout-v5", protocol="classic", num_threads=1).resolved()
    envs = gym.make_vec(config.id, 8, "vector_entry_point", **config.atari, num_threads=1)
    frames = [envs.reset(seed=seed * 100)[1]["episode_frame_number"] for seed in range(30)]
    envs.close()
    assert np.min(frames) == 1 and np.max(frames) == 29


def test_a_wrapped_atari_vector_env_keeps_its_lives(make):
    """A user's own Atari: known by the env inside, though it can only step()."""

    def build(num_envs):
        env = gym.make_vec(
            "ALE/Breakout-v5", num_envs, stack_num=1, reward_clipping=False, life_loss_info=True
        )
        return gym.wrappers.vector.RecordEpisodeStatistics(env)

    wrapped, plain = make(EnvConfig(build), 2), make(atari(kwargs={}), 2)
    wrapped.reset(0), plain.reset(0)
    assert wrapped.env_step_frames == 4
    ended = 0
    for step in play(wrapped, np.random.default_rng(0).integers(0, 4, (200, 2))):
        ended += (step.terminated & ~step.game_over).sum()
    assert ended > 2


def test_sync_callables_are_vector_envs_too(make):
    group = make(EnvConfig(lambda n: SyncVectorEnv([counting_env.make_one] * n)), 2)
    assert group.reset(4)[:, 0].tolist() == [4, 5]


def test_rewards_of_atari_are_whole_without_a_protocol_too(make):
    plain = atari(protocol="none", kwargs={"stack_num": 2}).resolved()
    assert plain.kwargs == {"stack_num": 2, "reward_clipping": False, "episodic_life": False}
    group = make(EnvConfig("ALE/MsPacman-v5", protocol="none"), 2)
    group.reset(0)
    rewards = set()
    for _ in range(150):
        group.send(np.array([2, 3]))
        rewards.update(group.recv().reward.tolist())
    assert max(rewards) >= 10  # of each pill
    assert group.observation_space.shape == (4, 84, 84)  # ALE's own stack is as it is
    group.close()


def test_a_reset_for_standing_still_takes_no_other_ones_word_that_its_game_goes_on(make):
    """Gymnasium's info of a reset of some environments says False for all others."""

    class Lives(gym.Env):
        observation_space, action_space = spaces.Box(0, 9, (1,)), spaces.Discrete(2)

        def __init__(self, standing):
            self.standing = standing

        def reset(self, *, seed=None, options=None):
            self.count = 0
            return np.zeros(1, np.float32), {"game_goes_on": False}

        def step(self, action):
            self.count += 1
            ended = not self.standing and self.count == 3
            reward = 0.0 if self.standing else 1.0
            return np.zeros(1, np.float32), reward, ended, False, {"game_goes_on": ended}

    def vector(num_envs):
        lives = [lambda env=env: Lives(env == 1) for env in range(num_envs)]
        return SyncVectorEnv(lives, autoreset_mode=AutoresetMode.NEXT_STEP)

    group = make(EnvConfig(vector, max_idle_steps=2), 2)
    group.reset(0)
    ended = []
    for _ in range(12):
        group.send(np.zeros(2, int))
        step = group.recv()
        if step.game_over[0]:
            ended.append(bool(step.goes_on[0]))
    assert len(ended) == 3 and all(ended)
