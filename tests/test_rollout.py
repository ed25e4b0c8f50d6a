"""The rollout queue: every unroll once, in order, and never too many ahead of the learner."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium import spaces

from asyncrl.algorithms.a2c import A2CConfig
from asyncrl.algorithms.ppo import PPOConfig
from asyncrl.models.cores import FrameStack
from asyncrl.state import flatten, unflatten
from asyncrl.stores.rollout import Rollout, RolloutConfig, RolloutQueue, Sequences, Steps
from asyncrl.transport.ring import Word
from asyncrl.types import Field, Header, Spec, poison, tree_leaves, tree_map
from tests.streams import Stream, make_spec
from tests.test_on_policy import CPU, Box

FIELDS = ("obs", "first", "action", "log_prob", "reward", "terminated", "truncated", "valid")


class Lanes:
    """Streams that fill one buffer a lane, over and over, and copies of all they made."""

    def __init__(self, spec: Spec, num_lanes: int, frame_stack: int = 1):
        self.spec = spec
        self.streams = [Stream(spec, lane, 1, frame_stack) for lane in range(num_lanes)]
        self.buffers = [bytearray(spec.layout.nbytes) for _ in range(num_lanes)]
        self.rng, self.made = np.random.default_rng(0), []

    def unroll(self, lane: int, version: int = 1):
        views = self.spec.layout.views(self.buffers[lane])
        poison(views)
        unroll = self.streams[lane].unroll(self.buffers[lane])
        unroll.log_prob[...] = self.rng.normal(size=unroll.log_prob.shape)
        unroll.header.version[...] = version
        self.made.append(tree_map(np.copy, unroll))
        return unroll

    def fill(self, queue: RolloutQueue, count: int, version: int = 1) -> None:
        for _ in range(count):
            lane = int(self.rng.integers(len(self.streams)))
            unroll = self.unroll(lane, version)
            assert queue.insert(lane, unroll) == unroll.valid.sum()
            poison(unroll)  # the slot is the actor's again


def assert_columns(rollout: Rollout, unrolls: list) -> None:
    """Bit for bit those unrolls, side by side."""
    B = unrolls[0].first.shape[1]
    assert rollout.first.shape[1] == B * len(unrolls)
    for index, unroll in enumerate(unrolls):
        columns = slice(B * index, B * (index + 1))
        for name in FIELDS:
            got, want = getattr(rollout, name), getattr(unroll, name)
            for part, whole in zip(tree_leaves(want), tree_leaves(got), strict=True):
                assert np.array_equal(whole[:, columns].numpy(), part), name
                assert whole.numpy().dtype == part.dtype
        for part, whole in zip(tree_leaves(unroll.state), tree_leaves(rollout.state), strict=True):
            assert np.array_equal(whole[columns].numpy(), part[0])


@pytest.mark.parametrize("num_unrolls", [0, 1, 3])
@pytest.mark.parametrize("frame_stack", [1, 4])
def test_every_unroll_comes_out_once_in_order_in_its_columns(num_unrolls, frame_stack):
    lanes = Lanes(make_spec(frame_stack=frame_stack), 2, frame_stack)
    queue = RolloutQueue(RolloutConfig(num_unrolls, ahead=2), lanes.spec, 2, epochs=3)
    each, taken = num_unrolls or 2, 0
    assert np.isnan(queue.limiter.actual())
    for count in (1, 4, 0, 7, 2, 5):
        lanes.fill(queue, count)
        assert queue.updates_allowed() == (len(lanes.made) - taken) // each
        while queue.updates_allowed():
            assert_columns(queue.sample(CPU), lanes.made[taken : taken + each])
            queue.used(3)
            taken += each
            steps = [int(unroll.valid.sum()) for unroll in lanes.made]
            assert queue.limiter.inserted == sum(steps) < 15 * len(steps)
            assert queue.limiter.sampled == 3 * sum(steps[:taken])
    assert queue.limiter.actual() == pytest.approx(3 * sum(steps[:taken]) / sum(steps))


def test_trees_and_the_first_of_several_states():
    space = spaces.Dict({"a": spaces.Box(0, 9, (2,)), "b": spaces.Tuple([spaces.Discrete(3)])})
    state = {"h": Field((2,), "float32"), "more": (Field((), "int64"),)}
    spec = Spec(4, 2, space, spaces.MultiDiscrete([3, 2]), state, num_states=2)
    queue, rng, made = RolloutQueue(RolloutConfig(2), spec, 3), np.random.default_rng(0), []
    for _ in range(2):
        unroll = spec.layout.views(bytearray(spec.layout.nbytes))
        tree_map(lambda leaf: leaf.__setitem__(..., rng.integers(0, 2, leaf.shape)), unroll)
        queue.insert(0, unroll)
        made.append(unroll)
    rollout = queue.sample(CPU)
    assert_columns(rollout, made)
    assert rollout.action.shape == (4, 4, 2) and rollout.obs["a"].shape == (5, 4, 2)
    assert rollout.state["h"].shape == (4, 2) and rollout.obs["b"][0].dtype == torch.int64


def test_room_falls_as_the_queue_fills():
    lanes = Lanes(make_spec(), 2)
    queue = RolloutQueue(RolloutConfig(num_unrolls=2, ahead=2), lanes.spec, 2)
    for count in range(7):  # of (1 + 2) rollouts
        assert queue.insert_limit() - queue.limiter.inserted == (6 - count) * 15
        assert queue.metrics()["rollout/fill"] == count / 6
        if count < 6:
            lanes.fill(queue, 1)
    queue.sample(CPU)
    assert queue.insert_limit() - queue.limiter.inserted == 2 * 15
    # Of each lane: all that is ever in flight, rounded up.
    rounds = [RolloutQueue(RolloutConfig(n, 1), lanes.spec, 4).limiter.rounds_ahead for n in (0, 3)]
    assert rounds == [2, 2]


def test_what_is_too_old_is_dropped_and_counted():
    lanes = Lanes(make_spec(), 2)
    queue = RolloutQueue(RolloutConfig(num_unrolls=2, ahead=1, max_lag=3), lanes.spec, 2)
    for version in (1, 5, 2, 4, 3):
        lanes.fill(queue, 1, version)
    inserted = queue.limiter.inserted
    queue.expire(4)
    assert len(queue.unrolls) == 5 and queue.dropped == 0
    queue.expire(5)
    assert queue.dropped == 1 and queue.metrics()["rollout/dropped"] == 1
    queue.expire(6)
    assert queue.dropped == 2 and queue.limiter.inserted == inserted
    assert_columns(queue.sample(CPU), [lanes.made[1], lanes.made[3]])
    assert queue.lags == [1, 2] and queue.metrics()["rollout/lag"] == 1.5
    queue.expire(1_000)
    assert queue.dropped == 3 and not queue.unrolls
    keeps_all = RolloutQueue(RolloutConfig(max_lag=0), lanes.spec, 2)
    lanes.fill(keeps_all, 3, version=1)
    keeps_all.expire(1_000)
    assert len(keeps_all.unrolls) == 3 and keeps_all.dropped == 0


@pytest.mark.parametrize("count", [0, 5])
def test_saved_and_loaded_it_is_the_same(count):
    lanes = Lanes(make_spec(frame_stack=3), 2, 3)
    config = RolloutConfig(num_unrolls=2, ahead=1, max_lag=2)
    queue = RolloutQueue(config, lanes.spec, 2, epochs=4)
    lanes.fill(queue, 4, version=1)
    queue.sample(CPU)
    queue.used(4)
    queue.expire(9)
    lanes.fill(queue, count, version=9)
    arrays, numbers = flatten(queue.state_dict())
    other = RolloutQueue(config, lanes.spec, 2, epochs=4)
    Lanes(make_spec(frame_stack=3), 2, 3).fill(other, 1)  # of an unusable checkpoint
    other.restart_at(other.position())
    other.load_state_dict(unflatten(arrays | numbers))
    for name in ("inserted", "sampled"):
        assert getattr(other.limiter, name) == getattr(queue.limiter, name) > 0
    assert other.dropped == queue.dropped == 2
    assert len(other.unrolls) == len(queue.unrolls) == count
    for one, two in zip(queue.unrolls, other.unrolls, strict=True):
        assert isinstance(two.header, Header) and int(two.header.version) == 9
        for a, b in zip(tree_leaves(one), tree_leaves(two), strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    for _ in range(count // 2):
        for a, b in zip(*(tree_leaves(q.sample(CPU)) for q in (queue, other)), strict=True):
            assert torch.equal(a, b)
    assert other.insert_limit() == queue.insert_limit()


def test_saved_without_values_that_are_needed_now_unrolls_are_dropped_and_counted():
    """As by a revision that had none, or with other options."""
    lanes = Lanes(make_spec(), 2)
    queue = RolloutQueue(RolloutConfig(), lanes.spec, 2)
    lanes.fill(queue, 3)
    arrays, numbers = flatten(queue.state_dict())
    other = RolloutQueue(RolloutConfig(), replace(lanes.spec, values=True), 2)
    other.load_state_dict(unflatten(arrays | numbers))
    assert not other.unrolls and other.dropped == 3
    assert other.limiter.inserted == queue.limiter.inserted > 0


# -- minibatches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("frame_stack", [1, 2, 4, 9])
def test_steps_are_what_the_models_own_stack_makes_of_the_sequence(frame_stack):
    """At once, one step at a time, and by walking back in the stream."""
    lanes = Lanes(make_spec(7, 3, frame_stack), 2, frame_stack)
    queue = RolloutQueue(RolloutConfig(), lanes.spec, 2)
    core, opened = FrameStack(frame_stack, (), torch.int32), 0
    for _ in range(8):
        for lane in (0, 1):
            begins = lanes.streams[lane].moment
            queue.insert(lane, lanes.unroll(lane))
            assert lanes.streams[lane].moment == begins + 7
        rollout = queue.sample(CPU)
        opened += int(rollout.first[1:].sum())
        T, N = rollout.action.shape
        whole, _ = core(rollout.obs[:T], rollout.first[:T], rollout.state)
        steps = Steps(rollout, frame_stack)
        index = torch.randperm(T * N, generator=torch.Generator().manual_seed(0))
        for part in (index, index[:5], index[:1]):
            obs, first, state = steps[part]
            assert first.shape == obs.shape == (1, len(part))
            assert torch.equal(first[0], rollout.first[:T].flatten()[part])
            stack, _ = core(obs, first, state)
            assert torch.equal(stack[0], whole.flatten(0, 1)[part])
            for at, row in zip(part.tolist(), stack[0].tolist(), strict=True):
                t, env = divmod(at, N)
                stream, moment = lanes.streams[env // 3], begins + t
                assert row == stream.stack(moment, env % 3)
    assert opened > 20


def test_steps_of_trees():
    T, N = 4, 3
    obs = {"a": torch.randn(T + 1, N, 2), "b": (torch.arange((T + 1) * N).view(T + 1, N),)}
    nothing = torch.zeros(T, N)
    first = torch.rand(T + 1, N) < 0.5
    steps = Steps(Rollout(obs, first, *[nothing] * 6, {}), 1)
    obs_of_steps, first_of_steps, state = steps[torch.tensor([7, 0, 11])]
    assert state == {} and obs_of_steps["b"][0].tolist() == [[7, 0, 11]]
    assert torch.equal(obs_of_steps["a"][0], obs["a"][[2, 0, 3], [1, 0, 2]])
    assert torch.equal(first_of_steps[0], first[[2, 0, 3], [1, 0, 2]])


def test_sequences_are_whole_columns():
    lanes = Lanes(make_spec(frame_stack=3), 2, 3)
    queue = RolloutQueue(RolloutConfig(), lanes.spec, 2)
    lanes.fill(queue, 2)
    rollout, envs = queue.sample(CPU), torch.tensor([4, 1])
    obs, first, state = Sequences(rollout)[envs]
    assert torch.equal(obs, rollout.obs[:5, envs]) and torch.equal(first, rollout.first[:5, envs])
    assert torch.equal(state["frames"], rollout.state["frames"][envs])


def test_refusals():
    for name in ("num_unrolls", "ahead", "max_lag"):
        with pytest.raises(ValueError, match=r"of at least 0, got .*-1"):
            RolloutConfig(**{name: -1})
    for ahead, max_lag in ((3, 3), (8, 8), (4, 1)):
        with pytest.raises(ValueError, match=f"above rollout.ahead={ahead}, got {max_lag}"):
            RolloutConfig(ahead=ahead, max_lag=max_lag)
    RolloutConfig(ahead=3, max_lag=4), RolloutConfig(ahead=100, max_lag=0)


def test_minibatches_that_cannot_be_are_refused():
    memory = {"h": Field((4,), "float32")}
    plain, stacked = make_spec(), make_spec(frame_stack=4)  # 5 steps of 3 environments
    recurrent = [replace(plain, state=memory | stacked.state), replace(plain, state=memory["h"])]
    recurrent.append(replace(plain, state=(memory["h"],)))
    for spec in (plain, stacked, replace(plain, state=())):
        for good in (1, 2, 3, 15, 30):
            PPOConfig(num_minibatches=good).store_nbytes(None, spec, 2)
        with pytest.raises(ValueError, match="divides the 30 steps of a rollout, got 4"):
            PPOConfig(num_minibatches=4).store_nbytes(None, spec, 2)
        with pytest.raises(ValueError, match="divides the 6 environments of a rollout, got 15"):
            config = PPOConfig(num_minibatches=15, minibatch_of="sequences")
            config.store_nbytes(None, spec, 2)
    for spec in recurrent:
        PPOConfig(num_minibatches=6).store_nbytes(None, spec, 2)
        with pytest.raises(ValueError, match="divides the 6 environments of a rollout, got 30"):
            PPOConfig(num_minibatches=30).store_nbytes(None, spec, 2)
        with pytest.raises(ValueError, match="expected minibatch_of sequences"):
            PPOConfig(num_minibatches=1, minibatch_of="steps").store_nbytes(None, spec, 2)
    with pytest.raises(ValueError, match="divides the 9 environments"):
        config = PPOConfig(num_minibatches=2, rollout=RolloutConfig(num_unrolls=3))
        config.store_nbytes(None, recurrent[0], 2)


# -- actors and the learner ----------------------------------------------------------------------


def begun(box: Box) -> int:
    """Unrolls that actors have begun, on all lanes."""
    return sum(ring.read(0) for ring in box.rings)


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("num_unrolls, num_actors", [(0, 1), (0, 3), (2, 3), (12, 1)])
def test_actors_are_never_more_than_their_rollouts_ahead(num_unrolls, num_actors, ahead, tmp_path):
    """Begun in all: those learned from and (1 + ahead) rollouts. So no unroll is older when it is
    learned from than `ahead` versions, while none is in play as the learner publishes."""
    config = A2CConfig(precision="float32", rollout=RolloutConfig(num_unrolls, ahead))
    box = Box(tmp_path, config, num_actors=num_actors, unroll_length=2)
    each, learned, lags = num_unrolls or 2 * num_actors, 0, []
    rng = np.random.default_rng(0)
    for _ in range(60):
        box.learner.drain()
        box.learner.throttle.move()
        for _ in range(rng.integers(0, 12)):
            actor = box.actors[rng.integers(num_actors)]
            if actor.may_begin():
                actor.play()
            assert begun(box) <= (learned + 1 + ahead) * each
        if rng.random() < 0.4:
            learned += box.learner.learn(1)
            lags += box.store.lags
    assert learned > 8 and box.store.dropped == 0
    assert max(lags) == ahead


def test_a_slow_actor_is_learned_from_only_while_it_is_young_enough(tmp_path):
    """In play while others go round, an unroll may get as old as may be; max_lag has the say."""
    rollout = RolloutConfig(ahead=1, max_lag=3)
    box = Box(tmp_path, A2CConfig(precision="float32", rollout=rollout), num_actors=4)
    slow, held, oldest = box.actors[3], [], 0
    for turn in range(60):
        box.learner.drain()
        box.learner.throttle.move()
        if turn % 9 == 0 and slow.may_begin():
            held = [lane.writer for lane in slow.lanes]
            for writer in held:
                writer.commit = lambda: None  # played, and not yet over
            slow.play()
        elif turn % 9 == 8:
            for writer in held:
                del writer.commit
                writer.commit()
            held = []
        for actor in box.actors[:3]:
            if actor.may_begin():
                actor.play()
        if box.learner.learn(1):
            oldest = max(oldest, *box.store.lags)
    assert oldest <= 3 and box.store.dropped > 4
    assert box.learner.updates > 20


def test_the_lag_told_is_that_of_the_weights_learned_with(tmp_path):
    """Also in the second of two updates without a drain between them."""
    rollout = RolloutConfig(ahead=3)
    box = Box(tmp_path, A2CConfig(precision="float32", rollout=rollout))
    for _ in range(3):
        box.collect()
        version = [int(unroll.header.version) for unroll in box.store.unrolls][2:4]
        assert box.learner.learn(2) == 2
        # The second update began with the weights that the first one published.
        assert box.store.lags == [box.learner.weights.version - 1 - v for v in version]


@pytest.mark.parametrize("num_unrolls, ahead", [(1, 0), (3, 0), (1, 1), (5, 0), (3, 1)])
def test_rounds_that_do_not_fit_the_queue_do_not_stop_the_run(num_unrolls, ahead, tmp_path):
    """An actor begins an unroll of all its lanes at once; rollouts need not be made of those."""
    config = A2CConfig(precision="float32", rollout=RolloutConfig(num_unrolls, ahead))
    box = Box(tmp_path, config, lanes_per_actor=4)
    for _ in range(30):
        box.turn()
    assert box.learner.updates > 10


def test_a_queue_that_expires_as_a_whole_does_not_stop_the_run(tmp_path):
    """A learner died and resumes with a queue of long ago, full, while nothing is in flight."""
    box = Box(tmp_path, A2CConfig(precision="float32"))
    box.collect()
    assert box.store.insert_limit() == box.learner.env_steps
    for _ in range(20):
        box.learner.publish()

    def wait(condition) -> bool:
        for actor in box.actors:
            if actor.may_begin():
                actor.play()
        assert condition(), "the learner sleeps, and no actor may begin"
        return box.learner.updates < 5

    box.learner.run_async(wait)
    assert box.learner.updates == 5 and box.store.dropped == 4


@pytest.mark.parametrize(
    "num_actors, alive, ahead",
    [
        (2, 1, 1),
        (4, 2, 1),
        (4, 1, 3),
        (3, 1, 1),
        (2, 1, 0),
    ],
)
def test_actors_given_up_do_not_hold_back_the_others(num_actors, alive, ahead, tmp_path):
    """What they were permitted is counted as theirs for ever, unless they are marked as gone."""
    rollout = RolloutConfig(ahead=ahead)
    box = Box(tmp_path, A2CConfig(precision="float32", rollout=rollout), num_actors=num_actors)
    box.learner.throttle.move()
    lanes = box.config.lanes_per_actor
    for ring in box.rings[alive * lanes :]:
        ring.words[Word.GONE] = 1
    del box.actors[alive:]
    for _ in range(20):
        box.turn()
    assert box.learner.updates > 5


def test_rounds_drained_together_are_learned_from_in_the_order_they_were_played(tmp_path):
    """Else one lane's second unroll goes before another's first, which is older."""
    box = Box(tmp_path, A2CConfig(precision="float32", rollout=RolloutConfig(ahead=2)))
    box.collect()
    order = [(int(u.header.sequence), int(u.header.lane)) for u in box.store.unrolls]
    assert order == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]


def test_a_max_lag_that_would_drop_most_is_refused_for_these_lanes():
    """Eight lanes of one actor play together, one unroll each update: the last is seven late."""
    spec = make_spec()
    one = RolloutConfig(num_unrolls=1, max_lag=7)
    with pytest.raises(ValueError, match=r"max_lag of at least 8, got 7: up to 8 unrolls of 8"):
        RolloutQueue.nbytes(one, spec, 8)
    assert RolloutQueue.nbytes(replace(one, max_lag=8), spec, 8) == 10 * spec.layout.nbytes
    assert RolloutQueue.nbytes(replace(one, max_lag=0), spec, 8) == 10 * spec.layout.nbytes
    assert RolloutQueue.nbytes(RolloutConfig(max_lag=2), spec, 8) == 32 * spec.layout.nbytes
