"""Who goes first where processors are few."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from asyncrl import ActorConfig

ASK = """
import os
from pathlib import Path
from asyncrl.priority import give_way
give_way({})
print(os.getpriority(os.PRIO_PROCESS, 0), Path("/proc/self/autogroup").read_text().split()[-1])
"""


def ask(nice: int, leads: bool) -> list[int]:
    """[priority of the process, of its session] once it has given way."""
    command = [sys.executable, "-c", ASK.format(nice)]
    return [int(word) for word in subprocess.check_output(command, start_new_session=leads).split()]


@pytest.mark.skipif(
    not Path("/proc/self/autogroup").exists(), reason="the kernel does not group sessions"
)
def test_a_session_of_ones_own_gives_way_and_nobody_elses():
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    group = int(Path("/proc/self/autogroup").read_text().split()[-1])
    nice = 19 - ours
    assert ask(nice, leads=True) == [19, nice]
    assert ask(nice, leads=False) == [19, group]
    assert ask(0, leads=True)[0] == ours


def test_nobody_can_ask_for_more_than_there_is():
    with pytest.raises(ValueError, match=r"actor\.nice from 0 to 19, got 20"):
        ActorConfig(nice=20)
