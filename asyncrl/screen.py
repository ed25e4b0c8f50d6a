"""What a run shows, in a thread of its own: a terminal that nobody reads holds up nobody else."""

import os
import sys
import threading
from contextlib import suppress
from pathlib import Path

from asyncrl.panel import Panel

CLOSE_SECONDS = 1.0  # for the last look


class Screen:
    """A `Panel` on standard output. No call waits for the terminal, and none raises."""

    def __init__(self, run_folder: Path, total_env_steps: int):
        self._due, self._closing = threading.Event(), False
        self._panel = Panel(run_folder, total_env_steps, _standard_output())
        self._thread = threading.Thread(target=self._show, name="screen", daemon=True)
        self._thread.start()

    def refresh(self) -> None:
        """Show what is new, soon."""
        self._due.set()

    def close(self) -> None:
        """Show the last of it, and leave the terminal in order if somebody reads it."""
        self._closing = True
        self._due.set()
        self._thread.join(CLOSE_SECONDS)

    def _show(self) -> None:
        while not self._closing:
            self._due.wait(5.0)
            self._due.clear()
            self._panel.refresh()
        self._panel.close()


def _standard_output():
    """A stream of one's own on it: of `sys.stdout`, the interpreter would wait for the lock of a
    write that hangs, and not end."""
    with suppress(AttributeError, OSError, ValueError):  # there is none, or no file behind it
        out = sys.stdout
        return os.fdopen(os.dup(out.fileno()), "w", encoding=out.encoding, errors=out.errors)
    return sys.stdout
