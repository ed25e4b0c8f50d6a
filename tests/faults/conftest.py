"""A lab for each test, and time for a busy machine."""

from __future__ import annotations

import os

import pytest

from tests.faults.lab import Lab

PATIENCE = float(os.environ.get("ASYNCRL_PATIENCE", "4"))  # times the promised seconds


@pytest.fixture
def lab(tmp_path):
    lab = Lab(tmp_path / "runs", PATIENCE)
    yield lab
    lab.close()


def pytest_collection_modifyitems(items):
    for item in items:
        if "lab" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(150 * PATIENCE))
