"""Where faults are injected: real runs, a look into their shared memory, and what always holds.

Each fault is a function of a `Lab` that injects it, watches, and returns an `Outcome`; the tests
here call it once, `benchmarks/faults.py` as often as it is told.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from asyncrl.plan import Plan
from asyncrl.spec_json import spec_from_json
from asyncrl.transport.ring import Ring, Word
from asyncrl.transport.status import Status
from tests.runs import Run

LAUNCH_FILES = Path(__file__).parent.parent / "launch_files"
FAULTY = LAUNCH_FILES / "faulty.py"
STRANGER = "stranger"  # in the names of what a test puts into /dev/shm beside another test


class Broken(AssertionError):
    """A promise was not kept: score 0."""


def expect(ok: object, what: str) -> None:
    if not ok:
        raise Broken(what)


@dataclass
class Outcome:
    """What one injection came to. Seconds and counts are one each time it happened."""

    recovery_seconds: list[float] = field(default_factory=list)
    transitions_lost: list[int] = field(default_factory=list)  # a kill
    pause_seconds: list[float] = field(default_factory=list)  # of checkpoints
    resume_loss: list[int] = field(default_factory=list)  # env steps
    bound_seconds: float | None = None  # of the recovery
    score: int = 2  # 1: where the promise is a clean stop
    stand_in: str = ""  # by what the fault was injected, where it is not the real thing


class Memory:
    """The words of a running run, read through its parent's file descriptors."""

    def __init__(self, run: Run):
        learner = run.find("learner 0")
        expect(learner is not None, "expected a learner")
        plan = Plan.read(run.folder)
        spec = spec_from_json(plan.spec)
        segments = {}
        for path in Path(f"/proc/{run.process.pid}/fd").iterdir():
            name = os.readlink(path)
            if name.startswith("/memfd:asyncrl-"):
                with open(path, "rb") as file:
                    memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
                segments[name.removeprefix("/memfd:asyncrl-").split()[0]] = memory
        lanes = [segments[f"lane-{lane}"] for lane in range(plan.num_lanes)]
        self.rings = [Ring(lane, spec, plan.slots_per_lane) for lane in lanes]
        self.status = Status(segments["status"])
        self.weights = segments["weights"]
        self.lanes_per_actor = plan.num_lanes // plan.num_actors

    @property
    def version(self) -> int:
        """Of the published weights."""
        return int.from_bytes(self.weights[:8], "little")

    def heads(self, actor: int) -> list[int]:
        """Unrolls committed on each lane of an actor."""
        lanes = self.rings[actor * self.lanes_per_actor :][: self.lanes_per_actor]
        return [ring.read(Word.HEAD) for ring in lanes]

    def rebuilds(self) -> int:
        return sum(ring.read(Word.REBUILDS) for ring in self.rings)


