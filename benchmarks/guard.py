"""Two revisions side by side: fails where the newer one has lost more than 5 % of its speed.

    python benchmarks/guard.py                            HEAD~1 against the working tree
    python benchmarks/guard.py --base v1.0 --head HEAD --launch launch/pong_dqn.py --profile home

Each revision trains each launch file, in turns, learning included; compared are the updates a
second of neighbouring runs: env steps keep a fixed ratio to them, but come by hundreds at once.
Exit status 1 where the median of the ratios is below 0.95. Options it does not know are those of
the launch files.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from measure import REPOSITORY, Program, Report, arguments, median
from throughput import measure

LAUNCH = ["launch/cartpole_dqn.py", "launch/cartpole_ppo.py", "launch/breakout_dqn.py",
          "launch/breakout_ppo.py"]  # fmt: skip
FOR_EVER = {"total-env-steps": 10**9, "evaluation.period-steps": 0, "learner.log-seconds": 1}
SMALL = {"algorithm.replay.capacity": 100_000, "algorithm.replay.learning-starts": 2_000}

ENTRY = "from asyncrl.cli import entry; entry()"  # older revisions have no __main__.py


@contextmanager
def tree(revision: str, folder: Path) -> Iterator[Path]:
    """The files of a revision; the working tree itself where none is named."""
    if not revision:
        yield REPOSITORY
        return
    git = ["git", "-C", REPOSITORY, "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", folder, revision], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", folder], check=True)


def train(tree: Path, launch: str, runs: Path, rest: list[str]) -> Program:
    """A run of a revision's own code and launch file."""
    runs.mkdir(parents=True)
    options = FOR_EVER | (SMALL if "ReplayConfig" in (tree / launch).read_text() else {})
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-c", ENTRY, "train", launch, "run", *words, *rest]
    rows = runs / "run" / "metrics.jsonl"
    path = {"PYTHONPATH": str(tree), "ASYNCRL_RUNS": str(runs)}
    return Program(command, runs / "log", rows, folder=tree, **path)


def main() -> None:
    parser = arguments(__doc__, repeats=5)
    parser.add_argument("--base", default="HEAD~1", help="the older revision")
    parser.add_argument("--head", default="", help="the newer one (default: the working tree)")
    parser.add_argument("--launch", nargs="+", default=LAUNCH, help="launch files")
    parser.add_argument("--seconds", type=float, default=15, help="of each measurement")
    parser.add_argument("--loss", type=float, default=0.05, help="that is still put up with")
    options, rest = parser.parse_known_args()
    report, rows = Report("guard", options), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, head = tree(options.base, folder / "base"), tree(options.head, folder / "head")
        with base as old, head as new:
            for launch in options.launch:
                rates: dict[str, list[float]] = {"base": [], "head": []}
                for repeat in range(options.repeats):
                    for which in (("base", "head"), ("head", "base"))[repeat % 2]:
                        runs = folder / f"{Path(launch).stem}_{which}_{repeat}"
                        program = train({"base": old, "head": new}[which], launch, runs, rest)
                        rates[which].append(measure(which, program, options.seconds)["updates/s"])
                ratio = [b / a for a, b in zip(*rates.values(), strict=True)]
                rows.append({"updates/s": Path(launch).stem} | rates | {"head / base": ratio})
                print(f"{launch}: {median(ratio):.3f}", file=sys.stderr, flush=True)
    report.table(rows)
    for row in rows:
        bound = 1 - options.loss
        report.goal(f"{row['updates/s']}, head / base", row["head / base"], at_least=bound)
    report.finish()
    sys.exit(not all(goal["met"] for goal in report.goals))


if __name__ == "__main__":
    main()
