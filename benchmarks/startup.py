"""From the command to the first gradient step, and the memory of a learner with a full replay.

    python benchmarks/startup.py

CartPole starts in two ways, in turn: with a row of metrics every 0.05 s, where the first row that
counts an update tells when learning began; and as it is, where the first row of metrics tells what
a person waits for. Then the learner of launch/breakout_dqn.py is made in a process of its own, its
replay of 1,000,000 frames filled with noise by Replay.insert, and some updates made.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from full_replay import FullReplay
from measure import Program, Report, arguments, like_a_run, memory, train

FULL_REPLAY = "--full-replay"  # how this script calls itself


def seconds_until(program: Program, condition: Callable[[dict], bool]) -> float:
    """Seconds from the command to the time in the first row for which the condition holds."""
    while time.time() - program.begun < 300:
        for row in program.rows():
            if condition(row):
                return row["time"] - program.begun
        time.sleep(0.1)
    raise RuntimeError(f"no such row in 300 seconds; see {program.log}")


def startup(runs: Path, launch: str, often: bool) -> float:
    options = ("--learner.log-seconds", 0.05) if often else ()
    program = train(launch, "run", runs, *options)
    try:
        return seconds_until(program, lambda row: not often or row["updates"] > 0)
    finally:
        program.stop()


def full_replay(folder: Path, launch: str, updates: int) -> dict:
    """Make a learner as a run does, fill its replay; bytes of memory at several moments."""
    # Saving the replay would write the noise to the disk, and no more to memory.
    full = FullReplay(folder, launch, save_replay=False)
    learner, found = full.learner, {"before": memory(os.getpid())}
    learner.start(resume=False)
    begun = time.monotonic()
    full.fill()
    found["full"] = memory(os.getpid())
    found["fill_seconds"] = time.monotonic() - begun
    for _ in range(updates):
        learner.algorithm.update(learner.store)
    learner.publish()
    found["learning"] = memory(os.getpid())
    found["frames"], found["device"] = learner.store.capacity, str(learner.store.device)
    return found


def main() -> None:
    parser = arguments(__doc__, repeats=5)
    parser.add_argument("--launch", default="launch/cartpole_dqn.py", help="what is started")
    parser.add_argument("--memory-launch", default="launch/breakout_dqn.py", help="a replay's")
    parser.add_argument("--no-memory", action="store_true", help="leave the replay of 7 GB out")
    parser.add_argument(FULL_REPLAY, type=Path, help="(for itself)")
    options = parser.parse_args()
    like_a_run()
    if options.full_replay:
        print(json.dumps(full_replay(options.full_replay, options.memory_launch, updates=50)))
        return
    report, name = Report("startup", options), Path(options.launch).stem
    times: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        for repeat, often in itertools.product(range(options.repeats), times):
            runs = Path(folder) / f"{repeat}-{often}"
            times[often].append(startup(runs, options.launch, often))
        report.table([
            {f"seconds from the command, {name}": "to the first gradient step", "s": times[True]},
            {f"seconds from the command, {name}": "to the first row of metrics",
             "s": times[False]},
        ])  # fmt: skip
        if not options.no_memory:
            command = [sys.executable, __file__, FULL_REPLAY, folder,
                       "--memory-launch", options.memory_launch]  # fmt: skip
            child = subprocess.run(command, capture_output=True, text=True)
            if child.returncode:
                raise RuntimeError(f"{command} ended with {child.returncode}:\n{child.stderr}")
            found = json.loads(child.stdout.splitlines()[-1])
            frames = f"learner, replay of {found['frames']:,} frames on {found['device']}"
            report.table([
                {frames: what} | {f"{kind}, GB": found[key][kind] / 1e9 for kind in ("Rss", "Pss")}
                for what, key in (("empty", "before"), ("full", "full"),
                                  ("full, after 50 updates", "learning"))
            ])  # fmt: skip
            print(f"filled in {found['fill_seconds']:.0f} s\n")
    report.goal(f"first gradient step, {name}", times[True], at_most=12, unit=" s")
    if not options.no_memory:
        for kind in ("Rss", "Pss"):
            taken = (found["full"][kind] - found["before"][kind]) / 1e9
            report.goal(f"{kind} that the replay takes", taken, at_most=7.5, unit=" GB")
    report.finish()


if __name__ == "__main__":
    main()
