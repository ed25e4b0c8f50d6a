"""Starting real runs in tests: the command line in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil

from asyncrl.checkpoint import Checkpoints
from asyncrl.logs import Event, read_events

REPOSITORY = Path(__file__).parent.parent
EXACT = REPOSITORY / "tests" / "launch_files" / "exact.py"


class Run:
    """`asyncrl train` on a launch file, in `runs`.

    `constants` replaces numbers of asyncrl.supervisor, `prefix` is a command to run it by, and
    `environment` goes to all its processes.
    """

    def __init__(
        self,
        runs: Path,
        run_id: str,
        launch_file: Path | str,
        *options: object,
        constants: dict | None = None,
        prefix: tuple[str, ...] = (),
        environment: dict | None = None,
    ):
        self.folder = runs / run_id
        program = ["-m", "asyncrl"]
        if constants:
            code = f"import sys, asyncrl.supervisor as s; vars(s).update({constants!r}); "
            program = ["-c", code + "from asyncrl.cli import main; sys.exit(main())"]
        command = [*prefix, sys.executable, *program, "train", str(launch_file), run_id]
        variables = {"ASYNCRL_RUNS": str(runs), "PYTHONPATH": str(REPOSITORY)}
        self.process = subprocess.Popen(
            [*command, *map(str, options)],
            env=os.environ | variables | (environment or {}),
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.seen: set[psutil.Process] = set()
        self.since = 0.0

    def finish(self, timeout_seconds: float = 90) -> tuple[int, str]:
        """(exit status, output), once the run has ended by itself."""
        try:
            output, _ = self.process.communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            self.kill_tree()
            raise
        return self.process.returncode, output

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait_until(self, condition: Callable[[], object], timeout_seconds: float = 60) -> None:
        """Look at the run until the condition holds; fails with its output when it never does."""
        deadline = time.monotonic() + timeout_seconds
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                output, _ = self.process.communicate()
                raise AssertionError(f"the condition never held; output:\n{output[-4000:]}")
            time.sleep(0.05)

    def children(self) -> list[psutil.Process]:
        """Living descendants; remembered for `orphans`."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        self.seen |= set(found)
        return found

    def find(self, role: str) -> psutil.Process | None:
        """The child with this role ("actor 0", "learner 0") in its command line."""
        for child in self.children():
            try:
                if re.search(rf"asyncrl(\.run)? {role} ", " ".join(child.cmdline())):
                    return child
            except psutil.Error:
                continue
        return None

    def orphans(self, patience_seconds: float = 3) -> list[psutil.Process]:
        """Which of the children ever seen are still alive."""
        return psutil.wait_procs(list(self.seen), timeout=patience_seconds)[1]

    def mark(self) -> None:
        """Forget the events until now."""
        self.since = time.time()

    def events(self) -> list[Event]:
        events = read_events(self.folder / "events.log")
        return [event for event in events if event.time >= self.since]

    def metrics(self) -> list[dict]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def count(self, kind: str, text: str = "") -> int:
        """How many events of a kind have this text in them."""
        return sum(event.kind == kind and text in event.text for event in self.events())

    def num_saved(self) -> int:
        """How many checkpoints were saved; one that was not is told of in other words."""
        texts = [event.text for event in self.events() if event.kind == "checkpoint"]
        return sum(text.startswith("checkpoint_") for text in texts)

    def kill_tree(self) -> None:
        """kill -9 of the parent and everything below it, at once."""
        if self.process.poll() is not None:
            return
        for process in [psutil.Process(self.process.pid), *self.children()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self.process.wait()


def last_checkpoint(folder: Path) -> tuple[dict, dict]:
    """(tensors, counters) of the newest checkpoint of a run that is exact."""
    loaded = Checkpoints(folder / "checkpoints").newest_valid()
    assert loaded.state["env_steps"] >= 4_000
    counters = {
        name: loaded.state[name]
        for name in ("numbers", "env_steps", "updates", "epoch", "sequences", "episodes")
    }
    return {name: np.array(tensor) for name, tensor in loaded.tensors.items()}, counters
