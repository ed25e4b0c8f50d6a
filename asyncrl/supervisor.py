"""The parent of a run: owns memory and doorbells, starts the processes and keeps them alive.

It imports no torch and touches no GPU: nothing that happens to a child can take the shared memory
away or hang the one that has to clean up. It sleeps on its children's ends, on signals, and once a
second looks at heartbeats.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from asyncrl.checkpoint import write_atomically
from asyncrl.metrics import EventLog
from asyncrl.run import EXIT_FAILED, EXIT_REFUSED, STATUS_BYTES, Plan, Status, versions
from asyncrl.transport.ring import Ring, Word
from asyncrl.transport.shared_memory import Doorbell, Segment
from asyncrl.transport.weights import WeightsBuffer
from asyncrl.types import Spec, fields_from_json

STOP_SECONDS = 20.0  # for a checkpoint, after the first signal
START_SECONDS, ACTOR_SECONDS, LEARNER_SECONDS = 120.0, 10.0, 300.0  # without a heartbeat
MAX_RESTARTS, RESTART_WINDOW_SECONDS = 5, 600.0
BACK_OFF_SECONDS, MAX_BACK_OFF_SECONDS = 0.5, 30.0

# glibc gives large blocks back to the system and fetches them again at every update; told not to,
# a training step on a CPU takes about half the time.
CHILD_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "PYTHONUNBUFFERED": "1",
}


class Refused(Exception):
    """The run cannot begin: one clear message, exit status 2, nothing half made."""


def train(
    launch_file: Path,
    run_id: str,
    options: list[str],
    runs: Path,
    display: Callable[[Path, int], Any],
) -> int:
    """Start or resume a run and stay until it ends; returns the exit status.

    `display(folder, total_env_steps)` makes an object with `refresh()` and `close()`.
    """
    folder = runs / run_id
    try:
        with _Run(folder) as run:
            plan = run.prepare(launch_file, options)
            preflight(plan, runs)
            run.begin(plan)
            supervisor = Supervisor(folder, plan)
            screen = display(folder, plan.total_env_steps)
            try:
                return supervisor.run(screen.refresh)
            finally:
                screen.close()
    except Refused as error:
        for line in error.args:
            print(f"asyncrl: {line}", file=sys.stderr)
        return EXIT_REFUSED


# -- before anything is started ------------------------------------------------------------------


class _Run:
    """A run folder, locked by this process while it is in use."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.lock: int | None = None
        self.is_new = not (folder / "launch.json").exists()
        if not self.is_new:
            self._lock()

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *error) -> None:
        if self.lock is not None:
            os.close(self.lock)

    def _lock(self) -> None:
        path = self.folder / "lock"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise Refused(
                f"expected a run folder that can be written, got {error}; a run that cannot be "
                "saved is not begun: give permission, make room, or set ASYNCRL_RUNS to another place"
            ) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(fd)
            raise Refused(
                f"expected run {self.folder.name} to be free, but {holder} holds it; stop that one "
                "or choose another run id"
            ) from None
        os.ftruncate(fd, 0)
        begun = time.strftime("%Y-%m-%d %H:%M:%S")
        os.pwrite(fd, f"process {os.getpid()} (since {begun})\n".encode(), 0)
        self.lock = fd

    def prepare(self, launch_file: Path, options: list[str]) -> Plan:
        """Have a child execute the launch file; refuses what it refuses, and other configurations."""
        own_copy = self.folder / "launch.py"
        original = launch_file
        if not self.is_new:
            stored = json.loads((self.folder / "launch.json").read_text())
            options = [*stored["options"], *options]
            if launch_file.is_file() and launch_file.read_bytes() == own_copy.read_bytes():
                launch_file, original = own_copy, Path(stored["file"])
        if not launch_file.is_file():
            raise Refused(
                f"expected a launch file, got {launch_file}, which is not there; "
                "launch/ holds examples"
            )
        self.launch = {"file": str(original.resolve()), "options": options}
        self.source = launch_file.read_bytes()
        plan = _prepare_in_child(launch_file.resolve(), original.resolve(), options)
        if not self.is_new:
            from asyncrl.describe import differences

            before = json.loads((self.folder / "config.json").read_text())
            changed = differences(before["config"], plan.config)
            if changed:
                raise Refused(
                    f"expected the configuration that run {self.folder.name} began with, got:",
                    *(f"    {line}" for line in changed),
                    "resume it without these changes, or begin a run with another id",
                )
        return plan

    def begin(self, plan: Plan) -> None:
        """Make the run folder say what is being run."""
        if self.lock is None:
            self._lock()
        config = {"config": plan.config, "versions": versions(), "git": _git_revision()}
        config["launch"] = self.launch
        try:
            files = {"plan.json": vars(plan), "config.json": config, "launch.json": self.launch}
            write_atomically(self.folder / "launch.py", self.source)
            for name, content in files.items():
                write_atomically(self.folder / name, json.dumps(content, indent=1).encode())
            (self.folder / "logs").mkdir(exist_ok=True)
        except OSError as error:
            raise Refused(
                f"expected a run folder that can be written, got {error}; make room or give "
                "permission: a run that cannot be saved is not begun"
            ) from None


