"""lockstep and serial: bit-equal to each other, and to themselves after a kill."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

from asyncrl.checkpoint import Checkpoints
from tests.runs import Run

LAUNCH_FILE = Path(__file__).parent / "launch_files" / "exact.py"
OTHERS = ["exact_ppo.py", "exact_family.py"]


def last_checkpoint(folder: Path) -> tuple[dict, dict]:
    """(tensors, counters) of the newest checkpoint of a run."""
    loaded = Checkpoints(folder / "checkpoints").newest_valid()
    assert loaded.state["env_steps"] >= 4_000
    counters = {
        name: loaded.state[name]
        for name in ("numbers", "env_steps", "updates", "epoch", "sequences", "episodes")
    }
    return {name: np.array(tensor) for name, tensor in loaded.tensors.items()}, counters


def assert_equal(one: tuple[dict, dict], other: tuple[dict, dict]) -> None:
    assert one[1] == other[1]
    assert one[0].keys() == other[0].keys()
    for name, tensor in one[0].items():
        assert np.array_equal(tensor, other[0][name]), name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[dict, dict]:
    run = Run(tmp_path_factory.mktemp("runs"), "lockstep", LAUNCH_FILE)
    status, output = run.finish()
    assert status == 0, output
    return last_checkpoint(run.folder)


def test_serial_equals_lockstep(uninterrupted, start):
    run = start("serial", LAUNCH_FILE, "--schedule", "serial")
    status, output = run.finish()
    assert status == 0, output
    assert_equal(last_checkpoint(run.folder), uninterrupted)


def test_another_seed_differs(uninterrupted, start):
    run = start("other", LAUNCH_FILE, "--schedule", "serial", "--seed", "2")
    assert run.finish()[0] == 0
    weights = "algorithm|model|head.advantage.weight"
    assert not np.array_equal(last_checkpoint(run.folder)[0][weights], uninterrupted[0][weights])


@pytest.mark.parametrize("what", ["tree", "actor 1", "learner 0", "SIGTERM"])
def test_killed_and_resumed_equals_uninterrupted(what, uninterrupted, start):
    """Whatever is killed, the run goes back to its last periodic checkpoint and gets there."""
    run = start("killed", LAUNCH_FILE)
    run.wait_until(lambda: len(list((run.folder / "checkpoints").glob("checkpoint_*"))) > 2)
    if what in ("tree", "SIGTERM"):
        if what == "tree":
            run.kill_tree()
        else:
            run.signal(signal.SIGTERM)
            assert run.finish(30)[0] == 143
        assert not run.orphans()
        run = start("killed", LAUNCH_FILE)
    else:
        run.find(what).send_signal(signal.SIGKILL)
    status, output = run.finish()
    assert status == 0, output
    assert run.count("learner", "resumed at")
    assert_equal(last_checkpoint(run.folder), uninterrupted)
    steps = [row["env_steps"] for row in run.metrics()]
    assert steps == sorted(steps)


@pytest.mark.parametrize("name", OTHERS)
def test_serial_equals_lockstep_killed_and_resumed(name, start):
    """PPO with a frame stack, an LSTM, normalisers and a mix of policies; DQN with all that draws
    (noisy nets, IQN, prioritised sequences) and stored states that are refreshed."""
    launch_file = LAUNCH_FILE.parent / name
    serial = start("serial", launch_file, "--schedule", "serial")
    status, output = serial.finish()
    assert status == 0, output
    run = start("killed", launch_file)
    run.wait_until(lambda: len(list((run.folder / "checkpoints").glob("checkpoint_*"))) > 2)
    run.kill_tree()
    run = start("killed", launch_file)
    status, output = run.finish()
    assert status == 0, output
    assert run.count("learner", "resumed at")
    assert_equal(last_checkpoint(run.folder), last_checkpoint(serial.folder))
