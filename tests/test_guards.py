"""What is not finite and what does not fit: skipped, counted, never published, never saved."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from asyncrl.guards import (
    MAX_SKIPPED,
    Diverged,
    EnvFailed,
    GuardedEnvs,
    OutOfMemory,
    UpdateGuard,
)
from asyncrl.logs import EventLog, read_events
from tests.test_learner import Box


@pytest.fixture
def box(tmp_path):
    """A run that has learned a little."""
    box = Box(tmp_path, 1)
    box.actor = box.make_actor(0)
    while box.learner.updates < 3:
        box.turn([box.actor])
    return box


def poison(box: Box) -> None:
    """From now on every reward in the replay is nan."""
    box.learner.store.reward.fill_(np.nan)


def update(box: Box, count: int) -> None:
    for _ in range(count):
        box.learner.guard.update(box.learner.algorithm, box.learner.store)


def test_skipped_updates_are_counted_and_ten_in_a_row_are_too_many(box):
    guard, good = box.learner.guard, box.learner.store.reward.clone()
    for _ in range(3):  # nine, and a good one: nothing to go back for
        poison(box)
        update(box, MAX_SKIPPED - 1)
        box.learner.store.reward.copy_(good)
        update(box, 1)
    box.learner.publish()
    assert guard.num_skipped == 3 * (MAX_SKIPPED - 1) and guard.in_a_row == 0
    poison(box)
    update(box, MAX_SKIPPED)
    version = box.learner.weights.version
    with pytest.raises(Diverged, match="10 updates in a row were not finite"):
        box.learner.publish()
    assert box.learner.weights.version == version


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_neither_published_nor_saved(box, value):
    learner = box.learner
    learner.publish()
    learner.save()
    before = sorted(path.name for path in (learner.folder / "checkpoints").iterdir())
    front = {name: array.copy() for name, array in learner.weights.front()["model"].items()}
    with torch.no_grad():
        next(iter(learner.model.parameters())).view(-1)[-1] = value
    with pytest.raises(Diverged, match="expected finite weights"):
        learner.publish()
    with pytest.raises(Diverged, match="neither published nor saved"):
        learner.save(final=True)
    for name, array in learner.weights.front()["model"].items():
        assert np.array_equal(array, front[name])
    assert before == sorted(path.name for path in (learner.folder / "checkpoints").iterdir())


def test_infinities_that_belong_to_a_model_are_its_own(tmp_path):
    class Masked(torch.nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

    model = Masked()
    guard = UpdateGuard(model, EventLog(tmp_path / "events.log"))
    guard.check(model.state_dict())
    with torch.no_grad():
        model.bias[1] = torch.nan
    with pytest.raises(Diverged, match="got others in bias"):
        guard.check(model.state_dict())


def test_a_wide_type_may_hold_what_a_narrow_one_cannot(tmp_path):
    model = torch.nn.Linear(2, 2)
    model.register_buffer("variance", torch.tensor([3.5e75], dtype=torch.float64))
    model.register_buffer("narrow", torch.full((10,), 60_000.0, dtype=torch.float16))
    UpdateGuard(model, EventLog(tmp_path / "events.log")).check(model.state_dict())


class Steps:
    """An algorithm that says which of an update's steps were skipped."""

    def __init__(self, *skipped: float):
        self.skipped = torch.tensor(skipped)

    def update(self, store):
        return {"loss/skipped": self.skipped}


def test_of_updates_with_several_steps_each_counts(tmp_path):
    guard = UpdateGuard(torch.nn.Linear(1, 1), EventLog(tmp_path / "events.log"))
    store = SimpleNamespace(streams=False, unrolls=deque(), limiter=SimpleNamespace(sampled=0))
    for _ in range(MAX_SKIPPED):  # one bad minibatch in each rollout
        metrics = guard.update(Steps(0, 1, 0, 0), store)
        assert metrics["loss/skipped"] == 1  # of any step, for a row of metrics
    guard.settle()
    assert guard.num_skipped == MAX_SKIPPED and guard.in_a_row == 0
    guard.update(Steps(0, 1, 1, 1), store)
    guard.settle()
    guard.update(Steps(1, 1, 1, 1), store)
    guard.settle()
    assert guard.num_skipped == MAX_SKIPPED + 7 == 10 + guard.in_a_row
    guard.update(Steps(1, 1, 0, 0), store)
    guard.update(Steps(1, 1, 1, 0), store)
    guard.settle()
    guard.update(Steps(0, 0), store)
    guard.update(Steps(*[1] * 16), store)
    guard.settle()  # one bad rollout, nothing more
    guard.update(Steps(0, *[1] * 15), store)
    guard.settle()
    guard.update(Steps(1, 1, 1, 1), store)
    guard.update(Steps(1, 1, 1, 1), store)
    with pytest.raises(Diverged, match="23 updates in a row were not finite"):
        guard.settle()


def limit_memory(model: torch.nn.Module, most: int) -> SimpleNamespace:
    """A stand-in for a small GPU: batches (T, N) need N of at most `most`."""
    gpu = SimpleNamespace(most=most, failures=0)

    def look(module, inputs):
        if inputs[1].shape[1] > gpu.most:
            gpu.failures += 1
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    model.register_forward_pre_hook(look)
    return gpu


def test_a_batch_that_does_not_fit_into_gpu_memory_is_learned_from_in_halves(box):
    learner, limiter = box.learner, box.learner.store.limiter
    gpu, updates, sampled = limit_memory(learner.model, 4), learner.updates, limiter.sampled
    update(box, 1)
    assert (learner.updates, limiter.sampled) == (updates + 2, sampled + 8)
    gpu.most = 8  # it was another program that took the memory
    update(box, 1)
    assert (learner.updates, limiter.sampled) == (updates + 3, sampled + 16)
    assert gpu.failures == 1
    (event,) = read_events(learner.events.path)
    assert event.kind == "memory"
    assert event.text.endswith("in two halves: CUDA out of memory. Tried to allocate 2 GiB")


def test_where_halves_do_not_fit_either_what_was_learned_is_saved_before_the_end(box):
    learner = box.learner
    limit_memory(learner.model, 2)
    while not learner.store.updates_allowed():
        learner.throttle.move()
        box.actor.play()
        learner.drain()
    updates, sampled = learner.updates, learner.store.limiter.sampled
    with pytest.raises(OutOfMemory, match=r"in two halves.*lower --algorithm\.batch-size") as why:
        learner.learn(1)
    assert why.value.exit_status == 2
    saved = learner.checkpoints.newest_valid().state
    assert (saved["updates"], saved["env_steps"]) == (updates, learner.env_steps)
    assert learner.store.limiter.sampled == sampled and learner.store.batch_size == 8


class Group:
    """As much of an EnvGroup as an actor sees."""

    num_envs = 2

    def reset(self, seed):
        raise KeyError(seed)

    def send(self, action):
        raise ConnectionError("gone")

    def recv(self):
        return "a step"

    def close(self):
        return "closed"


def test_only_steps_are_guarded():
    envs = GuardedEnvs(Group())
    assert envs.num_envs == 2 and envs.recv() == "a step" and envs.close() == "closed"
    with pytest.raises(EnvFailed, match="ConnectionError: gone"):
        envs.send(np.zeros(2))
    with pytest.raises(KeyError):
        envs.reset(3)
