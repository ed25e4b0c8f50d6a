"""A lab for each test, and time for a busy machine."""

from __future__ import annotations

import os

import pytest

from tests.faults.lab import Lab

PATIENCE = float(os.environ.get("ASYNCRL_PATIENCE", "8"))  # times the promised seconds


@pytest.fixture
def lab(tmp_path):
    lab = Lab(tmp_path / "runs", PATIENCE)
    yield lab
    lab.close()


@pytest.fixture(scope="package")
def shared_run(tmp_path_factory):
    """A lab of one run for many faults; it is ended as a run must end, whatever it went through."""
    lab = Lab(tmp_path_factory.mktemp("shared") / "runs", PATIENCE)
    lab.shared = True
    yield lab
    try:
        if lab.runs and lab.runs[-1].process.poll() is None:
            lab.stop(lab.runs[-1])
    finally:
        lab.close()


@pytest.fixture
def shared_lab(shared_run, request):
    """The lab of that run; after a fault that failed, the next one begins another run."""
    before = request.session.testsfailed
    yield shared_run
    if request.session.testsfailed > before:
        for run in shared_run.runs:
            run.kill_tree()
        shared_run.folder = shared_run.folder.with_name(f"after-{request.node.name}")


def pytest_collection_modifyitems(items):
    for item in items:
        if {"lab", "shared_lab"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.timeout(150 * PATIENCE))
