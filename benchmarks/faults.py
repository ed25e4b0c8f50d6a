"""The fault scorecard: every fault is injected into real runs, and what became of them is measured.

    python benchmarks/faults.py                          all of them, a quarter of an hour
    python benchmarks/faults.py --only 1 8 29 --repeats 5
    python benchmarks/faults.py --chaos launch/cartpole_dqn.py     a random fault every 20 seconds
    python benchmarks/faults.py --soak 2 --output soak.json        hours; draws soak.png beside it

Score: 2 kept its promise (recovered by itself in time, or refused where that is promised), 1
recovered late, 0 not. Recovery is from the injection, or from the moment it was noticed where that
takes a fixed time, to the first unroll, update or checkpoint after it; n is how often that was
measured. Where it is less than 20, the largest stands in the place of the 95th percentile. Options
that --chaos and --soak do not know are those of the launch file.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from measure import REPOSITORY, Report, arguments

from tests.faults import data, processes, stops
from tests.faults.lab import Lab, Outcome


@dataclass(frozen=True)
class Fault:
    """A line of the scorecard. Without `inject`, the tests of that number are run."""

    number: int
    name: str
    injection: str
    promise: str
    inject: Callable[[Lab], Outcome] | None = None


FAULTS = (
    Fault(1, "actor killed mid-unroll", "kill -9, at random",
          "open slot vanishes, learner goes on, actor back with current weights in 3 s",
          lambda lab: processes.fault_01(lab, 2 if lab.quick else 6)),
    Fault(2, "env step raises", "1 step in 1,000", "that actor's envs made anew, run goes on",
          data.fault_02),
    Fault(3, "env cannot be made", "bad factory, of one actor and of all",
          "given up, run goes on with the others; exit 1 with the traceback", processes.fault_03),
    Fault(4, "env hangs", "endless loop; SIGSTOP", "noticed in 10 s, stacks dumped, replaced",
          processes.fault_04),
    Fault(5, "native crash, exit()", "SIGSEGV, abort, _exit(0)", "as 1; stack in events.log",
          processes.fault_05),
    Fault(6, "killed inside the slot write", "1,000 random moments", "no torn slot is read"),
    Fault(7, "all actors die at once", "kill -9", "learner waits; all back in 10 s",
          processes.fault_07),
    Fault(8, "learner killed", "kill -9", "resumed from its newest checkpoint",
          lambda lab: processes.fault_08(lab, 1 if lab.quick else 3)),
    Fault(9, "whole tree killed", "kill -9 of the parent", "nothing is left, next start resumes",
          processes.fault_09),
    Fault(10, "SIGTERM", "start, stuck actor, evaluation, random", "saved, 143 within 20 s",
          stops.fault_10),
    Fault(11, "SIGINT", "to the group, once and twice", "saved, 130; twice: at once",
          stops.fault_11),
    Fault(12, "log sink gone", "closed stdout, deleted folders, metrics not writable",
          "trains on, counts what is lost, recovers", stops.fault_12),
    Fault(13, "evaluator dies", "kill -9", "restarted, evaluates again", processes.fault_13),
    Fault(14, "crash in a checkpoint", "after each system call", "always one valid checkpoint"),
    Fault(15, "checkpoint cut short", "0, 1/2, -1 byte, missing", "the one before, both named"),
    Fault(16, "checkpoint: a bit flipped", "in each file", "found; the one before is used"),
    Fault(17, "disk full", "tmpfs of 32 MB", "save refused, said, trained on, saved later",
          stops.fault_17),
    Fault(18, "folder unusable or gone", "a file in its place; moved away", "as 17",
          stops.fault_18),
    Fault(19, "hostile checkpoint", "pickles, paths, sizes", "refused, no code run"),
    Fault(20, "other configuration", "changed options", "refused, field by field"),
    Fault(21, "kill and resume in lockstep", "kill -9 of tree, actor, learner", "bit-equal"),
    Fault(22, "two processes, one folder", "started twice; holder killed",
          "second exits 2; a dead holder's lock is taken over", stops.fault_22),
    Fault(23, "too little memory", "stand-ins for readings and cgroups", "refused, arithmetic"),
    Fault(24, "strangers in /dev/shm", "made and deleted", "no effect", stops.fault_24),
    Fault(25, "learner stalled", "SIGSTOP", "actors wait at 0 % CPU, go on within 1 s",
          processes.fault_25),
    Fault(26, "learner killed in a publication", "kill -9 at random", "no torn weights",
          lambda lab: processes.fault_26(lab, 3 if lab.quick else 10)),
    Fault(27, "churn", "many restarts, 256 descriptors", "memory, threads, descriptors flat",
          lambda lab: processes.fault_27(lab, 4 if lab.quick else 200)),
    Fault(28, "bad data", "nan, inf, shape, dtype, 1e30", "stopped at the actor, envs made anew",
          data.fault_28),
    Fault(29, "updates not finite", "nan batches, nan weights, always",
          "skipped, rolled back, never published or saved; exit 1 if it stays", data.fault_29),
    Fault(30, "GPU out of memory", "CUDA's error in an update, once, always",
          "tried once more in halves; else a checkpoint, exit 1 with the remedy", data.fault_30),
)  # fmt: skip


def by_tests(number: int, quick: bool) -> Outcome:
    """Run the tests that have this fault's number in their names or as a mark."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
               "tests", "-k", f"fault_{number:02d}"]  # fmt: skip
    more = {} if quick else {"ASYNCRL_TEST_KILLS": "1000"}
    result = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, env=os.environ | more
    )
    if result.returncode:
        raise AssertionError(result.stdout[-3000:])
    return Outcome()


