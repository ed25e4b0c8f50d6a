"""A lane: against a deque, and against a producer that is killed again and again."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections import deque

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.transport.ring import CONTROL_BYTES, Ring, UnrollReader, UnrollWriter, Word
from asyncrl.transport.shared_memory import Doorbell, Segment
from asyncrl.types import Spec, Unroll, tree_map

SMALL = Spec(2, 1, spaces.Discrete(2), spaces.Discrete(2), {})
LARGE = Spec(16, 8, spaces.Box(0, 255, (31, 17), np.uint8), spaces.Discrete(4), {})


def fill(unroll: Unroll, number: int) -> None:
    """Every row of every field different, and different for every unroll."""

    def set_rows(array: np.ndarray) -> None:
        if array.ndim == 0:
            array[...] = number
        for t in range(len(array) if array.ndim else 0):
            array[t] = (number * 31 + t) % 251 if array.dtype != bool else (number >> t % 8) % 2

    tree_map(set_rows, unroll)


def filled(spec: Spec, number: int) -> np.ndarray:
    raw = np.zeros(spec.layout.nbytes, np.uint8)
    fill(spec.layout.views(raw), number)
    return raw


OPERATIONS = st.one_of(
    st.sampled_from(["reserve", "reserve", "commit", "commit", "take", "take", "release"]),
    st.sampled_from(["new writer", "new reader"]),
    st.integers(0, 40),  # permit
)


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 4), st.integers(0, 9), st.lists(OPERATIONS, min_size=10, max_size=80))
def test_a_lane_is_a_deque_with_a_throttle(num_slots, start, operations):
    buffer = np.zeros(Ring.nbytes(SMALL, num_slots), np.uint8)
    ring = Ring(buffer, SMALL, num_slots)
    ring.start_at(start)
    writer, reader = UnrollWriter(ring), UnrollReader(ring)
    head, permitted, reserved = start, start, False
    waiting: deque[int] = deque()
    held: list[tuple[int, np.ndarray, np.ndarray]] = []  # taken and not released
    for operation in operations:
        if operation == "reserve":
            unroll = writer.reserve()
            reserved = unroll is not None
            assert reserved == writer.may_begin()
            assert reserved == (head < permitted and len(waiting) + len(held) < num_slots)
            if reserved:
                fill(unroll, head)
        elif operation == "commit" and reserved:
            writer.commit()
            waiting.append(head)
            head, reserved = head + 1, False
        elif operation == "take":
            item = reader.take()
            assert (item is not None) == bool(waiting)
            if waiting:
                number, (unroll, raw) = waiting.popleft(), item
                assert unroll.header.sequence == number
                held.append((number, raw, filled(SMALL, number)))
        elif operation == "release":
            reader.release()
            held.clear()
        elif operation == "new writer":
            writer, reserved = UnrollWriter(Ring(buffer, SMALL, num_slots)), False
        elif operation == "new reader":  # reads again what the last one had not released
            reader = UnrollReader(Ring(buffer, SMALL, num_slots))
            waiting.extendleft(number for number, *_ in reversed(held))
            held.clear()
        elif isinstance(operation, int):
            reader.permit(operation)
            permitted = max(permitted, operation)  # the throttle never moves back
        assert (writer.sequence, reader.permitted) == (head, permitted)
        assert reader.waiting() == len(waiting)
        assert all(np.array_equal(raw, whole) for _, raw, whole in held)  # not written again


def test_words_do_not_share_cache_lines_with_each_other_or_with_slots():
    ring = Ring(np.zeros(Ring.nbytes(SMALL, 2), np.uint8), SMALL, 2)
    lines = [ring.words[word:].__array_interface__["data"][0] // 64 for word in Word]
    assert len(set(lines)) == len(Word) and 64 * len(Word) <= CONTROL_BYTES
    ring.words[:] = -1
    assert not any(raw.any() for raw in ring.raw)
    with pytest.raises(ValueError, match="at least 1 slot, got 0"):
        Ring(b"", SMALL, 0)


def produce(lane: int, actor_bell: int, learner_bell: int) -> None:
    """An actor that never ends by itself."""
    ring = Ring(Segment.attach(lane).buffer, LARGE, 3)
    writer, mine, theirs = UnrollWriter(ring), Doorbell(actor_bell), Doorbell(learner_bell)
    while mine.wait_for(writer.may_begin, lambda: False):
        fill(writer.reserve(), writer.sequence)
        writer.commit()
        theirs.ring()


@pytest.mark.fault_06
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_producer_loses_repeats_and_tears_nothing():
    """Producers, each killed at a random moment, one after another on the same lane."""
    segment = Segment.create("lane", Ring.nbytes(LARGE, 3))
    ring = Ring(segment.buffer, LARGE, 3)
    reader, actor_bell, learner_bell = UnrollReader(ring), Doorbell.create(), Doorbell.create()
    rng = random.Random(0)
    seen = torn = 0

    def consume() -> None:
        nonlocal seen
        while (item := reader.take()) is not None:
            unroll, raw = item
            assert unroll.header.sequence == seen
            assert np.array_equal(raw, filled(LARGE, seen))
            seen += 1
            if rng.random() < 0.7:
                reader.release()
        reader.release()
        reader.permit(seen + rng.randint(1, 4))
        actor_bell.ring()

    fork = multiprocessing.get_context("fork")
    kills = 0
    # On a busy machine as many more as it takes to see work done and slots torn.
    most = int(os.environ.get("ASYNCRL_TEST_KILLS", 200))
    while kills < most or seen <= 200 or torn <= 10:
        kills += 1
        fds = segment.fd, actor_bell.fd, learner_bell.fd
        producer = fork.Process(target=produce, args=fds, daemon=True)
        producer.start()
        end = time.monotonic() + rng.uniform(0, 0.004)
        while (left := end - time.monotonic()) > 0:
            learner_bell.wait(left)
            consume()
        time.sleep(rng.uniform(0, 0.001))  # the producer goes on where it may
        producer.kill()
        producer.join()
        consume()
        assert reader.take() is None and reader.taken == ring.read(Word.HEAD) == seen
        whole = [filled(LARGE, number) for number in (seen - 3, seen) if number >= 0]
        torn += not any(np.array_equal(ring.raw[seen % 3], raw) for raw in whole)


def test_an_actor_never_sees_cursors_half_set():
    """A resumed learner sets them while the actor looks: whenever it does, it may not begin."""
    ring = Ring(np.zeros(Ring.nbytes(SMALL, 2), np.uint8), SMALL, 2)
    writer, order = UnrollWriter(ring), (Word.HEAD, Word.TAIL, Word.PERMITTED)

    class Moving:
        """Words that change between two looks at them."""

        def __init__(self, looks: int):
            self.left, self.words = looks, dict.fromkeys(order, 0)

        def __getitem__(self, word):
            if self.left == 0:
                self.words = dict.fromkeys(order, 7)
            self.left -= 1
            return self.words[word]

    for looks in range(4):
        ring.words = Moving(looks)
        assert not writer.may_begin()
