"""Whole systems, learning included, asyncrl beside others on the same machine.

    python benchmarks/throughput.py --task dqn
    python benchmarks/throughput.py --task ppo --systems asyncrl sf plain

One arithmetic for all: the same net, batch and epochs, float32 unless asyncrl and the plain loop
find hardware for bfloat16. All but the last are Breakout with the Nature net.

dqn           one vanilla update with a batch of 32 every 4 env steps, replay of 100,000
a2c           rollouts of 16 x 5 steps
ppo           rollouts of 32 x 32 steps, 4 epochs of 4 minibatches
impala        rollouts of 32 x 20 steps, one pass; V-trace in asyncrl and RLlib
cartpole_ppo  rollouts of 8 x 32 steps, 10 epochs of 4 minibatches, two nets of 64 x 64: overhead

Peers are `sb3`, Stable-Baselines3, `sf`, Sample Factory's asynchronous PPO, and `rllib`, RLlib's
IMPALA, each with its own environments and wrappers. They have as many environments as asyncrl, but
in DQN one and in Breakout's PPO eight, as they are usually run: there `sb3-16`, `sb3-32` and
`sf-32` have as many. `-tuned` ones get the environment variables by which asyncrl tunes memory and
threads, as a user who knows of them might set them. `plain` is a synchronous loop of ours in one
process with as many environments; `ideal` is no system, but what env steps, asyncrl's net and its
updates come to, timed alone on these cores and overlapped perfectly. They take turns, another one
first in each repeat. Measured is from some seconds after the first update on, by updates: env steps
are counted by the unroll or rollout, and there is one update for a fixed number of them. An env
step is a decision of the agent, four frames of Atari; samples are transitions learned from, once
for each time. The best peer is the one with the best median, of those that are as they are
installed.

Each peer gets a virtual environment of its own, made at the first use (torch and ALE of the same
version as here).

`asyncrl-float32` computes as the peers do, without bfloat16.

`waiting` says what a process costs that has nothing to do: at the end the learner is stopped
(SIGSTOP) and the CPU time of the actors counted, and the other way round.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from measure import Program, Report, arguments, median, memory
from peers import PEERS, TASKS, ideal, make_venv, start

GOALS = {  # of asyncrl's env steps/s
    "dqn": {"/ sb3": 2, "/ best peer": 2.6, "/ ideal": 0.85},
    "a2c": {"/ sb3": 2, "/ best peer": 2.7, "/ ideal": 0.85},
    "ppo": {"/ sb3": 2, "/ best peer": 3, "/ plain": 0.95},
    "impala": {"/ best peer": 5},
    "cartpole_ppo": {"/ best peer": 2},
}
MAX_PSS = {"ppo": 1000}  # MB
SETTLE_SECONDS, START_SECONDS = 12.0, 300.0  # from the first update on; until it
PSS_SECONDS = 4.0
FAILURES = (RuntimeError, subprocess.TimeoutExpired, psutil.Error)  # of a system


class Tree:
    """A process and its descendants: CPU seconds of all that ever lived, peak of their PSS (which
    shares out a page among the processes that have it; RSS would count it several times)."""

    def __init__(self, pid: int):
        self.root = psutil.Process(pid)
        self.cpu: dict[int, float] = {}
        self.peak_pss, self.look_at = 0, 0.0

    def processes(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            return [self.root, *self.root.children(recursive=True)]
        return []

    def sample(self) -> float:
        """CPU seconds so far. Memory only now and then: the kernel goes through all its pages."""
        processes = self.processes()
        for process in processes:
            with contextlib.suppress(psutil.Error):
                self.cpu[process.pid] = cpu_seconds(process)
        if (now := time.monotonic()) >= self.look_at:
            self.look_at = now + PSS_SECONDS
            self.peak_pss = max(self.peak_pss, sum(memory(its.pid)["Pss"] for its in processes))
        return sum(self.cpu.values())

    def of_role(self, role: str) -> list[psutil.Process]:
        return [process for process in self.processes()
                if f"asyncrl {role} " in " ".join(process.cmdline())]  # fmt: skip


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def machine_seconds() -> float:
    """CPU seconds of everything since the machine began, what others took from it included."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - times.iowait - times.guest - times.guest_nice


