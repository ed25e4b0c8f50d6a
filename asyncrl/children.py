"""The processes of a run as their parent sees them: history, and what they take, from /proc."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import psutil

from asyncrl.plan import Plan

PAGE_NBYTES = os.sysconf("SC_PAGE_SIZE")
# glibc gives large blocks back to the system and fetches them again at every update; told not to,
# a training step on a CPU takes about half the time.
CHILD_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # and in large pages, where the system lends some
    # Threads that wait for each other at the end of a layer sleep soon: actors need the processor.
    "GOMP_SPINCOUNT": "300",
    # Asked whether there is a GPU, PyTorch must not take hold of it: a fork could not use it then.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "PYTHONUNBUFFERED": "1",
}


class Forked:
    """A child process that was forked by another one: the part of Popen that a parent needs."""

    def __init__(self, pid: int):
        self.pid, self.returncode = pid, None
        self.pidfd = os.pidfd_open(pid)

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it lives."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout_seconds: float | None = None) -> int | None:
        """Until it has ended or the time is over; as `poll`."""
        ended = select.poll()
        ended.register(self.pidfd, select.POLLIN)
        ended.poll(None if timeout_seconds is None else timeout_seconds * 1000)
        return self.poll()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            signal.pidfd_send_signal(self.pidfd, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def bury(self) -> None:
        """Forget one that has ended, and end what it left: workers of environments."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        os.close(self.pidfd)


@dataclass
class Child:
    """One process of the run and its history."""

    role: str
    index: int
    process: Forked | None = None
    started: float = 0.0
    generation: int = -1  # grows with each start
    deaths: list[float] = field(default_factory=list)  # since it last did its work
    excused: float = 0.0  # what silence before this means is not its fault
    work_at_start: int = 0
    restart_at: float | None = None
    refused: int = 0  # starts in a row that the system did not allow
    last_beat: float = 0.0
    cpu_seconds_at_beat: float = 0.0
    gone: bool = False  # given up, or ended as it should

    @property
    def name(self) -> str:
        return f"{self.role} {self.index}" if self.role == "actor" else self.role

    @property
    def learns(self) -> bool:
        """Whether the run ends with it."""
        return self.role in ("learner", "serial")

    def cpu_seconds(self) -> float:
        """Processor time it has had."""
        with contextlib.suppress(psutil.Error):
            times = psutil.Process(self.process.pid).cpu_times()
            return times.user + times.system
        return 0.0

    def stuck_for(self, beat: float, limit: float, start_limit: float) -> float:
        """Seconds without a heartbeat where they mean that it is stuck, else 0.

        One that wants to run and is given no processor is not stuck: while it is runnable, the
        silence counts only as far as it was spent computing.
        """
        if beat != self.last_beat:
            self.last_beat, self.cpu_seconds_at_beat = beat, self.cpu_seconds()
        silent = time.monotonic() - max(beat, self.started, self.excused)
        limit = limit if beat > self.started else max(start_limit, limit)
        if silent < limit:
            return 0.0
        computed = self.cpu_seconds() - self.cpu_seconds_at_beat
        starved = computed < 0.5 * limit and self.is_runnable() and silent < 20 * limit
        return 0.0 if starved else silent

    def is_runnable(self) -> bool:
        """Whether a thread of it runs or waits for a processor, rather than asleep or stopped."""
        with contextlib.suppress(psutil.Error, OSError):
            for task in Path(f"/proc/{self.process.pid}/task").iterdir():
                if (task / "stat").read_text().rpartition(")")[2].split()[0] == "R":
                    return True
        return False


def children_of(plan: Plan) -> list[Child]:
    """All processes that a run has, none of them started."""
    roles = [("serial", 0)]
    if plan.schedule != "serial":
        roles = [("learner", 0), *(("actor", i) for i in range(plan.num_actors))]
    if plan.evaluates:
        roles.append(("evaluator", 0))
    return [Child(role, index) for role, index in roles]


def open_log(path: Path) -> BinaryIO:
    """Where a child's output goes; nowhere, if there is no place for it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "wb")
    except OSError:
        return open(os.devnull, "wb")


def last_words(log: Path) -> str:
    """The end of what a child has written; of a log of any size, only that is read."""
    with contextlib.suppress(OSError), open(log, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 24_000))
        return file.read(24_000).decode(errors="replace")[-6000:].strip()
    return ""


class Usage(NamedTuple):
    """What some processes take together."""

    nbytes: int = 0  # private memory; what is shared is counted by whoever made it
    descriptors: int = 0


def usage(pids: list[int]) -> Usage:
    """Of these processes; of one that is gone, nothing."""
    nbytes = descriptors = 0
    for pid in pids:
        with contextlib.suppress(OSError, ValueError):
            resident, shared = map(int, Path(f"/proc/{pid}/statm").read_text().split()[1:3])
            descriptors += len(os.listdir(f"/proc/{pid}/fd"))
            nbytes += (resident - shared) * PAGE_NBYTES
    return Usage(nbytes, descriptors)


def reap_strangers(known: set[int]) -> None:
    """Take note of the ends of processes that were adopted, so that nothing of them stays."""
    with contextlib.suppress(ChildProcessError):
        while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if ended.si_pid in known:  # whose end is looked at elsewhere, first
                return
            os.waitpid(ended.si_pid, 0)


def usage_by_role(
    parents: list[int], children: list[Child], shared_nbytes: int
) -> dict[str, float]:
    """Megabytes and descriptors, as metrics, of supervisor and template (`parents`, pids) and of
    each role with its workers."""
    pids: dict[str, list[int]] = {"supervisor": parents}
    for child in children:
        role = {"actor": "actors", "serial": "learner"}.get(child.role, child.role)
        if child.process is not None:
            pids.setdefault(role, []).extend(_family(child.process.pid))
    taken = {role: usage(members) for role, members in pids.items()}
    row = {f"memory/{role}_mb": found.nbytes / 1e6 for role, found in taken.items()}
    row |= {f"fds/{role}": float(found.descriptors) for role, found in taken.items()}
    return row | {"memory/shared_mb": shared_nbytes / 1e6}


def _family(pid: int) -> Iterator[int]:
    """A process and all its descendants, workers of environments above all."""
    yield pid
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _family(int(child))
