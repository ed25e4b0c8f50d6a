"""The replay on disk: a stream of raw unrolls in immutable segment files.

The learner appends every unroll it drains, so a checkpoint has only the tail to write. Manifests of
checkpoints list segments with their sums; what no manifest lists is deleted.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from asyncrl.disk import (
    CheckpointError,
    check_entry,
    create,
    expect,
    fsync_folder,
    make_folder,
    open_checked,
    read_checked,
    sync_and_close,
    write,
)

_SEGMENT = re.compile(r"segment_(\d{12,18})\.bin")  # no such name leads out of its folder


class SegmentWriter:
    """Appends records of `record_nbytes` to files of about `segment_nbytes` in `folder`.

    An append costs a copy to the page cache and a running sum; a thread fsyncs full segments. Disk
    trouble never raises into training: the writer becomes `broken` (why, in words; None while
    well), drops records, and goes on after `restart()`. `resume`: the loaded checkpoint's segments;
    CheckpointError if one is missing or does not fit.
    """

    def __init__(
        self,
        folder: str | Path,
        record_nbytes: int,
        segment_nbytes: int = 64 << 20,
        resume: Iterable[dict] = (),
    ):
        self.folder = Path(folder)
        self.record_nbytes = record_nbytes
        self.broken: str | None = None
        self._segments = checked_segments(list(resume), record_nbytes)
        check_files(self.folder, self._segments)
        self._records_per_segment = max(1, segment_nbytes // record_nbytes)
        self._fd = -1  # of the open segment; -1: none is open
        self._open: dict = {}  # its listing so far
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="segments")
        self._syncing: list[Future] = []
        # Above every name in sight, also those that only a rejected checkpoint lists.
        names = [*self._files(), *self._names()]
        self._next_index = 1 + max((int(_SEGMENT.fullmatch(n)[1]) for n in names), default=-1)

    def append(self, buffer, base: dict) -> bool:
        """Write one record: a contiguous buffer of `record_nbytes` bytes, free again on return.

        Returns whether that has filled a segment. `base` (JSON): what a reader needs to start with
        this record; kept for each segment's first.
        """
        record = memoryview(buffer).cast("B")
        if record.nbytes != self.record_nbytes:
            raise ValueError(f"record: expected {self.record_nbytes} bytes, got {record.nbytes}")
        if self.broken:
            return False
        try:
            if self._fd < 0:
                self._begin_segment(base)
            write(self._fd, record)
        except OSError as error:
            self._break(str(error))
            return False
        self._digest.update(record)
        self._open["records"] += 1
        full = self._open["records"] == self._records_per_segment
        if full:
            self._end_segment()
        return full

    def flush(
        self, seconds: float = math.inf, beat: Callable[[], object] = lambda: None
    ) -> list[dict]:
        """Make all records durable; return the live segments for a manifest, oldest first.

        The open segment ends here, so nothing returned ever changes. Blocks for the fsyncs, for
        `seconds` at most, and calls `beat` every second meanwhile. Raises CheckpointError if the
        writer is broken, a file has vanished, or the disk takes longer.
        """
        if self._fd >= 0:
            self._end_segment()
        last = time.monotonic() + seconds
        while self._syncing and (left := last - time.monotonic()) > 0:
            concurrent.futures.wait(self._syncing[-1:], min(1.0, left))
            self._hear()
            beat()
        if self._syncing:
            self._break(f"a disk that took more than {seconds:g} s")
        if not self.broken and self._segments:
            try:
                fsync_folder(self.folder)
                check_files(self.folder, self._segments)
            except (OSError, CheckpointError) as error:
                self._break(str(error))
        if self.broken:
            raise CheckpointError(
                f"cannot save replay: expected {self.folder} to take segments, got {self.broken}; "
                "make room or give permission; restart() begins a new stream"
            )
        return [dict(segment) for segment in self._segments]

    def restart(self) -> None:
        """Begin a new stream: former segments leave the list; the next record opens a new one."""
        self._break("restarted")
        self._syncing.clear()  # nobody wants to know any more
        self.broken = None

    def forget_all_but(self, newest: int) -> None:
        """Unlist the oldest segments as long as the others hold the `newest` records."""
        num_records = sum(s["records"] for s in [*self._segments, self._open] if s)
        while self._segments and num_records - self._segments[0]["records"] >= newest:
            num_records -= self._segments.pop(0)["records"]

    def delete_unlisted(self, still_listed_files: Collection[str]) -> int:
        """Delete segment files that neither a manifest nor this writer lists; return how many.

        Call it at start, after each save and after each full segment, with
        `Checkpoints.listed_segments()`.
        """
        num_deleted = 0
        for name in self._files() - set(still_listed_files) - self._names():
            with contextlib.suppress(OSError):  # tried again next time
                os.unlink(self.folder / name)
                num_deleted += 1
        return num_deleted

    def close(self) -> None:
        """Let go of file and thread; records since the last flush are not promised."""
        self._break("closed")
        self._thread.shutdown(wait=False)

    def _begin_segment(self, base: dict) -> None:
        base = json.loads(json.dumps(base))  # the caller's lists may change before the flush
        make_folder(self.folder)
        name = f"segment_{self._next_index:012d}.bin"
        self._next_index += 1
        self._fd = create(self.folder / name)
        self._open = {"file": name, "records": 0, "base": base}
        self._digest = hashlib.sha256()

    def _end_segment(self) -> None:
        nbytes = self._open["records"] * self.record_nbytes
        self._segments.append(self._open | {"nbytes": nbytes, "sha256": self._digest.hexdigest()})
        self._syncing.append(self._thread.submit(sync_and_close, self._fd))
        self._fd, self._open = -1, {}
        self._hear()

    def _hear(self) -> None:
        while self._syncing and self._syncing[0].done():
            if error := self._syncing.pop(0).exception():  # a gap: the stream is worth nothing
                self._break(str(error))

    def _break(self, reason: str) -> None:
        self.broken = self.broken or reason
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
        self._fd, self._open = -1, {}
        self._segments.clear()

    def _names(self) -> set[str]:
        return {segment["file"] for segment in [*self._segments, self._open] if segment}

    def _files(self) -> set[str]:
        with contextlib.suppress(OSError):
            return {name for name in os.listdir(self.folder) if _SEGMENT.fullmatch(name)}
        return set()


def read_segments(
    folder: str | Path, segments: list[dict], record_nbytes: int
) -> Iterator[tuple[memoryview, dict | None, bool]]:
    """Yield (record, base or None, first of its segment?) in the order they were appended.

    All sizes are checked before the first record, a segment's sum before its first; one segment at
    a time is in memory. Raises CheckpointError naming the file and the reason.
    """
    check_files(Path(folder), checked_segments(segments, record_nbytes))
    for segment in segments:
        data = memoryview(read_checked(Path(folder) / segment["file"], segment))
        for index in range(segment["records"]):
            record = data[index * record_nbytes : (index + 1) * record_nbytes]
            yield record, None if index else segment["base"], index == 0


def checked_segments(segments: Any, record_nbytes: int | None = None) -> list[dict]:
    expect(isinstance(segments, list), "segments: expected a list", segments)
    for segment in segments:
        ok = isinstance(segment, dict) and {"file", "records", "base"} <= set(segment)
        expect(ok, "segment: expected file, records, base", segment)
        name, records = segment["file"], segment["records"]
        ok = isinstance(name, str) and _SEGMENT.fullmatch(name)
        expect(bool(ok), "segment: expected a plain file name segment_<12 digits>.bin", name)
        check_entry(name, segment)
        ok = type(records) is int and records > 0
        if record_nbytes is not None:
            ok = ok and segment["nbytes"] == records * record_nbytes
        expect(ok, f"{name}: expected records of {record_nbytes} bytes (same config?)", segment)
    return [dict(segment) for segment in segments]


def check_files(folder: Path, segments: list[dict]) -> None:
    for segment in segments:
        with open_checked(folder / segment["file"], segment["nbytes"]):
            pass
