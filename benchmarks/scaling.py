"""How cost grows: speed, lag and memory over cores, envs, actors, unrolls, replay and model size.

    python benchmarks/scaling.py                                 all sweeps
    python benchmarks/scaling.py --only envs unroll --output scaling.json

Each sweep trains one launch file with one number changed; a sweep's points are measured in turn in
each repeat, over at least three whole rounds of collecting and learning. What an update learns from
stays the same, but in the sweep of unrolls:

cores   processors; one actor for every two of them, 16 envs shared out among the actors
envs    of one actor; unrolls are shortened, so that a rollout is always 1,024 env steps
actors  16 envs shared out among them
unroll  its length; a rollout grows with it
replay  its capacity; the learner alone, in a process that fills the replay with noise before it
        inserts and updates by the configured ratio: env steps/s without acting, and no lag
model   two layers of so many units; parameters grow with their square

A point that fails is told in a note and not tried again. The JSON of --output is written after each
sweep, with the sweeps so far drawn into a PNG beside it. A cliff is a point that is slower than its
neighbour by more than a third: it is named. Options it does not know are those of the launch files.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from math import inf
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil
from full_replay import FullReplay
from measure import REPOSITORY, Program, Report, arguments, like_a_run, median, memory, train
from throughput import SETTLE_SECONDS, START_SECONDS, Tree, whole_rounds

from asyncrl.config import resolve
from asyncrl.costs import wire
from asyncrl.limits import container_memory, usable_cores
from asyncrl.plots import BLUE, GREEN, ORANGE, STYLE

CORES = usable_cores()
PPO, DQN = "launch/breakout_ppo.py", "launch/breakout_dqn.py"
ROUNDS = 3  # at least, of a measurement
SLOWEST = 10  # env steps/s; what is slower is given up


@dataclass(frozen=True)
class Sweep:
    """One number of a launch file and the options it stands for.

    `cores`: it is the processors lent; `alone`: the learner is measured alone, its replay full.
    """

    launch: str
    options: Callable[[int], dict[str, object]]
    points: tuple[int, ...]
    cores: bool = False
    alone: bool = False


def shared_out(actors: int) -> dict[str, object]:
    """16 envs, in two lanes of each actor."""
    return {"actor.num-actors": actors, "actor.envs-per-lane": 8 // actors}


SWEEPS = {
    "cores": Sweep(PPO, lambda n: shared_out(max(1, n // 2)), (1, 2, 4, 8, 16), cores=True),
    "envs": Sweep(PPO, lambda n: {"actor.envs-per-lane": n // 2, "actor.unroll-length": 1024 // n},
                  (8, 16, 32, 64, 128, 256, 512)),
    "actors": Sweep("launch/cartpole_ppo.py", shared_out, (1, 2, 4, 8)),
    "unroll": Sweep("launch/breakout_a2c.py", lambda n: {"actor.unroll-length": n},
                    (5, 8, 16, 32, 64, 128)),
    "replay": Sweep(DQN, lambda n: {"algorithm.replay.capacity": n},
                    (10_000, 30_000, 100_000, 300_000, 1_000_000), alone=True),
    "model": Sweep("launch/cartpole_dqn.py", lambda n: {"model.hidden": f"{n} {n}"},
                   (300, 600, 1_000, 2_000, 3_000)),
}  # fmt: skip


def measure(program: Program, seconds: float, round_env_steps: int) -> dict[str, float]:
    """From some seconds after the first update on, over whole rounds."""
    tree = Tree(program.process.pid)
    patience = START_SECONDS + 5 * seconds + (ROUNDS + 2) * round_env_steps / SLOWEST
    while True:
        tree.sample()
        rows = program.rows()
        first_update = next((row["time"] for row in rows if row["updates"]), np.inf)
        fresh = whole_rounds(rows, first_update + SETTLE_SECONDS)
        if len(fresh) > ROUNDS and fresh[-1]["time"] - fresh[0]["time"] >= seconds:
            break
        if program.process.poll() is not None:
            raise RuntimeError("the run has ended by itself")
        if time.time() - program.begun > patience:
            done = max(len(fresh) - 1, 0)
            raise RuntimeError(f"{done} of {ROUNDS} rounds of learning in {patience:.0f} s")
        time.sleep(0.5)
    begin, end = fresh[0], fresh[-1]
    spent = end["time"] - begin["time"]
    lags = [row["lag/mean"] for row in rows if begin["time"] < row["time"] <= end["time"]]
    return {
        "env steps/s": (end["env_steps"] - begin["env_steps"]) / spent,
        "updates/s": (end["updates"] - begin["updates"]) / spent,
        "lag": float(np.mean(lags)),
        "peak PSS, MB": tree.peak_pss / 1e6,
    }


def measure_alone(launch: str, words: list[str], seconds: float) -> dict[str, float]:
    """A learner in this process, the replay of its launch file filled before."""
    config = resolve(REPOSITORY / launch, words)
    spec, model = wire(config)
    needed = config.algorithm.store_nbytes(model, spec, config.actor.num_lanes)
    there = min(psutil.virtual_memory().available, container_memory() or inf)
    if needed > 0.9 * there:
        raise RuntimeError(f"the replay takes {needed / 1e9:.1f} GB, of {there / 1e9:.1f} GB free")
    with tempfile.TemporaryDirectory() as folder:
        full = FullReplay(Path(folder), launch, save_replay=False, options=words)
        full.fill()
        algorithm, store = full.learner.algorithm, full.learner.store
        limiter = store.limiter
        limiter.starts_at = float(limiter.inserted)  # nothing is owed for what filled it

        def a_round() -> None:
            full.insert()
            while store.updates_allowed():
                algorithm.update(store)

        a_round()
        begun, env_steps, updates = time.monotonic(), limiter.inserted, algorithm.updates
        rounds = 0
        while rounds < ROUNDS or time.monotonic() - begun < seconds:
            a_round()
            rounds += 1
        spent = time.monotonic() - begun
        return {
            "env steps/s": (limiter.inserted - env_steps) / spent,
            "updates/s": (algorithm.updates - updates) / spent,
            "peak PSS, MB": memory(os.getpid())["Pss"] / 1e6,
        }


def main() -> None:
    parser = arguments(__doc__, repeats=3)
    parser.add_argument(
        "--only", nargs="+", choices=list(SWEEPS), default=list(SWEEPS), help="sweeps"
    )
    parser.add_argument("--seconds", type=float, default=15, help="of each measurement")
    options, rest = parser.parse_known_args()
    like_a_run()
    report = Report("scaling", options)
    for name in options.only:
        sweep = SWEEPS[name]
        points = [point for point in sweep.points if not sweep.cores or point <= CORES]
        results: dict[int, list[dict]] = {point: [] for point in points}
        failed = set()
        for repeat, point in itertools.product(range(options.repeats), points):
            if point in failed:
                continue
            try:
                results[point].append(point_of(sweep, point, options.seconds, rest))
            except RuntimeError as error:
                failed.add(point)
                print(error, file=sys.stderr)
                last = str(error).strip().splitlines()[-1]
                report.note(f"{name} {point:,} failed in repeat {repeat + 1}: {last}")
            else:
                print(f"{name} {point}, {repeat + 1}: {results[point][-1]}", file=sys.stderr)
        title = f"{name}, {Path(sweep.launch).stem}"
        rows = [
            {title: f"{point:,}"} | {key: [one[key] for one in found] for key in found[0]}
            for point, found in results.items() if found
        ]  # fmt: skip
        if rows:
            report.table(rows)
        rates = [(row[title], median(row["env steps/s"])) for row in rows]
        for (here, rate), (there, other) in itertools.pairwise(rates):
            if other < rate / 1.5:
                report.note(f"a cliff: {name} {there} is slower than {here}")
        report.finish()  # so that whatever comes, this sweep is kept
        if options.output and report.tables:
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
                if quantity not in rows[0]:
                    panel.set_axis_off()
                    continue
                values = [row[quantity] for row in rows]  # points may differ in repeats
                panel.plot(points, [*map(median, values)], "o-", color=color, markersize=3)
                low, high = [*map(min, values)], [*map(max, values)]
                panel.fill_between(points, low, high, color=color, alpha=0.2)
                panel.set_xscale("log")
                panel.xaxis.set_major_locator(FixedLocator(points))
                panel.xaxis.set_minor_locator(NullLocator())
                panel.xaxis.set_major_formatter(EngFormatter(sep=""))
                panel.set_ylim(bottom=0)
                panel.set_title(f"{quantity} by {title}" if panel is line[0] else quantity)
        figure.savefig(path, dpi=120)


def point_of(sweep: Sweep, point: int, seconds: float, rest: list[str]) -> dict[str, float]:
    """Measure one point of a sweep."""
    options = {"total-env-steps": 10**9, "evaluation.period-steps": 0, "learner.log-seconds": 1}
    words = [word for key, value in (options | sweep.options(point)).items()
             for word in (f"--{key}", *str(value).split())] + rest  # fmt: skip
    if sweep.alone:  # in a process of its own, for its memory
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(measure_alone, sweep.launch, words, seconds).result()
    actor = resolve(REPOSITORY / sweep.launch, words).actor
    round_env_steps = actor.num_lanes * actor.envs_per_lane * actor.unroll_length
    allowed = os.sched_getaffinity(0)
    if sweep.cores:
        os.sched_setaffinity(0, sorted(allowed)[:point])  # children inherit it
    try:
        with tempfile.TemporaryDirectory() as folder:
            program = train(sweep.launch, "run", Path(folder), *words)
            try:
                return measure(program, seconds, round_env_steps)
            finally:
                program.stop()
    finally:
        os.sched_setaffinity(0, allowed)


if __name__ == "__main__":
    main()