def measure(fault: Fault, options: argparse.Namespace, report: Report) -> dict:
    """A line of the scorecard over all repeats."""
    outcomes, score = [], 2
    for _ in range(options.repeats if fault.inject else 1):
        folder = Path(tempfile.mkdtemp(prefix=f"fault-{fault.number:02d}-"))
        lab = Lab(folder / "runs", options.patience, options.quick)
        try:
            inject = fault.inject or (lambda lab: by_tests(fault.number, lab.quick))
            outcomes.append(inject(lab))
        except Exception as error:
            score = 0
            what = "" if isinstance(error, AssertionError) else traceback.format_exc()
            report.note(f"fault {fault.number}: {error}\n{what}see {folder}".strip())
        finally:
            lab.close()
        if score:
            shutil.rmtree(folder, ignore_errors=True)
    seconds = [value for outcome in outcomes for value in outcome.recovery_seconds]
    bounds = [outcome.bound_seconds for outcome in outcomes if outcome.bound_seconds]
    if score and bounds and max(seconds) > bounds[0]:
        score = 1
    for words in sorted({outcome.stand_in for outcome in outcomes if outcome.stand_in}):
        report.note(f"fault {fault.number} by a stand-in: {words}")

    def found(name: str) -> list | str:
        return [value for outcome in outcomes for value in getattr(outcome, name)] or ""

    return {
        "#": str(fault.number), "fault": fault.name, "injected by": fault.injection,
        "promise": fault.promise, "score": str(score),
        "n": str(len(seconds) or ""),
        "recovery p50, s": float(np.percentile(seconds, 50)) if seconds else "",
        "p95 or max, s": float(np.percentile(seconds, 95 if len(seconds) >= 20 else 100))
        if seconds else "",
        "promised": f"{bounds[0]:g}" if bounds else "",
        "transitions lost": found("transitions_lost"),
        "checkpoint pause, s": found("pause_seconds"), "resume loss": found("resume_loss"),
    }  # fmt: skip


def main() -> None:
    parser = arguments(__doc__, repeats=1)
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="these faults")
    parser.add_argument("--quick", action="store_true", help="fewer injections, shorter deadlines")
    words = "times the seconds that waiting may take, for a busy machine"
    parser.add_argument("--patience", type=float, default=1.0, help=words)
    parser.add_argument("--chaos", metavar="LAUNCH_FILE", help="train it under random faults")
    parser.add_argument("--every", type=float, default=20.0, help="seconds between them")
    parser.add_argument("--hours", type=float, default=3.0, help="at most, of --chaos")
    parser.add_argument("--soak", type=float, metavar="HOURS", help="only watch a run")
    parser.add_argument("--launch", default="launch/cartpole_dqn.py", help="what --soak runs")
    parser.add_argument("--seed", type=int, default=0, help="of --chaos")
    options, rest = parser.parse_known_args()
    if rest and not (options.chaos or options.soak):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.chaos or options.soak:
        from endurance import chaos, soak

        name = "chaos" if options.chaos else "soak"
        report = Report(name, options)
        (chaos if options.chaos else soak)(options, rest, report)
        report.finish()
        return
    report, rows = Report("faults", options), []
    for fault in FAULTS:
        if options.only and fault.number not in options.only:
            continue
        rows.append(measure(fault, options, report))
        print(f"fault {fault.number}: {rows[-1]['score']}", file=sys.stderr, flush=True)
    report.table(rows)
    scores = [int(row["score"]) for row in rows]
    report.goal("faults that kept their promise", scores.count(2), at_least=len(scores))
    report.finish()


if __name__ == "__main__":
    main()
