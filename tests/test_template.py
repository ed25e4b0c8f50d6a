"""Children forked from the template: whose they are, what they get, and what ends them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch

from asyncrl.children import reap_strangers
from asyncrl.template import MAX_FDS, Template, flatten, receive_fds
from asyncrl.transport.shared_memory import Doorbell, adopt_orphans
from tests.runs import REPOSITORY, Run

NO_RUN = ["actor", "0", "/nowhere", str(os.getpid()), "0"]  # a child that fails at once


@pytest.fixture(scope="module")
def template():
    with Template() as template:
        template.start()
        assert template.is_ready(60)
        yield template


def end_of(template: Template, child) -> int:
    status = child.wait(60)
    child.bury()
    return status


def test_a_child_is_the_supervisors_own_and_its_output_is_in_its_log(template, tmp_path):
    with open(tmp_path / "log", "wb") as log:
        child = template.fork(NO_RUN, {"lanes": []}, log)
    assert psutil.Process(child.pid).ppid() == os.getpid()
    assert end_of(template, child) == 1
    told = (tmp_path / "log").read_text()
    assert "FileNotFoundError" in told and "/nowhere" in told


def test_a_killed_child_says_by_what(template, tmp_path):
    with open(tmp_path / "log", "wb") as log:
        child = template.fork(NO_RUN, {}, log)
    child.kill()
    assert end_of(template, child) == -signal.SIGKILL


def test_a_child_that_nobody_knows_of_ends(template, tmp_path):
    """Its supervisor waits no more, so it must not begin to write into a lane."""
    read, write = os.pipe()
    with open(tmp_path / "log", "wb") as log:
        pid = template._ask({"arguments": NO_RUN, "fds": {"log": log.fileno(), "go": read}})
    os.close(read)
    time.sleep(0.2)
    assert os.waitpid(pid, os.WNOHANG)[0] == 0, "it did not wait for the word"
    os.close(write)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    assert (tmp_path / "log").read_text() == ""


def test_more_descriptors_than_a_message_takes():
    bells = [Doorbell.create() for _ in range(2 * MAX_FDS + 7)]
    sent = {"one": bells[0].fd, "many": [bell.fd for bell in bells[1:]], "none": []}
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def send():
        for start in range(0, len(bells), MAX_FDS):
            socket.send_fds(ours, [b"+"], flatten(sent)[start : start + MAX_FDS])

    sender = threading.Thread(target=send)
    sender.start()
    received = receive_fds(theirs, sent)
    sender.join()
    assert received["none"] == [] and len(received["many"]) == len(bells) - 1
    for number, fd in enumerate(flatten(received)):
        os.eventfd_write(fd, number + 1)
    assert [os.eventfd_read(bell.fd) for bell in bells] == list(range(1, len(bells) + 1))
    for fd in (*flatten(received), *flatten(sent)):
        os.close(fd)
    ours.close()
    theirs.close()


def test_not_ready_not_forked():
    template = Template()
    assert template.gone and not template.is_ready()
    with open(os.devnull, "wb") as log, pytest.raises(OSError, match="not ready"):
        template.fork(NO_RUN, {}, log)


def test_a_template_that_died_is_started_again(tmp_path):
    with Template() as template:
        template.start()
        os.kill(template.process.pid, signal.SIGKILL)
        assert not template.is_ready(60) and template.gone
        template.start()
        assert template.is_ready(60) and not template.gone
        with open(tmp_path / "log", "wb") as log:
            assert end_of(template, template.fork(NO_RUN, {}, log)) == 1


def test_a_stuck_template_costs_an_error_and_two_seconds(tmp_path):
    with Template() as template:
        template.start()
        assert template.is_ready(60)
        os.kill(template.process.pid, signal.SIGSTOP)
        begun = time.monotonic()
        with open(tmp_path / "log", "wb") as log, pytest.raises(OSError, match="does not fork"):
            template.fork(NO_RUN, {}, log)
        assert time.monotonic() - begun < 5, "its parent was deaf for so long"
        assert template.gone


@pytest.mark.timeout(240)
def test_a_run_outlives_its_template_and_what_a_killed_actor_leaves(tmp_path):
    """The template is killed, then an actor whose environments are processes of their own."""
    launch_file = REPOSITORY / "launch" / "cartpole_dqn.py"
    run = Run(tmp_path, "run", launch_file, "--env.vectorization", "async")
    try:
        run.wait_until(lambda: run.metrics() and run.metrics()[-1]["updates"] > 0, 90)
        actor, learner = run.find("actor 0"), run.find("learner 0")
        template = psutil.Process(run.process.pid).children()[0]
        assert "template" in template.name() or "template" in " ".join(template.cmdline())
        workers = actor.children(recursive=True)
        assert workers
        template.kill()
        run.wait_until(lambda: run.count("restarted", "template"))
        assert actor.is_running() and learner.is_running()
        actor.kill()
        run.wait_until(lambda: run.count("restarted", "actor 0"))
        assert not psutil.wait_procs(workers, timeout=10)[1], "zombies, or still alive"
        assert run.find("learner 0") == learner
        run.signal(signal.SIGTERM)
        assert run.finish()[0] == 143
        assert not run.orphans()
    finally:
        run.kill_tree()


SIMULATED = """
import subprocess, sys
import asyncrl, gymnasium as gym

