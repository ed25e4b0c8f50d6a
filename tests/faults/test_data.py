"""Environments and updates that fail."""

from __future__ import annotations

from tests.faults import data


def test_fault_02_env_step_raises(lab):
    lab.judge(data.fault_02(lab))


def test_fault_28_bad_data_from_environments(lab):
    lab.judge(data.fault_28(lab))


def test_fault_29_updates_that_are_not_finite(lab):
    lab.judge(data.fault_29(lab))


def test_fault_30_out_of_memory(lab):
    lab.judge(data.fault_30(lab))