def cost_of_waiting(tree: Tree, stopped: str, waiting: str, seconds: float = 4) -> float:
    """% of a core that a role uses while another one is stopped, once it has run out of work.

    The supervisor is stopped too: it would take an actor that makes no step for stuck.
    """
    asleep = [tree.root, *tree.of_role(stopped)]

    def used(during: float) -> float:
        begun = [(process, cpu_seconds(process)) for process in tree.of_role(waiting)]
        time.sleep(during)
        return 100 * sum(cpu_seconds(process) - before for process, before in begun) / during

    try:
        for process in asleep:
            process.suspend()
        deadline = time.monotonic() + 60
        while used(1) > 5 and time.monotonic() < deadline:
            pass
        return used(seconds)
    finally:
        for process in reversed(asleep):
            process.resume()
            time.sleep(1)  # a heartbeat, before the supervisor looks


def whole_rounds(rows: list[dict], begin: float) -> list[dict]:
    """Rows from a time on to measure between: one that has new env steps, with updates since the
    one before. Env steps come in unrolls, and some systems do nothing but learn for a while."""
    found, updates = [], 0
    for old, row in itertools.pairwise(rows):
        if row["time"] < begin:
            updates = row["updates"]
        elif row["env_steps"] > old["env_steps"] and row["updates"] > updates:
            found.append(row)
            updates = row["updates"]
    return found


def measure(
    name: str, program: Program, seconds: float, batch: int = 0, env_steps_an_update: float = 0
) -> dict[str, float]:
    """One system from its start to the end of its measurement.

    batch: transitions an update learns from, where those are to be counted. env_steps_an_update:
    where it is given, env steps/s are updates/s times this; what is counted otherwise comes in
    unrolls, hundreds or a thousand at once, and updates one by one.
    """
    tree, samples = Tree(program.process.pid), []
    first_update = None
    try:
        while True:
            samples.append((time.time(), tree.sample(), machine_seconds()))
            rows = program.rows()
            if first_update is None:
                first_update = next((row["time"] for row in rows if row["updates"]), None)
                if time.time() - program.begun > START_SECONDS:
                    raise RuntimeError(f"{name}: no update in {START_SECONDS:.0f} s")
            else:
                fresh = whole_rounds(rows, first_update + SETTLE_SECONDS)
                if fresh and fresh[-1]["time"] - fresh[0]["time"] >= seconds:
                    begin, end = fresh[0], fresh[-1]
                    break
                if time.time() - first_update > START_SECONDS + 5 * seconds:
                    raise RuntimeError(f"{name}: {len(fresh)} rounds of learning in so long a time")
            if program.process.poll() is not None:
                raise RuntimeError(f"{name} has ended by itself")
            time.sleep(0.5)
        times, *cpu = zip(*samples, strict=True)
        own, all_of_it = (np.diff(np.interp([begin["time"], end["time"]], times, its))[0]
                          for its in cpu)  # fmt: skip
        wall, updates = end["time"] - begin["time"], end["updates"] - begin["updates"]
        counted = end["env_steps"] - begin["env_steps"]
        env_steps = updates * env_steps_an_update or counted
        result = {
            "env steps/s": env_steps / wall,
            "updates/s": updates / wall,
            **({"samples/s": updates * batch / wall} if batch else {}),
            "env steps an update": counted / max(updates, 1),
            "CPU s / 1000 env steps": 1e3 * own / env_steps,
            "cores busy": own / wall,
            "cores busy with other work": (all_of_it - own) / wall,
            "peak PSS, MB": tree.peak_pss / 1e6,
        }
        if name == "asyncrl":
            result["actor waiting, % of a core"] = cost_of_waiting(tree, "learner", "actor")
            result["learner waiting, % of a core"] = cost_of_waiting(tree, "actor", "learner")
        return result
    finally:
        program.stop()


def add_ratios(rows: dict[str, dict]) -> str:
    """Columns of env steps/s relative to others in the same repeat; returns the best peer."""
    rates = {name: row["env steps/s"] for name, row in rows.items()}
    peers = [name for name in rates if peer_of(name) in PEERS and "tuned" not in name]
    best = max(peers, key=lambda name: median(rates[name]), default="")
    others = {name: name for name in rates if name != "asyncrl"} | {"best peer": best}
    for what, other in others.items():
        for name, row in rows.items():
            if other in rates:
                pairs = zip(rates[name], rates[other], strict=True)
                row[f"/ {what}"] = [mine / its for mine, its in pairs]
    return best


