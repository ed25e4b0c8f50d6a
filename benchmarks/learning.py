"""What a launch file learns: several seeds, each evaluated over whole games at its end.

    python benchmarks/learning.py --launch launch/cartpole_dqn.py --seeds 0 1 2
    python benchmarks/learning.py --launch launch/pong_dqn.py --profile home --jobs 2

Options it does not know are those of the launch file. A seed's result is the mean return of its
newest checkpoint (or its best) over --episodes games; all together are reported as their
interquartile mean with a bootstrap interval over seeds: percentiles of means over seeds drawn with
replacement, of which few make it somewhat narrow (with 5 seeds it covers about 90 %, not 95 %).
Runs, curves.png and results.json lie in --output; the same command again resumes what was
interrupted.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from measure import REPOSITORY, Program, Report, train

GOALS = {  # mean return, by launch file
    "cartpole_dqn": 475.0, "cartpole_ppo": 475.0, "cartpole_a2c": 475.0, "acrobot_ppo": -90.0,
    "lunarlander_ppo": 200.0, "lunarlander_a2c": 100.0, "pendulum_ppo": -250.0,
    "masked_cartpole_ppo": 450.0, "masked_cartpole_dqn": 450.0, "lunarlander_dqn": 250.0,
    "door_dqn": 0.95, "tiny_breakout_dqn": 10.0, "tiny_breakout_ppo": 10.0,
}  # fmt: skip


def iqm(scores: np.ndarray) -> np.ndarray:
    """Mean of the middle half along the last axis (of all where there are fewer than four)."""
    cut = scores.shape[-1] // 4
    return np.sort(scores)[..., cut : scores.shape[-1] - cut].mean(-1)


def bootstrap(scores: np.ndarray, resamples: int = 20_000) -> tuple[float, float]:
    """95 % interval of the IQM, runs drawn with replacement."""
    rng = np.random.default_rng(0)
    drawn = rng.choice(scores, size=(resamples, len(scores)))
    low, high = np.percentile(iqm(drawn), [2.5, 97.5])
    return float(low), float(high)


def asyncrl(runs: Path, *words: object) -> str:
    """Output of an asyncrl command on the folder `runs`."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [sys.executable, "-m", "asyncrl", *map(str, words)], capture_output=True, text=True,
        env=os.environ | {"ASYNCRL_RUNS": str(runs), "PYTHONPATH": path},
    )  # fmt: skip
    if result.returncode:
        raise RuntimeError(f"asyncrl {' '.join(map(str, words))}: {result.stdout}{result.stderr}")
    return result.stdout


def mean_return(runs: Path, run_id: str, *how: object) -> float:
    """Of the games of `asyncrl eval`."""
    told = asyncrl(runs, "eval", run_id, *how)
    found = re.search(r"mean return\s+(-?[\d.]+)", told)
    if not found:
        raise RuntimeError(f"expected asyncrl eval to print 'mean return', got:\n{told}")
    return float(found[1])


def train_all(options: argparse.Namespace, rest: list[str], runs: Path) -> dict[int, Program]:
    """One run a seed, `options.jobs` at a time; all have ended well when it returns."""
    waiting, going, ended = list(options.seeds), {}, {}
    try:
        while waiting or going:
            while waiting and len(going) < options.jobs:
                seed = waiting.pop(0)
                going[seed] = train(
                    options.launch, f"{options.name}_{seed}", runs, *rest, "--seed", seed
                )
            for seed, program in list(going.items()):
                if program.process.poll() is not None:
                    ended[seed] = going.pop(seed)
                    program.rows()  # raises if the run has failed
                    print(f"seed {seed}: trained", file=sys.stderr, flush=True)
            time.sleep(0.2)
    finally:
        for program in going.values():
            program.stop()
    return {seed: ended[seed] for seed in options.seeds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--launch", default="launch/cartpole_dqn.py", help="what to train")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="one run each"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--episodes", type=int, default=100, help="games that judge a seed")
    parser.add_argument("--epsilon", type=float, default=0.01, help="random actions in them")
    parser.add_argument("--checkpoint", choices=["newest", "best"], default="newest",
                        help="best: by the run's own evaluations, on other games")  # fmt: skip
    parser.add_argument("--name", help="of the runs (default: the launch file's)")
    parser.add_argument("--goal", type=float, help="mean return to reach")
    parser.add_argument("--at-most", type=float, help="instead of a goal: what no seed may pass, "
                        "where something that is needed has been taken away")  # fmt: skip
    parser.add_argument("--output", type=Path, help="a folder (default: runs/benchmarks/NAME)")
    options, rest = parser.parse_known_args()
    launch = Path(options.launch)
    options.launch = str(launch.absolute() if launch.exists() else REPOSITORY / launch)
    options.name = options.name or launch.stem
    folder = (options.output or Path("runs") / "benchmarks" / options.name).absolute()
    goal = options.goal if options.goal is not None else GOALS.get(launch.stem)
    folder.mkdir(parents=True, exist_ok=True)
    options.output = folder / "results.json"
    report, runs = Report("learning", options), folder / "runs"

    programs = train_all(options, rest, runs)
    rows = []
    for seed, program in programs.items():
        run = f"{options.name}_{seed}"
        how = ["--checkpoint", options.checkpoint, "--epsilon", options.epsilon]
        score = mean_return(runs, run, "--episodes", options.episodes, *how)
        last = program.rows()[-1]
        rows.append({
            f"{options.name}, seed": str(seed),
            f"mean return of {options.episodes} games": score,
            "checkpoint": options.checkpoint,
            "last 100 training episodes": last.get("episode/return", float("nan")),
            "env steps": last["env_steps"], "updates": last["updates"],
            "minutes": last["elapsed_seconds"] / 60,
        })  # fmt: skip
        print(f"seed {seed}: mean return {score}", file=sys.stderr, flush=True)
    report.table(rows)
    scores = np.array([row[f"mean return of {options.episodes} games"] for row in rows])
    low, high = bootstrap(scores)
    text = f"IQM over {len(scores)} seeds {iqm(scores):.2f}, 95 % bootstrap interval {low:.2f} - "
    report.note(f"{text}{high:.2f}; worst seed {scores.min():.2f}, best {scores.max():.2f}")
    names = [f"{options.name}_{seed}" for seed in programs]
    asyncrl(runs, "plot", "--group", "--output", folder / "curves.png", *names)
    if options.at_most is not None:
        report.goal(f"mean return of the best seed, {options.name}", float(scores.max()),
                    at_most=options.at_most)  # fmt: skip
    elif goal is not None:
        report.goal(f"mean return (IQM), {options.name}", float(iqm(scores)), at_least=goal)
        report.goal(f"mean return of the worst seed, {options.name}", float(scores.min()),
                    at_least=goal)  # fmt: skip
    report.finish()
    print(f"runs, results.json and curves.png: {folder}")


if __name__ == "__main__":
    main()
