"""The parent by itself: when the system gives it nothing, and as the first of all processes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from asyncrl.children import Child, Forked, last_words
from asyncrl.logs import EventLog, read_events
from asyncrl.supervisor import (
    ACTOR_SECONDS,
    BACK_OFF_SECONDS,
    GRACE_SECONDS,
    KILL_SECONDS,
    MAX_BACK_OFF_SECONDS,
    MAX_RESTARTS_IN_VAIN,
    PAUSED_SECONDS,
    STOP_SECONDS,
    Supervisor,
)
from asyncrl.transport.status import STATUS_BYTES, Status
from tests.runs import REPOSITORY


def test_a_process_that_cannot_be_started_is_tried_again_and_the_others_go_on():
    supervisor = object.__new__(Supervisor)
    events, started = [], []
    supervisor.events = SimpleNamespace(event=lambda kind, text: events.append((kind, text)))
    supervisor.template = SimpleNamespace(is_ready=lambda: True)
    supervisor.children = [Child("learner", 0), Child("actor", 0), Child("actor", 1)]

    def start(child: Child) -> None:
        if child.name == "actor 0" and not events:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        child.restart_at = None
        started.append(child.name)

    supervisor._start = start
    for child in supervisor.children:
        child.restart_at = 0.0
    supervisor._start_the_due()
    assert started == ["learner", "actor 1"]
    assert [kind for kind, _ in events] == ["warning"] and "actor 0" in events[0][1]
    assert 0 < supervisor.children[1].restart_at - time.monotonic() <= BACK_OFF_SECONDS
    supervisor._start_the_due()
    assert len(started) == 2
    supervisor.children[1].restart_at = time.monotonic()
    supervisor._start_the_due()
    assert started[2:] == ["actor 0"]


def test_waits_grow_while_the_system_refuses():
    supervisor, child = object.__new__(Supervisor), Child("actor", 0)
    supervisor.events = SimpleNamespace(event=lambda kind, text: None)
    supervisor.template = SimpleNamespace(is_ready=lambda: True)
    supervisor.children, waits = [child], []

    def start(child: Child) -> None:
        raise OSError("the template does not fork")

    supervisor._start = start
    for _ in range(9):
        child.restart_at = 0.0
        supervisor._start_the_due()
        waits.append(child.restart_at - time.monotonic())
    expected = [0.5, 1, 2, 4, 8, 16, *3 * [MAX_BACK_OFF_SECONDS]]
    assert waits == pytest.approx(expected, abs=0.4)


def ending(place: Path, *children: Child) -> Supervisor:
    """One that is about to end, with these children."""
    supervisor = object.__new__(Supervisor)
    supervisor.folder, supervisor.children = place, list(children)
    supervisor.events, supervisor.signals = EventLog(place / "events.log"), []
    words = np.zeros(STATUS_BYTES // 8, np.int64)
    supervisor.status = SimpleNamespace(words=words)
    supervisor.memory = SimpleNamespace(ask_to_stop=lambda: words.__setitem__(Status.STOP, 1))
    supervisor.grace_seconds, supervisor.exit_status = GRACE_SECONDS, None
    supervisor.last_words = []
    return supervisor


def test_a_learner_that_stands_still_cannot_delay_the_exit(tmp_path):
    assert STOP_SECONDS + KILL_SECONDS < 20
    pids = [os.posix_spawnp("sleep", ["sleep", "99"], os.environ) for _ in range(3)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    children = [Child(*role, Forked(pid)) for role, pid in zip(
        [("learner", 0), ("actor", 0), ("actor", 1)], pids, strict=True)]  # fmt: skip
    supervisor = ending(tmp_path, *children)
    supervisor.signals, supervisor.stop_deadline = [signal.SIGTERM], time.monotonic() - 0.1
    supervisor._heed_signals()
    assert supervisor.exit_status == 143
    (told,) = supervisor.last_words
    assert "no checkpoint in time: everything is killed and nothing was saved at" in told
    (event,) = read_events(tmp_path / "events.log")
    assert event.kind == "stopping" and event.text == told
    begun = time.monotonic()
    supervisor._end_all()
    assert time.monotonic() - begun < 1
    assert not any(map(psutil.pid_exists, pids))


def test_a_run_whose_folder_was_taken_leaves_no_word_in_it(tmp_path):
    supervisor = ending(tmp_path / "x")
    supervisor.run_folder = SimpleNamespace(keep=lambda: None, own_place=tmp_path / "moved")
    supervisor._keep_folder()
    assert supervisor.exit_status is None
    supervisor.run_folder.keep = lambda: "process 7 holds x now"
    supervisor._keep_folder()
    supervisor._end_all()
    assert supervisor.exit_status == 1 and not supervisor.status.words[Status.STOP]
    assert "to stay this run's, but process 7 holds x now: every" in supervisor.last_words[0]
    assert (tmp_path / "moved" / "events.log").exists() and not (tmp_path / "x").exists()


def mourning(place: Path, child: Child) -> Supervisor:
    """One whose child's work never grows."""
    supervisor = ending(place, child)
    supervisor.plan, supervisor.rings = SimpleNamespace(schedule="async"), []
    supervisor.template, supervisor.stop_deadline = SimpleNamespace(pid=0), None
    child.work_at_start = supervisor._work(child)
    return supervisor


