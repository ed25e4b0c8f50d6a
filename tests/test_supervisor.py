"""The parent by itself: what it does when the system gives it nothing."""

from __future__ import annotations

import time
from types import SimpleNamespace

from asyncrl.children import Child
from asyncrl.supervisor import MAX_BACK_OFF_SECONDS, Supervisor


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
