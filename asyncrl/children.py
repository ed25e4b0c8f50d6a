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

KILL_SECONDS = 2.0  # to be gone after SIGKILL; a disk that hangs may take longer
PAGE_NBYTES = os.sysconf("SC_PAGE_SIZE")
MAX_LOG_NBYTES = 64_000_000  # of what a child prints; more is cut down to
LAST_NBYTES = 24_000  # its end
MARK = "ASYNCRL_CHILD"  # in the environment of what a child starts: SUPERVISOR:CHILD, their pids
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

    def kill_with_stacks(self) -> None:
        """Kill one that is stuck; faulthandler writes where it was, if it still runs."""
        for number in (signal.SIGABRT, signal.SIGCONT):
            self.send_signal(number)
        self.wait(1.0)
        self.kill()

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
    proven: bool = False  # it has done some
    excused: float = 0.0  # what silence before this means is not its fault
    work_at_start: int = 0
    restart_at: float | None = None
    refused: int = 0  # starts in a row that the system did not allow
    last_beat: float = 0.0
    cpu_seconds_at_beat: float = 0.0
    log_cut: bool = False  # since its start; said once
    gone: bool = False  # given up, or ended as it should

    @property
    def name(self) -> str:
        return f"{self.role} {self.index}" if self.role == "actor" else self.role

    @property
    def learns(self) -> bool:
        """Whether the run ends with it."""
        return self.role in ("learner", "serial")

    @property
    def is_ending(self) -> bool:
        """Whether it was killed to begin anew and is not gone yet."""
        return self.process is not None and self.restart_at is not None

    def kill(self) -> None:
        """End its process, and forget it if it is gone soon; a disk may hold it up."""
        self.process.kill()
        if self.process.wait(KILL_SECONDS) is not None:
            self.bury()

    def bury(self) -> None:
        """Forget its process, which has ended."""
        self.process.bury()
        self.process = None

    def log_in(self, folder: Path) -> Path:
        return folder / "logs" / f"{self.name.replace(' ', '_')}.log"

    def open_log(self, folder: Path) -> BinaryIO:
        """Where its output goes, from now on; nowhere, if there is no place for it."""
        self.log_cut, log = False, self.log_in(folder)
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_bytes(b"")
            return open(log, "ab")  # to append, so that what follows a cut has no hole before it
        except OSError:
            return open(os.devnull, "wb")

    def cut_log(self, folder: Path) -> str:
        """Leave only the end of its log where that is too large; what to say of it, once."""
        log, said = self.log_in(folder), self.log_cut
        with contextlib.suppress(OSError):
            nbytes = log.stat().st_size
            if nbytes > MAX_LOG_NBYTES:
                self.log_cut = True
                with open(log, "a+b", buffering=0) as file:
                    end = os.pread(file.fileno(), LAST_NBYTES, nbytes - LAST_NBYTES)
                    file.truncate(0)
                    file.write(end)
                size = f"{nbytes / 1e6:.0f} MB"
                return "" if said else f"{log.name} had {size}: only its end is kept from now on"
        return ""

    def obituary(self, folder: Path, code: int) -> str:
        """Of what it died, by its exit status, and its last words."""
        text = last_words(self.log_in(folder))
        cause = f"signal {signal_name(-code)}" if code < 0 else f"exit status {code}"
        cause += f": {text.splitlines()[-1]:.300}" if code > 0 and text else ""
        return f"{self.name} died: {cause}\n{text}".strip()

    def cpu_seconds(self) -> float:
        """Processor time it has had, with the workers of its environments."""
        seconds = 0.0
        for pid in _family(self.process.pid):
            with contextlib.suppress(psutil.Error, OSError):  # no more descriptors for now
                times = psutil.Process(pid).cpu_times()
                seconds += times.user + times.system
        return seconds

    def stuck_for(self, beat: float, limit: float, start_limit: float) -> float:
        """Seconds without a heartbeat where they mean that it is stuck, else 0.

        One that wants to run and is given no processor or no disk is not stuck, nor is one whose
        workers are not: while any of them is runnable, the silence counts only as far as it was
        spent computing.
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
        """Whether a thread of it or of its workers runs, or waits for a processor or a disk, rather
        than asleep or stopped."""
        for pid in _family(self.process.pid):
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    if (task / "stat").read_text().rpartition(")")[2].split()[0] in "RD":
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


def end_all(children: list[Child], grace_seconds: float) -> None:
    """Wait so long for all to end by themselves, then leave nobody."""
    alive = [child for child in children if child.process is not None]
    deadline = time.monotonic() + grace_seconds
    for child in alive:
        child.process.wait(max(deadline - time.monotonic(), 0.0))
    end_strays(set())  # while it is still to be seen whose they are
    for child in alive:
        child.process.kill()
    deadline = time.monotonic() + KILL_SECONDS
    for child in alive:
        child.process.wait(max(deadline - time.monotonic(), 0.0))
        child.bury()
    end_strays(set())


def last_words(log: Path) -> str:
    """The end of what a child has written; of a log of any size, only that is read."""
    with contextlib.suppress(OSError), open(log, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_NBYTES))
        return file.read(LAST_NBYTES).decode(errors="replace")[-6000:].strip()
    return ""


def signal_name(number: int) -> str:
    """SIGTERM; real-time signals have a number only."""
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return str(number)


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


def mark_offspring(supervisor: int) -> None:
    """Have what this process starts carry its mark: simulators of environments, say, in sessions
    of their own, where no signal to its group reaches them."""
    os.environ[MARK] = f"{supervisor}:{os.getpid()}"


def end_strays(living: set[int]) -> None:
    """Kill what was started by a child that is not among `living` (pids).

    A process shows the environment of its last exec: what children fork is in their group.
    """
    for adopted in _offspring(os.getpid()):
        for pid in _family(adopted) if adopted not in living else ():
            if (starter := _starter(pid)) and starter not in living:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)


def _starter(pid: int) -> int:
    """The child of this process whose mark another one carries; 0 for none."""
    mark = f"{MARK}={os.getpid()}:".encode()
    with contextlib.suppress(OSError, ValueError):
        for variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if variable.startswith(mark):
                return int(variable.removeprefix(mark))
    return 0


def reap_strangers(known: set[int]) -> None:
    """Of processes that were adopted, kill those whose child has ended, and take note of all
    that have ended, so that nothing of them stays."""
    end_strays(known)
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
    for child in _offspring(pid):
        yield from _family(child)


def _offspring(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            yield from map(int, (task / "children").read_text().split())
