"""The run folder: locked while in use, compared when resumed, refused before anything is made."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from asyncrl.children import CHILD_ENVIRONMENT, signal_name
from asyncrl.disk import CheckpointError, write_atomically
from asyncrl.plan import EXIT_FAILED, EXIT_REFUSED, Plan
from asyncrl.program import program
from asyncrl.provenance import provenance, say_what_changed

BEGUN = "launch.json", "config.json", "checkpoints"  # where one of them is, there is a run
STRANGER_SECONDS = 3.0  # a lock held for less is somebody who looks, or is being refused
GLANCES, GLANCE_SECONDS = 10, 0.1  # how often a start asks again, and how long after each
WORD_SECONDS, PREPARE_SECONDS = 10.0, 300.0  # of waiting for a plan: it is said; it is given up
STACK_SECONDS = 2.0  # for the stacks of what is given up


class Refused(Exception):
    """The run cannot begin: one clear message, exit status 2, nothing half made."""

    status = EXIT_REFUSED


class Finished(Refused):
    """Nothing is left to do for it."""

    status = 0


def say(*lines: str) -> None:
    """Tell the user on standard error, where somebody listens; a second is enough for that."""
    text = "".join(f"asyncrl: {line}\n" for line in lines)

    def write() -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            try:
                fd = sys.stderr.fileno()
            except (OSError, ValueError):  # no file is behind it
                sys.stderr.write(text)
                return
            data = text.encode(errors="backslashreplace")
            while data:  # not by `sys.stderr`, whose lock the interpreter wants before it ends
                data = data[os.write(fd, data) :]

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    writer.join(1.0)


class RunFolder:
    """The folder of a run. As a context it is locked by this process while it is in use: at once
    where there is a run already, else from `begin` on."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.is_new = not has_begun(folder)
        self.held: dict[Path, int] = {}  # descriptors by which it is locked
        self.files: dict[str, bytes] = {}  # what children read
        self.stranger_since: float | None = None
        begun = time.strftime("%Y-%m-%d %H:%M:%S")
        self.words = f"process {os.getpid()} (since {begun})\n".encode()

    def __enter__(self) -> RunFolder:
        if not self.is_new:
            self._lock_or_refuse()
        return self

    def __exit__(self, *error) -> None:
        for fd in self.held.values():
            os.close(fd)
        self.held = {}

    def _lock_or_refuse(self) -> None:
        try:
            for _ in range(GLANCES):
                with contextlib.suppress(BlockingIOError):
                    return self._lock()
                time.sleep(GLANCE_SECONDS)
            self._lock()
        except BlockingIOError:
            self.__exit__()
            raise Refused(
                f"expected run {self.folder.name} to be free, but {_name_of_holder(self.folder)} "
                "holds it; stop that one or choose another run id"
            ) from None
        except OSError as error:
            self.__exit__()
            raise Refused(
                f"expected a run folder that can be written, got {error}; a run that cannot be "
                "saved is not begun: give permission, make room, or set ASYNCRL_RUNS elsewhere"
            ) from None

    def _lock(self) -> None:
        """Hold the folder itself, which nobody replaces unnoticed, and in it a file that says who
        does, which other machines see too; what is held already stays as it is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._hold(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        file = self._hold(self.folder / "lock", os.O_RDWR | os.O_CREAT)
        if os.pread(file, 200, 0) != self.words:
            os.ftruncate(file, 0)
            os.pwrite(file, self.words, 0)

    def _hold(self, path: Path, flags: int) -> int:
        if not self._holds(path):
            fd = os.open(path, flags, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(fd)
                raise
            if path in self.held:
                os.close(self.held[path])
            self.held[path] = fd
        return self.held[path]

    def _holds(self, path: Path) -> bool:
        """Whether what lies there is what is locked, not something in its place."""
        try:
            return path in self.held and os.path.samestat(os.fstat(self.held[path]), os.stat(path))
        except FileNotFoundError:
            return False

    def keep(self) -> str | None:
        """Hold on to the folder and put back what of it was deleted; in words who has taken its
        place, or None."""
        try:
            config = self.folder / "config.json"
            replaced = not self._holds(self.folder) and config.exists()
            if replaced and config.read_bytes() != self.files[config.name]:
                return f"another run is in {self.folder} now"
            self._lock()
            self.stranger_since = None
            for name, content in self.files.items():
                if not (self.folder / name).exists():
                    write_atomically(self.folder / name, content)
        except BlockingIOError:
            self.stranger_since = self.stranger_since or time.monotonic()
            name = _name_of_holder(self.folder)
            ours = name == self.words.decode().strip()  # a file system that counts inodes anew
            if not ours and time.monotonic() - self.stranger_since > STRANGER_SECONDS:
                return f"{name} holds {self.folder} now"
        except OSError:  # no room or no permission for now
            pass
        return None

    @property
    def own_place(self) -> Path:
        """The folder that was locked, wherever it lies now."""
        return Path(f"/proc/self/fd/{self.held[self.folder]}")

    def prepare(self, launch_file: Path, options: list[str]) -> Plan:
        """Have a child execute the launch file; refuse what it refuses, and changes on resume."""
        own_copy = self.folder / "launch.py"
        original = launch_file
        if not self.is_new:
            file, before = stored_launch(self.folder)
            options = [*before, *_without_auto(options)]
            with contextlib.suppress(OSError):
                if launch_file.read_bytes() == own_copy.read_bytes():
                    is_own = launch_file.samefile(own_copy)  # else it may have been moved
                    launch_file, original = own_copy, file if is_own else launch_file
        if not os.path.isfile(launch_file):
            raise Refused(
                f"expected a launch file, got {launch_file}, which is not there; "
                "launch/ holds examples"
            )
        options = list(options)
        self.launch = {"file": str(original.resolve()), "options": options}
        try:
            self.source = launch_file.read_bytes()
        except OSError as error:
            raise Refused(f"expected a launch file, got {error}; give permission") from None
        plan = prepare_in_child(launch_file.resolve(), original.resolve(), options)
        options += plan.measured  # kept, because every process reads these options again
        if not self.is_new:
            from asyncrl.describe import differences

            before = _stored(self.folder, "config.json", _config)
            changed = differences(before, plan.config, unset=plan.unset)
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # cannot be read
                last = Plan.read(self.folder)  # of its last start, which may have got nowhere
                changed = changed or differences(last.parameters, plan.parameters)
            if changed:
                raise Refused(
                    f"expected the configuration that run {self.folder.name} began with, got:",
                    *(f"    {line}" for line in changed),
                    "resume it without these changes, or begin a run with another id",
                )
            self._refuse_if_finished(plan.total_env_steps)
        return plan

    def _refuse_if_finished(self, total: int) -> None:
        from asyncrl.checkpoint import Checkpoints

        if newest_checkpoint(self.folder) >= total:
            valid = Checkpoints(self.folder / "checkpoints").newest_valid()
            if valid and valid.number >= total:
                raise Finished(
                    f"run {self.folder.name} is finished: {valid.number:,} of {total:,} env steps; "
                    "to go on, start it again with a larger --total-env-steps"
                )

    def begin(self, plan: Plan) -> None:
        """Make the run folder say what is being run."""
        from asyncrl.checkpoint import Checkpoints

        if not self.held:
            self._lock_or_refuse()
            if self.is_new and has_begun(self.folder):
                raise Refused(
                    f"expected run {self.folder.name} to be new, but another process has begun it "
                    "meanwhile; start it again to resume it, or choose another run id"
                )
        config = {"config": plan.config, **provenance(), "launch": self.launch}
        files = {"plan.json": vars(plan), "config.json": config, "launch.json": self.launch}
        self.files = {"launch.py": self.source}
        self.files |= {name: json.dumps(file, indent=1).encode() for name, file in files.items()}
        try:
            if not self.is_new:
                say_what_changed(self.folder, self.source, config)
            for name, content in self.files.items():
                write_atomically(self.folder / name, content)
            (self.folder / "logs").mkdir(exist_ok=True)
            Checkpoints(self.folder / "checkpoints").clean()
        except OSError as error:
            raise Refused(
                f"expected a run folder that can be written, got {error}; make room or give "
                "permission: a run that cannot be saved is not begun"
            ) from None
        except CheckpointError as error:
            raise Refused(str(error)) from None


def has_begun(folder: Path) -> bool:
    return any(os.path.lexists(folder / name) for name in BEGUN)


def newest_checkpoint(folder: Path) -> int:
    """The env steps of the newest checkpoint in a run's folder, -1 where there is none."""
    saved = (folder / "checkpoints").glob("checkpoint_" + 12 * "[0-9]")
    return max((int(path.name[-12:]) for path in saved), default=-1)


