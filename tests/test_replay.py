"""Replay: every draw against the slow bookkeeping of the stream it came from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces

from asyncrl.schedules import Linear
from asyncrl.stores.limiter import RateLimiter
from asyncrl.stores.replay import Replay, ReplayConfig
from asyncrl.stores.replay_config import fits_on_gpu
from asyncrl.types import Spec, tree_leaves
from tests.streams import Stream, make_spec


def make_replay(spec, num_lanes=2, capacity=200, batch_size=32, **options) -> Replay:
    limiter = RateLimiter(1.0, batch_size, 0, 0, spec.unroll_length * spec.num_envs * num_lanes)
    return Replay(spec, num_lanes, capacity, batch_size, limiter, **options)


def where(number: int) -> tuple[int, int, int]:
    """(lane, moment, env) of an observation of the stream."""
    return number // 1_000_000, number % 1_000_000 // 10, number % 10


def expected(stream: Stream, moment: int, env: int, n: int, cuts: set[int]) -> dict:
    """What a transition at a moment must hold, step by step. `cuts`: moments a seam cut behind."""
    rewards, terminated, at = [], False, moment
    for _ in range(n):
        row = stream.rows[at]
        rewards.append(float(row["reward"][env]))
        at += 1
        if row["terminated"][env]:
            terminated = True
            break
        if row["truncated"][env] or at - 1 in cuts:
            break
    steps = at - moment
    return {
        "stack": stream.stack(moment, env),
        "reward": rewards + [0.0] * (n - steps),
        "steps": steps,
        "terminated": terminated,
        "next_stack": stream.stack(at, env),
        "action": int(stream.rows[moment]["action"][env]),
    }


def check_sample(replay, streams, n, cuts) -> set[int]:
    """Compare one batch with the streams; returns the observations drawn."""
    sample = replay.sample()
    drawn = set()
    for i in np.nonzero(sample.weight.numpy())[0]:
        number = int(sample.obs[0, i])
        lane, moment, env = where(number)
        stream = streams[lane]
        assert stream.rows[moment]["valid"][env]
        want = expected(stream, moment, env, n, cuts[lane])
        before = sample.state["frames"][i].tolist() if sample.state else []
        after = sample.next_state["frames"][i].tolist() if sample.next_state else []
        assert [*before, number] == want["stack"]
        assert sample.steps[i] == want["steps"]
        assert bool(sample.terminated[i]) == want["terminated"]
        assert sample.reward[:, i].tolist() == pytest.approx(want["reward"])
        assert sample.action[i] == want["action"]
        if not want["terminated"]:
            assert [*after, int(sample.next_obs[0, i])] == want["next_stack"]
        drawn.add(number)
    return drawn


@pytest.mark.parametrize("frame_stack", [1, 4])
@pytest.mark.parametrize("n", [1, 3])
def test_every_draw_is_what_the_stream_held(frame_stack, n):
    """Across ends, lost lives, wrap-around of the lane, restarts and lost unrolls."""
    spec = make_spec(frame_stack=frame_stack)
    streams = [Stream(spec, lane, seed=n, frame_stack=frame_stack) for lane in range(2)]
    replay = make_replay(spec, frame_stack=frame_stack, n_step=n)
    cuts: list[set[int]] = [set(), set()]
    buffer = np.zeros(spec.layout.nbytes, np.uint8)
    rng = np.random.default_rng(0)
    num_drawn = 0
    for round_ in range(60):
        for lane, stream in enumerate(streams):
            event = rng.random()
            if event < 0.1 and round_:
                cuts[lane].add(stream.moment - 1)
                stream.restart()
            elif event < 0.2 and round_:
                cuts[lane].add(stream.moment - 1)
                stream.unroll(buffer)  # lost on the way
            replay.insert(lane, stream.unroll(buffer))
        for _ in range(5):
            num_drawn += len(check_sample(replay, streams, n, cuts))
    assert num_drawn > 3_000


@pytest.mark.parametrize("frame_stack,n", [(1, 1), (4, 3)])
def test_exactly_the_drawable_rows_are_drawn(frame_stack, n):
    """All rows with a whole stack and a whole window among the newest, each equally often."""
    spec = make_spec(frame_stack=frame_stack)
    stream = Stream(spec, 0, seed=5, frame_stack=frame_stack)
    replay = make_replay(spec, num_lanes=1, capacity=60, frame_stack=frame_stack, n_step=n)
    buffer = np.zeros(spec.layout.nbytes, np.uint8)
    unrolls = []
    for _ in range(12):
        start = stream.moment
        unrolls.append((start, int(replay.insert(0, stream.unroll(buffer)))))
    inserted = sum(count for _, count in unrolls)
    live = replay.lanes[0].end - replay.rows
    base = stream.moment - (replay.lanes[0].end - 1)  # moment of row 0
    want, so_far = set(), 0
    for start, count in unrolls:
        expired = inserted - so_far > 60
        so_far += count
        for moment in range(start, start + spec.unroll_length):
            for env in range(spec.num_envs):
                if expired or not stream.rows[moment]["valid"][env]:
                    continue
                reach = moment
                for _ in range(frame_stack - 1):
                    if not stream.rows[reach]["first"][env]:
                        reach -= 1
                last = stream.moment
                steps = [
                    stream.rows[at]["terminated"][env] or stream.rows[at]["truncated"][env]
                    for at in range(moment, min(moment + n, last))
                ]
                whole = any(steps) or moment + n <= last
                if whole and reach - base >= live:
                    want.add(int(stream.obs_of(moment)[env]))
    counts: dict[int, int] = {}
    num_draws = 0
    for _ in range(600):
        sample = replay.sample()
        assert sample.weight.all()
        for number in sample.obs[0].tolist():
            counts[number] = counts.get(number, 0) + 1
            num_draws += 1
    assert set(counts) == want
    mean = num_draws / len(want)
    chi_square = sum((count - mean) ** 2 / mean for count in counts.values())
    degrees = len(want) - 1
    assert abs(chi_square - degrees) < 5 * np.sqrt(2 * degrees)


def test_a_lane_that_stands_still_is_not_replayed_for_ever():
    spec = make_spec()
    streams = [Stream(spec, lane, seed=1) for lane in range(2)]
    replay = make_replay(spec, capacity=100)
    buffer = np.zeros(spec.layout.nbytes, np.uint8)
    replay.insert(1, streams[1].unroll(buffer))
    for _ in range(12):
        replay.insert(0, streams[0].unroll(buffer))
    for _ in range(50):
        assert {where(number)[0] for number in replay.sample().obs[0].tolist()} == {0}


def test_a_lane_that_expired_while_it_stood_still_goes_on_with_what_is_new():
    spec = make_spec()
    streams = [Stream(spec, lane, seed=1) for lane in range(2)]
    replay = make_replay(spec, capacity=100, n_step=3)
    buffer = np.zeros(spec.layout.nbytes, np.uint8)
    replay.insert(1, streams[1].unroll(buffer))
    begun = streams[1].moment
    for _ in range(12):
        replay.insert(0, streams[0].unroll(buffer))
    replay.insert(1, streams[1].unroll(buffer))
    drawn = {where(n) for _ in range(50) for n in replay.sample().obs[0].tolist()}
    assert {lane for lane, _, _ in drawn} == {0, 1}
    assert min(moment for lane, moment, _ in drawn if lane) >= begun


@pytest.mark.parametrize("exponent", [0.0, 0.6])
def test_unrolls_inserted_again_rebuild_the_same_replay(exponent):
    """Restored from the live unrolls only, the same draws follow, bit for bit."""
    spec = make_spec(frame_stack=4)
    streams = [Stream(spec, lane, seed=3, frame_stack=4) for lane in range(2)]
    options = dict(frame_stack=4, n_step=3, priority_exponent=exponent)
    replay = make_replay(spec, **options)
    log = []
    rng = np.random.default_rng(1)
    for round_ in range(50):
        for lane, stream in enumerate(streams):
            if rng.random() < 0.1 and round_:
                stream.restart()
            buffer = np.zeros(spec.layout.nbytes, np.uint8)
            log.append((lane, buffer, replay.position()))
            replay.insert(lane, stream.unroll(buffer))
            replay.update_priorities(replay.sample().index, torch.randn(32))
    kept = log[-len(replay.unrolls) :]
    assert len(kept) < len(log)
    twin = make_replay(spec, **options)
    twin.restart_at(kept[0][2])
    for lane, buffer, _ in kept:
        twin.insert(lane, spec.layout.views(buffer))
    twin.load_state_dict(replay.state_dict())
    for _ in range(40):
        buffer = np.zeros(spec.layout.nbytes, np.uint8)
        errors = torch.randn(32)
        for lane, stream in enumerate(streams):
            unroll = stream.unroll(buffer)
            replay.insert(lane, unroll)
            twin.insert(lane, unroll)
        samples = [store.sample() for store in (replay, twin)]
        for ours, theirs in zip(*map(tree_leaves, samples), strict=True):
            assert torch.equal(ours, theirs)
        for store, sample in zip((replay, twin), samples, strict=True):
            store.update_priorities(sample.index, errors)


SMALL = Spec(16, 4, spaces.Box(-1, 1, (2,)), spaces.Discrete(2), {})


def put(replay: Replay, sequences: range) -> None:
    """Unrolls of zeros into both lanes."""
    for sequence in sequences:
        for lane in range(2):
            unroll = SMALL.layout.views(bytearray(SMALL.layout.nbytes))
            unroll.valid[...], unroll.header.sequence[...] = True, sequence
            replay.insert(lane, unroll)


def test_what_a_stream_has_lost_is_not_proposed():
    """A disk that was full cuts the stream: few rows are left, and batches are as full as ever."""
    full = make_replay(SMALL, capacity=10_000)
    put(full, range(100))
    base = full.position()
    put(full, range(100, 104))
    replay = make_replay(SMALL, capacity=10_000)
    replay.restart_at(base)
    put(replay, range(100, 104))
    replay.load_state_dict(full.state_dict())
    for _ in range(20):
        assert (replay.sample().weight > 0).all()


def test_a_refill_that_is_resumed_is_not_begun_again():
    """A replay was lost, 640 env steps are due before updates; 256 of them were in when it was
    saved, and 384 are still due."""

    def make() -> Replay:
        limiter = RateLimiter(1.0, 32, learning_starts=640, tolerance=0, round_env_steps=128)
        return Replay(SMALL, 2, 10_000, 32, limiter)

    full = make()
    put(full, range(10))
    assert full.updates_allowed() == 640 // 32
    base = full.position()
    lost = make()
    lost.restart_at(base)
    lost.load_state_dict(full.state_dict())
    put(lost, range(10, 12))
    resumed = make()
    resumed.restart_at(base)
    put(resumed, range(10, 12))
    resumed.load_state_dict(lost.state_dict())
    for sequence in range(12, 15):
        assert resumed.updates_allowed() == lost.updates_allowed() == 0
        assert resumed.limiter.filling
        put(resumed, range(sequence, sequence + 1))
        put(lost, range(sequence, sequence + 1))
    assert resumed.updates_allowed() == lost.updates_allowed() == 0
    assert not resumed.limiter.filling
    put(resumed, range(15, 16))
    assert resumed.updates_allowed() == 128 // 32


# -- priorities ------------------------------------------------------------------------------------


class Priorities:
    """A prioritised replay with lanes that restart, and a slow account of what it must hold."""

    def __init__(self, **options):
        self.spec = make_spec(frame_stack=3)
        self.streams = [Stream(self.spec, lane, seed=8, frame_stack=3) for lane in range(2)]
        settings = dict(frame_stack=3, n_step=2, priority_exponent=0.6) | options
        self.replay = make_replay(self.spec, **settings)
        self.largest, self.priority = 1.0, {}  # by observation
        self.rng = np.random.default_rng(0)

    def round(self) -> None:
        """An unroll of each lane; what can be drawn comes in with the largest priority so far."""
        buffer = np.zeros(self.spec.layout.nbytes, np.uint8)
        for lane, stream in enumerate(self.streams):
            if self.rng.random() < 0.1:
                stream.restart()
            self.replay.insert(lane, stream.unroll(buffer))
            drawable = set(self.replay.obs[self.replay.selection.drawable].tolist())
            self.priority = {n: self.priority.get(n, self.largest) for n in drawable}

    def learn(self, sample, errors: torch.Tensor) -> None:
        self.replay.update_priorities(sample.index, errors)
        for number, error in zip(sample.obs[0].tolist(), errors.tolist(), strict=True):
            priority = (abs(error) + 1e-6) ** 0.6
            if number in self.priority and np.isfinite(priority):
                self.priority[number] = priority
                self.largest = max(self.largest, priority)

    def check(self) -> None:
        replay, leaves = self.replay, self.replay.selection.priority
        held = dict(zip(replay.obs[leaves > 0].tolist(), leaves[leaves > 0].tolist(), strict=True))
        assert held == pytest.approx(self.priority, rel=1e-5)
        total = replay.selection.tree.total()
        assert total == pytest.approx(float(leaves.double().sum()), rel=1e-12)


def test_priorities_follow_what_is_learned_and_what_comes_in():
    """Entering, updates with duplicates and bad errors, write-backs that come too late."""
    slow = Priorities()
    late, num_late = None, 0
    for round_ in range(50):
        slow.round()
        slow.check()
        sample = slow.replay.sample()
        drawn = sample.obs[0].tolist()
        error_of = {number: 3 * slow.rng.normal() for number in drawn}  # also of duplicates
        error_of[drawn[0]] = [float("nan"), float("inf"), 0.0, -5.0][round_ % 4]
        errors = torch.tensor([error_of[number] for number in drawn])
        slow.learn(sample, errors)
        slow.check()
        if round_ % 5 == 0:
            late = sample
        elif round_ % 5 == 4:
            num_late += len(set(late.obs[0].tolist()) - set(slow.priority))
            slow.learn(late, torch.full((32,), 2.0))
            slow.check()
    assert num_late > 50 and len(slow.priority) > 100


def test_duplicates_in_one_update_leave_one_of_their_values():
    slow = Priorities()
    for _ in range(10):
        slow.round()
    sample = slow.replay.sample()
    three = type(sample.index)(*(part[[4, 4, 4, 9]] for part in sample.index))
    slow.replay.update_priorities(three, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    leaves = slow.replay.selection.priority
    assert leaves[slow.replay.obs == sample.obs[0, 4]] == pytest.approx(3**0.6, rel=1e-5)
    total = slow.replay.selection.tree.total()
    assert total == pytest.approx(float(leaves.double().sum()), rel=1e-12)


def test_rows_are_drawn_in_proportion_and_weighed_against_it():
    slow = Priorities(importance_exponent=Linear(0.4, 1.0, 300))
    for _ in range(25):
        slow.round()
        slow.learn(slow.replay.sample(), torch.randn(32))
    for _ in range(20):
        sample = slow.replay.sample()
        slow.learn(sample, 1.0 + sample.obs[0] % 7)
    priority, counts = slow.priority, dict.fromkeys(slow.priority, 0)
    exponent = Linear(0.4, 1.0, 300).at(slow.replay.limiter.inserted)
    assert exponent == 1.0
    for _ in range(500):
        sample = slow.replay.sample()
        drawn = sample.obs[0].tolist()
        want = np.array([priority[number] for number in drawn]) ** -exponent
        assert sample.weight.tolist() == pytest.approx((want / want.max()).tolist(), rel=1e-5)
        for number in drawn:
            counts[number] += 1
    total, num_draws = sum(priority.values()), 16_000
    expected = {number: num_draws * value / total for number, value in priority.items()}
    often = [number for number in expected if expected[number] > 5]
    chi_square = sum((counts[n] - expected[n]) ** 2 / expected[n] for n in often)
    assert len(often) > 50  # stratified draws vary less than independent ones
    assert chi_square < len(often) + 5 * np.sqrt(2 * len(often))


def test_uniform_draws_take_no_notice_of_errors():
    spec = make_spec()
    replay, stream = make_replay(spec, num_lanes=1, capacity=100), Stream(spec, 0, seed=1)
    for _ in range(5):
        replay.insert(0, stream.unroll(np.zeros(spec.layout.nbytes, np.uint8)))
    sample = replay.sample()
    replay.update_priorities(sample.index, torch.full((32,), float("nan")))
    assert (replay.sample().weight == 1).all() and "priority" not in replay.state_dict()


def test_memory_is_what_nbytes_says():
    for exponent in (0.0, 0.6):
        replay = Priorities(priority_exponent=exponent).replay
        columns = [
            replay.obs, replay.action, replay.reward, replay.first, replay.terminated,
            replay.truncated, replay.valid, replay.selection.drawable,
        ]  # fmt: skip
        if exponent:
            columns += [replay.selection.tree.blocks, replay.selection.tree.sums]
        held = sum(column.numel() * column.element_size() for column in columns)
        assert Replay.nbytes(replay.spec, 2, 200, 3, 2, priority_exponent=exponent) == held


@pytest.mark.parametrize("field, value", [
    ("priority_exponent", -0.1), ("priority_exponent", 1.1), ("priority_exponent", float("nan")),
    ("importance_exponent", 2.0), ("state_dtype", "bfloat16"),
])  # fmt: skip
def test_settings_that_mean_nothing_are_refused(field, value):
    with pytest.raises(ValueError, match=f"expected.*{field}.*got"):
        ReplayConfig(**{field: value})


def test_a_replay_fits_into_four_fifths_of_what_a_gpu_has_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 10**9, 8 * 10**9))
    assert fits_on_gpu("cuda", 2_399_000_000) and not fits_on_gpu("cuda", 2_401_000_000)


def test_refusals():
    spec = make_spec()
    with pytest.raises(ValueError, match="at least one unroll of every lane, 30 env steps, got 20"):
        make_replay(spec, capacity=20)
    with pytest.raises(ValueError, match="tolerance of at least 62"):
        RateLimiter(1.0, 32, 0, 61, 30)
    assert RateLimiter(1.0, 32, 0, 62, 30).insert_limit() == 62


def test_the_limiter_keeps_the_ratio_from_both_sides():
    limiter = RateLimiter(8.0, 32, learning_starts=100, tolerance=20, round_env_steps=10)
    limiter.inserted = 103
    assert limiter.updates_allowed() == 0
    limiter.inserted = 108
    assert limiter.updates_allowed() == 2
    assert limiter.insert_limit() == 120
    limiter.sampled += 64
    assert limiter.updates_allowed() == 0
    assert limiter.insert_limit() == 128
    assert limiter.actual() == 8.0


def test_a_replay_resumed_empty_is_filled_before_it_is_drawn_from():
    limiter = RateLimiter(8.0, 32, learning_starts=100, tolerance=20, round_env_steps=10)
    limiter.inserted, limiter.sampled = 1_000, 4_000
    limiter.refill()
    assert limiter.updates_allowed() == 0
    assert np.isnan(limiter.actual())  # not 4,000 samples of the first new step
    assert limiter.insert_limit() == 1_120
    limiter.inserted = 1_100
    assert limiter.updates_allowed() == 0
    limiter.inserted = 1_104
    assert limiter.updates_allowed() == 1
    assert limiter.actual() == pytest.approx(4_000 / 504)