class Lab:
    """Starts runs in `folder`; `patience` stretches every bound on a busy machine.

    A `shared` one serves several faults: what one of them left running is given to the next.
    """

    shared = False

    def __init__(self, folder: Path, patience: float = 1.0, quick: bool = True):
        self.folder, self.patience, self.quick = folder, patience, quick
        self.runs: list[Run] = []
        self.record = folder / "record.bin"
        self.held: list[int] = []  # descriptors
        self.shm = _shm()

    def start(
        self, *options: object, fault: dict | None = None, launch_file: Path = FAULTY,
        run_id: str = "run", record: bool = False, tmpfs_nbytes: int = 0, **how,
    ) -> Run:  # fmt: skip
        """Begin, or go on with, a run of the faulty launch file; `record` keeps every unroll.

        `tmpfs_nbytes`: of a disk of its own, that vanishes when the lab is closed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = {"FAULT": json.dumps(fault or {})}
        if tmpfs_nbytes:
            mount = f'mount -t tmpfs -o size={tmpfs_nbytes} tmpfs "$ASYNCRL_RUNS"; exec "$@"'
            how["prefix"] = ("unshare", "-rm", "sh", "-c", mount, "sh")
        if record:
            environment |= {"RECORD": str(self.record), "STEPS": str(self.folder)}
        if self.patience != 1:
            how["constants"] = {"STOP_SECONDS": 20 * self.patience} | how.get("constants", {})
        since = time.time()
        run = Run(self.folder, run_id, launch_file, *options, environment=environment, **how)
        run.since = since
        self.runs.append(run)
        return self._with_disk(run) if tmpfs_nbytes else run

    def running(self) -> Run:
        """A run without options, new or left by another fault; it knows its own events only."""
        if self.shared and self.runs and self.runs[-1].process.poll() is None:
            self.runs[-1].mark()
            return self.runs[-1]
        return self.start()

    def leave(self, run: Run) -> None:
        """The fault is over: stop the run, or leave it to the next one."""
        if self.shared:
            self.check_logs(run)
        else:
            self.stop(run)

    @staticmethod
    def can_mount() -> bool:
        """Whether a run can be given a file system of its own here."""
        return subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0

    def _with_disk(self, run: Run) -> Run:
        """Look at a run in another mount namespace; it is held open as long as the lab is."""
        place = Path(f"/proc/{run.process.pid}/root") / self.folder.relative_to("/")
        here = os.stat(self.folder).st_dev
        self.until(run, lambda: os.stat(place).st_dev != here, "a disk of its own")
        self.held.append(os.open(place, os.O_RDONLY | os.O_DIRECTORY))
        run.folder = Path(f"/proc/self/fd/{self.held[-1]}") / run.folder.name
        return run

    def until(self, run: Run, condition: Callable[[], object], what: str, seconds: float = 60):
        """Seconds until the condition holds; Broken where it does not in time."""
        begun = time.monotonic()
        while not condition():
            if run.process.poll() is not None:
                raise Broken(f"the run ended before {what}: {run.finish()[1][-2000:]}")
            expect(time.monotonic() - begun < seconds * self.patience, f"never came: {what}")
            time.sleep(0.01)
        return time.monotonic() - begun

    def until_learning(self, run: Run, checkpoints: int = 0) -> Memory:
        """Wait for the first updates, and for checkpoints."""
        begun = psutil.Process(run.process.pid).create_time()

        def learns() -> bool:  # by a row of its own, after a resume
            row = (run.metrics() or [{"time": 0}])[-1]
            return row["time"] > begun and row["updates"] > 0

        self.until(run, learns, "updates", 60 + 20 * checkpoints)
        self.until(run, lambda: run.num_saved() >= checkpoints, "a checkpoint")
        return Memory(run)

    def until_env_steps(self, run: Run, more: int = 2_000) -> None:
        """Wait until the run has gone on by this many env steps."""

        def env_steps() -> int:  # the log is cut back while a learner resumes
            return max((row["env_steps"] for row in run.metrics()), default=0)

        at = env_steps()
        self.until(run, lambda: env_steps() > at + more, f"{more} env steps")

    def stop(self, run: Run, number: int = signal.SIGTERM, status: int | None = None) -> float:
        """End it by a signal; returns the seconds this took. Checks what must hold after it."""
        run.children()
        begun = time.monotonic()
        run.signal(number)
        return self.ended(run, 128 + number if status is None else status, begun)

    def ended(self, run: Run, status: int, begun: float | None = None) -> float:
        """The run has ended or will soon: with this status, and nothing of it is left."""
        begun = time.monotonic() if begun is None else begun
        if run.process.stdout.closed:
            found, output = run.process.wait(30 * self.patience + 60), ""
        else:
            found, output = run.finish(30 * self.patience + 60)
        seconds = time.monotonic() - begun
        expect(found == status, f"expected exit status {status}, got {found}: {output[-2000:]}")
        self.output = output
        expect(not run.orphans(), "processes were left behind")
        self.check_logs(run)
        return seconds

    def check_logs(self, run: Run) -> None:
        """Counters never go back, and nothing new lies in /dev/shm."""
        rows = run.metrics()
        for name in ("env_steps", "updates", "episodes"):
            values = [row[name] for row in rows]
            expect(values == sorted(values), f"{name} went back: {values[-20:]}")
        left = [name for name in _shm() - self.shm if "asyncrl" in name and STRANGER not in name]
        expect(not left, f"left in /dev/shm: {left}")

    def judge(self, outcome: Outcome) -> None:
        """Hold what was measured against its bound."""
        expect(outcome.score == 2, f"score {outcome.score}")
        if outcome.bound_seconds is not None:
            slowest = max(outcome.recovery_seconds)
            words = f"recovered in {slowest:.1f} s, promised are {outcome.bound_seconds:g} s"
            expect(slowest <= outcome.bound_seconds * self.patience, words)

    def close(self) -> None:
        for run in self.runs:
            run.kill_tree()
            run.process.stdout.close()
        for fd in self.held:
            os.close(fd)


def kill(process: psutil.Process, number: int = signal.SIGKILL) -> float:
    """Send a signal; returns the moment."""
    process.send_signal(number)
    return time.monotonic()


def _shm() -> set[str]:
    return set(os.listdir("/dev/shm"))
