"""Faults 10, 11, 12, 17, 18, 22, 24: signals, disks, locks, strangers."""

from __future__ import annotations

import contextlib
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import psutil

from asyncrl.checkpoint import Checkpoints
from tests.faults.lab import STRANGER, Lab, Outcome, expect, kill
from tests.runs import Run


def check_saved(run: Run) -> None:
    newest = Checkpoints(run.folder / "checkpoints").newest_valid()
    last = run.metrics()[-1]["env_steps"]
    expect(newest is not None and newest.state["env_steps"] == last, "it stopped without saving")


def fault_10(lab: Lab, times: int = 10) -> Outcome:
    """SIGTERM at the start, with a stuck actor, in an evaluation, at random moments; and twice."""
    outcome, rng = Outcome(bound_seconds=20.0), random.Random(0)
    run = lab.start()
    lab.until(run, lambda: run.find("prepare 0"), "the preparation")
    lab.stop(run)
    expect(not run.folder.exists(), "something was left of a run that never began")
    run = lab.start()
    lab.until(run, lambda: run.find("learner 0"), "a learner")
    outcome.recovery_seconds.append(lab.stop(run))
    check_saved(run)
    run = lab.start("--evaluation.period-steps", 500)
    lab.until_learning(run)
    kill(run.find("actor 0"), signal.SIGSTOP)
    lab.until(run, lambda: not lab.quick or run.count("evaluated"), "an evaluation", 120)
    outcome.recovery_seconds.append(lab.stop(run))
    check_saved(run)
    for _ in range(0 if lab.quick else times):
        run = lab.start("--evaluation.period-steps", 500)
        lab.until(run, lambda: run.find("learner 0"), "a learner")  # noqa: B023
        time.sleep(rng.uniform(0, 12))
        outcome.recovery_seconds.append(lab.stop(run))
        check_saved(run)
    if not lab.quick:
        run = lab.start()
        lab.until_learning(run)
        run.signal(signal.SIGTERM)
        expect(lab.stop(run) < 5 * lab.patience, "the second signal was not heeded at once")
    return outcome


def fault_11(lab: Lab) -> Outcome:
    """Ctrl-C to the whole group, once and twice."""
    outcome = Outcome(bound_seconds=20.0)
    run = lab.running()
    lab.until_learning(run)
    for child in run.children():
        child.send_signal(signal.SIGINT)
    outcome.recovery_seconds.append(lab.stop(run, signal.SIGINT))
    expect("Traceback" not in lab.output, "a traceback was shown")
    check_saved(run)
    run = lab.start()
    lab.until(run, lambda: run.count("learner", "resumed at"), "the resume")
    lab.until_env_steps(run)
    run.signal(signal.SIGINT)
    lab.stop(run, signal.SIGINT)
    expect("Traceback" not in lab.output, "a traceback was shown")
    newest = Checkpoints(run.folder / "checkpoints").newest_valid()
    expect(newest is not None, "the last checkpoint is not whole")
    return outcome


def fault_12(lab: Lab) -> Outcome:
    """Nobody reads standard output, log folders vanish, metrics cannot be written for a while."""
    run = lab.start("--learner.tensorboard", True)
    lab.until_learning(run)
    run.process.stdout.close()
    for name in ("logs", "tensorboard"):  # at once: files are written into them meanwhile
        shutil.rmtree((run.folder / name).rename(run.folder / f"former {name}"))
    path = run.folder / "metrics.jsonl"
    while not path.is_dir():
        path.unlink(missing_ok=True)
        with contextlib.suppress(FileExistsError):  # written anew in between
            path.mkdir()
    begun = run.events()[-1].time
    lab.until(run, lambda: run.events()[-1].time > begun + 3, "two more checkpoints")
    path.rmdir()
    lab.until(run, run.metrics, "metrics again")
    expect(run.metrics()[0]["log/dropped"] > 0, "what was not written was not counted")
    kill(run.find("actor 0"))
    lab.until(run, lambda: run.count("restarted", "actor 0"), "the actor again")
    lab.until_env_steps(run)
    expect(not run.count("death", "learner"), "the learner died of it")
    lab.stop(run)
    return Outcome()


