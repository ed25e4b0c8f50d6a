"""Code that is another when a run is resumed is said, and what it replaces is kept."""

from __future__ import annotations

import json

import pytest

from asyncrl.logs import read_events
from asyncrl.provenance import git_revision, provenance, say_what_changed

CONFIG = {"versions": {"python": "3.11.1", "torch": "2.13.0"}, "git": "v1"}


@pytest.fixture
def begun(tmp_path):
    (tmp_path / "launch.py").write_text("config = 1\n")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def warnings(folder) -> list[str]:
    path = folder / "events.log"
    return [event.text for event in read_events(path)] if path.exists() else []


def test_what_is_as_it_was_is_not_mentioned(begun):
    say_what_changed(begun, b"config = 1\n", CONFIG)
    assert warnings(begun) == []
    assert {path.name for path in begun.iterdir()} <= {"launch.py", "config.json", "events.log"}


def test_a_launch_file_that_is_replaced_is_kept(begun):
    say_what_changed(begun, b"config = 2\n", CONFIG)
    (kept,) = begun.glob("launch_until_*.py")
    assert kept.read_text() == "config = 1\n"
    (said,) = warnings(begun)
    assert "launch.py is another than before" in said and kept.name in said


def test_other_versions_are_named(begun):
    now = {"versions": {"python": "3.11.1", "torch": "2.14.0", "ale-py": "0.12"}, "git": "v2"}
    say_what_changed(begun, b"config = 1\n", now)
    (said,) = warnings(begun)
    changes = {"torch 2.13.0 -> 2.14.0", "ale-py None -> 0.12", "asyncrl v1 -> v2"}
    assert set(said.partition(": ")[2].split(", ")) == changes


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"versions": 3, "git": 4}'])
def test_what_cannot_be_compared_holds_nothing_up(begun, damage):
    (begun / "config.json").write_text(damage)
    (begun / "launch.py").unlink()
    say_what_changed(begun, b"config = 1\n", CONFIG)
    assert warnings(begun) == []


def test_the_revision_is_known(monkeypatch):
    own = git_revision()
    monkeypatch.setenv("ASYNCRL_GIT", "v1-dirty")
    assert git_revision() == provenance()["git"] == "v1-dirty"
    monkeypatch.setenv("ASYNCRL_GIT", "")  # as compose passes what is not set, an image has no git
    assert git_revision() == own
    assert provenance()["versions"].keys() >= {"python", "torch", "numpy", "gymnasium"}