def test_a_learner_that_gets_nothing_done_is_given_up_however_long_it_takes(tmp_path, monkeypatch):
    """One that dies every five minutes, before its first checkpoint, must not do so for ever."""
    clock = [0.0]
    monkeypatch.setattr("asyncrl.supervisor.time.monotonic", lambda: clock[0])
    learner = Child("learner", 0)
    supervisor = mourning(tmp_path, learner)
    for death in range(1, MAX_RESTARTS_IN_VAIN + 2):
        assert supervisor.exit_status is None and not learner.gone
        clock[0] += 300.0
        supervisor._mourn(learner, 1)
        assert learner.gone == (death > MAX_RESTARTS_IN_VAIN)
    assert supervisor.exit_status == 1
    gave_up = read_events(tmp_path / "events.log")[-1]
    assert gave_up.kind == "gave-up" and "11 times in 50 minutes" in gave_up.text
    learner.gone, supervisor.exit_status = False, None
    (tmp_path / "checkpoints" / "checkpoint_000000000100").mkdir(parents=True)
    supervisor._mourn(learner, 1)  # it has saved one since its start: all is forgiven
    assert not learner.gone and len(learner.deaths) == 1


@pytest.mark.parametrize("code, done, status", [(-6, 1, 0), (0, 1, 0), (-6, 0, None), (0, 0, None)])
def test_a_learner_that_fails_when_all_is_saved_has_ended_the_run(tmp_path, code, done, status):
    learner = Child("learner", 0)
    learner.process = SimpleNamespace(poll=lambda: code, returncode=code, pid=1, bury=lambda: None)
    supervisor = mourning(tmp_path, learner)
    supervisor.status.words[Status.DONE] = done
    supervisor._bury_the_dead()
    assert supervisor.exit_status == status and learner.gone == (status is not None)
    kinds = [event.kind for event in read_events(tmp_path / "events.log")]
    assert kinds == ([] if (code, done) == (0, 1) else ["death"])  # one that fails is noted


def test_nobody_is_stuck_because_everything_was_paused(tmp_path):
    """On waking the supervisor may look before its children have run."""
    sleeper = Forked(os.posix_spawnp("sleep", ["sleep", "99"], os.environ))
    actor = Child("actor", 0, sleeper, started=1.0)
    supervisor, now = ending(tmp_path, actor), time.monotonic()
    while actor.is_runnable() and time.monotonic() < now + 10:  # it still begins
        time.sleep(0.01)
    supervisor._last_beat = lambda child: (now - 1_000, ACTOR_SECONDS)
    supervisor.looked_at = now - PAUSED_SECONDS - 1
    supervisor._look_at_hearts()
    assert sleeper.poll() is None and not (tmp_path / "events.log").exists()
    actor.excused -= ACTOR_SECONDS + 1  # so much later
    supervisor._look_at_hearts()
    assert sleeper.wait(2) == -signal.SIGABRT
    sleeper.bury()


def test_of_a_large_log_only_the_end_is_read(tmp_path):
    with open(tmp_path / "log", "wb") as file:
        file.truncate(1 << 30)
        file.seek(1 << 30)
        file.write(b"\nthe cartridge caught fire\n")
    tracemalloc.start()
    try:
        assert last_words(tmp_path / "log").endswith("\nthe cartridge caught fire")
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()
    assert last_words(tmp_path / "nothing") == ""


@pytest.mark.skipif(
    subprocess.run(["unshare", "-rpf", "true"], capture_output=True).returncode != 0,
    reason="needs the right to make a process namespace",
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_process_1_of_a_container_ends_as_any_other(start, tmp_path, number):
    """The kernel spares process 1 every signal that it has no handler for."""
    run = start(
        "run", REPOSITORY / "tests" / "launch_files" / "recorder.py",
        prefix=("unshare", "-rpf", "--mount-proc"),
        environment={"RECORD": str(tmp_path / "record.bin")},
    )  # fmt: skip
    run.wait_until(lambda: run.num_saved())
    run.children()
    (first,) = psutil.Process(run.process.pid).children()
    first.send_signal(number)
    status, output = run.finish()
    asked = number == signal.SIGTERM  # of a kill, unshare makes a status of its own
    assert run.count("end") == asked and (status == 143) == asked, output
    assert not run.orphans()
