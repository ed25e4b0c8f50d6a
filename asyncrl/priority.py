"""Who goes first where processors are few: processes that give way to others, threads likewise."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path


def give_way(nice: int) -> None:
    """Lower this process's priority by `nice`, 0 to 19.

    Where the kernel shares out processors among sessions first (autogroup), priorities count within
    a session alone. Each process of a run leads one of its own, which gives way as a whole.
    """
    os.nice(nice)
    if nice == 0 or os.getsid(0) != os.getpid():
        return
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        try:
            Path("/proc/self/autogroup").write_text(str(nice))
            return
        except BlockingIOError:  # for ordinary users a tenth of a second lies between two of these
            time.sleep(0.1)
        except OSError:  # no such groups
            return


@contextlib.contextmanager
def threads_give_way() -> Iterator[None]:
    """Threads and processes that begin in here never push aside whoever runs already: those of
    environments would keep the one that acts, and has the next actions for them, waiting."""
    changed = False
    with contextlib.suppress(OSError):  # a container may forbid it
        if os.sched_getscheduler(0) == os.SCHED_OTHER:  # else somebody has decided
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
            changed = True
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if changed:
                os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