def peer_of(name: str) -> str:
    """What a system is a variant of: sb3 for sb3-16-tuned."""
    return name.partition("-")[0]


def main() -> None:
    parser = arguments(__doc__, repeats=5)
    parser.add_argument("--seconds", type=float, default=60, help="of each measurement")
    parser.add_argument("--task", choices=list(TASKS), default="dqn", help="see above")
    parser.add_argument("--systems", nargs="+", help="of those above; none: all of the task")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "asyncrl-benchmarks"
    for name in PEERS:
        parser.add_argument(
            f"--{name}-venv",
            type=Path,
            default=cache / name,
            help="where it is installed, or will be",
        )
    options, rest = parser.parse_known_args()  # the rest are options of asyncrl
    task = TASKS[options.task]
    chosen = options.systems or ["asyncrl", *task.peers, "plain", "ideal"]
    known = ["asyncrl", "asyncrl-float32", *task.peers, "plain", "ideal"]
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"--systems: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    peers = dict.fromkeys(peer_of(name) for name in chosen if name in task.peers)
    folders = {peer: getattr(options, f"{peer}_venv").absolute() for peer in peers}
    made, failed, limits = {}, {}, []
    for peer, folder in folders.items():
        try:
            made[peer] = make_venv(peer, folder)
        except (RuntimeError, subprocess.CalledProcessError) as error:  # no network, perhaps
            its = [name for name in chosen if name in task.peers and peer_of(name) == peer]
            failed |= {name: f"{name} is left out: {error}" for name in its}
    pythons = {peer: python for peer, (python, _) in made.items()}
    report = Report("throughput", options)
    results: dict[str, list[dict]] = {name: [] for name in chosen}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(options.repeats):
            turn = repeat % len(chosen)
            for name in chosen[turn:] + chosen[:turn]:
                if name in failed:
                    continue
                runs = Path(folder) / f"{name}_{repeat}"
                runs.mkdir()
                try:
                    if name == "ideal":
                        result, limit = ideal(options.task, runs, rest)
                        limits.append(limit)
                    else:
                        program = start(name, options.task, runs, repeat + 1, pythons, rest)
                        shape = task.batch, task.env_steps
                        result = measure(name, program, options.seconds, *shape)
                except FAILURES as error:  # the others go on without it
                    failed[name] = f"{name} is left out: {error}"
                    print(failed[name], file=sys.stderr)
                    continue
                results[name].append(result)
                print(f"{repeat + 1} {name}: {result['env steps/s']:.1f}", file=sys.stderr)
    columns = {name: {key: [result[key] for result in found] for key in found[0]}
               for name, found in results.items() if name not in failed}  # fmt: skip
    best = add_ratios(columns)
    waiting = {key: columns["asyncrl"].pop(key) for key in list(columns.get("asyncrl", {}))
               if "waiting" in key}  # fmt: skip
    report.table([{options.task: name} | row for name, row in columns.items()])
    if best:
        versions = ", ".join(f"{PEERS[peer][0][0]} {its}" for peer, (_, its) in made.items())
        report.note(f"best peer: {best}; {versions}")
    for words in failed.values():
        report.note(words)
    if limits:
        report.note(f"the ideal: {limits[len(limits) // 2]}")
    for name, row in columns.items():
        each = task.env_steps
        if name != "ideal" and abs(median(row["env steps an update"]) / each - 1) > 0.05:
            report.note(f"{name} did not do one update every {each:g} env steps")
    if "asyncrl" in columns:
        mine = columns["asyncrl"]
        for what, at_least in GOALS[options.task].items():
            if what in mine:
                report.goal(f"asyncrl {what}, env steps/s", mine[what], at_least=at_least)
        if options.task in MAX_PSS and report.hardware["gpu"] == "no GPU":  # its driver takes more
            pss = mine["peak PSS, MB"]
            report.goal("peak memory of the tree", pss, at_most=MAX_PSS[options.task], unit=" MB")
        for what, percent in waiting.items():
            report.goal(f"nobody spins: {what}", percent, at_most=2)
    report.finish()
    sys.exit(failed.get("asyncrl", 0))


if __name__ == "__main__":
    main()
