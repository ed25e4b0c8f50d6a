"""The screen of a run, and a terminal that nobody reads."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from asyncrl.logs import RunLog
from tests.runs import REPOSITORY

ROW = {"env_steps": 3, "elapsed_seconds": 1.0, "bottleneck": "the learner"}
SHOW = """
import sys, time
from asyncrl.folder import say
from asyncrl.screen import Screen
screen = Screen(sys.argv[1], 1_000_000)
{instead}
begun = time.monotonic()
for _ in range(50):
    screen.refresh()
assert time.monotonic() - begun < 10  # whoever waits here waits for ever
screen._thread.join({patience})
assert screen._thread.is_alive() == {alive}
screen.close()
say({last_words})
sys.exit(7)
"""


def show(folder, instead="", alive=True, last_words='"the end"', **streams) -> subprocess.Popen:
    RunLog(folder, tensorboard=False).write(ROW)
    code = SHOW.format(
        instead=instead, alive=alive, last_words=last_words, patience=0.5 if alive else 30
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, folder], cwd=REPOSITORY, env=os.environ | {"TERM": "dumb"},
        text=True, **streams,
    )  # fmt: skip


def test_it_shows_what_comes_once_and_then_the_last_words(tmp_path):
    process = show(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    shown, told = process.communicate(timeout=60)
    assert process.returncode == 7 and told == "asyncrl: the end\n"
    assert shown.count("env_steps=3 ") == 1 == len(shown.splitlines())


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_nobody_waits_for_a_terminal_that_is_not_read(tmp_path, kind):
    """Neither while the run goes on nor for its last words, nor the interpreter at its exit."""
    reader, writer = os.pipe() if kind == "pipe" else pty.openpty()
    more_than_it_holds = 'screen._panel._print_row = lambda: screen._panel._print(0, "x" * 300_000)'
    process = show(tmp_path, more_than_it_holds, True, '"y" * 300_000', stdout=writer,
                   stderr=writer)  # fmt: skip
    try:
        assert process.wait(60) == 7
    finally:
        process.kill()
        os.close(writer)
        os.close(reader)


def test_a_screen_that_fails_is_told_of_and_nobody_else_fails(tmp_path):
    process = show(tmp_path, "screen._panel.refresh = None", False, stderr=subprocess.PIPE)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 7
    assert "in thread screen" in told and "TypeError" in told and told.endswith(": the end\n")
