"""Runs that are killed at random moments against runs that are not.

    python benchmarks/resume.py                          lockstep and async, some twenty minutes
    python benchmarks/resume.py --only lockstep --kills 20

lockstep: one run, everything of it killed (kill -9) at --kills random moments and started again by
the same command each time, must end with the very numbers of an uninterrupted one. async: for each
seed one run killed three times and one that is not, both judged by the mean return of all their
training episodes; the killed ones must lie within the spread of the others, and no env step may be
counted twice.
"""

from __future__ import annotations

import contextlib
import csv
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from measure import REPOSITORY, Report, arguments

from tests.runs import EXACT, Run, last_checkpoint

PPO = REPOSITORY / "launch" / "cartpole_ppo.py"


def killed(runs: Path, waits: Sequence[float], *command: object) -> Run:
    """A run whose processes are all killed so many seconds after each time its learner began or
    went on, then left alone."""
    for count, seconds in enumerate(waits):
        run = Run(runs, "killed", *command)
        run.mark()
        run.wait_until(lambda: run.count("learner"))  # noqa: B023
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.process.wait(seconds)
        if run.process.poll() is not None:
            print(f"over after {count} of {len(waits)} kills", file=sys.stderr)
            return run
        run.kill_tree()
    run = Run(runs, "killed", *command)
    finish(run)
    run.since = 0.0
    return run


def finish(run: Run) -> None:
    status, output = run.finish(3_600)
    if status:
        raise RuntimeError(f"expected a run that ends with 0, got {status}:\n{output[-3000:]}")


def lockstep(report: Report, kills: int) -> None:
    """Final numbers of both, tensor by tensor."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        command = EXACT, "--total-env-steps", 1_000 * (kills + 5)
        plain = Run(Path(folder), "plain", *command)
        finish(plain)
        run = killed(Path(folder), rng.uniform(0, 2, kills), *command)
        (tensors, counters), (others, more) = map(last_checkpoint, (run.folder, plain.folder))
        equal = sum(np.array_equal(tensors[name], others[name], equal_nan=True) for name in others)
        resumed = run.count("learner", "resumed at")
        report.table([{
            "lockstep": EXACT.stem, "kills": str(kills), "resumed from a checkpoint": str(resumed),
            "env steps": str(counters["env_steps"]), "tensors": str(len(others)),
            "bit-equal": str(equal), "counters equal": str(counters == more),
        }])  # fmt: skip
        same = equal == len(others) == len(tensors) and counters == more
        report.goal("lockstep, killed equals uninterrupted", float(same), at_least=1)


def judge(run: Run) -> tuple[float, int, int]:
    """(mean return of all episodes, their env steps, env steps of the run)."""
    with open(run.folder / "episodes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    steps = [row["env_steps"] for row in run.metrics()]
    if steps != sorted(steps):
        raise RuntimeError(f"expected env steps that only grow, got {steps} in {run.folder}")
    returns = np.array([float(row["return"]) for row in rows])
    return returns.mean(), sum(int(row["length"]) for row in rows), steps[-1]


def asynchronous(report: Report, seeds: Sequence[int], kills: int) -> None:
    """CartPole by PPO, returns while it learns."""
    rng, rows = np.random.default_rng(1), []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            command = PPO, "--seed", seed, "--total-env-steps", 60_000
            command += "--learner.checkpoint-seconds", 3, "--evaluation.period-steps", 0
            plain = Run(Path(folder), "plain", *command)
            finish(plain)
            run = killed(Path(folder), rng.uniform(3, 9, kills), *command)
            for name, it in (("uninterrupted", plain), ("killed", run)):
                mean, of_episodes, env_steps = judge(it)
                rows.append({
                    "async": name, "seed": str(seed), "mean return": mean,
                    "env steps": env_steps, "of its episodes": of_episodes,
                    "kills resumed from": str(it.count("learner", "resumed at")),
                })  # fmt: skip
    report.table(rows)
    plain, broken = (np.array([row["mean return"] for row in rows if row["async"] == name])
                     for name in ("uninterrupted", "killed"))  # fmt: skip
    far = abs(np.median(broken) - np.median(plain)) / (plain.max() - plain.min())
    report.goal("async, distance of medians in spreads of uninterrupted seeds", far, at_most=1)
    twice = max(row["of its episodes"] - row["env steps"] for row in rows)
    report.goal("env steps of episodes beyond those of the run", float(twice), at_most=0)


def main() -> None:
    parser = arguments(__doc__, repeats=1)
    parser.add_argument("--only", choices=["lockstep", "async"], help="one of the two")
    parser.add_argument("--kills", type=int, default=20, help="in lockstep")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of async")
    options = parser.parse_args()
    report = Report("resume", options)
    if options.only != "async":
        lockstep(report, options.kills)
    if options.only != "lockstep":
        asynchronous(report, options.seeds, kills=3)
    report.finish()


if __name__ == "__main__":
    main()
