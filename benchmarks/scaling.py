"""How cost grows: speed, lag and memory over cores, envs, actors, unrolls, replay and model size.

    python benchmarks/scaling.py                                 all sweeps
    python benchmarks/scaling.py --only envs unroll --output scaling.json

Each sweep trains one launch file with one number changed and everything else as it is; a sweep's
points are measured in turn in each repeat. A cliff is a point that is slower than its neighbour by
more than a third: it is named. --output also draws the sweeps, into a PNG beside the JSON. Options
it does not know are those of the launch files.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from measure import Program, Report, arguments, median, train
from throughput import Tree

from asyncrl.logs import read_metrics
from asyncrl.plots import BLUE, GREEN, ORANGE, STYLE

CORES = len(os.sched_getaffinity(0))
PPO, DQN = "launch/breakout_ppo.py", "launch/breakout_dqn.py"
SETTLE_ROWS = 5  # that are left out, from the first update on


@dataclass(frozen=True)
class Sweep:
    """One number of a launch file and what it is changed to; `cores`: the processors lent."""

    launch: str
    options: Callable[[int], dict[str, object]]
    points: tuple[int, ...]
    cores: bool = False


def widths(width: int) -> dict[str, object]:
    """An MLP of two layers; parameters grow with its square."""
    return {"model.hidden": f"{width} {width}"}


SWEEPS = {
    "cores": Sweep(PPO, lambda n: {"actor.num-actors": max(1, n // 2)}, (1, 2, 4, 8, 16), True),
    "envs": Sweep(PPO, lambda n: {"actor.envs-per-lane": n // 2}, (8, 16, 32, 64, 128, 256, 512)),
    "actors": Sweep("launch/cartpole_ppo.py", lambda n: {"actor.num-actors": n}, (1, 2, 4, 8)),
    "unroll": Sweep("launch/breakout_a2c.py", lambda n: {"actor.unroll-length": n},
                    (5, 8, 16, 32, 64, 128)),
    "replay": Sweep(DQN, lambda n: {"algorithm.replay.capacity": n},
                    (10_000, 30_000, 100_000, 300_000, 1_000_000)),
    "model": Sweep("launch/cartpole_dqn.py", widths, (300, 600, 1_000, 2_000, 3_000)),
}  # fmt: skip
REPLAY = {"algorithm.replay.learning-starts": 2_000}


def measure(program: Program, folder: Path, seconds: float) -> dict[str, float]:
    """Medians over the rows of metrics of some seconds of learning."""
    tree = Tree(program.process.pid)
    while True:
        tree.sample()
        rows = [row for row in program.rows() if row["updates"]][SETTLE_ROWS:]
        if len(rows) > 1 and rows[-1]["time"] - rows[0]["time"] >= seconds:
            break
        if not rows and time.time() - program.begun > 300:
            raise RuntimeError(f"{program.process.args}: no update in five minutes")
        time.sleep(0.5)
    columns = read_metrics(folder)
    known = columns["updates"] > 0
    spent = rows[-1]["time"] - rows[0]["time"]
    return {
        "env steps/s": (rows[-1]["env_steps"] - rows[0]["env_steps"]) / spent,
        "updates/s": (rows[-1]["updates"] - rows[0]["updates"]) / spent,
        "lag": float(np.nanmean(columns["lag/mean"][known])),
        "peak PSS, MB": tree.peak_pss / 1e6,
    }


def main() -> None:
    parser = arguments(__doc__, repeats=3)
    parser.add_argument("--only", nargs="+", choices=list(SWEEPS), default=list(SWEEPS))
    parser.add_argument("--seconds", type=float, default=15, help="of each measurement")
    options, rest = parser.parse_known_args()
    report = Report("scaling", options)
    for name in options.only:
        sweep = SWEEPS[name]
        points = [point for point in sweep.points if not sweep.cores or point <= CORES]
        results: dict[int, list[dict]] = {point: [] for point in points}
        for repeat, point in itertools.product(range(options.repeats), points):
            with tempfile.TemporaryDirectory() as folder:
                results[point].append(point_of(sweep, point, Path(folder), options.seconds, rest))
            print(f"{name} {point}, {repeat + 1}: {results[point][-1]}", file=sys.stderr)
        title = f"{name}, {Path(sweep.launch).stem}"
        rows = [
            {title: f"{point:,}"} | {key: [one[key] for one in found] for key in found[0]}
            for point, found in results.items()
        ]
        report.table(rows)
        rates = [median(row["env steps/s"]) for row in rows]
        for (here, rate), (there, other) in itertools.pairwise(zip(points, rates, strict=True)):
            if other < rate / 1.5:
                report.note(f"a cliff: {name} {there:,} is slower than {here:,}")
    report.finish()
    if options.output:
        draw(report.tables, options.output.with_suffix(".png"))


def draw(tables: list[list[dict]], path: Path) -> None:
    """A row of panels for each sweep: speed, lag and memory, medians and ranges over repeats."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, FixedLocator, NullLocator

    quantities = {"env steps/s": BLUE, "lag": ORANGE, "peak PSS, MB": GREEN}
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 2 * len(tables) + 0.4), layout="constrained")
        axes = figure.subplots(len(tables), len(quantities), squeeze=False)
        for line, rows in zip(axes, tables, strict=True):
            title = next(iter(rows[0]))
            points = [int(row[title].replace(",", "")) for row in rows]
            for panel, (quantity, color) in zip(line, quantities.items(), strict=True):
                values = np.array([row[quantity] for row in rows])  # (points, repeats)
                panel.plot(points, np.median(values, axis=1), "o-", color=color, markersize=3)
                panel.fill_between(points, values.min(1), values.max(1), color=color, alpha=0.2)
                panel.set_xscale("log")
                panel.xaxis.set_major_locator(FixedLocator(points))
                panel.xaxis.set_minor_locator(NullLocator())
                panel.xaxis.set_major_formatter(EngFormatter(sep=""))
                panel.set_ylim(bottom=0)
                panel.set_title(f"{quantity} by {title}" if panel is line[0] else quantity)
        figure.savefig(path, dpi=120)


def point_of(
    sweep: Sweep, point: int, folder: Path, seconds: float, rest: list[str]
) -> dict[str, float]:
    """Train at one point of a sweep."""
    options = {"total-env-steps": 10**9, "evaluation.period-steps": 0, "learner.log-seconds": 1}
    options |= REPLAY if "dqn" in sweep.launch else {}
    words = [word for key, value in (options | sweep.options(point)).items()
             for word in (f"--{key}", *str(value).split())]  # fmt: skip
    allowed = os.sched_getaffinity(0)
    if sweep.cores:
        os.sched_setaffinity(0, sorted(allowed)[:point])  # children inherit it
    try:
        program = train(sweep.launch, "run", folder, *words, *rest)
        try:
            return measure(program, folder / "run", seconds)
        finally:
            program.stop()
    finally:
        os.sched_setaffinity(0, allowed)


if __name__ == "__main__":
    main()
