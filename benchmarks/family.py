"""What every member of DQN's family learns: one launch file, a few options, several seeds each.

    python benchmarks/family.py                                 all on CartPole-v1, some two hours
    python benchmarks/family.py --members c51 qr iqn --seeds 0 1 2 --jobs 2

Each member is trained and judged by learning.py; runs, curves and results.json of each lie in a
folder of its name under --output, and the same command again resumes what was interrupted.
Options it does not know are those of the launch file, for all members.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from learning import bootstrap, iqm
from measure import REPOSITORY, Report

PLAIN = "--algorithm.double False --model.dueling False --algorithm.n-step 1"
NO_EPSILON = "--policy.epsilon.start 0 --policy.epsilon.end 0"
MEMBERS = {  # beside the launch file's own: double, dueling and three steps
    "dqn": PLAIN,
    "double": PLAIN.replace("double False", "double True"),
    # Values run away without double Q-learning or longer returns where the horizon is longer.
    "dueling": PLAIN.replace("dueling False", "dueling True") + " --algorithm.gamma 0.98",
    "double_dueling": "--algorithm.n-step 1",  # as in the paper of dueling nets
    "n_step": PLAIN.replace("n-step 1", "n-step 3"),
    "all_three": "",
    "prioritised": "--algorithm.replay.priority-exponent 0.6",
    "noisy": f"--model.noisy True {NO_EPSILON}",
    "c51": "--algorithm.distribution c51 --algorithm.value-min 0 --algorithm.value-max 10",
    "qr": "--algorithm.distribution qr",
    "iqn": "--algorithm.distribution iqn",
    # Its usual temperature and clip go with rewards of 1; the launch file counts them as 0.1.
    "munchausen": "--algorithm.munchausen 0.9 --algorithm.munchausen-temperature 0.003 "
    "--algorithm.munchausen-clip -0.1",
    "rescaled": "--algorithm.value-rescaling True",
}


def learn(options: argparse.Namespace, member: str, rest: list[str]) -> np.ndarray:
    """Train and judge all seeds of a member; their mean returns."""
    name, folder = f"{options.launch.stem}_{member}", options.folder / member
    command = [
        sys.executable, REPOSITORY / "benchmarks" / "learning.py", "--launch", options.launch,
        "--name", name, "--output", folder, "--jobs", options.jobs, "--episodes", options.episodes,
        "--epsilon", 0, "--goal", options.goal, "--seeds", *options.seeds,
        *MEMBERS[member].split(), *rest,
    ]  # fmt: skip
    subprocess.run([str(word) for word in command], check=True, stdout=sys.stderr)
    rows = json.loads((folder / "results.json").read_text())["tables"][0]
    return np.array([row[f"mean return of {options.episodes} games"] for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--launch", type=Path, default=REPOSITORY / "launch" / "cartpole_dqn.py", help="of a DQN"
    )
    parser.add_argument(
        "--members", nargs="+", choices=MEMBERS, default=list(MEMBERS), help="which to train"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="one run each"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--episodes", type=int, default=100, help="greedy games that judge a seed")
    parser.add_argument("--goal", type=float, default=475.0, help="mean return to reach")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/benchmarks/family"),
        help="folder of the runs and figures",
    )
    options, rest = parser.parse_known_args()
    options.folder = options.output.absolute()
    options.output = options.folder / "results.json"
    report, rows = Report("family", options), []
    for member in options.members:
        scores = learn(options, member, rest)
        low, high = bootstrap(scores)
        rows.append({
            "member": member, "options": MEMBERS[member], "seeds": str(len(scores)),
            "mean return (IQM)": float(iqm(scores)),
            "95 % interval": f"{low:.1f} to {high:.1f}",
            "worst seed": float(scores.min()),
        })  # fmt: skip
    report.table(rows)
    for row in rows:
        report.goal(f"{row['member']}, IQM", row["mean return (IQM)"], at_least=options.goal)
    report.finish()


if __name__ == "__main__":
    main()
