"""What faults.py does for a long time: chaos, a random fault every so often, and soak, none."""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
from learning import mean_return
from measure import REPOSITORY, Report, train

from asyncrl.logs import Event, read_metrics
from tests.runs import Run

GOAL = 475.0  # CartPole's, of chaos
TIMED_OUT = 124  # an exit status, as of timeout(1)
MAX_MB_AN_HOUR, MAX_DRIFT = 1.0, 0.05  # of a soak


def resumes(events: list[Event]) -> tuple[int, list[str]]:
    """How often a learner went on, and where it did so behind the newest checkpoint saved before.

    It may be ahead of it: the event is written after the checkpoint, and a kill may come between.
    """
    newest, count, behind = 0, 0, []
    for event in events:
        if saved := re.match(r"checkpoint_(\d+) saved", event.text):
            newest = int(saved[1])
        elif at := re.match(r"(resumed|begun) at (\d+) env steps", event.text):
            count += at[1] == "resumed"
            if int(at[2]) < newest:
                behind.append(f"{event.text}, the newest checkpoint being of {newest}")
    return count, behind


class Storm:
    """A run and what is done to it, by the numbers of faults.py; each tells whether it hit."""

    def __init__(self, runs: Path, launch: Path, rest: list[str], rng: random.Random):
        self.runs, self.launch, self.rest, self.rng = runs, launch, rest, rng
        self.start()

    def start(self) -> None:
        """Begin, or go on with, the run; nobody reads what it prints."""
        self.run = Run(self.runs, "chaos", self.launch, *self.rest)
        self.run.process.stdout.close()

    def send(self, role: str, number: int) -> bool:
        """A signal to all processes of a role that are there now."""
        hit = False
        for child in self.run.children():
            with contextlib.suppress(psutil.Error):
                if f"asyncrl {role} " in " ".join(child.cmdline()):
                    child.send_signal(number)
                    hit = True
        return hit

    def stop(self, number: int) -> bool:
        """A signal to the parent, and the same command again."""
        self.run.children()
        self.run.signal(number)
        self.run.process.wait(60)
        if left := self.run.orphans():
            raise RuntimeError(f"after signal {number} these were left: {left}")
        self.start()
        return True

    def stall(self) -> bool:
        hit = self.send("learner", signal.SIGSTOP)
        time.sleep(5)
        return self.send("learner", signal.SIGCONT) and hit

    def forget_logs(self) -> bool:
        shutil.rmtree(self.run.folder / "logs", ignore_errors=True)
        return True

    def faults(self) -> dict[str, Callable[[], bool]]:
        return {
            "1 actor killed": lambda: self.send("actor 0", signal.SIGKILL),
            "4 actor stopped": lambda: self.send("actor 0", signal.SIGSTOP),
            "5 actor: SIGSEGV": lambda: self.send("actor 0", signal.SIGSEGV),
            "7 all actors killed": lambda: self.send("actor", signal.SIGKILL),
            "8 learner killed": lambda: self.send("learner", signal.SIGKILL),
            "9 tree killed": lambda: self.stop(signal.SIGKILL),
            "10 SIGTERM": lambda: self.stop(signal.SIGTERM),
            "11 SIGINT": lambda: self.stop(signal.SIGINT),
            "12 logs deleted": self.forget_logs,
            "13 evaluator killed": lambda: self.send("evaluator", signal.SIGKILL),
            "25 learner stalled 5 s": self.stall,
            "template killed": lambda: self.send("template", signal.SIGKILL),
        }


