"""Every launch file, and the one in the README, goes the whole road once."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces

from asyncrl.logs import read_episodes, read_metrics
from asyncrl.models.contract import try_model
from tests.forked import train_serially
from tests.runs import REPOSITORY

LAUNCH_FILES = sorted((REPOSITORY / "launch").glob("*.py"))
SMALL = {"evaluation.period-steps": 0, "actor.num-actors": 1}
ROLLOUT = {"total-env-steps": 200, "actor.envs-per-lane": 4, "actor.unroll-length": 16}
REPLAY = {"total-env-steps": 600, "actor.envs-per-lane": 4, "algorithm.batch-size": 8,
          "algorithm.replay.learning-starts": 520, "algorithm.replay.samples-per-insert": 4,
          "algorithm.replay.capacity": 1_000}  # fmt: skip
# Images take longer.
FEW_IMAGES = {"total-env-steps": 180, "actor.envs-per-lane": 2}
REPLAY_OF_IMAGES = {**FEW_IMAGES, "algorithm.batch-size": 4,
                    "algorithm.replay.learning-starts": 128,
                    "algorithm.replay.samples-per-insert": 1}  # fmt: skip
OTHERS = {
    "breakout_btr": {"model.torso-width": 1, "algorithm.num-acting-tau": 4},
    # Room for a sequence and its burn-in in each environment.
    "breakout_r2d2": {"total-env-steps": 340, "algorithm.replay.learning-starts": 280,
                      "algorithm.replay.samples-per-insert": 4},
}  # fmt: skip


def small(launch_file: Path) -> dict:
    """Options for few env steps and small batches, which take seconds on a CPU as they are."""
    images = launch_file.stem.startswith(("breakout", "pong"))
    if "ReplayConfig" in launch_file.read_text():
        sizes = REPLAY | (REPLAY_OF_IMAGES if images else {})
    else:
        sizes = ROLLOUT | (FEW_IMAGES if images else {})
    return SMALL | sizes | OTHERS.get(launch_file.stem, {})


def learn(runs: Path, launch_file: Path, options: dict) -> dict:
    """The last row of metrics of a run, begun or gone on with."""
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    metrics = read_metrics(train_serially(runs, "small", launch_file, words))
    last = {name: values[-1] for name, values in metrics.items()}
    assert last["env_steps"] >= options["total-env-steps"]
    assert last["updates"] > 0 and last["loss/grad_norm"] > 0 and last["loss/skipped"] == 0
    return last


@pytest.mark.parametrize("launch_file", LAUNCH_FILES, ids=lambda path: path.stem)
def test_launch_file_learns_a_little(launch_file: Path, tmp_path):
    learn(tmp_path, launch_file, small(launch_file))


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("devices", ["cpu cpu", pytest.param("cuda cuda cpu", marks=needs_gpu),
                                     pytest.param("cpu cuda cuda", marks=needs_gpu)])  # fmt: skip
@pytest.mark.parametrize("name", ["gridworld_dqn", "tiny_breakout_dqn", "masked_cartpole_ppo"])
def test_it_goes_on_on_another_device(name, devices, tmp_path):
    """Acting and learning, with a memory and with priorities or without."""
    launch_file = REPOSITORY / "launch" / f"{name}.py"
    updates, options = 0, small(launch_file)
    for device in devices.split():
        both = {"learner.device": device, "actor.device": device}
        last = learn(tmp_path, launch_file, options | both)
        assert last["updates"] > updates
        updates = last["updates"]
        options["total-env-steps"] += 400


@pytest.mark.parametrize("launch_file", LAUNCH_FILES, ids=lambda path: path.stem)
def test_launch_file_says_what_to_expect(launch_file: Path):
    """Its header names command, hardware and score, or says that no run was made yet."""
    header = launch_file.read_text().split('"""')[1]
    for word in ("./run_main.sh", "Hardware:", "Score:"):
        assert word in header
    score = header.partition("Score:")[2]
    assert re.search(r"\d{2}|\d\.\d|no run of the full length", score)


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


def test_what_the_page_on_own_parts_has(start, tmp_path):
    """Its models are accepted, its algorithm learns, and what it learned is loaded elsewhere."""
    page = (REPOSITORY / "docs" / "algorithms" / "own.md").read_text()
    models, algorithm, program = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict = {}
    exec(models, names)
    images, numbers = spaces.Box(0, 255, (36, 36), np.uint8), spaces.Box(-1, 1, (3,))
    acts = spaces.Discrete(3), spaces.Box(-2, 2, (2,))
    assert set(try_model(names["Stacked"](images, acts[0]), "q", images, acts[0])[0]) == {"frames"}
    actor_critic = names["Gaussian"](numbers, acts[1]), "actor_critic", numbers, acts[1]
    assert try_model(*actor_critic)[0] == {}
    launch_file = tmp_path / "weighted.py"
    launch_file.write_text(algorithm)
    options = ["--algorithm.temperature", "0.5", "--total-env-steps", "2000"]
    folder = train_serially(tmp_path, "weighted", launch_file, options)
    assert read_metrics(folder)["loss/policy"][-1] != 0
    names = {}
    exec(program.replace("runs/RUN_ID", str(folder)), names)
    assert names["config"].algorithm.temperature == 0.5
    outputs, _ = names["model"](torch.zeros(1, 1, 4), torch.ones(1, 1, dtype=torch.bool), {})
    assert outputs["value"].item() != 0  # as a fresh one has it
    names["envs"].close()
