"""Code of the user's: called so that its errors stay its own, named so that it can be found, left
behind at the end."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import select
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

_PACKAGE = os.path.dirname(__file__) + os.sep


def call(who: str, function: Callable, *arguments: Any) -> Any:
    """What `function` returns. A ValueError that asyncrl did not raise itself comes as a
    RuntimeError with the same traceback, for one of asyncrl's own is told without any."""
    try:
        return function(*arguments)
    except ValueError as error:
        if traceback.extract_tb(error.__traceback__)[-1].filename.startswith(_PACKAGE):
            raise
        foreign = RuntimeError(f"{who} raised {type(error).__name__}: {error}")
        raise foreign.with_traceback(error.__traceback__.tb_next) from None


def name_of(thing: Any) -> str:
    """A function by its name and line, a class by its name, anything else as it shows itself."""
    thing = thing.func if isinstance(thing, functools.partial) else thing
    name, code = getattr(thing, "__qualname__", None), getattr(thing, "__code__", None)
    where = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
    return f"{name}{where}" if name else repr(thing)


def open_standard_streams() -> None:
    """Give a process that was started with some of its standard streams closed (`>&-`) ones that
    lead nowhere, before other files get their numbers."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def nobody_reads() -> bool:
    """Whether what is printed goes nowhere any more, as by `--help | head`; then for good."""
    reader = select.poll()
    reader.register(sys.stdout.fileno(), 0)
    if not reader.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def leave(status: Any) -> NoReturn:
    """As sys.exit(status), but without waiting for threads that a launch file or an environment has
    left running. Where there are any, what they would have done and written is lost."""
    if all(thread.daemon or thread is threading.main_thread() for thread in threading.enumerate()):
        sys.exit(status)
    if not isinstance(status, int | None):
        print(status, file=sys.stderr)
        status = 1
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError as error:
        status = status or 1
        print(f"not all could be printed: {error}", file=sys.stderr)
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(status or 0)
