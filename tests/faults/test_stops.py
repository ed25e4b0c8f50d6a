"""Signals, disks, locks, strangers."""

from __future__ import annotations

from tests.faults import stops


def test_fault_10_sigterm_at_any_moment(lab):
    lab.judge(stops.fault_10(lab))


def test_fault_11_ctrl_c(shared_lab):
    shared_lab.judge(stops.fault_11(shared_lab))


def test_fault_12_log_sink_gone(lab):
    lab.judge(stops.fault_12(lab))


def test_fault_17_disk_full(lab):
    lab.judge(stops.fault_17(lab))


def test_fault_18_folders_that_cannot_be_used(lab):
    lab.judge(stops.fault_18(lab))


def test_fault_22_two_processes_one_folder(shared_lab):
    shared_lab.judge(stops.fault_22(shared_lab))


def test_fault_24_strangers_in_shared_memory(shared_lab):
    shared_lab.judge(stops.fault_24(shared_lab))
