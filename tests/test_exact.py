"""lockstep and serial: bit-equal to each other, and to themselves after a kill."""

from __future__ import annotations

import signal

import numpy as np
import pytest

from tests.forked import train_serially
from tests.runs import EXACT, last_checkpoint

OTHERS = ["exact_ppo.py", "exact_family.py", "exact_a2c.py", "exact_pixels.py"]


def assert_equal(one: tuple[dict, dict], other: tuple[dict, dict]) -> None:
    assert one[1] == other[1]
    assert one[0].keys() == other[0].keys()
    for name, tensor in one[0].items():
        assert np.array_equal(tensor, other[0][name]), name


def test_serial_equals_lockstep(uninterrupted, start):
    run = start("serial", EXACT, "--schedule", "serial")
    status, output = run.finish()
    assert status == 0, output
    assert max(row["actors/alive"] for row in run.metrics()) == 2  # in the one process
    assert_equal(last_checkpoint(run.folder), uninterrupted)


def test_another_seed_differs(uninterrupted, tmp_path):
    folder = train_serially(tmp_path, "other", EXACT, ["--seed", 2])
    weights = "algorithm|model|head.advantage.last.weight"
    assert not np.array_equal(last_checkpoint(folder)[0][weights], uninterrupted[0][weights])


@pytest.mark.fault_21
@pytest.mark.parametrize("what", ["actor 1", "learner 0", "SIGTERM", "tree"])
def test_killed_and_resumed_equals_uninterrupted(what, uninterrupted, start):
    """Whatever is killed, the run goes back to its last periodic checkpoint and gets there."""
    run = start("killed", EXACT)
    run.wait_until(lambda: len(list((run.folder / "checkpoints").glob("checkpoint_*"))) > 2)
    if what in ("tree", "SIGTERM"):
        if what == "tree":
            run.kill_tree()
        else:
            run.signal(signal.SIGTERM)
            assert run.finish(30)[0] == 143
        assert not run.orphans()
        run = start("killed", EXACT)
    else:
        run.find(what).send_signal(signal.SIGKILL)
    status, output = run.finish()
    assert status == 0, output
    assert run.count("learner", "resumed at")
    if what in ("actor 1", "learner 0"):  # all go back together
        assert run.count("restarted", "learner") == run.count("restarted", "actor 1") == 1
        assert run.metrics()[-1]["actors/restarts"] == 2
    assert_equal(last_checkpoint(run.folder), uninterrupted)
    steps = [row["env_steps"] for row in run.metrics()]
    assert steps == sorted(steps)


DEADLY = """
import os
import shutil
import signal
from asyncrl.learner import Learner


def finish(learner, finish=Learner.finish):
    finish(learner)
    straight = learner.folder.with_name("straight")
    if not straight.exists():
        shutil.copytree(learner.folder, straight)
        os.kill(os.getpid(), signal.SIGKILL)


Learner.finish = finish
"""


def test_killed_behind_its_last_checkpoint_a_run_is_extended_alike(start, tmp_path):
    """It is begun again and finds nothing to do: that leaves no trace in what comes later."""
    launch_file = tmp_path / "deadly.py"
    launch_file.write_text(EXACT.read_text() + DEADLY)
    run = start("killed", launch_file, "--schedule", "serial", "--total-env-steps", 1_000)
    status, output = run.finish()
    assert status == 0 and run.count("restarted", "serial") == 1, output
    for run_id in ("killed", "straight"):
        train_serially(tmp_path, run_id, launch_file, ["--total-env-steps", 4_000])
    straight = last_checkpoint(tmp_path / "straight")
    assert_equal(last_checkpoint(tmp_path / "killed"), straight)


@pytest.mark.parametrize("name", OTHERS)
def test_serial_equals_lockstep_killed_and_resumed(name, start, tmp_path):
    """PPO with a frame stack, an LSTM, normalisers and a mix of policies; DQN with all that draws
    (noisy nets, IQN, prioritised sequences) and stored states that are refreshed; A2C with V-trace
    on observations and actions of several parts; IQN from pixels."""
    launch_file = EXACT.parent / name
    serial = train_serially(tmp_path, "serial", launch_file)
    run = start("killed", launch_file)
    run.wait_until(lambda: len(list((run.folder / "checkpoints").glob("checkpoint_*"))) > 2)
    run.kill_tree()
    run = start("killed", launch_file)
    status, output = run.finish()
    assert status == 0, output
    assert run.count("learner", "resumed at")
    assert_equal(last_checkpoint(run.folder), last_checkpoint(serial))


def test_a_replay_that_is_not_saved_fills_anew(start):
    """`--learner.save-replay False`: nothing of it on the disk, all else goes on."""
    first = start("short", EXACT, "--learner.save-replay", "False", "--total-env-steps", "2000")
    assert first.finish()[0] == 0
    assert not list((first.folder / "replay").glob("*")) and first.num_saved()
    before = first.metrics()
    again = start("short", EXACT, "--total-env-steps", "4000")
    status, output = again.finish()
    assert status == 0, output
    rows = again.metrics()[len(before) :]
    assert rows[-1]["env_steps"] >= 4000 and rows[-1]["updates"] > before[-1]["updates"]
    assert rows[0]["replay/fill"] < 0.9 < min(before[-1]["replay/fill"], rows[-1]["replay/fill"])
    assert not list((again.folder / "replay").glob("*"))