def fault_17(lab: Lab) -> Outcome:
    """The disk is full for a while: a small tmpfs where that may be mounted."""
    outcome, small = Outcome(), lab.can_mount()
    run = lab.start("--learner.tensorboard", True, tmpfs_nbytes=32 << 20 if small else 0)
    memory = lab.until_learning(run, checkpoints=1)
    learner, heads = run.find("learner 0"), memory.heads(0)
    steps = run.metrics()[-1]["env_steps"]
    limits = learner.rlimit(resource.RLIMIT_FSIZE)
    filler = run.folder.parent / "filler"
    if small:
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 12))
    else:
        outcome.stand_in = "no file of the learner's may grow, by RLIMIT_FSIZE"
        learner.rlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
    time.sleep(3 if lab.quick else 7)  # checkpoints are every two seconds
    lab.until(run, lambda: min(memory.heads(0)) > max(heads) + 20, "training without a disk")
    left = list((run.folder / "checkpoints").glob(".*"))
    saved = run.num_saved()
    if small:
        filler.unlink()
    else:
        learner.rlimit(resource.RLIMIT_FSIZE, limits)
    at = time.monotonic()
    lab.until(run, lambda: run.num_saved() > saved, "a checkpoint again")
    outcome.recovery_seconds.append(time.monotonic() - at)
    expect(not left, f"temporary files were left: {left}")
    lab.until(run, lambda: run.count("checkpoint", "not saved"), "being told of it")
    lab.until(run, lambda: run.metrics()[-1].get("log/dropped"), "a count of what is lost")
    expect(run.metrics()[-1]["env_steps"] > steps, "env steps went back")
    expect(learner == run.find("learner 0"), "the learner was restarted")
    lab.stop(run)
    check_saved(run)
    return outcome


def fault_18(lab: Lab) -> Outcome:
    """The checkpoints' folder cannot be used, then the whole run's folder is gone."""
    outcome = Outcome(stand_in="a file in a folder's place, a moved folder: root passes any chmod")
    run = lab.start("--learner.tensorboard", True)
    lab.until_learning(run, checkpoints=1)
    folder = run.folder / "checkpoints"
    folder.rename(lab.folder / "aside")
    folder.write_text("in the way")
    lab.until(run, lambda: run.count("checkpoint", "not saved"), "a refused checkpoint")
    saved = run.num_saved()
    folder.unlink()
    (lab.folder / "aside").rename(folder)
    at = time.monotonic()
    lab.until(run, lambda: run.num_saved() > saved, "a checkpoint again")
    outcome.recovery_seconds.append(time.monotonic() - at)
    run.folder.rename(lab.folder / "gone")
    at = time.monotonic()
    lab.until(run, lambda: run.num_saved(), "a folder again")
    outcome.recovery_seconds.append(time.monotonic() - at)
    lab.until(run, lambda: run.metrics(), "metrics")
    lab.until_env_steps(run)
    expect(not run.count("death"), "somebody died of it")
    kill(run.find("actor 0"))
    lab.until(run, lambda: run.count("restarted", "actor 0"), "the actor, by files put back")
    lab.until_env_steps(run)
    expect(run.count("death") == 1, "it died again")
    lab.stop(run)
    check_saved(run)
    return outcome


def fault_22(lab: Lab) -> Outcome:
    """A second process on one folder; then a holder that was killed."""
    run = lab.running()
    lab.until_learning(run, checkpoints=1)
    (run.folder / "lock").unlink()  # the folder itself is locked
    second = lab.start()
    status, output = second.finish(60 * lab.patience)
    expect(status == 2, f"expected exit status 2, got {status}: {output}")
    expect(f"process {run.process.pid}" in output, f"the holder is not named: {output}")
    lab.until_env_steps(run)
    run.children()
    run.signal(signal.SIGKILL)
    run.process.wait()
    expect(not run.orphans(), "processes outlived their parent")
    run = lab.start()
    lab.until(run, lambda: run.count("learner", "resumed at"), "the lock taken over")
    lab.leave(run)
    return Outcome()


def fault_24(lab: Lab) -> Outcome:
    """Strangers in /dev/shm, made and deleted: nothing of ours is there."""
    run = lab.running()
    lab.until_learning(run)
    names = ("asyncrl-lane-0", "asyncrl-weights")
    strangers = [Path("/dev/shm") / f"{name}-{STRANGER}" for name in names]
    for stranger in strangers:
        stranger.write_bytes(b"x" * 4096)
    for process in (psutil.Process(run.process.pid), *run.children()):
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        expect("/dev/shm/" not in maps, f"{process} maps something in /dev/shm")
    lab.until_env_steps(run)
    for stranger in strangers:
        stranger.unlink()
    lab.until_env_steps(run)
    lab.leave(run)
    return Outcome()
