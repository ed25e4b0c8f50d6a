"""A process that has imported everything, and the children that are forked from it.

Importing torch takes seconds. The template does it once, while the plan of the run is made; every
child is then there within a fraction of a second, a replacement too, and shares the memory of what
was imported. The template itself starts no thread, touches no GPU, and does nothing but fork.

    supervisor   Template.fork(arguments, descriptors, log) -> Forked
    template     forks twice; the first of the two ends at once, so that the second one is adopted
                 by the supervisor: the child's end, status and life hang on it alone
    child        waits for the supervisor's word, then goes to asyncrl.run
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from typing import BinaryIO, NoReturn

from setproctitle import setproctitle

from asyncrl.children import CHILD_ENVIRONMENT, Forked, mark_offspring
from asyncrl.foreign import leave
from asyncrl.logs import EventLog
from asyncrl.program import program
from asyncrl.transport.shared_memory import adopt_orphans, die_with_parent

PRELOADED = [
    "asyncrl.actor",
    "asyncrl.config",
    "asyncrl.envs",
    "asyncrl.evaluate",
    "asyncrl.guards",
    "asyncrl.learner",
    "asyncrl.run",
]
GPUS = "/dev/nvidiactl", "/dev/dxg", "/dev/kfd"
if not any(map(os.path.exists, GPUS)):  # with a GPU, who may say that it will never look at it?
    PRELOADED.append("torch._dynamo")  # PyTorch's optimizers import it at their first step
IMPORT_SECONDS, REPLY_SECONDS = 120.0, 2.0  # one that takes longer is stuck
READY = b"ready"
MAX_MESSAGE_NBYTES, MAX_FDS = 1 << 16, 200  # in one message; the kernel takes 253 descriptors


class Template:
    """The supervisor's side. When it is ready it forks; when it has died, start it anew."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None
        self.connection: socket.socket | None = None
        self.started, self.imported = 0.0, False
        self.failed = 0  # starts in a row that have not made it ready
        self.log, self.last_words = -1, ""

    def __enter__(self) -> Template:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def start(self) -> None:
        """Begin to import, in a process of its own; returns at once."""
        self.close()
        self.started, self.imported, self.failed = time.monotonic(), False, self.failed + 1
        self.log = os.memfd_create("template.log")
        adopt_orphans()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, ends of children would be lost
        self.connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                program("asyncrl.template", str(os.getpid()), str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=self.log,
                env=CHILD_ENVIRONMENT | os.environ,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """0 where there is none."""
        return self.process.pid if self.process is not None else 0

    @property
    def gone(self) -> bool:
        """Whether it has died, was never started, or is stuck in what it imports."""
        if self.process is not None and self.process.poll() is not None:
            self.close()
        if self.process is None:
            return True
        return not self.is_ready() and time.monotonic() - self.started > IMPORT_SECONDS

    def is_ready(self, timeout_seconds: float = 0.0) -> bool:
        """Whether it can fork, after waiting for that at most so long."""
        if self.connection is not None and not self.imported:
            self.connection.settimeout(timeout_seconds)
            with contextlib.suppress(OSError):
                self.imported = self.connection.recv(MAX_MESSAGE_NBYTES) == READY
                if self.imported:
                    self.failed = 0
                else:  # it has died
                    self.close()
        return self.imported

    def keep(self, events: EventLog, back_off_seconds: float) -> None:
        """Start another one where it has died, so long after the last start."""
        if not self.gone or time.monotonic() < self.started + back_off_seconds:
            return
        if self.started:
            self.close()
            events.event("death", f"template died\n{self.last_words}".strip())
            events.event("restarted", "template restarted")
        try:
            self.start()
        except OSError as error:  # no more processes, descriptors or memory for now
            events.event("warning", f"template cannot be started, tried again: {error}")
            self.close()

    def fork(self, arguments: list[str], fds: dict, log: BinaryIO) -> Forked:
        """A child that runs `asyncrl.run.child_main(arguments + [fds, in its own numbers])`.

        `fds` has descriptors, or lists of them, by name. OSError when no child came of it.
        """
        if self.gone or not self.is_ready():
            raise OSError("the template is not ready")
        go_read, go_write = os.pipe()
        try:
            sent = {**fds, "log": log.fileno(), "go": go_read}
            child = Forked(self._ask({"arguments": arguments, "fds": sent}))
            os.write(go_write, b"!")
            return child
        finally:  # without the word, a child that nobody knows of ends by itself
            os.close(go_read)
            os.close(go_write)

    def _ask(self, request: dict) -> int:
        """The pid that the template answers with."""
        flat = flatten(request["fds"])
        try:
            resource.prlimit(self.process.pid, resource.RLIMIT_NOFILE,
                             resource.getrlimit(resource.RLIMIT_NOFILE))  # fmt: skip
            self.connection.settimeout(REPLY_SECONDS)
            self.connection.send(json.dumps(request).encode())
            for start in range(0, len(flat), MAX_FDS):
                socket.send_fds(self.connection, [b"+"], flat[start : start + MAX_FDS])
            pid = int(self.connection.recv(MAX_MESSAGE_NBYTES) or -1)
        except OSError as error:
            self.close()
            raise OSError(f"the template does not fork: {error}") from None
        if pid == -1:
            self.close()
            raise OSError("the template died")
        if pid == 0:
            raise OSError("there can be no more processes")
        return pid

    def close(self) -> None:
        """End the template; its children stay."""
        if self.connection is not None:
            self.connection.close()
        if self.process is not None:
            self.process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1.0)
        if self.log >= 0:
            self.last_words = os.pread(self.log, 6000, max(os.fstat(self.log).st_size - 6000, 0))
            self.last_words = self.last_words.decode(errors="replace").strip()
            os.close(self.log)
        self.process, self.connection, self.imported, self.log = None, None, False, -1


