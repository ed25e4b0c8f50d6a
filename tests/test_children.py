"""Children as their parent sees them: when they are stuck, what they print, what they leave."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from asyncrl import children
from asyncrl.children import Child, Forked, last_words, mark_offspring, reap_strangers
from asyncrl.logs import EventLog, read_events
from asyncrl.supervisor import Supervisor
from asyncrl.transport.shared_memory import adopt_orphans


@pytest.fixture
def spawn():
    """`spawn(code)`: a process of Python in a group of its own, that says when it is ready."""
    spawned: list[Forked] = []

    def start(code: str, **streams) -> Forked:
        read, write = os.pipe()
        process = subprocess.Popen(
            [sys.executable, "-c", code.replace("READY", f"__import__('os').write({write}, b'!')")],
            start_new_session=True, pass_fds=[write], **streams,
        )  # fmt: skip
        os.close(write)
        assert os.read(read, 1) == b"!"
        os.close(read)
        process.returncode = 0  # it is waited for elsewhere
        spawned.append(Forked(process.pid))
        return spawned[-1]

    yield start
    for process in spawned:
        process.kill()
        process.wait()
        process.bury()


WORKER = """
import os, time
if os.fork() == 0:
    READY
    while True: {does}
os.wait()
"""


@pytest.mark.parametrize("does, stuck", [("pass", False), ("time.sleep(99)", True)])
def test_one_whose_worker_is_starved_is_not_stuck(spawn, does, stuck):
    process = spawn(WORKER.format(does=does))
    actor = Child("actor", 0, process, started=1.0)
    deadline = time.monotonic() + 30
    while actor.is_runnable() and stuck and time.monotonic() < deadline:
        time.sleep(0.01)  # it still begins to sleep
    beat, limit = time.monotonic() - 1_000, 900.0
    assert bool(actor.stuck_for(beat, limit, limit)) == stuck
    actor.cpu_seconds_at_beat -= limit  # so much was computed since, or more: no lack of processors
    assert actor.stuck_for(beat, limit, limit)


def test_who_waits_for_a_disk_is_not_stuck(spawn):
    """The state is that of one whose vfork goes on."""
    code = "import ctypes, time\nREADY\nctypes.CDLL(None).vfork() or time.sleep(999)"
    actor = Child("actor", 0, spawn(code), started=1.0)
    parent = psutil.Process(actor.process.pid)
    deadline = time.monotonic() + 30
    while parent.status() != psutil.STATUS_DISK_SLEEP and time.monotonic() < deadline:
        time.sleep(0.01)
    if parent.status() != psutil.STATUS_DISK_SLEEP:
        pytest.skip("here a vfork is none")
    beat = time.monotonic() - 100
    assert not actor.stuck_for(beat, 90, 90)
    assert actor.stuck_for(beat, 4, 4), "at some time it is"


def measuring(folder, child: Child) -> Supervisor:
    supervisor = object.__new__(Supervisor)
    supervisor.folder, supervisor.children, supervisor.usage_at = folder, [child], 0.0
    supervisor.template, supervisor.memory = SimpleNamespace(pid=0), SimpleNamespace(nbytes=0)
    supervisor.status = SimpleNamespace(usage=[])
    supervisor.events = EventLog(folder / "events.log")
    return supervisor


def test_a_log_does_not_grow_for_ever_and_its_end_stands(spawn, tmp_path, monkeypatch):
    monkeypatch.setattr(children, "MAX_LOG_NBYTES", 1_000_000)
    actor, supervisor = Child("actor", 0), measuring(tmp_path, None)
    supervisor.children = [actor]
    log = tmp_path / "logs" / "actor_0.log"
    for life in range(2):
        read, write = os.pipe()
        chatty = "import sys\nREADY\nfor line in sys.stdin: print(int(line) * 'x', line, end='')"
        chatty = f"{chatty}; sys.stdout.flush()"
        with actor.open_log(tmp_path) as output:
            actor.process = spawn(chatty, stdin=read, stdout=output)
        for nbytes, kept in ((1_000, 1_000), (2_000_000, 24_000), (3_000_000, 24_000), (7, 24_007)):
            os.write(write, b"%d\n" % nbytes)
            deadline = time.monotonic() + 30
            while not last_words(log).endswith(f"x {nbytes}") and time.monotonic() < deadline:
                time.sleep(0.01)
            supervisor.usage_at = 0.0
            supervisor._measure()
            assert kept <= log.stat().st_size <= kept + 30
            assert b"\0" not in log.read_bytes(), "it was not appended"
            assert last_words(log).endswith(f"x {nbytes}")
        os.close(read)
        os.close(write)
        actor.process.wait(30)
        assert actor.obituary(tmp_path, -9).endswith("xxxxxxx 7")
        texts = [event.text for event in read_events(tmp_path / "events.log")]
        assert texts == (life + 1) * ["actor_0.log had 2 MB: only its end is kept from now on"]


def test_a_log_that_is_gone_is_cut_without_an_error(tmp_path):
    assert Child("actor", 0).cut_log(tmp_path) == "" and not list(tmp_path.iterdir())


def simulator(supervisor: int) -> tuple[Forked, psutil.Process]:
    """A child, and what it has started for good in a session of its own, with the mark of a child
    of this supervisor."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        os.setsid()
        mark_offspring(supervisor)
        command = ["sh", "-c", "sleep 999 > /dev/null & echo $!"]
        os.write(write, subprocess.check_output(command, start_new_session=True))
        signal.pause()
    started = psutil.Process(int(os.read(read, 20)))
    os.close(read)
    os.close(write)
    return Forked(pid), started


def test_what_a_child_leaves_in_other_sessions_ends_with_it_and_nothing_else():
    adopt_orphans()
    (dead, its), (alive, helper) = simulator(os.getpid()), simulator(os.getpid())
    other, stranger = simulator(os.getpid() + 1)  # somebody else's, who has the same parent
    daemon = subprocess.Popen(["sleep", "999"], start_new_session=True)
    try:
        for child in (dead, other):
            child.kill()
            child.wait()
            child.bury()
        assert its.ppid() == stranger.ppid() == os.getpid()
        reap_strangers({alive.pid})
        assert its.wait(30) is not None or not its.is_running()
        reap_strangers({alive.pid})
        spared = [helper, stranger, psutil.Process(daemon.pid)]
        assert not psutil.wait_procs(spared, timeout=1)[0]
        child = Child("actor", 0, alive)
        children.end_all([child], 0.0)
        assert child.process is None
        assert not psutil.wait_procs([helper], timeout=30)[1]
        assert stranger.is_running() and daemon.poll() is None
    finally:
        for pid in (its.pid, alive.pid, helper.pid, stranger.pid, daemon.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        daemon.wait()
