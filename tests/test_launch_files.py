"""Every launch file, and the one in the README, goes the whole road once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from asyncrl.logs import read_episodes
from tests.runs import REPOSITORY

LAUNCH_FILES = sorted((REPOSITORY / "launch").glob("*.py"))
SMALL = ["--schedule", "serial", "--total-env-steps", 1500, "--evaluation.period-steps", 0]
SMALL_REPLAY = ["--algorithm.replay.capacity", 2000, "--algorithm.replay.learning-starts", 1400]
SMALL_ROLLOUT = ["--actor.unroll-length", 32]
# Updates that take seconds on a CPU: two or three of them are enough.
FEW_UPDATES = {
    "breakout_ancestor": ["--algorithm.replay.samples-per-insert", 10],
    "breakout_btr": ["--model.torso-width", 1, "--algorithm.num-acting-tau", 4,
                     "--algorithm.replay.samples-per-insert", 2],
}  # fmt: skip


@pytest.mark.parametrize("launch_file", LAUNCH_FILES, ids=lambda path: path.stem)
def test_launch_file_learns_a_little(launch_file: Path, start):
    from_replay = "ReplayConfig" in launch_file.read_text()
    options = [*SMALL, *(SMALL_REPLAY if from_replay else SMALL_ROLLOUT)]
    run = start("small", launch_file, *options, *FEW_UPDATES.get(launch_file.stem, []))
    status, output = run.finish(110)
    assert status == 0, output
    last = run.metrics()[-1]
    assert last["env_steps"] >= 1_500
    assert last["updates"] > 0 and last["loss/grad_norm"] > 0 and last["loss/skipped"] == 0


@pytest.mark.parametrize("launch_file", LAUNCH_FILES, ids=lambda path: path.stem)
def test_launch_file_says_what_to_expect(launch_file: Path):
    """Its header names command, hardware, time and score, or says that no run was made yet."""
    header = launch_file.read_text().split('"""')[1]
    for word in ("./run_main.sh", "Hardware:", "Score:"):
        assert word in header


def test_the_launch_file_of_the_readme(start, tmp_path):
    """Own env, model and policy mix in under 40 lines; it learns, and reports by policy."""
    readme = (REPOSITORY / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(code.splitlines()) < 40
    launch_file = tmp_path / "corridor.py"
    launch_file.write_text(code)
    run = start("corridor", launch_file)
    status, output = run.finish(110)
    assert status == 0, output
    episodes = read_episodes(run.folder)
    assert set(episodes["policy"]) == {"explorer", "soft"}
    # Nine steps to the right are the best there is: -0.9; a walk at random takes about 90.
    assert episodes["return"][-100:].mean() > -2.5