def holder(folder: Path) -> str | None:
    """Who holds a run's folder, None where it is free. OSError where one may not look."""
    for path in (folder, folder / "lock"):
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _name_of_holder(folder)
            finally:
                os.close(fd)
    return None


def _name_of_holder(folder: Path) -> str:
    with contextlib.suppress(OSError), open(folder / "lock", "rb") as file:
        if words := file.read(200).decode(errors="replace").strip():
            return words
    with contextlib.suppress(OSError):  # somebody has deleted that file
        place = os.stat(folder)
        device = f"{os.major(place.st_dev):02x}:{os.minor(place.st_dev):02x}:{place.st_ino}"
        for line in Path("/proc/locks").read_text().splitlines():
            _, kind, *_, pid, where, _, _ = line.split()
            if kind == "FLOCK" and where == device:
                return f"process {pid}"
    return "another process"


def stored_launch(folder: Path) -> tuple[Path, list[str]]:
    """The launch file that a run was begun with, and its options."""
    if os.path.lexists(folder / "launch.json"):
        return _stored(folder, "launch.json", _launch)
    return _stored(folder, "config.json", lambda found: _launch(found["launch"]))


def _launch(found: Any) -> tuple[Path, list[str]]:
    file, options = found["file"], found["options"]
    words = options if isinstance(options, list) else [None]
    if not all(isinstance(word, str) for word in (file, *words)):
        raise TypeError(f"expected a file and a list of options, got {file!r:.99}, {options!r:.99}")
    return Path(file), options