def flatten(fds: dict) -> list[int]:
    """All descriptors in their order."""
    return [fd for value in fds.values() for fd in (value if isinstance(value, list) else [value])]


# -- the template's side -------------------------------------------------------------------------


def main(parent_pid: int, connection: socket.socket) -> int:
    """Serve until the supervisor is gone; in a child that was forked: be that child."""
    die_with_parent(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    setproctitle(f"asyncrl template of {parent_pid}")
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # looking for garbage would write to what is shared
    connection.send(READY)
    while message := connection.recv(MAX_MESSAGE_NBYTES):
        request = json.loads(message)
        fds = receive_fds(connection, request["fds"])
        told_read, told_write = os.pipe()
        first = fork()
        if first == 0:
            second = fork()
            if second != 0:
                with contextlib.suppress(OSError):  # nobody is left to be told
                    os.write(told_write, str(max(second, 0)).encode())
                os._exit(0)
            for fd in (connection.detach(), told_read, told_write):
                os.close(fd)
            be_child(request["arguments"], fds)
        for fd in (told_write, *flatten(fds)):
            os.close(fd)
        if first > 0:
            os.waitpid(first, 0)  # only now the supervisor has adopted its child
        with open(told_read, "rb") as told:
            connection.send(told.read() or b"0")
    return 0


def fork() -> int:
    """As os.fork, and -1 where no process can be made."""
    try:
        return os.fork()
    except OSError:
        return -1


def receive_fds(connection: socket.socket, sent: dict) -> dict:
    """What `Template.fork` sent, with the numbers that the descriptors have here."""
    received: list[int] = []
    for _ in range(0, len(flatten(sent)), MAX_FDS):
        received += socket.recv_fds(connection, 1, MAX_FDS)[1]
    numbers = iter(received)
    return {
        name: [next(numbers) for _ in value] if isinstance(value, list) else next(numbers)
        for name, value in sent.items()
    }


def be_child(arguments: list[str], fds: dict) -> NoReturn:
    """What is left to do for a process of its own, then its work."""
    import numpy as np

    from asyncrl.run import child_main

    os.setsid()  # a group of its own, to be killed as one
    log, go = fds.pop("log"), fds.pop("go")
    if not os.read(go, 1):
        os._exit(1)  # the supervisor does not know of it
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.close(go)
    np.random.seed()  # for environments that draw from it; `random` does so by itself
    role, index, folder, parent, *_ = arguments
    mark_offspring(int(parent))
    folder = os.fsencode(folder).decode(errors="replace")
    setproctitle(f"asyncrl {role} {index} of {folder}")
    sys.argv[1:] = [*arguments, json.dumps(fds)]
    leave(child_main(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), socket.socket(fileno=int(sys.argv[2]))))
