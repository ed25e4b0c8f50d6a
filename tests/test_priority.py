"""Who goes first where processors are few."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from asyncrl import ActorConfig

ASK = """
import os
from pathlib import Path
from asyncrl.priority import give_way
give_way({})
group = Path("/proc/self/autogroup")  # "/autogroup-12 nice 5", or empty
words = group.read_text().split() if group.exists() else []
print(os.getpriority(os.PRIO_PROCESS, 0), *words[2:])
"""


def ask(nice: int, leads: bool) -> list[int]:
    """[priority of the process, of its session where that has one] once it has given way."""
    command = [sys.executable, "-c", ASK.format(nice)]
    return [int(word) for word in subprocess.check_output(command, start_new_session=leads).split()]


def test_a_session_of_ones_own_gives_way_and_nobody_elses():
    ours, *group = ask(0, leads=False)
    assert ours == os.getpriority(os.PRIO_PROCESS, 0)
    nice = 19 - ours
    assert ask(nice, leads=False) == [19, *group]
    if len(ask(0, leads=True)) == 1:
        pytest.skip("the kernel does not group sessions")
    assert ask(nice, leads=True) == [19, nice]


def test_nobody_can_ask_for_more_than_there_is():
    with pytest.raises(ValueError, match=r"actor\.nice from 0 to 19, got 20"):
        ActorConfig(nice=20)
