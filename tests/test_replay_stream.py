"""The replay on disk beside training: bounded, and enough to rebuild it."""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from asyncrl import disk, replay_stream, segments
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
        checkpoints.clean()  # as a learner does first
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
    segments = stream.flush(final=False)
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
    after.beat = lambda: beats.append(1)
    after.restore(segments)
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
    after.beat = lambda: next(beats)
    with pytest.raises(Stopped):
        after.restore(segments)
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


def test_a_full_disk_is_given_back_what_the_replay_took_of_it(make_stream, monkeypatch):
    """And the checkpoint that comes next, which has a place of its own, does not lack it."""
    stream, written = make_stream(), []
    stream.begin([])
    take(stream, 2 * CAPACITY)
    listed = {segment["file"] for segment in save(stream)}

    def write(fd: int, data: memoryview) -> None:
        if len(written) == 3 * RECORDS + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(os.write(fd, data))

    monkeypatch.setattr(segments, "write", write)
    take(stream, 3 * RECORDS + 1)
    assert {path.name for path in stream.folder.iterdir()} > listed
    take(stream, 1)
    assert {path.name for path in stream.folder.iterdir()} == listed
    assert save(stream) == []  # without a replay
    monkeypatch.undo()
    take(stream, 3)
    assert save(stream)


def test_a_slow_disk_does_not_keep_the_learner_from_beating(make_stream, monkeypatch):
    stream, beats, done = make_stream(), [], threading.Event()
    stream.begin([])

    def beat() -> bool:
        beats.append(1)
        if len(beats) == 2:
            done.set()
        return False

    stream.beat = beat
    monkeypatch.setattr(segments, "sync_and_close", lambda fd: (done.wait(60), os.close(fd)))
    take(stream, RECORDS + 1)
    assert sum(segment["records"] for segment in save(stream)) == RECORDS + 1
    assert len(beats) >= 2


def test_at_the_end_a_disk_that_is_too_slow_for_the_replay_still_gets_the_rest(
    make_stream, monkeypatch
):
    stream, done = make_stream(), threading.Event()
    stream.begin([])
    monkeypatch.setattr(replay_stream, "FINAL_SECONDS", 0.05)
    monkeypatch.setattr(segments, "sync_and_close", lambda fd: (done.wait(60), os.close(fd)))
    take(stream, 2 * RECORDS)
    assert stream.flush(final=True) == []
    assert "took more than 0.05 s" in stream.events.path.read_text()
    done.set()
    take(stream, RECORDS)
    assert len(stream.flush(final=False)) == 1


def test_what_one_cannot_read_for_now_is_not_taken_for_unlisted(make_stream, monkeypatch):
    """A manifest on a disk with hiccups, or a folder that is out of sight, lists what it lists."""
    stream = make_stream()
    stream.begin([])
    for _ in range(3):
        take(stream, 2 * CAPACITY)
        listed = {segment["file"] for segment in save(stream)}
    plain = disk.os.open

    def hiccup(path, *rest, **others) -> int:
        if "checkpoint_000000000060/manifest" in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return plain(path, *rest, **others)

    monkeypatch.setattr(disk.os, "open", hiccup)
    take(stream, 3 * CAPACITY)
    assert listed <= {path.name for path in stream.folder.iterdir()}
    monkeypatch.undo()
    stream.checkpoints.folder.rename(away := stream.folder.with_name("away"))
    take(stream, 3 * CAPACITY)
    away.rename(stream.checkpoints.folder)
    assert listed <= {path.name for path in stream.folder.iterdir()}
