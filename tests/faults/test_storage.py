"""Checkpoints, configurations, memory: the tests of their stations, by the number of the fault."""

from __future__ import annotations

import pytest

from asyncrl.preflight import preflight
from tests import test_checkpoint, test_cli, test_doctor, test_exact
from tests.test_cli import in_this_process, launch_file, runs

__all__ = ["in_this_process", "launch_file", "runs"]  # fixtures


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork
@pytest.mark.parametrize("action", ["rotate", "replace"])
def test_fault_14_crash_at_each_step_of_a_checkpoint(tmp_path, action):
    test_checkpoint.test_a_crash_at_any_system_call_leaves_a_valid_checkpoint_and_best(
        tmp_path, action
    )


@pytest.mark.parametrize("name", test_checkpoint.FILES)
@pytest.mark.parametrize("damage", ["empty", "half", "one byte less", "missing"])
def test_fault_15_newest_checkpoint_is_cut(tmp_path, name, damage):
    if damage == "missing":
        test_checkpoint.test_a_missing_file_makes_the_one_before_be_used(tmp_path, name)
    else:
        test_checkpoint.test_a_damaged_file_makes_the_one_before_be_used_and_is_named(
            tmp_path, name, damage
        )


@pytest.mark.parametrize("name", test_checkpoint.FILES)
def test_fault_16_one_bit_flipped(tmp_path, name):
    test_checkpoint.test_a_damaged_file_makes_the_one_before_be_used_and_is_named(
        tmp_path, name, "a flipped bit"
    )


@pytest.mark.parametrize("attack", test_checkpoint.HOSTILE)
def test_fault_19_hostile_checkpoint(tmp_path, attack):
    test_checkpoint.test_a_hostile_checkpoint_is_refused_in_words(tmp_path, attack)


def test_fault_20_another_configuration(in_this_process, runs, launch_file, capfd):
    test_cli.test_a_resume_with_another_configuration(in_this_process, runs, launch_file, capfd)


def test_fault_21_killed_and_resumed_equals_uninterrupted(uninterrupted, start):
    """The whole tree; actor, learner and SIGTERM are in tests/test_exact.py."""
    test_exact.test_killed_and_resumed_equals_uninterrupted("tree", uninterrupted, start)


def test_fault_23_too_little_memory(in_this_process, runs, launch_file, capfd, tmp_path):
    """Refused with the arithmetic, by what is there and by what a container's limit leaves."""
    test_cli.test_memory_is_refused_with_the_arithmetic(in_this_process, runs, launch_file, capfd)
    test_doctor.test_memory_of_containers(tmp_path / "2")
    test_doctor.test_memory_of_containers_version_1(tmp_path / "1")
    with pytest.raises(Exception, match=r"expected 1\.00 GB of memory, got 0\.50 GB"):
        preflight(test_doctor.make_plan(), tmp_path, available=5 * 10**8)
