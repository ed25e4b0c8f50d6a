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

from asyncrl.children import KILL_SECONDS, Child, Forked, last_words
from asyncrl.logs import EventLog, read_events
from asyncrl.supervisor import (
    ACTOR_SECONDS,
    BACK_OFF_SECONDS,
    GRACE_SECONDS,
    MAX_BACK_OFF_SECONDS,
    MAX_RESTARTS,
    MAX_RESTARTS_IN_VAIN,
    PATIENCE_SECONDS,
    PAUSED_SECONDS,
    STOP_SECONDS,
    Supervisor,
)
from asyncrl.transport.ring import Word
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
    for refused in (*range(11), 9_999):
        child.restart_at, child.refused = 0.0, refused
        supervisor._start_the_due()
        waits.append(child.restart_at - time.monotonic())
    expected = [*(0.5 * 2**n for n in range(10)), *2 * [MAX_BACK_OFF_SECONDS]]
    assert waits == pytest.approx(expected, abs=0.4)


def ending(place: Path, *children: Child) -> Supervisor:
    """One that is about to end, with these children."""
    supervisor = object.__new__(Supervisor)
    supervisor.folder, supervisor.children = place, list(children)
    supervisor.events, supervisor.signals = EventLog(place / "events.log"), []
    words = np.zeros(STATUS_BYTES // 8, np.int64)
    supervisor.status = SimpleNamespace(words=words, numbers=np.zeros(32))
    supervisor.rings = {index: SimpleNamespace(words=np.zeros(16, np.int64)) for index in (0, 1)}
    for ring in supervisor.rings.values():
        ring.read = ring.words.__getitem__
    supervisor.memory = SimpleNamespace(
        ask_to_stop=lambda: words.__setitem__(Status.STOP, 1),
        rings_of=lambda actor: [supervisor.rings[actor]],
    )
    supervisor.grace_seconds, supervisor.exit_status = GRACE_SECONDS, None
    supervisor.last_words, supervisor.failed = [], 0
    return supervisor


def process(code: int | None = None) -> SimpleNamespace:
    """One that has ended with this status, or lives."""
    return SimpleNamespace(poll=lambda: code, returncode=code, pid=1, bury=lambda: None)


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


def mourning(place: Path, *children: Child) -> Supervisor:
    """One whose children's work never grows by itself."""
    supervisor = ending(place, *children)
    supervisor.plan = SimpleNamespace(schedule="async", num_actors=2)
    supervisor.template, supervisor.stop_deadline = SimpleNamespace(pid=0), None
    for child in children:
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
    gave_up, _ = read_events(tmp_path / "events.log")[-2:]
    assert gave_up.kind == "gave-up" and "11 times in 50 minutes" in gave_up.text
    learner.gone, supervisor.exit_status = False, None
    (tmp_path / "checkpoints" / "checkpoint_000000000100").mkdir(parents=True)
    supervisor._mourn(learner, 1)  # it has saved one since its start: all is forgiven
    assert not learner.gone and len(learner.deaths) == 1


@pytest.mark.parametrize("role", ["learner", "actor"])
def test_one_that_has_worked_is_given_up_after_half_an_hour_in_vain(tmp_path, monkeypatch, role):
    """A disk or a server that is away for some minutes ends no run."""
    clock = [0.0]
    monkeypatch.setattr("asyncrl.supervisor.time.monotonic", lambda: clock[0])
    child, other = Child(role, 0), Child("actor", 1, process())
    supervisor, work = mourning(tmp_path, child, other), iter(range(10, 999, 10))

    def works():
        if role == "actor":
            supervisor.rings[0].words[Word.HEAD] = next(work)
        else:
            (tmp_path / "checkpoints" / f"checkpoint_{next(work):012}").mkdir(parents=True)

    for _ in range(2):  # what it did in between makes up for everything before
        works()
        begun, waits = clock[0], []
        while clock[0] <= begun + PATIENCE_SECONDS:
            supervisor._mourn(child, 1)
            assert not child.gone and supervisor.exit_status is None
            waits.append(child.restart_at - clock[0])
            clock[0] = child.restart_at
            child.work_at_start = supervisor._work(child)
        assert waits[:5] == [0.5, 1, 2, 4, 8] and waits[-1] == MAX_BACK_OFF_SECONDS
    supervisor._mourn(child, 1)
    assert child.gone and supervisor.exit_status == (1 if role == "learner" else None)


def test_one_that_dies_after_hours_each_time_is_not_given_up_for_its_second_death(
    tmp_path, monkeypatch
):
    clock = [0.0]
    monkeypatch.setattr("asyncrl.supervisor.time.monotonic", lambda: clock[0])
    learner = Child("learner", 0, proven=True)
    supervisor = mourning(tmp_path, learner)
    for death in range(1, MAX_RESTARTS_IN_VAIN + 2):
        clock[0] += 2 * PATIENCE_SECONDS
        supervisor._mourn(learner, 1)
        assert learner.gone == (death > MAX_RESTARTS_IN_VAIN)


def test_what_never_worked_is_given_up_at_once(tmp_path):
    actor = Child("actor", 0)
    supervisor = mourning(tmp_path, actor, Child("actor", 1, process()))
    for death in range(1, MAX_RESTARTS + 2):
        supervisor._mourn(actor, 1)
        assert actor.gone == (death > MAX_RESTARTS)


def dead_actors(place: Path) -> tuple[Supervisor, Child]:
    """A run whose last actor is to be mourned, and its learner, which lives."""
    learner = Child("learner", 0, process())
    actors = [Child("actor", 0, gone=True), Child("actor", 1, deaths=[time.monotonic()] * 9)]
    return mourning(place, learner, *actors), learner


@pytest.mark.parametrize("saved", [True, False])
def test_a_run_without_actors_ends_as_by_a_signal_with_a_checkpoint(tmp_path, saved):
    supervisor, learner = dead_actors(tmp_path)
    supervisor._mourn(supervisor.children[2], 1)
    assert supervisor.exit_status is None and supervisor.status.words[Status.STOP]
    assert supervisor.stop_deadline - time.monotonic() > GRACE_SECONDS
    supervisor._hear(signal.SIGTERM, None)  # it is saving already
    supervisor._heed_signals()
    assert supervisor.exit_status is None
    if saved:
        supervisor.status.words[Status.DONE], learner.process = 1, process(0)
        supervisor._bury_the_dead()
    else:
        supervisor.stop_deadline = time.monotonic() - 1
        supervisor._heed_signals()
    assert supervisor.exit_status == 1
    assert "actor 1 died: exit status 1" in supervisor.last_words[0]
    assert "the run cannot go on without actor 1; see" in supervisor.last_words[1]


def test_a_run_ends_when_nothing_can_be_forked_and_nobody_acts(tmp_path):
    supervisor, learner = dead_actors(tmp_path)
    actor = supervisor.children[2]
    actor.process = process()
    supervisor.template = SimpleNamespace(failed=99, keep=lambda *_: None, last_words="no torch")
    supervisor._keep_template()
    assert supervisor.stop_deadline is None  # those that live go on
    actor.process = None
    supervisor._keep_template()
    assert supervisor.stop_deadline and supervisor.exit_status is None  # the learner saves
    supervisor.stop_deadline = learner.process = None
    supervisor._keep_template()
    assert supervisor.exit_status == 1 and "no torch" in supervisor.last_words


@pytest.mark.parametrize(
    "heard, status, at_once",
    [
        ([signal.SIGHUP, signal.SIGHUP], 129, False),
        ([signal.SIGHUP, signal.SIGTERM], 143, False),
        ([signal.SIGHUP, signal.SIGHUP, signal.SIGTERM], 143, False),
        ([signal.SIGHUP, signal.SIGTERM, signal.SIGTERM], 143, True),
        ([signal.SIGTERM, signal.SIGHUP], 143, False),
        ([signal.SIGINT, signal.SIGTERM], 130, True),
    ],
)
def test_a_terminal_that_closes_is_one_signal_with_what_follows(tmp_path, heard, status, at_once):
    supervisor = mourning(tmp_path, learner := Child("learner", 0, process()))
    for number in heard:
        supervisor._hear(number, None)
        supervisor._heed_signals()
        deadline = supervisor.stop_deadline
    assert supervisor.exit_status == (status if at_once else None)
    assert supervisor.stop_deadline == deadline
    supervisor.status.words[Status.DONE], learner.process = 1, process(0)
    supervisor._bury_the_dead()
    assert supervisor.exit_status == status


@pytest.mark.parametrize("number, name", [(9, "SIGKILL"), (35, "35"), (63, "63")])
def test_a_death_by_any_signal_is_told(tmp_path, number, name):
    supervisor = mourning(tmp_path, Child("learner", 0, process(-number)))
    supervisor._bury_the_dead()
    (event,) = read_events(tmp_path / "events.log")
    assert event.text == f"learner died: signal {name}"


def test_a_disk_that_is_away_is_no_work_and_no_error(tmp_path, monkeypatch):
    learner = Child("learner", 0, process(1), work_at_start=700)
    supervisor = mourning(tmp_path, learner)
    learner.work_at_start = 700

    def fails(folder: Path) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("asyncrl.supervisor.newest_checkpoint", fails)
    supervisor._bury_the_dead()
    assert learner.restart_at and not learner.proven
    assert supervisor._work(learner) == 700


def test_only_a_learner_that_starts_takes_back_that_all_is_done(tmp_path):
    """The word is the learner's: it may be writing it at this moment."""
    supervisor = mourning(tmp_path, Child("actor", 0), Child("evaluator", 0), Child("learner", 0))
    supervisor.fds = {}
    supervisor.template = SimpleNamespace(fork=lambda *_: process())
    written = []

    class Words(dict):
        def __setitem__(self, word, value):
            written.append(word)
            super().__setitem__(word, value)

    supervisor.status.words = Words({word: 0 for word in range(8)})
    for child in supervisor.children:
        assert Status.DONE not in written
        supervisor._start(child)
    assert Status.DONE in written


def test_nobody_takes_turns_beside_one_that_a_disk_keeps_from_dying(tmp_path):
    learner, actor = Child("learner", 0, process(1), started=1.0), Child("actor", 0, started=1.0)
    actor.process = process()  # killed, and still there after two seconds
    actor.process.kill, actor.process.wait = lambda: None, lambda seconds: None
    supervisor = mourning(tmp_path, learner, actor)
    supervisor.plan.schedule, started = "lockstep", []
    supervisor.memory.clear = lambda: None
    supervisor.template.is_ready = lambda: True
    supervisor._start = started.append
    supervisor._bury_the_dead()
    assert actor.restart_at == learner.restart_at is not None and actor.process is not None
    actor.restart_at = learner.restart_at = 0.0
    supervisor._start_the_due()
    assert not started
    actor.process = process(-9)
    supervisor._bury_the_dead()
    supervisor._start_the_due()
    assert started == [learner, actor] and not actor.deaths
    assert [event.kind for event in read_events(tmp_path / "events.log")] == ["death"]


@pytest.mark.parametrize("code, done, status", [(-6, 1, 0), (0, 1, 0), (-6, 0, None), (0, 0, None)])
def test_a_learner_that_fails_when_all_is_saved_has_ended_the_run(tmp_path, code, done, status):
    learner = Child("learner", 0)
    learner.process = process(code)
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
    supervisor.memory.last_beat = lambda role, index: now - 1_000
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
