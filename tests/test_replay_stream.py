"""The replay on disk beside training: bounded, and enough to rebuild it."""

from __future__ import annotations

from collections import deque
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from asyncrl import replay_stream
from asyncrl.checkpoint import Checkpoints
from asyncrl.logs import EventLog
from asyncrl.replay_stream import ReplayStream, Stopped
from asyncrl.segments import SegmentWriter

CAPACITY, NBYTES, RECORDS = 10, 8, 5  # unrolls in the store, bytes of one, unrolls a segment


class Store:
    """Keeps the numbers of the newest CAPACITY unrolls."""

    def __init__(self):
        self.unrolls: deque[int] = deque(maxlen=CAPACITY)
        self.count = 0

    def position(self) -> dict:
        return {"count": self.count}

    def restart_at(self, position: dict) -> None:
        self.unrolls.clear()
        self.count = position["count"]

    def insert(self, lane: int, unroll: SimpleNamespace) -> None:
        self.unrolls.append(unroll.number)
        self.count += 1


class Layout:
    nbytes = NBYTES

    def views(self, record: bytearray) -> SimpleNamespace:
        number = int(np.frombuffer(record, np.int64)[0])
        return SimpleNamespace(number=number, header=SimpleNamespace(lane=0))


@pytest.fixture
def make_stream(tmp_path, monkeypatch):
    small = partial(SegmentWriter, segment_nbytes=RECORDS * NBYTES)
    monkeypatch.setattr(replay_stream, "SegmentWriter", small)

    def make() -> ReplayStream:
        checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3)
        events = EventLog(tmp_path / "events.log")
        return ReplayStream(
            tmp_path / "replay", Store(), Layout(), checkpoints, events, enabled=True
        )

    return make


def take(stream: ReplayStream, num: int) -> None:
    for _ in range(num):
        number = stream.store.count
        stream.append(np.array([number], np.int64))
        stream.store.insert(0, SimpleNamespace(number=number))


def save(stream: ReplayStream) -> list[dict]:
    segments = stream.flush()
    stream.checkpoints.save(stream.store.count, {}, {}, segments)
    stream.forget()
    return segments


def test_between_checkpoints_the_disk_holds_little_more_than_the_replay(make_stream):
    stream = make_stream()
    stream.begin([])
    most = CAPACITY // RECORDS + 2  # one half forgotten, one half written
    for _ in range(20):
        take(stream, 7)
        assert len(list(stream.folder.iterdir())) <= most
    for _ in range(5):
        save(stream)  # the two newest checkpoints have a replay each, the third has lost its own
        for _ in range(20):
            take(stream, 7)
            assert len(list(stream.folder.iterdir())) <= 2 * (most - 1) + most


@pytest.mark.parametrize("num", [3, 10, 11, 14, 15, 16, 73])
def test_what_is_on_disk_rebuilds_the_store(make_stream, num):
    before = make_stream()
    before.begin([])
    take(before, num)
    segments = save(before)
    after = make_stream()
    beats = []
    after.restore(segments, lambda: beats.append(1))
    after.begin(segments)
    assert after.store.unrolls == before.store.unrolls
    assert after.store.count == before.store.count
    assert len(beats) == sum(segment["records"] for segment in segments)
    take(after, 12)
    assert list(after.store.unrolls) == list(range(num + 2, num + 12))


def test_a_stop_is_heard_at_each_unroll(make_stream):
    before = make_stream()
    before.begin([])
    take(before, 9)
    segments = save(before)
    after = make_stream()
    beats = iter([False, False, False, True])
    with pytest.raises(Stopped):
        after.restore(segments, lambda: next(beats))
    assert list(after.store.unrolls) == [0, 1, 2]


def test_a_folder_that_cannot_be_listed_holds_nothing_up_and_loses_nothing(make_stream, tmp_path):
    stream = make_stream()
    stream.begin([])
    take(stream, 2 * CAPACITY)
    segments = save(stream)
    (tmp_path / "checkpoints").rename(tmp_path / "away")
    (tmp_path / "checkpoints").write_text("no folder")
    take(stream, 3 * CAPACITY)
    names = {path.name for path in (tmp_path / "replay").iterdir()}
    assert names >= {segment["file"] for segment in segments}
