"""Memory without a name, and doorbells: all that ring and weights need of Linux.

Segments are `memfd_create` files, handed to children as file descriptors: nothing lies in /dev/shm,
so nothing can leak there or meet docker's 64 MB limit. A doorbell is an `eventfd` with one waiter;
whoever moved a cursor rings it, always. The cursor is the truth; the bell only wakes.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import signal
from collections.abc import Callable

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


class Segment:
    """A piece of shared memory: `buffer` here, `fd` for a child to attach."""

    def __init__(self, fd: int, nbytes: int):
        self.fd, self.nbytes = fd, nbytes
        self.buffer = mmap.mmap(fd, nbytes)

    @classmethod
    def create(cls, name: str, nbytes: int) -> Segment:
        """New memory of `nbytes`, zeroed and really there. OSError when there is too little."""
        fd = os.memfd_create(f"asyncrl-{name}", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(fd, 0, nbytes)
            return cls(fd, nbytes)
        except OSError:
            os.close(fd)
            raise

    @classmethod
    def attach(cls, fd: int) -> Segment:
        """The segment behind an inherited file descriptor."""
        return cls(fd, os.fstat(fd).st_size)


class Doorbell:
    """An eventfd that one process waits on and any may ring."""

    def __init__(self, fd: int):
        self.fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)

    @classmethod
    def create(cls) -> Doorbell:
        return cls(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))

    def ring(self) -> None:
        os.eventfd_write(self.fd, 1)

    def wait(self, timeout_seconds: float) -> bool:
        """Sleep until rung or the deadline; True if rung. Several rings wake once."""
        if not self._poll.poll(timeout_seconds * 1000):
            return False
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return False
        return True

    def wait_for(
        self, condition: Callable[[], bool], on_idle: Callable[[], bool], period_seconds: float = 1
    ) -> bool:
        """Sleep until `condition()` holds; True if it does.

        `on_idle()` is called at least once a period (to beat the heart) and may return True to
        give up. The condition is looked at before the first sleep and after every one, so that a
        ring that came early is never missed.
        """
        while not condition():
            if on_idle():
                return False
            self.wait(period_seconds)
        return True


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent dies, however that happens."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before the call above
        os.kill(os.getpid(), signal.SIGKILL)


def adopt_orphans() -> None:
    """Have the kernel make this process the parent of descendants whose own parent has ended."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value}) failed")
