"""The replay beside training: every unroll that comes in is streamed to segment files, and what
neither the store nor a checkpoint needs any more is deleted."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from asyncrl.checkpoint import Checkpoints
from asyncrl.disk import CheckpointError
from asyncrl.logs import EventLog
from asyncrl.segments import SegmentWriter, read_segments
from asyncrl.types import Layout, Unroll

FINAL_SECONDS = 8.0  # for the replay, of the 17 that the last checkpoint has


class Stopped(Exception):
    """The run is to stop, and the replay was not read to its end."""


class ReplayStream:
    """Of `store`'s unrolls, in `folder`; does nothing where not `enabled`."""

    def __init__(
        self, folder: Path, store, layout: Layout, checkpoints: Checkpoints, events: EventLog,
        enabled: bool, beat: Callable[[], bool] = lambda: False,
    ):  # fmt: skip
        self.folder, self.store, self.layout = folder, store, layout
        self.checkpoints, self.events, self.enabled = checkpoints, events, enabled
        self.beat = beat  # called while it waits for the disk; returns whether to stop

    def restore(self, segments: list[dict]) -> None:
        """Insert the unrolls of a checkpoint's segments again. CheckpointError if they are damaged,
        Stopped as soon as `beat` says so, each with some of them inserted."""
        if not self.enabled:
            return
        for index, (record, base, _) in enumerate(
            read_segments(self.folder, segments, self.layout.nbytes)
        ):
            if self.beat():
                raise Stopped
            if index == 0:
                self.store.restart_at(base)
            unroll: Unroll = self.layout.views(bytearray(record))
            self.store.insert(int(unroll.header.lane), unroll)

    def begin(self, segments: list[dict]) -> None:
        """Go on behind the segments of the checkpoint that was loaded."""
        resume = segments if self.enabled else []
        self.writer = SegmentWriter(self.folder, self.layout.nbytes, resume=resume)
        self.forget()

    def append(self, raw: np.ndarray) -> None:
        """Write an unroll that the store is about to take in."""
        was_well = self.enabled and not self.writer.broken
        full = self.enabled and self.writer.append(raw, self.store.position())
        if full or (was_well and self.writer.broken):  # then what it wrote is in the disk's way
            self.forget(about_to_come=1)

    def forget(self, about_to_come: int = 0) -> None:
        """Delete what neither the store nor one of the two newest checkpoints needs."""
        if self.enabled:
            self.writer.forget_all_but(len(self.store.unrolls) + about_to_come)
        with contextlib.suppress(OSError):  # who cannot see what is listed deletes nothing for now
            self.writer.delete_unlisted(self.checkpoints.listed_segments(newest=2))

    def flush(self, final: bool) -> list[dict]:
        """The segments for a manifest; [] where there is no room, or at the end not enough time,
        and the rest is saved alone."""
        if not self.enabled:
            return []
        self.writer.forget_all_but(len(self.store.unrolls))
        try:
            return self.writer.flush(FINAL_SECONDS if final else math.inf, self.beat)
        except CheckpointError as error:
            self.events.event("checkpoint", f"replay not saved: {error}")
            self.writer.restart()
            self.forget()
            return []
