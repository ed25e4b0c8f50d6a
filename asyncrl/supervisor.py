"""The parent of a run: owns memory and doorbells, starts the processes and keeps them alive.

It imports no torch and touches no GPU: nothing that happens to a child can take the shared memory
away or hang the one that has to clean up. It sleeps on its children's ends, on signals, and once a
second looks at heartbeats.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from asyncrl.children import Child, children_of, end_all, reap_strangers, usage_by_role
from asyncrl.folder import Refused, RunFolder, leaving_at_once, newest_checkpoint, say
from asyncrl.logs import EventLog
from asyncrl.memory import Memory
from asyncrl.plan import EXIT_FAILED, EXIT_REFUSED, Plan
from asyncrl.preflight import preflight
from asyncrl.template import Template
from asyncrl.transport.ring import Word
from asyncrl.transport.status import Status

STOP_SECONDS = 17.0  # for a checkpoint, after the first signal; 20 are promised for the exit
GRACE_SECONDS = 2.0  # for the others to end by themselves
START_SECONDS, ACTOR_SECONDS, LEARNER_SECONDS = 120.0, 9.0, 300.0  # silence; looked at each second
PAUSED_SECONDS = 5.0  # between two looks: this process itself was not there
MAX_RESTARTS, RESTART_WINDOW_SECONDS = 5, 600.0
MAX_RESTARTS_IN_VAIN = 10  # in any time, without anything done in between
PATIENCE_SECONDS = 1800.0  # with one that has worked: what it needs may be away for a while
BACK_OFF_SECONDS, MAX_BACK_OFF_SECONDS = 0.5, 300.0
PROVEN_UNROLLS = 10  # of each lane: an actor that has made them does not fail at its start
USAGE_SECONDS = 5.0  # between two looks at what the processes take


def train(
    launch_file: Path,
    run_id: str,
    options: list[str],
    runs: Path,
    display: Callable[[Path, int], Any],
) -> int:
    """Start or resume a run and stay until it ends; returns the exit status.

    `display(folder, total_env_steps)` makes an object with `refresh()` and `close()`.
    """
    folder = runs / run_id
    try:
        with RunFolder(folder) as run, Template() as template:
            with leaving_at_once(signal.SIGTERM):
                supervisor = _begin(run, template, launch_file, options)
            screen = display(folder, supervisor.plan.total_env_steps)
            try:
                return supervisor.run(screen.refresh)
            finally:
                screen.close()
                say(*supervisor.last_words)
    except Refused as error:
        say(*error.args)
        return error.status


def _begin(run: RunFolder, template: Template, launch_file: Path, options: list[str]) -> Supervisor:
    """Have the plan made, and memory for it, before anything is written."""
    try:
        template.start()  # imports while the plan is made
        plan = run.prepare(launch_file, options)
        warnings = preflight(plan, run.folder)
        memory = Memory(plan)
    except OSError as error:
        raise Refused(
            f"expected the system to let run {run.folder.name} begin, got {error}; see the limits "
            "of processes, files and memory (ulimit -a), and asyncrl doctor"
        ) from error
    run.begin(plan)
    supervisor = Supervisor(run.folder, plan, template, run, memory)
    for check in warnings:
        supervisor.events.event("warning", f"{check.lines[0]}; {check.remedy}")
    return supervisor


class Supervisor:
    """Starts the children of a planned run and sees it to its end."""

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        template: Template | None = None,
        run: RunFolder | None = None,
        memory: Memory | None = None,
    ):
        self.folder, self.plan = folder, plan
        self.template = template or Template()
        self.run_folder = run
        self.events = EventLog(folder / "events.log")
        self.memory = memory or Memory(plan)
        self.status, self.fds = self.memory.status, self.memory.fds
        self.children = children_of(plan)
        self.signals: list[int] = []
        self.stop_deadline: float | None = None
        self.grace_seconds = GRACE_SECONDS
        self.exit_status: int | None = None
        self.failed = 0  # the status, where the run cannot go on
        self.last_words: list[str] = []  # to the user, when the screen is closed
        self.usage_at, self.looked_at = 0.0, time.monotonic()

    def run(self, refresh: Callable[[], None]) -> int:
        """Supervise until the learner is done, a signal comes or nothing can go on."""
        wake_read, wake_write = socket.socketpair()
        wake_write.setblocking(False)
        heard = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup leaves it
            heard.append(signal.SIGHUP)
        previous = {number: signal.signal(number, self._hear) for number in heard}
        previous_fd = signal.set_wakeup_fd(wake_write.fileno(), warn_on_full_buffer=False)
        self.events.event("start", f"run {self.folder.name} started", pid=os.getpid())
        try:
            for child in self.children:
                child.restart_at = 0.0
            self._start_the_due()
            while self.exit_status is None:
                self._sleep(wake_read)
                self._heed_signals()
                self._bury_the_dead()
                self._keep_folder()
                self._keep_template()
                self._look_at_hearts()
                self._start_the_due()
                self.status.words[Status.ALIVE] = self._num_acting()
                self._measure()
                refresh()
        finally:
            self._end_all()
            signal.set_wakeup_fd(previous_fd)
            for number, handler in previous.items():
                signal.signal(number, handler)
            wake_read.close()
            wake_write.close()
            refresh()
        self.events.event("end", f"run {self.folder.name} ended", status=self.exit_status)
        return self.exit_status

    def _hear(self, number: int, frame: Any) -> None:
        # A terminal that closes sends SIGHUP twice, by the shell and by the kernel, and SIGTERM may
        # follow, as at the end of a user's session: once is meant.
        if self.signals == [signal.SIGHUP]:
            self.signals = [number]
        elif number != signal.SIGHUP or not self.signals:
            self.signals.append(number)

    def _sleep(self, wake: socket.socket) -> None:
        """Until a child ends, a signal comes, or a second has passed."""
        poll = select.poll()
        poll.register(wake, select.POLLIN)
        for child in self.children:
            if child.process is not None:
                poll.register(child.process.pidfd, select.POLLIN)
        due = (child.restart_at for child in self.children if not child.gone)
        soon = [at for at in due if at is not None]
        if not self.template.is_ready() or any(child.is_ending for child in self.children):
            soon = []
            if self.template.connection is not None:
                poll.register(self.template.connection, select.POLLIN)
        timeout = min([1.0, *(max(at - time.monotonic(), 0) for at in soon)])
        for fd, _ in poll.poll(timeout * 1000):
            if fd == wake.fileno():
                wake.recv(4096)

    # -- starting and ending ---------------------------------------------------------------------

    def _keep_folder(self) -> None:
        """Its children read and write it by its name: what is there must be this run's."""
        taken = self.run_folder and self.run_folder.keep()
        if taken:
            self.events = EventLog(self.run_folder.own_place / "events.log")
            why = f"expected {self.folder} to stay this run's, but {taken}"
            self._end_at_once(why, EXIT_FAILED)

    def _keep_template(self) -> None:
        """Where it dies, those it has made live on; a run that needs it and cannot have it ends."""
        template = self.template
        template.keep(self.events, _back_off(template.failed + 1))
        idle = not (self._learns() and self._num_acting())
        if template.failed > MAX_RESTARTS and idle and self.stop_deadline is None:
            self._fail(template.last_words, "the run cannot go on: nothing can be forked")

    def _start(self, child: Child) -> None:
        generation, again = child.generation + 1, child.started > 0
        child.restart_at, child.work_at_start = None, self._work(child)
        if child.learns:
            self.status.words[Status.DONE] = 0
        if child.role == "actor":
            self.memory.rings_of(child.index)[0].words[Word.BEAT] = 0
        word = {"actor": Status.RESTARTS, "evaluator": Status.EVALUATOR_RESTARTS}
        self.status.words[word.get(child.role, Status.LEARNER_RESTARTS)] += again
        arguments = [child.role, str(child.index), str(self.folder), str(os.getpid())]
        with child.open_log(self.folder) as log:
            child.process = self.template.fork([*arguments, str(generation)], self.fds, log)
        child.generation, child.started, child.refused = generation, time.monotonic(), 0
        verb, pid = "restarted" if again else "started", child.process.pid
        self.events.event(verb, f"{child.name} {verb}", pid=pid, generation=generation)

    def _bury_the_dead(self) -> None:
        for child in self.children:
            if child.process is None or child.process.poll() is None:
                continue
            code = child.process.returncode
            child.bury()
            if child.restart_at is not None:  # it was killed to begin anew
                continue
            if child.learns and self.status.words[Status.DONE]:
                child.gone, self.exit_status = True, self._status_at_end()
                if code:  # as libraries may fail at the very end
                    self._report_death(child, code)
            elif self.stop_deadline is not None or (child.learns and code == EXIT_REFUSED):
                child.gone = True
                if child.learns:
                    self.last_words.append(self._report_death(child, code))
                    restarts = self.status.words[Status.LEARNER_RESTARTS]
                    begun = restarts or self._has_worked(child)
                    self.exit_status = EXIT_FAILED if begun or code != EXIT_REFUSED else code
            else:
                self._mourn(child, code)
        known = {child.process.pid for child in self.children if child.process is not None}
        reap_strangers(known | {self.template.pid})

    def _report_death(self, child: Child, code: int) -> str:
        text = child.obituary(self.folder, code)
        self.events.event("death", text)
        return text

    def _mourn(self, child: Child, code: int) -> None:
        """Decide what becomes of a run whose child died unasked."""
        report = self._report_death(child, code)
        now = time.monotonic()
        if self._has_worked(child):
            child.deaths.clear()
            child.proven = True
        child.deaths.append(now)
        if _is_hopeless(child, now):
            child.gone = True
            for ring in self.memory.rings_of(child.index) if child.role == "actor" else []:
                ring.words[Word.GONE] = 1
            minutes = (now - child.deaths[0]) / 60
            times = f"{len(child.deaths)} times in {minutes:.0f} minutes and got nothing done"
            self.events.event("gave-up", f"{child.name} died {times}; not restarted")
            last = all(other.gone for other in self.children if other.role == "actor")
            turn_based = self.plan.schedule != "async"
            if child.learns or (child.role == "actor" and (last or turn_based)):
                self._fail(report, f"the run cannot go on without {child.name}")
        elif self.plan.schedule == "async" or child.role == "evaluator":
            child.restart_at = now + _back_off(len(child.deaths))
        else:
            # Turns must be exact: all go back to the last periodic checkpoint together.
            for other in self.children:
                if other.process is not None and other.role != "evaluator":
                    other.kill()
                if other.role != "evaluator":
                    other.restart_at, other.generation = now + _back_off(len(child.deaths)), -1
            self.memory.clear()

    def _work(self, child: Child) -> int:
        """A count that grows while a child does what it is there for."""
        if child.role == "evaluator":
            return int(self.status.numbers[Status.EVALUATION.index("eval/env_steps")])
        if child.role == "actor" and self.plan.schedule == "async":
            return min(ring.read(Word.HEAD) for ring in self.memory.rings_of(child.index))
        try:
            return newest_checkpoint(self.folder)
        except OSError:  # of a disk that is away nothing new is known
            return child.work_at_start

    def _has_worked(self, child: Child) -> bool:
        """Whether it got on since its start: its earlier deaths are then forgiven, and one that
        is killed now and then for a week is restarted for a week."""
        unrolls = child.role == "actor" and self.plan.schedule == "async"
        return self._work(child) - child.work_at_start >= (PROVEN_UNROLLS if unrolls else 1)

    def _start_the_due(self) -> None:
        now = time.monotonic()
        if any(child.is_ending for child in self.children):
            return  # there must not be two of one
        for child in self.children:
            if not self.template.is_ready():
                return
            if child.restart_at is not None and now >= child.restart_at and not child.gone:
                try:
                    self._start(child)
                except OSError as error:  # no more processes, descriptors or memory for now
                    child.refused += 1
                    child.restart_at = time.monotonic() + _back_off(child.refused)
                    text = f"{child.name} cannot be started, tried again: {error}"
                    self.events.event("warning", text)

    def _look_at_hearts(self) -> None:
        """Kill what is alive but stuck; whoever is merely blocked keeps beating."""
        now, before = time.monotonic(), self.looked_at
        self.looked_at = now
        for child in self.children:
            if now - before > PAUSED_SECONDS:  # a container's pause, a virtual machine's
                child.excused = now
            beat = self.memory.last_beat(child.role, child.index)
            limit = ACTOR_SECONDS if child.role == "actor" else LEARNER_SECONDS
            silent = child.process and child.stuck_for(beat, limit, START_SECONDS)
            if not silent:
                continue
            self.events.event("stuck", f"{child.name} is stuck: no heartbeat for {silent:.0f} s",
                              pid=child.process.pid)  # fmt: skip
            child.process.kill_with_stacks()
            child.excused = now  # one that a disk holds up is not killed again each second

    def _learns(self) -> bool:
        """Whether somebody is there to learn, and to save what was learned."""
        return any(child.process is not None for child in self.children if child.learns)

    def _num_acting(self) -> int:
        """Actors that are alive; in `serial` all are in one process."""
        alive = [child.role for child in self.children if child.process is not None]
        return alive.count("actor") + alive.count("serial") * self.plan.num_actors

    def _measure(self) -> None:
        """Say now and then what the processes take, for rows of metrics."""
        if time.monotonic() - self.usage_at < USAGE_SECONDS:
            return
        self.usage_at = time.monotonic()
        parents = [os.getpid(), self.template.pid]
        taken = usage_by_role(parents, self.children, self.memory.nbytes)
        self.status.usage[:] = [taken.get(name, 0.0) for name in Status.USAGE]
        for child in self.children:
            if words := child.process and child.cut_log(self.folder):
                self.events.event("log", words)

    # -- stopping --------------------------------------------------------------------------------

    def _heed_signals(self) -> None:
        if self.signals and self.stop_deadline is None:
            self._stop(signal.Signals(self.signals[0]).name)
        late = self.stop_deadline is not None and time.monotonic() > self.stop_deadline
        if len(self.signals) > 1 or late:
            why = "a second signal" if len(self.signals) > 1 else "no checkpoint in time"
            self._end_at_once(why, self._status_at_end())

    def _fail(self, report: str, why: str) -> None:
        """End a run that cannot go on; what was learned is saved, as at any stop."""
        self.failed = EXIT_FAILED
        self.last_words += report, f"{why}; see {self.folder / 'events.log'}"
        self._stop(why)

    def _stop(self, why: str) -> None:
        """Have the learner save, where one is there, and end."""
        self.stop_deadline = time.monotonic() + STOP_SECONDS
        saves = self.plan.schedule == "async" and self._learns()  # in turns it would be a seam
        what = "checkpoint and exit" if saves else "exit; the last checkpoint stands"
        self.events.event("stopping", f"{why}: {what}; a second signal: at once")
        self._ask_to_stop()
        if not self._learns():
            self.exit_status = self._status_at_end()

    def _status_at_end(self) -> int:
        return self.failed or (128 + self.signals[0] if self.signals else 0)

    def _end_at_once(self, why: str, status: int) -> None:
        """Everything is killed: nobody may save any more, and no time is left."""
        lost = "" if self.status.words[Status.DONE] else " and nothing was saved at this end"
        words = f"{why}: everything is killed{lost}; a start resumes the newest checkpoint"
        self.events.event("stopping", words)
        self.last_words.append(words)
        self.grace_seconds, self.exit_status = 0.0, status

    def _ask_to_stop(self) -> None:
        self.memory.ask_to_stop()
        for child in self.children:
            child.restart_at = None

    def _end_all(self) -> None:
        """Nobody outlives the parent."""
        if self.grace_seconds:
            self._ask_to_stop()
        end_all(self.children, self.grace_seconds)


def _is_hopeless(child: Child, now: float) -> bool:
    """Whether one that died once more is given up. What is wrong from the start comes to light
    soon; one that has worked may lack for a while what it needs, a disk or a server."""
    in_vain = len(child.deaths) > MAX_RESTARTS_IN_VAIN
    if child.proven:
        return in_vain and now - child.deaths[0] > PATIENCE_SECONDS
    lately = sum(now - at < RESTART_WINDOW_SECONDS for at in child.deaths)
    return in_vain or lately > MAX_RESTARTS


def _back_off(deaths: int) -> float:
    """Seconds before a new start."""
    return min(BACK_OFF_SECONDS * 2 ** min(deaths - 1, 99), MAX_BACK_OFF_SECONDS)
