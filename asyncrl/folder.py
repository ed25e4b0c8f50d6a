"""The run folder: locked while in use, compared when resumed, refused before anything is made."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from asyncrl.children import CHILD_ENVIRONMENT
from asyncrl.disk import write_atomically
from asyncrl.plan import Plan, versions


class Refused(Exception):
    """The run cannot begin: one clear message, exit status 2, nothing half made."""


class RunFolder:
    """A run folder, locked by this process while it is in use."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.lock: int | None = None
        self.is_new = not (folder / "launch.json").exists()
        if not self.is_new:
            self._lock()

    def __enter__(self) -> RunFolder:
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
                "saved is not begun: give permission, make room, or set ASYNCRL_RUNS elsewhere"
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
        """Have a child execute the launch file; refuse what it refuses, and changes on resume."""
        own_copy = self.folder / "launch.py"
        original = launch_file
        if not self.is_new:
            stored = self._read("launch.json", "options", "file")
            options = [*stored["options"], *_without_auto(options)]
            if launch_file.is_file() and launch_file.read_bytes() == own_copy.read_bytes():
                launch_file, original = own_copy, Path(stored["file"])
        if not launch_file.is_file():
            raise Refused(
                f"expected a launch file, got {launch_file}, which is not there; "
                "launch/ holds examples"
            )
        options = list(options)
        self.launch = {"file": str(original.resolve()), "options": options}
        self.source = launch_file.read_bytes()
        plan = prepare_in_child(launch_file.resolve(), original.resolve(), options)
        options += plan.measured  # kept, because every process reads these options again
        if not self.is_new:
            from asyncrl.describe import differences

            before = self._read("config.json", "config")
            changed = differences(before["config"], plan.config)
            if changed:
                raise Refused(
                    f"expected the configuration that run {self.folder.name} began with, got:",
                    *(f"    {line}" for line in changed),
                    "resume it without these changes, or begin a run with another id",
                )
        return plan

    def _read(self, name: str, *keys: str) -> dict:
        try:
            found = json.loads((self.folder / name).read_text())
            return {key: found[key] for key in keys}
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise Refused(
                f"expected {self.folder / name} as the run wrote it, got "
                f"{type(error).__name__}: {error}; put it back, or begin a run with another id"
            ) from None

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
    """The plan of a run, or SystemExit with the status of the child that could not make one."""
    read_end, write_end = os.pipe()
    command = [sys.executable, "-m", "asyncrl.run", "prepare", "0", str(launch_file),
               str(original), str(write_end), *options]  # fmt: skip
    environment = CHILD_ENVIRONMENT | os.environ
    child = subprocess.Popen(command, pass_fds=[write_end], env=environment)
    os.close(write_end)
    with os.fdopen(read_end) as file:
        text = file.read()
    status = child.wait()
    if status != 0 or not text:
        raise SystemExit(status if status >= 0 else 128 - status)
    return Plan(**json.loads(text))


def _git_revision() -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        result = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
            capture_output=True, text=True, timeout=5,
        )  # fmt: skip
        return result.stdout.strip() or None
    return None