def chaos(options: argparse.Namespace, rest: list[str], report: Report) -> None:
    """Train a launch file to its end under random faults, then judge it by 100 greedy games."""
    launch, rng = REPOSITORY / options.chaos, random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    begun, counts = time.monotonic(), Counter()
    storm = Storm(folder, launch, ["--learner.checkpoint-seconds", "10", *rest], rng)
    try:
        while True:
            with contextlib.suppress(Exception):
                storm.run.process.wait(options.every)
            status = storm.run.process.poll()
            if status is None and time.monotonic() - begun > 3600 * options.hours:
                report.note(f"not over after {options.hours:g} hours: killed")
                status = TIMED_OUT
            if status is not None:
                break
            name = rng.choice(list(storm.faults()))
            counts[name] += storm.faults()[name]()
    finally:
        storm.run.kill_tree()
    minutes = (time.monotonic() - begun) / 60
    rows, events = storm.run.metrics(), storm.run.events()
    report.table([{"fault": name, "times": count} for name, count in sorted(counts.items())])
    (resumed, behind), env_steps = resumes(events), rows[-1]["env_steps"]
    deaths = sum(event.kind == "death" for event in events)
    report.note(
        f"{sum(counts.values())} faults in {minutes:.1f} minutes; exit status {status}; "
        f"{env_steps:,} env steps, {deaths} deaths, {resumed} resumes from a checkpoint"
    )
    for words in behind:
        report.note(words)
    report.goal("exit status", float(status), at_most=0)
    report.goal("resumes behind the newest checkpoint", float(len(behind)), at_most=0)
    score = mean_return(folder, "chaos", "--episodes", 100, "--epsilon", 0)
    report.goal(f"mean return of 100 games, {launch.stem}", score, at_least=GOAL)
    shutil.rmtree(folder)


def soak(options: argparse.Namespace, rest: list[str], report: Report) -> None:
    """Let a run go on for hours; slopes of memory and throughput, and a picture of them."""
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    program = train(
        str(REPOSITORY / options.launch), "soak", folder, "--total-env-steps", 10**12, *rest
    )
    try:
        with contextlib.suppress(Exception):
            program.process.wait(options.soak * 3600)
        program.rows()  # raises if it has ended badly
    finally:
        program.stop()
    columns = read_metrics(folder / "soak")
    hours = columns["elapsed_seconds"] / 3600
    late = hours > 0.2 * hours[-1]  # what fills once, as the replay does, has filled
    memory = {name[7:-3]: columns[name] for name in columns
              if name.startswith("memory/") and name != "memory/rss_mb"}  # fmt: skip
    fds = {name[4:]: columns[name] for name in columns if name.startswith("fds/")}
    rate = columns["rate/env_steps"]
    rows = []
    for name, values in memory.items():
        known = late & np.isfinite(values)
        slope = float(np.polyfit(hours[known], values[known], 1)[0])
        growth = float(np.ptp(fds[name][known])) if name in fds else ""
        rows.append({"process": name, "MB at the end": float(values[known][-1]),
                     "MB an hour": slope, "descriptors, last": fds[name][known][-1]
                     if name in fds else "", "range": growth})  # fmt: skip
    report.table(rows)
    total = sum(np.nan_to_num(values) for values in memory.values())
    slope = float(np.polyfit(hours[late], total[late], 1)[0])
    quarter = len(rate) // 4
    drift = float(np.median(rate[-quarter:]) / np.median(rate[quarter : 2 * quarter]) - 1)
    command = " ".join([options.launch, *rest])
    report.note(f"{options.soak:g} hours of {command}, {len(rate)} rows; "
                f"throughput {np.median(rate):.0f} env steps/s, drift {drift:+.1%}")  # fmt: skip
    report.goal("memory of all processes", slope, at_most=MAX_MB_AN_HOUR, unit=" MB/h")
    report.goal("drift of throughput", abs(drift), at_most=MAX_DRIFT)
    ends = [np.nanmedian(v[late][:quarter]) < np.nanmedian(v[late][-quarter:])
            for v in fds.values()]  # fmt: skip
    report.goal("processes with more descriptors at the end", float(sum(ends)), at_most=0)
    picture = (options.output or Path("soak.json")).with_suffix(".png")
    draw(hours, memory, fds, rate, picture)
    print(f"drawn to {picture}")
    shutil.rmtree(folder)


def draw(hours: np.ndarray, memory: dict, fds: dict, rate: np.ndarray, path: Path) -> None:
    """Three panels over hours: memory, descriptors, throughput."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 1, figsize=(8, 7), sharex=True, layout="constrained")
    for panel, lines, title in (
        (axes[0], memory, "private memory, MB"), (axes[1], fds, "open descriptors"),
        (axes[2], {"": rate}, "env steps a second"),
    ):  # fmt: skip
        for name, values in lines.items():
            panel.plot(hours, values, linewidth=1.2, label=name or None)
        panel.set_title(title, loc="left", fontsize=10)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in axes[:2]:
        panel.legend(fontsize=8, ncols=3)
    axes[2].set_xlabel("hours")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