def make(num_envs):
    if sys.argv[1:2] == ["actor"]:
        subprocess.Popen(["sleep", f"99{sys.argv[2]}"], start_new_session=True)
    autoreset = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}
    return gym.make_vec("CartPole-v1", num_envs, "sync", autoreset)

config = asyncrl.Config(
    env=asyncrl.EnvConfig(make),
    model=asyncrl.ModelConfig(hidden=(16,)),
    algorithm=asyncrl.PPOConfig(),
    actor=asyncrl.ActorConfig(num_actors=2, lanes_per_actor=1, envs_per_lane=2),
    learner=asyncrl.LearnerConfig(num_threads=1, tensorboard=False, device="cpu"),
    evaluation=asyncrl.EvaluationConfig(period_steps=0),
    total_env_steps=10**9,
)
"""


@pytest.mark.timeout(240)
def test_what_environments_start_in_sessions_of_their_own_ends_with_its_actor(tmp_path):
    (tmp_path / "simulated.py").write_text(SIMULATED)
    run = Run(tmp_path, "run", tmp_path / "simulated.py")

    def simulators(actor: int) -> list[psutil.Process]:
        found = []
        for child in run.children():
            with contextlib.suppress(psutil.Error):  # it ends
                found += [child] if child.cmdline() == ["sleep", f"99{actor}"] else []
        return found

    try:
        run.wait_until(lambda: simulators(0) and simulators(1), 90)
        (first,), (other,) = simulators(0), simulators(1)
        run.find("actor 0").kill()
        run.wait_until(lambda: not first.is_running() and simulators(0), 90)
        assert simulators(1) == [other]
        run.signal(signal.SIGTERM)
        assert run.finish()[0] == 143
        assert not run.orphans()
    finally:
        run.kill_tree()


def test_a_run_whose_template_never_gets_ready_ends_and_says_why(tmp_path):
    """Nothing of it could ever be started."""
    code = "import os, sys; 'asyncrl.template' in sys.orig_argv and "
    code += "(os.write(2, b'the library is broken'), os._exit(3))"
    (tmp_path / "sitecustomize.py").write_text(code)
    run = Run(
        tmp_path, "run", REPOSITORY / "launch" / "cartpole_dqn.py",
        constants={"BACK_OFF_SECONDS": 0.01, "MAX_RESTARTS": 2},
        environment={"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"},
    )  # fmt: skip
    status, output = run.finish()
    assert status == 1 and "the library is broken" in output
    assert run.count("death", "the library is broken") == 2
    assert not run.orphans()


def test_no_more_processes_costs_an_error_and_no_more(tmp_path):
    """The template says so, and lives on: another one could be made even less."""
    with Template() as template:
        template.process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1)
        template.connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        template.imported = theirs.send(b"0") == 1
        with open(tmp_path / "log", "wb") as log, pytest.raises(OSError, match="no more processes"):
            template.fork(NO_RUN, {}, log)
        assert template.is_ready() and not template.gone
        theirs.close()


def test_what_was_adopted_is_reaped():
    """A process whose parent has ended, in a session of its own, as some environments start one."""
    adopt_orphans()
    read, write = os.pipe()
    code = f"import os; pid = os.fork(); os.setsid(); pid and os.write({write}, b'%d' % pid)"
    subprocess.run([sys.executable, "-c", code], check=True, pass_fds=[write])
    orphan = psutil.Process(int(os.read(read, 20)))
    assert orphan.ppid() == os.getpid()
    deadline = time.monotonic() + 30
    while orphan.is_running() and time.monotonic() < deadline:
        reap_strangers(known=set())
    assert not orphan.is_running()
    os.close(read)
    os.close(write)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_was_forked_can_use_the_gpu(tmp_path):
    options = ("--learner.device", "cuda", "--actor.device", "cuda", "--total-env-steps", 3_000)
    run = Run(tmp_path, "run", REPOSITORY / "launch" / "cartpole_dqn.py", *options)
    status, output = run.finish()
    assert status == 0, output
