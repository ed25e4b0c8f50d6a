"""`asyncrl train --schedule serial` in a process forked from one that has imported everything.

Importing torch takes most of the time of a run of a few updates, and a run imports it in each of
its processes. What is left out is the supervisor's watch; `tests.runs.Run` is the real command.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import multiprocessing
import os
import traceback
from collections.abc import Iterable
from pathlib import Path

from asyncrl import folder as run_folder
from asyncrl import plan as run_plan
from asyncrl import template
from asyncrl.children import CHILD_ENVIRONMENT
from asyncrl.preflight import preflight
from asyncrl.run import Process, run_serial
from asyncrl.supervisor import Supervisor
from asyncrl.transport.shared_memory import die_with_parent

# Modules that a run imports only when it needs them, and pytest, which a child imports as well.
PRELOADED = ["asyncrl.learner", "asyncrl.example_envs", "ale_py", "pytest", *template.PRELOADED,
             "tensorboard.summary.writer.record_writer", __name__]  # fmt: skip


def train_serially(
    runs: Path,
    run_id: str,
    launch_file: Path,
    options: Iterable[object] = (),
    timeout_seconds: float = 110,
) -> Path:
    """Begin or go on with a run and see it to its end, in a process of its own; returns its folder.

    AssertionError with its output where it fails or takes too long.
    """
    options = [*map(str, options), "--schedule", "serial"]
    folder, output = runs / run_id, runs / f"{run_id}.log"
    process = server().Process(target=_train, args=(folder, output, launch_file, options))
    process.start()
    process.join(timeout_seconds)
    late = process.is_alive()
    process.kill()
    process.join()
    told = output.read_text(errors="replace")[-6000:] if output.exists() else ""
    assert not late, f"{run_id} did not end within {timeout_seconds} s:\n{told}"
    assert process.exitcode == 0, f"{run_id} ended with {process.exitcode}:\n{told}"
    return folder


def server() -> multiprocessing.context.ForkServerContext:
    """Where processes are forked; it begins at its first process, as the supervisor's children."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    before = dict(os.environ)
    os.environ.update(CHILD_ENVIRONMENT | before)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _train(folder: Path, output: Path, launch_file: Path, options: list[str]) -> None:
    die_with_parent(os.getppid())
    with open(output, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable(2)
    run_folder.prepare_in_child = _prepare
    try:
        with run_folder.RunFolder(folder) as run:
            plan = run.prepare(launch_file, options)
            preflight(plan, folder)
            run.begin(plan)
            supervisor = Supervisor(folder, plan)
            run_serial(Process(folder, supervisor.fds), 0, 0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _prepare(launch_file: Path, original: Path, options: list[str]) -> run_plan.Plan:
    """The plan, made in this process and sent through JSON as from a child."""
    plan = run_plan.prepare(launch_file, options, original)
    return run_plan.Plan(**json.loads(json.dumps(dataclasses.asdict(plan))))
