"""Weights: whatever a writer is doing, or died doing, a reader believes whole versions only."""

from __future__ import annotations

import multiprocessing
import random
import time

import numpy as np
import pytest

from asyncrl.transport.shared_memory import Segment
from asyncrl.transport.weights import WeightsBuffer, WeightsReader, WeightsWriter, weights_fields
from asyncrl.types import Field, tree_leaves

MODEL = {
    "convolution": np.zeros((701, 713), np.float32),  # 2 MB
    "count": np.zeros((), np.int64),
    "linear": np.zeros(131_101),  # 1 MB
    "bias": np.zeros(3, np.float32),
}
FIELDS = weights_fields(MODEL, {"env_steps": Field((), "int64")})


def make_buffer() -> WeightsBuffer:
    return WeightsBuffer(np.zeros(WeightsBuffer.nbytes(FIELDS), np.uint8), FIELDS)


def publish(writer: WeightsWriter) -> None:
    """Fill everything with the number of the version."""
    for array in tree_leaves(writer.back()):
        array[...] = writer.version + 1
    writer.publish()


def test_a_resumed_run_goes_on_counting_and_shows_nothing_before_it_has_published():
    buffer = make_buffer()
    writer, reader = WeightsWriter(buffer), WeightsReader(buffer)
    writer.go_on_from(7)
    for array in tree_leaves(writer.back()):
        array[...] = 8
    assert writer.version == 0 and reader.version == 0  # killed here, nothing was published
    assert writer.publish() == 8
    assert is_all(reader.pull(), 8) and is_all(writer.front(), 8)
    publish(writer)
    assert is_all(reader.pull(), 9)


def is_all(tree, version: int) -> bool:
    return all((array == version).all() for array in tree_leaves(tree))


def publish_for_ever(fd: int) -> None:
    writer = WeightsWriter(WeightsBuffer(Segment.attach(fd).buffer, FIELDS))
    while True:
        publish(writer)


@pytest.mark.fault_26
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_versions_are_whole_and_growing_while_writers_write_and_die():
    """12 writers, one after another, each killed at a random moment of publishing at full speed."""
    segment = Segment.create("weights", WeightsBuffer.nbytes(FIELDS))
    buffer = WeightsBuffer(segment.buffer, FIELDS)
    reader, writer, rng = WeightsReader(buffer), WeightsWriter(buffer), random.Random(0)
    num_pulled = torn = version = 0

    def pull() -> None:
        nonlocal num_pulled, version
        if (tree := reader.pull()) is not None:
            assert reader.version > version and is_all(tree, reader.version)
            num_pulled, version = num_pulled + 1, reader.version

    for _ in range(12):
        process = multiprocessing.get_context("fork").Process(
            target=publish_for_ever, args=(segment.fd,), daemon=True
        )
        process.start()
        end = time.monotonic() + rng.uniform(0.03, 0.07)
        enough = num_pulled + 3
        while time.monotonic() < end or num_pulled < enough:
            pull()
        process.kill()
        process.join()
        pull()
        assert version == writer.version and is_all(writer.front(), version)
        torn += not any(is_all(writer.back(), of) for of in (version - 1, version + 1))
    assert torn > 3  # or no writer died in the middle of a copy


def test_copies_take_turns_and_a_half_written_one_is_not_pulled():
    buffer = make_buffer()
    reader, writer = WeightsReader(buffer), WeightsWriter(buffer)
    assert reader.pull() is None and reader.version == 0
    publish(writer)
    assert is_all(reader.pull(), 1) and reader.version == 1
    assert reader.pull() is None
    writer.back()["model"]["convolution"][:300] = -1  # and there it died
    assert is_all(writer.front(), 1)
    assert reader.pull() is None
    assert is_all(WeightsReader(buffer).pull(), 1)
    publish(WeightsWriter(buffer))  # another learner goes on from there
    publish(writer)
    assert is_all(reader.pull(), 3) and reader.version == 3


class Overtaken(list):
    """The two raw copies, where the writer publishes twice whenever a reader begins to copy."""

    times = 0

    def __getitem__(self, index: int) -> np.ndarray:
        for _ in range(2 if self.times > 0 else 0):
            publish(self.writer)
        self.times -= 1
        return super().__getitem__(index)


def test_three_torn_copies_are_refused_and_the_next_pull_succeeds():
    buffer = make_buffer()
    reader, writer = WeightsReader(buffer), WeightsWriter(buffer)
    buffer.raw = raw = Overtaken(buffer.raw)
    raw.writer = writer
    publish(writer)
    assert is_all(reader.pull(), 1)
    raw.times = 3
    publish(writer)
    assert reader.pull() is None and raw.times == 0
    assert reader.version == 1 and writer.version == 8
    raw.times = 2  # the third copy is whole
    assert is_all(reader.pull(), 12) and reader.version == 12
    publish(writer)
    raw.times = 1
    assert reader.pull(attempts=1) is None and reader.version == 12
    raw.times = 5  # who has no weights yet cannot do without
    assert is_all(WeightsReader(buffer).pull(), writer.version)
