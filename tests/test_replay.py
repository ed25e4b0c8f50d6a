"""Replay: every draw against the slow bookkeeping of the stream it came from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from asyncrl.stores.limiter import RateLimiter
from asyncrl.stores.replay import Replay
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


def test_unrolls_inserted_again_rebuild_the_same_replay():
    """Restored from the live unrolls only, the same draws follow, bit for bit."""
    spec = make_spec(frame_stack=4)
    streams = [Stream(spec, lane, seed=3, frame_stack=4) for lane in range(2)]
    replay = make_replay(spec, frame_stack=4, n_step=3)
    log = []
    rng = np.random.default_rng(1)
    for round_ in range(50):
        for lane, stream in enumerate(streams):
            if rng.random() < 0.1 and round_:
                stream.restart()
            buffer = np.zeros(spec.layout.nbytes, np.uint8)
            log.append((lane, buffer, replay.position()))
            replay.insert(lane, stream.unroll(buffer))
    kept = log[-len(replay.unrolls) :]
    assert len(kept) < len(log)
    twin = make_replay(spec, frame_stack=4, n_step=3)
    twin.restart_at(kept[0][2])
    for lane, buffer, _ in kept:
        twin.insert(lane, spec.layout.views(buffer))
    twin.load_state_dict(replay.state_dict())
    for _ in range(40):
        buffer = np.zeros(spec.layout.nbytes, np.uint8)
        for lane, stream in enumerate(streams):
            unroll = stream.unroll(buffer)
            replay.insert(lane, unroll)
            twin.insert(lane, unroll)
        for ours, theirs in zip(replay.sample(), twin.sample(), strict=True):
            ours, theirs = (x.get("frames") if isinstance(x, dict) else x for x in (ours, theirs))
            assert torch.equal(ours, theirs)


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
    assert limiter.insert_limit() == 1_120
    limiter.inserted = 1_100
    assert limiter.updates_allowed() == 0
    limiter.inserted = 1_104
    assert limiter.updates_allowed() == 1
