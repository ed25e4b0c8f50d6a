"""The tasks of benchmarks/throughput.py, and how asyncrl and the others are started on them.

A peer's name may say more, behind dashes: a number of environments (sb3-16), and "tuned", which
gives it the environment variables of asyncrl's own processes (sb3-16-tuned): how its memory is
allocated and its threads wait for each other.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from measure import REPOSITORY, Program, train

from asyncrl.children import CHILD_ENVIRONMENT
from asyncrl.limits import usable_cores


class Task(NamedTuple):
    """The same for all systems: how many transitions an optimizer step learns from, and after how
    many env steps there is one. Nets, environments and epochs are written down in each script."""

    batch: int
    env_steps: float
    launch: str
    peers: tuple[str, ...]
    plain: str
    options: dict[str, object] = {}  # noqa: RUF012  of asyncrl


ON_POLICY = "peer_plain_on_policy"
TASKS = {
    "dqn": Task(
        32, 4, "breakout_dqn", ("sb3", "sb3-16", "sb3-16-tuned"), "peer_plain_dqn", {
            "algorithm.double": False, "model.dueling": False, "algorithm.n-step": 1,
            "algorithm.batch-size": 32, "algorithm.replay.samples-per-insert": 8,
            "algorithm.replay.capacity": 100_000, "algorithm.replay.learning-starts": 2_000,
            "actor.nice": 19,
        },
    ),
    "a2c": Task(80, 80, "breakout_a2c", ("sb3", "sb3-tuned"), ON_POLICY, {"profile": "home"}),
    "ppo": Task(
        256, 64, "breakout_ppo",
        ("sb3", "sb3-tuned", "sb3-32", "sb3-32-tuned", "sf", "sf-32"), ON_POLICY,
        {"profile": "home"},
    ),
    "impala": Task(640, 640, "breakout_impala", ("sf", "rllib"), ON_POLICY),
    "cartpole_ppo": Task(64, 6.4, "cartpole_ppo", ("sb3", "sb3-tuned", "sf"), ON_POLICY),
}  # fmt: skip
SHARED = {"total-env-steps": 10**9, "evaluation.period-steps": 0, "learner.log-seconds": 1}

# What a peer's virtual environment gets, what must be there, and what is of the version used here.
PEERS = {
    "sb3": (
        ["stable-baselines3", "opencv-python-headless"], "stable_baselines3, ale_py, cv2",
        ["torch", "ale-py", "numpy"],
    ),
    "sf": (
        ["sample-factory", "opencv-python-headless"], "sample_factory, ale_py, cv2",
        ["torch", "ale-py"],  # it needs Gymnasium before 1.0 and NumPy before 2
    ),
    "rllib": (
        ["ray[rllib]", "opencv-python-headless"], "ray, gymnasium, ale_py, cv2",
        ["torch", "ale-py"],
    ),
}  # fmt: skip


def make_venv(name: str, folder: Path) -> tuple[Path, str]:
    """A Python with a peer in it, and the peer's version."""
    python = folder / "bin" / "python"
    packages, modules, same = PEERS[name]
    wanted = {p: importlib.metadata.version(p).partition("+")[0] for p in same}
    ask = f"import {modules}; from importlib.metadata import version; " + (
        f"print(*[version(p).partition('+')[0] for p in {[packages[0].partition('[')[0], *same]}])"
    )
    for fresh in (False, True):
        if fresh:
            packages = [*packages, *(f"{p}=={version}" for p, version in wanted.items())]
            print(f"making {folder} with {', '.join(packages)}", file=sys.stderr)
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        if python.exists():
            found = subprocess.run([python, "-c", ask], capture_output=True, text=True, cwd=folder)
            its, *others = found.stdout.split()[-1 - len(same) :] or [""]
            if found.returncode == 0 and others == list(wanted.values()):
                return python, its
    raise RuntimeError(f"expected {wanted} in {folder}, got {others}:\n{found.stderr[-2000:]}")


def words(task: str, rest: list[str]) -> list[str]:
    """The options that a task has for asyncrl, and those of the command line."""
    options = (TASKS[task].options | SHARED).items()
    return [str(word) for name, value in options for word in (f"--{name}", value)] + rest


def start(
    name: str, task: str, runs: Path, seed: int, pythons: dict[str, Path], rest: list[str]
) -> Program:
    """One of the systems, in a folder for its files."""
    if name.startswith("asyncrl"):
        options = [*words(task, rest), "--seed", seed]
        if name == "asyncrl-float32":
            options += ["--actor.precision", "float32", "--algorithm.precision", "float32"]
        return train(f"launch/{TASKS[task].launch}.py", name, runs, *options)
    peer, *variant = name.split("-")
    script = TASKS[task].plain if name == "plain" else f"peer_{peer}"
    script = REPOSITORY / "benchmarks" / f"{script}.py"
    command = [pythons.get(peer, sys.executable), script, runs / "rows", task, seed]
    more = {"BENCHMARK_CORES": str(usable_cores())}  # by a quota too, which not all of them ask for
    more |= CHILD_ENVIRONMENT if "tuned" in variant else {}
    command += [word for word in variant if word != "tuned"]
    return Program(command, runs / "log", runs / "rows", **more)


def ideal(task: str, runs: Path, rest: list[str]) -> tuple[dict, str]:
    """What the parts of a task come to, perfectly overlapped, and why not more: peer_ideal.py."""
    script = REPOSITORY / "benchmarks" / "peer_ideal.py"
    launch = REPOSITORY / "launch" / f"{TASKS[task].launch}.py"
    command = [sys.executable, script, runs / "result", launch, *words(task, rest)]
    program = Program(command, runs / "log", runs / "result")
    try:
        program.process.wait(900)
        row = program.rows()[0]
        return {"env steps/s": row["env steps/s"]}, row["limit"]
    finally:
        program.stop()
