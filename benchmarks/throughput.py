"""Whole systems on Breakout, learning included, asyncrl beside others on the same machine.

    python benchmarks/throughput.py --task dqn
    python benchmarks/throughput.py --task ppo

One arithmetic for all, with the Nature net. dqn: one vanilla update with a batch of 32 every 4 env
steps, replay of 100,000. ppo: rollouts of 8 x 128 steps, 4 epochs of 4 minibatches. a2c: rollouts
of 16 x 5 steps. `sb3` is Stable-Baselines3 as it is usually run; `plain` is a synchronous loop of
ours in one process with as many environments as asyncrl's actor. The systems take turns in each
repeat. Measured is from some seconds after the first update on. Stable-Baselines3 gets a virtual
environment of its own, made at the first use (torch of the same version as here).

`waiting` says what a process costs that has nothing to do: at the end the learner is stopped
(SIGSTOP) and the CPU time of the actors counted, and the other way round.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from measure import REPOSITORY, Program, Report, arguments, median, memory, train

SHARED = {"evaluation.period-steps": 0, "learner.log-seconds": 1}
OPTIONS = {
    "dqn": {
        "algorithm.double": False, "model.dueling": False, "algorithm.n-step": 1,
        "algorithm.batch-size": 32, "algorithm.replay.samples-per-insert": 8,
        "algorithm.replay.capacity": 100_000, "algorithm.replay.learning-starts": 2_000,
    } | SHARED,
    "a2c": SHARED,
    "ppo": SHARED,
}  # fmt: skip
PLAIN = {"dqn": "peer_plain_dqn", "a2c": "peer_plain_on_policy", "ppo": "peer_plain_on_policy"}
STEPS_AN_UPDATE = {"dqn": 4, "a2c": 80, "ppo": 64}  # optimizer steps
SETTLE_SECONDS, START_SECONDS = 5.0, 300.0  # from the first update on; until it


class Tree:
    """A process and its descendants: CPU seconds of all that ever lived, peak of their PSS (which
    shares out a page among the processes that have it; RSS would count it several times)."""

    def __init__(self, pid: int):
        self.root = psutil.Process(pid)
        self.cpu: dict[int, float] = {}
        self.peak_pss = 0

    def processes(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            return [self.root, *self.root.children(recursive=True)]
        return []

    def sample(self) -> float:
        """CPU seconds so far."""
        pss = 0
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                self.cpu[process.pid] = cpu_seconds(process)
                pss += memory(process.pid)["Pss"]
        self.peak_pss = max(self.peak_pss, pss)
        return sum(self.cpu.values())

    def of_role(self, role: str) -> list[psutil.Process]:
        return [process for process in self.processes()
                if f"asyncrl {role} " in " ".join(process.cmdline())]  # fmt: skip


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def make_venv(folder: Path) -> Path:
    """A Python with Stable-Baselines3 in it, and the same torch and ALE as here."""
    python = folder / "bin" / "python"
    check = [python, "-c", "import stable_baselines3, ale_py, cv2"]
    if not python.exists() or subprocess.run(check, capture_output=True).returncode:
        version, same = importlib.metadata.version, ("torch", "ale-py", "numpy")
        same = [f"{name}=={version(name).partition('+')[0]}" for name in same]
        print(f"making {folder} with stable-baselines3, {', '.join(same)}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        packages = ["stable-baselines3", "opencv-python-headless", *same]
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    return python


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


def measure(name: str, program: Program, seconds: float) -> dict[str, float]:
    """One system from its start to the end of its measurement."""
    tree, samples = Tree(program.process.pid), []
    first_update = None
    try:
        while True:
            samples.append((time.time(), tree.sample()))
            rows = program.rows()
            if first_update is None:
                first_update = next((row["time"] for row in rows if row["updates"]), None)
                if time.time() - program.begun > START_SECONDS:
                    raise RuntimeError(f"{name}: no update in {START_SECONDS:.0f} s")
            else:
                # Env steps come in unrolls: from a row that has new ones to another such row.
                fresh = [row for old, row in itertools.pairwise(rows)
                         if row["env_steps"] > old["env_steps"]
                         and row["time"] >= first_update + SETTLE_SECONDS]  # fmt: skip
                if fresh and fresh[-1]["time"] - fresh[0]["time"] >= seconds:
                    begin, end = fresh[0], fresh[-1]
                    break
            time.sleep(0.5)
        times, cpu = zip(*samples, strict=True)
        used = np.interp([begin["time"], end["time"]], times, cpu)
        env_steps, wall = end["env_steps"] - begin["env_steps"], end["time"] - begin["time"]
        result = {
            "env steps/s": env_steps / wall,
            "env steps an update": env_steps / max(end["updates"] - begin["updates"], 1),
            "CPU s / 1000 env steps": 1e3 * (used[1] - used[0]) / env_steps,
            "cores busy": (used[1] - used[0]) / wall,
            "peak PSS, MB": tree.peak_pss / 1e6,
        }
        if name == "asyncrl":
            result["actor waiting, % of a core"] = cost_of_waiting(tree, "learner", "actor")
            result["learner waiting, % of a core"] = cost_of_waiting(tree, "actor", "learner")
        return result
    finally:
        program.stop()


def main() -> None:
    parser = arguments(__doc__, repeats=5)
    parser.add_argument("--seconds", type=float, default=60, help="of each measurement")
    systems = ["asyncrl", "sb3", "plain"]
    parser.add_argument("--task", choices=list(OPTIONS), default="dqn")
    parser.add_argument("--systems", nargs="+", choices=systems, default=systems)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    parser.add_argument("--peers-venv", type=Path, default=cache / "asyncrl-benchmarks" / "sb3")
    options, rest = parser.parse_known_args()  # the rest are options of asyncrl
    python = make_venv(options.peers_venv.absolute()) if "sb3" in options.systems else None
    report = Report("throughput", options)
    results: dict[str, list[dict]] = {name: [] for name in options.systems}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(options.repeats):
            for name in options.systems:
                runs = Path(folder) / f"{name}_{repeat}"
                runs.mkdir()
                if name == "asyncrl":
                    changed = OPTIONS[options.task].items()
                    words = [word for k, v in changed for word in (f"--{k}", v)]
                    launch = f"launch/breakout_{options.task}.py"
                    program = train(launch, name, runs, *words, *rest)
                else:
                    interpreter = python if name == "sb3" else sys.executable
                    script = PLAIN[options.task] if name == "plain" else "peer_sb3"
                    script = REPOSITORY / "benchmarks" / f"{script}.py"
                    command = [interpreter, script, runs / "rows", options.task, repeat + 1]
                    program = Program(command, runs / "log", runs / "rows")
                results[name].append(result := measure(name, program, options.seconds))
                print(f"{repeat + 1} {name}: {result['env steps/s']:.1f}", file=sys.stderr)
    rows, title = [], f"Breakout, {options.task}"
    for name, found in results.items():
        columns = {key: [result[key] for result in found] for key in found[0]}
        if "sb3" in results:
            pairs = zip(found, results["sb3"], strict=True)
            columns["/ sb3"] = [mine["env steps/s"] / its["env steps/s"] for mine, its in pairs]
        rows.append({title: name} | columns)
    waiting = [{key: row.pop(key) for key in list(row) if "waiting" in key} for row in rows]
    report.table(rows)
    for row, costs in zip(rows, waiting, strict=True):
        expected = STEPS_AN_UPDATE[options.task]
        if abs(median(row["env steps an update"]) / expected - 1) > 0.05:
            report.note(f"{row[title]} did not do one update every {expected} env steps")
        if row[title] == "asyncrl" and "/ sb3" in row:
            report.goal("asyncrl / Stable-Baselines3, env steps/s", row["/ sb3"], at_least=2)
        for what, percent in costs.items():
            report.goal(f"nobody spins: {what}", percent, at_most=2)
    report.finish()


if __name__ == "__main__":
    main()