def _config(found: Any) -> dict:
    if not isinstance(found["config"], dict):
        raise TypeError(f"expected a configuration by names, got {found['config']!r:.99}")
    return found["config"]


def _stored(folder: Path, name: str, read: Callable[[Any], Any]) -> Any:
    try:
        return read(json.loads((folder / name).read_bytes()))
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise Refused(
            f"expected {folder / name} as the run wrote it, got {type(error).__name__}: {error}; "
            "put it back, or begin a run with another id"
        ) from None


def _without_auto(options: list[str]) -> list[str]:
    """A resumed run keeps the number of actors that was found for it."""
    name, kept = "--actor.num-actors", []
    for word in options:
        if word == "auto" and kept[-1:] == [name]:
            kept.pop()
        elif word != f"{name}=auto":
            kept.append(word)
    return kept


@contextlib.contextmanager
def leaving_at_once(number: int) -> Iterator[None]:
    """As long as there is nothing to save. A container's process 1 has no other way to leave."""

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(number, leave)
    try:
        yield
    finally:
        signal.signal(number, previous)


def prepare_in_child(launch_file: Path, original: Path, options: list[str]) -> Plan:
    """The plan of a run, or SystemExit with a status where it was said why there is none."""
    with open(os.memfd_create("plan"), "rb") as file:  # a pipe could be held open by others
        command = program(
            "asyncrl.run", "prepare", "0", str(launch_file), str(original), str(file.fileno()),
            *options,
        )  # fmt: skip
        environment = CHILD_ENVIRONMENT | os.environ
        child = subprocess.Popen(command, pass_fds=[file.fileno()], env=environment)
        if not _has_ended(child, original):
            raise SystemExit(EXIT_REFUSED)
        status = child.wait()
        file.seek(0)
        text = file.read()
    if status == 0 and text:
        return Plan(**json.loads(text))
    if status == 0 and not {"-h", "--help"} & set(options):
        say(f"expected {original} to define a Config, but it ended its process; let it not exit")
        status = EXIT_REFUSED
    elif status < 0 and -status not in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        say(f"expected a plan of {original}, but the process that makes it was ended by "
            f"{signal_name(-status)}; SIGKILL often means too little memory: see dmesg, "
            "then start it again")  # fmt: skip
        status = EXIT_FAILED
    raise SystemExit(status if status >= 0 else 128 - status)


def _has_ended(child: subprocess.Popen, launch_file: Path) -> bool:
    """Wait for it; whether it has ended by itself in time. Of one that has not, show the stacks."""
    pidfd, ended = os.pidfd_open(child.pid), select.poll()
    ended.register(pidfd, select.POLLIN)
    try:
        if ended.poll(WORD_SECONDS * 1000):
            return True
        say(f"still waiting: libraries are imported, {launch_file} is executed, its environment "
            f"and model are made; given up after {PREPARE_SECONDS:.0f} s")  # fmt: skip
        if ended.poll((PREPARE_SECONDS - WORD_SECONDS) * 1000):
            return True
        for number in (signal.SIGABRT, signal.SIGCONT):  # faulthandler writes the stacks
            child.send_signal(number)
        ended.poll(STACK_SECONDS * 1000)
        say(f"expected {launch_file} to be executed, and its environment and model to be made, "
            f"within {PREPARE_SECONDS:.0f} s, got none; the stacks above show what it waits for: "
            "mend that, or prepare what takes so long beforehand")  # fmt: skip
        child.kill()
        return False
    finally:
        os.close(pidfd)
