"""What is not finite and what does not fit: skipped, counted, never published, never saved."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from asyncrl.guards import MAX_SKIPPED, Diverged, EnvFailed, GuardedEnvs, UpdateGuard
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
    guard.check()
    with torch.no_grad():
        model.bias[1] = torch.nan
    with pytest.raises(Diverged, match="got others in bias"):
        guard.check()


class Stub:
    """An algorithm whose updates run out of GPU memory as often as it is told."""

    def __init__(self, failures: int):
        self.failures, self.made = failures, 0

    def update(self, store):
        if self.failures:
            self.failures -= 1
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        self.made += 1
        return {"loss/skipped": torch.tensor(0.0)}


def test_an_update_that_runs_out_of_gpu_memory_is_tried_once_more(tmp_path):
    """The error is raised by a stand-in: no GPU is needed."""
    guard, stub = UpdateGuard(torch.nn.Linear(1, 1), EventLog(tmp_path / "events.log")), Stub(1)
    assert guard.update(stub, None) == {} and stub.made == 0
    assert guard.update(stub, None) and stub.made == 1
    stub.failures = 1  # later, once more: not in a row
    assert guard.update(stub, None) == {}
    assert guard.update(stub, None) and stub.made == 2
    events = read_events(tmp_path / "events.log")
    assert [event.kind for event in events] == ["memory", "memory"]
    assert events[0].text.endswith("tried once more: CUDA out of memory. Tried to allocate 2 GiB")
    stub.failures = 2
    guard.update(stub, None)
    with pytest.raises(RuntimeError, match=r"(?s)at a second try.*lower --algorithm\.batch-size"):
        guard.update(stub, None)


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