def _prepare_in_child(launch_file: Path, original: Path, options: list[str]) -> Plan:
    read_end, write_end = os.pipe()
    command = [sys.executable, "-m", "asyncrl.run", "prepare", "0", str(launch_file),
               str(original), str(write_end), *options]  # fmt: skip
    child = subprocess.Popen(command, pass_fds=[write_end])
    os.close(write_end)
    with os.fdopen(read_end) as file:
        text = file.read()
    status = child.wait()
    if status != 0 or not text:
        raise SystemExit(status if status > 0 else 128 - status)
    return Plan(**json.loads(text))


def preflight(plan: Plan, runs: Path, available: int | None = None) -> None:
    """Refuse, with the arithmetic, a run that memory or disk cannot hold."""
    needed = sum(nbytes for _, nbytes in plan.memory)
    limits = {"available": psutil.virtual_memory().available if available is None else available}
    limits |= _cgroup_memory()
    source = min(limits, key=limits.get)
    if needed > limits[source]:
        raise Refused(
            f"expected {needed / 1e9:.2f} GB of memory, got {limits[source] / 1e9:.2f} GB "
            f"({source}); the run needs:",
            *(f"    {nbytes / 1e9:8.3f} GB  {what}" for what, nbytes in plan.memory),
            "lower --algorithm.replay.capacity, --actor.num-actors or --actor.envs-per-lane",
        )
    place = next(path for path in (runs, *runs.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if plan.disk_nbytes * 1.1 > free:
        raise Refused(
            f"expected {plan.disk_nbytes * 1.1 / 1e9:.2f} GB of disk in {place} for the saved "
            f"replay, got {free / 1e9:.2f} GB; lower --algorithm.replay.capacity or use "
            "--learner.save-replay False (a resumed run then fills its replay anew)"
        )


def _cgroup_memory() -> dict[str, int]:
    """What the container's own limit leaves, where there is one."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        return {} if limit == "max" else {"left of the container's limit": int(limit) - used}
    except (OSError, ValueError):
        return {}


def _git_revision() -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        result = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
            capture_output=True, text=True, timeout=5,
        )  # fmt: skip
        return result.stdout.strip() or None
    return None


# -- while it runs -------------------------------------------------------------------------------


@dataclass
class Child:
    """One process of the run and its history."""

    role: str
    index: int
    process: subprocess.Popen | None = None
    pidfd: int = -1
    started: float = 0.0
    generation: int = -1  # grows with each start
    deaths: list[float] = field(default_factory=list)
    restart_at: float | None = None
    gone: bool = False  # given up, or ended as it should

    @property
    def name(self) -> str:
        return f"{self.role} {self.index}" if self.role == "actor" else self.role


class Supervisor:
    """Starts the children of a planned run and sees it to its end."""

    def __init__(self, folder: Path, plan: Plan):
        self.folder, self.plan = folder, plan
        self.events = EventLog(folder / "events.log")
        spec = Spec.from_json(plan.spec)
        lane_nbytes = Ring.nbytes(spec, plan.slots_per_lane)
        self.segments = {
            "status": Segment.create("status", STATUS_BYTES),
            "weights": Segment.create(
                "weights", WeightsBuffer.nbytes(fields_from_json(plan.weights))
            ),
        }
        self.lanes = [Segment.create(f"lane-{i}", lane_nbytes) for i in range(plan.num_lanes)]
        self.status = Status(self.segments["status"].buffer)
        self.rings = [Ring(lane.buffer, spec, plan.slots_per_lane) for lane in self.lanes]
        self.learner_bell, self.evaluator_bell = Doorbell.create(), Doorbell.create()
        self.actor_bells = [Doorbell.create() for _ in range(plan.num_actors)]
        self.fds = {
            **{name: segment.fd for name, segment in self.segments.items()},
            "lanes": [lane.fd for lane in self.lanes],
            "learner_bell": self.learner_bell.fd,
            "evaluator_bell": self.evaluator_bell.fd,
            "actor_bells": [bell.fd for bell in self.actor_bells],
        }
        roles = [("serial", 0)]
        if plan.schedule != "serial":
            roles = [("learner", 0), *(("actor", i) for i in range(plan.num_actors))]
        if plan.evaluates:
            roles.append(("evaluator", 0))
        self.children = [Child(role, index) for role, index in roles]
        self.signals: list[int] = []
        self.stop_deadline: float | None = None
        self.exit_status: int | None = None

    def run(self, refresh: Callable[[], None]) -> int:
        """Supervise until the learner is done, a signal comes or nothing can go on."""
        wake_read, wake_write = socket.socketpair()
        wake_write.setblocking(False)
        previous = {
            number: signal.signal(number, lambda number, frame: self.signals.append(number))
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        previous_fd = signal.set_wakeup_fd(wake_write.fileno(), warn_on_full_buffer=False)
        self.events.event("start", f"run {self.folder.name} started", pid=os.getpid())
        try:
            for child in self.children:
                self._start(child)
            while self.exit_status is None:
                self._sleep(wake_read)
                self._heed_signals()
                self._bury_the_dead()
                self._look_at_hearts()
                self._start_the_due()
                refresh()
        finally:
            self._end_all()
            signal.set_wakeup_fd(previous_fd)
            for number, handler in previous.items():
                signal.signal(number, handler)
            wake_read.close()
            wake_write.close()
            refresh()
        self.events.event("end", f"run {self.folder.name} ended", status=self.exit_status)
        return self.exit_status

    def _sleep(self, wake: socket.socket) -> None:
        """Until a child ends, a signal comes, or a second has passed."""
        poll = select.poll()
        poll.register(wake, select.POLLIN)
        for child in self.children:
            if child.process is not None:
                poll.register(child.pidfd, select.POLLIN)
        soon = [child.restart_at for child in self.children if child.restart_at is not None]
        timeout = min([1.0, *(max(at - time.monotonic(), 0) for at in soon)])
        for fd, _ in poll.poll(timeout * 1000):
            if fd == wake.fileno():
                wake.recv(4096)

    # -- starting and ending ---------------------------------------------------------------------

    def _start(self, child: Child) -> None:
        child.generation += 1
        child.restart_at = None
        child.started = time.monotonic()
        if child.role == "actor":
            for ring in self._rings_of(child):
                ring.words[Word.BEAT] = 0
        flat = [fd for value in self.fds.values() for fd in ([value] if isinstance(value, int) else value)]
        command = [sys.executable, "-m", "asyncrl.run", child.role, str(child.index),
                   str(self.folder), str(os.getpid()), str(child.generation),
                   json.dumps(self.fds)]  # fmt: skip
        with open(self._log_of(child), "wb") as log:
            child.process = subprocess.Popen(
                command,
                pass_fds=flat,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=CHILD_ENVIRONMENT | os.environ,
                start_new_session=True,  # a group of its own, to be killed as one
            )
        child.pidfd = os.pidfd_open(child.process.pid)
        verb = "started" if child.generation == 0 else "restarted"
        self.events.event(
            verb, f"{child.name} {verb}", pid=child.process.pid, generation=child.generation
        )

    def _log_of(self, child: Child) -> Path:
        return self.folder / "logs" / f"{child.name.replace(' ', '_')}.log"

    def _rings_of(self, child: Child) -> list[Ring]:
        lanes = self.plan.num_lanes // self.plan.num_actors
        return self.rings[child.index * lanes : (child.index + 1) * lanes]

    def _bury_the_dead(self) -> None:
        for child in self.children:
            if child.process is None or child.process.poll() is None:
                continue
            code = child.process.returncode
            self._forget_process(child)
            if code == 0:
                child.gone = True
                if child.role in ("learner", "serial"):
                    self.exit_status = 128 + self.signals[0] if self.signals else 0
            elif self.stop_deadline is not None:
                child.gone = True
                if child.role in ("learner", "serial"):
                    self._report_death(child, code)
                    self.exit_status = EXIT_FAILED
            else:
                self._mourn(child, code)

    def _forget_process(self, child: Child) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.process.pid, signal.SIGKILL)  # env workers it may have left
        os.close(child.pidfd)
        child.process, child.pidfd = None, -1

    def _report_death(self, child: Child, code: int) -> str:
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        text = self._log_of(child).read_text(errors="replace")[-6000:].strip()
        self.events.event("death", f"{child.name} died: {cause}\n{text}".strip())
        return f"{child.name} died: {cause}\n{text}"

    def _mourn(self, child: Child, code: int) -> None:
        """Decide what becomes of a run whose child died unasked."""
        report = self._report_death(child, code)
        now = time.monotonic()
        child.deaths = [at for at in child.deaths if now - at < RESTART_WINDOW_SECONDS] + [now]
        given_up = len(child.deaths) > MAX_RESTARTS
        back_off = min(BACK_OFF_SECONDS * 2 ** (len(child.deaths) - 1), MAX_BACK_OFF_SECONDS)
        if given_up:
            child.gone = True
            self.events.event("gave-up", f"{child.name} died {len(child.deaths)} times in "
                              f"{RESTART_WINDOW_SECONDS / 60:.0f} minutes; not restarted")  # fmt: skip
            actors = [other for other in self.children if other.role == "actor"]
            turn_based = self.plan.schedule != "async"
            needed = child.role in ("learner", "serial") or (child.role == "actor" and turn_based)
            if needed or (child.role == "actor" and all(other.gone for other in actors)):
                print(f"asyncrl: {report}\nasyncrl: the run cannot go on without "
                      f"{child.name}; see {self.folder / 'events.log'}", file=sys.stderr)  # fmt: skip
                self.exit_status = EXIT_FAILED
        elif self.plan.schedule == "async" or child.role == "evaluator":
            child.restart_at = now + back_off
        else:
            # Turns must be exact: all go back to the last periodic checkpoint together.
            for other in self.children:
                if other.process is not None and other.role != "evaluator":
                    other.process.kill()
                    other.process.wait()
                    self._forget_process(other)
                if other.role != "evaluator":
                    other.restart_at, other.generation = now + back_off, -1
            self._clear_memory()

    def _clear_memory(self) -> None:
        """Make the segments as new, for children that will start from a checkpoint."""
        for ring in self.rings:
            ring.words[:] = 0
        self.segments["weights"].buffer[:8] = bytes(8)
        self.status.words[Status.READY] = 0

    def _start_the_due(self) -> None:
        now = time.monotonic()
        for child in self.children:
            if child.restart_at is not None and now >= child.restart_at and not child.gone:
                self._start(child)

    def _look_at_hearts(self) -> None:
        """Kill what is alive but stuck; whoever is merely blocked keeps beating."""
        now = time.monotonic()
        for child in self.children:
            if child.process is None:
                continue
            beat, limit = self._last_beat(child)
            silent = now - max(beat, child.started)
            if silent < (limit if beat > child.started else max(START_SECONDS, limit)):
                continue
            self.events.event("stuck", f"{child.name} is stuck: no heartbeat for {silent:.0f} s",
                              pid=child.process.pid)  # fmt: skip
            child.process.send_signal(signal.SIGABRT)  # faulthandler writes the stacks
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(1.0)
            child.process.kill()

    def _last_beat(self, child: Child) -> tuple[float, float]:
        """(time of the last heartbeat, silence that means stuck), in seconds."""
        if child.role == "actor":
            beat = max(ring.read(Word.BEAT) for ring in self._rings_of(child))
            return beat / 1e9, ACTOR_SECONDS
        word = Status.EVALUATOR_BEAT if child.role == "evaluator" else Status.LEARNER_BEAT
        return int(self.status.words[word]) / 1e9, LEARNER_SECONDS

    # -- stopping --------------------------------------------------------------------------------

    def _heed_signals(self) -> None:
        now = time.monotonic()
        if self.signals and self.stop_deadline is None:
            self.stop_deadline = now + STOP_SECONDS
            name = signal.Signals(self.signals[0]).name
            self.events.event("stopping", f"{name}: checkpoint and exit; a second one: at once")
            self._ask_to_stop()
            if all(child.process is None for child in self.children if child.role in ("learner", "serial")):
                self.exit_status = 128 + self.signals[0]
        if len(self.signals) > 1 or (self.stop_deadline is not None and now > self.stop_deadline):
            why = "a second signal" if len(self.signals) > 1 else "no checkpoint in time"
            self.events.event("stopping", f"{why}: everything is killed")
            self.exit_status = 128 + self.signals[0]

    def _ask_to_stop(self) -> None:
        self.status.words[Status.STOP] = 1
        for bell in (self.learner_bell, self.evaluator_bell, *self.actor_bells):
            bell.ring()
        for child in self.children:
            child.restart_at = None

    def _end_all(self) -> None:
        """Nobody outlives the parent."""
        self._ask_to_stop()
        deadline = time.monotonic() + (2.0 if len(self.signals) < 2 else 0.0)
        for child in self.children:
            if child.process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.process.wait(max(deadline - time.monotonic(), 0.01))
                child.process.kill()
                child.process.wait()
                self._forget_process(child)


