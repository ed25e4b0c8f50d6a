"""Processes that die, hang or stand still; benchmarks/faults.py draws up the whole scorecard."""

from __future__ import annotations

from tests.faults import processes


def test_fault_01_actor_killed_mid_unroll(lab):
    lab.judge(processes.fault_01(lab))


def test_fault_03_environments_that_cannot_be_made(lab):
    lab.judge(processes.fault_03(lab))


def test_fault_04_environments_that_hang(lab):
    lab.judge(processes.fault_04(lab))


def test_fault_05_crash_in_native_code(lab):
    lab.judge(processes.fault_05(lab))


def test_fault_07_all_actors_die_at_once(shared_lab):
    shared_lab.judge(processes.fault_07(shared_lab))


def test_fault_08_learner_killed(shared_lab):
    shared_lab.judge(processes.fault_08(shared_lab))


def test_fault_09_whole_tree_killed(shared_lab):
    shared_lab.judge(processes.fault_09(shared_lab))


def test_fault_13_evaluator_killed(lab):
    lab.judge(processes.fault_13(lab))


def test_fault_25_learner_stalled(shared_lab):
    shared_lab.judge(processes.fault_25(shared_lab))


def test_fault_26_learner_killed_while_it_publishes(lab):
    lab.judge(processes.fault_26(lab, times=1))


def test_fault_27_churn(lab):
    lab.judge(processes.fault_27(lab, times=2))
