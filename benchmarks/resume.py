"""Runs that are killed at random moments against runs that are not.

    python benchmarks/resume.py                          lockstep and async, some twenty minutes
    python benchmarks/resume.py --only lockstep --kills 20

lockstep: one run, everything of it killed (kill -9) at --kills random moments and started again by
the same command each time, must end with the very numbers of an uninterrupted one.

async: for each seed one run of CartPole by PPO that is killed three times and one that is not, both
cut off at 30,000 env steps, where seeds still differ. Each is judged by its last weights: the mean
return of 50 greedy games. Asked is whether kills cost more than chance does: the lower end of the
95 % interval of (killed - uninterrupted), the IQM of the pairs of a seed, bootstrapped over seeds
(somewhat narrow, see learning.py), must not lie further below 0 than the uninterrupted seeds lie
apart, 25 points at least. No env step may be in two episodes.

Both: no start goes on behind the newest checkpoint that was saved before it.
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
from endurance import resumes
from learning import bootstrap, iqm, mean_return
from measure import REPOSITORY, Report, arguments

from tests.runs import EXACT, Run, last_checkpoint

PPO = REPOSITORY / "launch" / "cartpole_ppo.py"
LEAST_SPREAD = 25.0  # of returns


def killed(runs: Path, waits: Sequence[float], *command: object) -> tuple[Run, int]:
    """A run whose processes are all killed so many seconds after each time its learner began or
    went on, then left alone; and how often it was, which is less where it is over before."""
    for count, seconds in enumerate(waits):
        run = Run(runs, "killed", *command)
        run.mark()
        run.wait_until(lambda: run.count("learner"))  # noqa: B023
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.process.wait(seconds)
        if run.process.poll() is not None:
            print(f"over after {count} of {len(waits)} kills", file=sys.stderr)
            break
        run.kill_tree()
    else:
        run, count = Run(runs, "killed", *command), len(waits)
    finish(run)
    run.since = 0.0
    return run, count


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
        run, done = killed(Path(folder), rng.uniform(0, 2, kills), *command)
        (tensors, counters), (others, more) = map(last_checkpoint, (run.folder, plain.folder))
        equal = sum(np.array_equal(tensors[name], others[name], equal_nan=True) for name in others)
        resumed, behind = resumes(run.events())
        report.table([{
            "lockstep": EXACT.stem, "kills": str(done), "resumed from a checkpoint": str(resumed),
            "env steps": str(counters["env_steps"]), "tensors": str(len(others)),
            "bit-equal": str(equal), "counters equal": str(counters == more),
        }])  # fmt: skip
        same = equal == len(others) == len(tensors) and counters == more
        report.goal("lockstep, killed equals uninterrupted", float(same), at_least=1)
        tell(report, "lockstep", behind)


def tell(report: Report, what: str, behind: list[str]) -> None:
    for words in behind:
        report.note(f"{what}: {words}")
    report.goal(f"{what}, starts behind the newest checkpoint", float(len(behind)), at_most=0)


def asynchronous(report: Report, seeds: Sequence[int], kills: int, env_steps: int) -> None:
    """CartPole by PPO, its last weights."""
    rng, rows, behind = np.random.default_rng(1), [], []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            command = PPO, "--seed", seed, "--total-env-steps", env_steps
            command += "--learner.checkpoint-seconds", 3, "--evaluation.period-steps", 0
            plain = Run(Path(folder), "plain", *command)
            finish(plain)
            run, done = killed(Path(folder), rng.uniform(3, 7, kills), *command)
            for name, it, times in (("uninterrupted", plain, 0), ("killed", run, done)):
                resumed, its = resumes(it.events())
                behind += its
                with open(it.folder / "episodes.csv", newline="") as file:
                    of_episodes = sum(int(row["length"]) for row in csv.DictReader(file))
                games = mean_return(Path(folder), it.folder.name, "--episodes", 50, "--epsilon", 0)
                rows.append({
                    "async": name, "seed": str(seed), "mean return of 50 games": games,
                    "env steps": it.metrics()[-1]["env_steps"], "of its episodes": of_episodes,
                    "kills": str(times), "resumed from a checkpoint": str(resumed),
                })  # fmt: skip
    report.table(rows)
    plain, broken = (
        np.array([row["mean return of 50 games"] for row in rows if row["async"] == name])
        for name in ("uninterrupted", "killed")
    )
    differences, spread = broken - plain, max(float(np.ptp(plain)), LEAST_SPREAD)
    low, high = bootstrap(differences)
    by_seed = ", ".join(f"{difference:+.1f}" for difference in differences)
    report.note(
        f"killed - uninterrupted by seed: {by_seed}; IQM {iqm(differences):+.1f}, 95 % bootstrap "
        f"interval {low:+.1f} to {high:+.1f}"
    )
    report.goal("async, lower end of killed - uninterrupted", low, at_least=-spread)
    twice = max(row["of its episodes"] - row["env steps"] for row in rows)
    report.goal("env steps of episodes beyond those of the run", float(twice), at_most=0)
    tell(report, "async", behind)


def main() -> None:
    parser = arguments(__doc__, repeats=1)
    parser.add_argument("--only", choices=["lockstep", "async"], help="one of the two")
    parser.add_argument("--kills", type=int, default=20, help="in lockstep")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of async")
    parser.add_argument("--env-steps", type=int, default=30_000, help="of a run in async")
    options = parser.parse_args()
    report = Report("resume", options)
    if options.only != "async":
        lockstep(report, options.kills)
    if options.only != "lockstep":
        asynchronous(report, options.seeds, 3, options.env_steps)
    report.finish()


if __name__ == "__main__":
    main()
