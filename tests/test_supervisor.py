"""The parent by itself: when the system gives it nothing, and as the first of all processes."""

from __future__ import annotations

import signal
import subprocess
import time
from types import SimpleNamespace

import psutil
import pytest

from asyncrl.children import Child
from asyncrl.supervisor import MAX_BACK_OFF_SECONDS, Supervisor
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
    wait = supervisor.children[1].restart_at - time.monotonic()
    assert MAX_BACK_OFF_SECONDS - 5 < wait <= MAX_BACK_OFF_SECONDS
    supervisor._start_the_due()
    assert len(started) == 2
    supervisor.children[1].restart_at = time.monotonic()
    supervisor._start_the_due()
    assert started[2:] == ["actor 0"]


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
    run.wait_until(lambda: run.count("checkpoint", "saved"))
    run.children()
    (first,) = psutil.Process(run.process.pid).children()
    first.send_signal(number)
    status, output = run.finish()
    asked = number == signal.SIGTERM  # of a kill, unshare makes a status of its own
    assert run.count("end") == asked and (status == 143) == asked, output
    assert not run.orphans()
