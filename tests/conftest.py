"""Fixtures of several tests."""

from __future__ import annotations

import pytest

from tests.runs import EXACT, Run, last_checkpoint


def pytest_configure(config):
    for number in range(1, 31):
        line = f"fault_{number:02d}: shows what becomes of that fault (docs/faults.md)"
        config.addinivalue_line("markers", line)


@pytest.fixture
def start(tmp_path):
    """`start(run_id, launch_file, *options, ...)` begins a real run; none outlives its test."""
    runs: list[Run] = []

    def start_run(run_id, launch_file, *options, **how) -> Run:
        runs.append(Run(tmp_path, run_id, launch_file, *options, **how))
        return runs[-1]

    yield start_run
    for run in runs:
        run.kill_tree()


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory) -> tuple[dict, dict]:
    """What a run of launch_files/exact.py ends with that nothing disturbs."""
    run = Run(tmp_path_factory.mktemp("runs"), "lockstep", EXACT)
    status, output = run.finish()
    assert status == 0, output
    return last_checkpoint(run.folder)
