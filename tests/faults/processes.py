"""Faults 1 to 9, 13, 25, 27: processes that die, hang or stand still."""

from __future__ import annotations

import random
import signal
import time

import psutil

from asyncrl.children import usage
from asyncrl.supervisor import ACTOR_SECONDS
from tests.faults.lab import Lab, Memory, Outcome, expect, kill
from tests.runs import Run
from tests.test_road import check_lane, read_records

AT_ONCE = {"BACK_OFF_SECONDS": 0.02, "MAX_BACK_OFF_SECONDS": 0.1}


def until_actor_is_back(lab: Lab, run: Run, memory: Memory, actor: int, since: float) -> float:
    """Seconds from `since` to the first unroll of each lane that the new process commits."""
    heads = memory.heads(actor)
    lab.until(run, lambda: min(memory.heads(actor)) > max(heads), f"actor {actor} again")
    return time.monotonic() - since


def transitions_lost(lab: Lab, run: Run, generations: list[tuple[int, int]]) -> list[int]:
    """Env steps made by these (actor, generation) that the learner never got."""
    _, unrolls = read_records(lab.record, run.folder)
    lost = []
    for actor, generation in generations:
        got = sum(
            int(unroll.valid.sum()) for unroll in unrolls
            if (unroll.header.actor, unroll.header.generation) == (actor, generation)
        )  # fmt: skip
        lost.append((lab.folder / f"{actor}-{generation}").stat().st_size - got)
    return lost


def fault_01(lab: Lab, times: int = 2) -> Outcome:
    """An actor is killed mid-unroll, again and again."""
    outcome, rng = Outcome(bound_seconds=3.0), random.Random(0)
    run = lab.start(record=True)
    memory = lab.until_learning(run)
    learner, generations = run.find("learner 0"), [0, 0]
    killed = []
    for _ in range(times):
        actor, version = rng.randrange(2), memory.version
        killed.append((actor, generations[actor]))
        generations[actor] += 1
        at = kill(run.find(f"actor {actor}"))
        outcome.recovery_seconds.append(until_actor_is_back(lab, run, memory, actor, at))
        lab.until_env_steps(run)
        expect(memory.version >= version, "weights grow older")
    expect(run.find("learner 0") == learner, "the learner was restarted")
    lab.stop(run)
    expect(run.count("death", "signal SIGKILL") == times, "a death is not in events.log")
    spec, unrolls = read_records(lab.record, run.folder)
    for lane in range(4):
        check_lane(spec, [unroll for unroll in unrolls if unroll.header.lane == lane])
    outcome.transitions_lost = transitions_lost(lab, run, killed)
    expect(0 <= max(outcome.transitions_lost) <= 2 * 2 * 3 * 7, "more than the open unrolls lost")
    return outcome


def fault_03(lab: Lab) -> Outcome:
    """Environments that cannot be made: of one actor, then of all."""
    constants = AT_ONCE | ({"MAX_RESTARTS": 1} if lab.quick else {})
    times = 1 + constants.get("MAX_RESTARTS", 5)
    run = lab.start(fault={"kind": "make", "actor": 1}, constants=constants)
    words = f"actor 1 died {times} times"
    lab.until(run, lambda: run.count("gave-up", words), "giving up", 40 * times)
    lab.until_env_steps(run)
    lab.stop(run)
    begun = time.monotonic()
    run = lab.start(fault={"kind": "make"}, constants=constants, run_id="none")
    lab.until(run, lambda: run.children(), "processes")
    lab.until(run, lambda: run.count("gave-up"), "giving up", 40 * times)
    lab.ended(run, 1, begun)
    expect("the cartridge is missing" in lab.output, "the traceback was not shown")
    return Outcome()


def fault_04(lab: Lab) -> Outcome:
    """Environments that hang: a stopped actor, and an endless loop in a step."""
    limit = 2.0 if lab.quick else ACTOR_SECONDS
    outcome = Outcome(bound_seconds=10.0 + 3.0)  # noticed, replaced
    once = {"kind": "spin", "actor": 0, "step": 3_000, "once": str(lab.folder / "once")}
    run = lab.start(fault=once, constants={"ACTOR_SECONDS": limit})
    memory = lab.until_learning(run)
    lab.until(run, lambda: (lab.folder / "once").exists(), "the endless loop")
    at = time.monotonic()
    lab.until(run, lambda: run.count("stuck", "actor 0"), "actor 0 seen stuck")
    outcome.recovery_seconds.append(until_actor_is_back(lab, run, memory, 0, at))
    (death,) = [event for event in run.events() if event.kind == "death"]
    expect("faulty.py" in death.text and " in step" in death.text, "no stacks in events.log")
    at = kill(run.find("actor 1"), signal.SIGSTOP)
    lab.until(run, lambda: run.count("stuck", "actor 1"), "actor 1 seen stuck")
    outcome.recovery_seconds.append(until_actor_is_back(lab, run, memory, 1, at))
    lab.stop(run)
    return outcome


def fault_05(lab: Lab) -> Outcome:
    """Crashes in native code, and an environment that calls exit()."""
    outcome = Outcome(bound_seconds=3.0)
    kinds = {"segv": "signal SIGSEGV", "exit": "exit status 0", "abort": "signal SIGABRT"}
    kinds = dict(list(kinds.items())[: 2 if lab.quick else 3])
    faults = [
        {"kind": kind, "actor": 1, "step": 3_000 * (i + 1), "once": str(lab.folder / kind)}
        for i, kind in enumerate(kinds)
    ]
    run = lab.start(fault=faults)
    memory = lab.until_learning(run)
    for i in range(len(kinds)):
        lab.until(run, lambda: run.count("death") > i, "the crash")  # noqa: B023
        at = time.monotonic()
        outcome.recovery_seconds.append(until_actor_is_back(lab, run, memory, 1, at))
    deaths = [event for event in run.events() if event.kind == "death"]
    for death, (kind, cause) in zip(deaths, kinds.items(), strict=True):
        expect(f"actor 1 died: {cause}" in death.text, f"no {cause} in events.log")
        stack = "Fatal Python error" in death.text and " in step" in death.text
        expect(stack or kind == "exit", "no stack in events.log")
    lab.stop(run)
    return outcome


def fault_07(lab: Lab) -> Outcome:
    """All actors die at once."""
    outcome = Outcome(bound_seconds=10.0)
    run = lab.running()
    memory = lab.until_learning(run)
    actors, learner = [run.find(f"actor {i}") for i in (0, 1)], run.find("learner 0")
    at = max(kill(actor) for actor in actors)
    cpu = sum(learner.cpu_times()[:2])
    lab.until(run, lambda: all(run.find(f"actor {i}") for i in (0, 1)), "two new actors")
    spent = (sum(learner.cpu_times()[:2]) - cpu) / (time.monotonic() - at)
    expect(spent < 0.5, f"the learner spun, at {spent:.0%} of a core, while nobody acted")
    backs = [until_actor_is_back(lab, run, memory, actor, at) for actor in (0, 1)]
    outcome.recovery_seconds.append(max(backs))
    lab.until_env_steps(run)
    expect(run.find("learner 0") == learner, "the learner was restarted")
    lab.leave(run)
    return outcome


def fault_08(lab: Lab, times: int = 1) -> Outcome:
    """The learner is killed."""
    outcome = Outcome()
    run = lab.running()
    memory = lab.until_learning(run, checkpoints=1)
    actors = [run.find(f"actor {i}").pid for i in (0, 1)]
    for round_ in range(times):
        version, steps = memory.version, run.metrics()[-1]["env_steps"]
        at = kill(run.find("learner 0"))
        lab.until(run, lambda: run.count("learner", "resumed at") > round_, "the resume")  # noqa: B023
        lab.until(run, lambda: memory.version > version, "new weights")  # noqa: B023
        outcome.recovery_seconds.append(time.monotonic() - at)
        (*_, resumed) = [event for event in run.events() if "resumed at" in event.text]
        outcome.resume_loss.append(max(0, steps - int(resumed.text.split()[2])))
        lab.until_env_steps(run)
    expect([run.find(f"actor {i}").pid for i in (0, 1)] == actors, "actors were restarted")
    lab.leave(run)
    outcome.pause_seconds = [
        float(event.fields["seconds"]) for event in run.events() if "seconds" in event.fields
    ]
    return outcome


def fault_09(lab: Lab, times: int = 1) -> Outcome:
    """The whole tree is killed; another run beside it goes on."""
    outcome = Outcome()
    other = None if lab.quick else lab.start(run_id="other")
    run = lab.running()
    lab.until_learning(run, checkpoints=1)
    for _ in range(times):
        steps = run.metrics()[-1]["env_steps"]
        run.children()
        run.signal(signal.SIGKILL)
        run.process.wait()
        expect(not run.orphans(), "processes outlived their parent")
        at = time.monotonic()
        run = lab.start()
        lab.until(run, lambda: run.count("learner", "resumed at"), "the resume")  # noqa: B023
        outcome.recovery_seconds.append(time.monotonic() - at)
        (*_, resumed) = [event for event in run.events() if "resumed at" in event.text]
        outcome.resume_loss.append(max(0, steps - int(resumed.text.split()[2])))
        lab.until_env_steps(run)
    lab.leave(run)
    if other:
        lab.until_env_steps(other)
        expect(not other.count("death"), "the other run was touched")
        lab.stop(other)
    return outcome


def fault_13(lab: Lab) -> Outcome:
    """The evaluator is killed."""
    outcome = Outcome()
    run = lab.start("--evaluation.period-steps", 1_000)
    memory = lab.until_learning(run)
    lab.until(run, lambda: run.count("evaluated"), "an evaluation", 120)
    learner = run.find("learner 0")
    at = kill(run.find("evaluator 0"))
    evaluations = run.count("evaluated")  # by now it can have made no more
    lab.until(run, lambda: run.count("evaluated") > evaluations, "an evaluation again", 120)
    outcome.recovery_seconds.append(time.monotonic() - at)
    expect(run.count("death", "evaluator died: signal SIGKILL"), "its death was not recorded")
    expect(memory.status.words[memory.status.EVALUATOR_RESTARTS] == 1, "its restart not counted")
    expect(run.find("learner 0") == learner, "the learner was restarted")
    lab.stop(run)
    return outcome


def fault_25(lab: Lab) -> Outcome:
    """The learner stands still."""
    outcome = Outcome(bound_seconds=1.0)
    run = lab.running()
    memory = lab.until_learning(run)
    learner, actors = run.find("learner 0"), [run.find(f"actor {i}") for i in (0, 1)]
    kill(learner, signal.SIGSTOP)
    time.sleep(3 if lab.quick else 20)
    heads, cpu = [memory.heads(i) for i in (0, 1)], [sum(a.cpu_times()[:2]) for a in actors]
    time.sleep(2 if lab.quick else 10)
    expect(heads == [memory.heads(i) for i in (0, 1)], "actors went on without permission")
    spent = max(sum(a.cpu_times()[:2]) - before for a, before in zip(actors, cpu, strict=True))
    expect(spent < 0.2, f"an actor spent {spent:.2f} s of CPU on waiting")
    at = kill(learner, signal.SIGCONT)
    lab.until(run, lambda: min(memory.heads(0)) > max(heads[0]), "actors go on")
    outcome.recovery_seconds.append(time.monotonic() - at)
    expect(actors == [run.find(f"actor {i}") for i in (0, 1)], "an actor was replaced")
    expect(not run.count("death") and not run.count("stuck"), "somebody was declared dead")
    lab.leave(run)
    return outcome


def fault_27(lab: Lab, times: int = 4) -> Outcome:
    """Actors are restarted many times, with few file descriptors."""
    outcome = Outcome(bound_seconds=3.0)
    few = ("sh", "-c", 'ulimit -n 256; exec "$@"', "sh")
    run = lab.start(prefix=few, constants=AT_ONCE)
    memory = lab.until_learning(run)
    before = []
    for round_ in range(times + 1):
        actor = round_ % 2
        at = kill(run.find(f"actor {actor}"))
        outcome.recovery_seconds.append(until_actor_is_back(lab, run, memory, actor, at))
        heads = memory.heads(actor)
        lab.until(run, lambda: min(memory.heads(actor)) > max(heads) + 10, "work")  # noqa: B023
        pids = (run.process.pid, run.find("learner 0").pid)
        taken = [(*usage([pid]), psutil.Process(pid).num_threads()) for pid in pids]
        before = before or taken  # after the first one, which loads what all need
    for (nbytes, fds, threads), (nbytes_0, fds_0, threads_0) in zip(taken, before, strict=True):
        expect(fds <= fds_0 + 1, f"descriptors grew from {fds_0} to {fds}")
        expect(threads <= threads_0 + 1, f"threads grew from {threads_0} to {threads}")
        expect(nbytes < 1.05 * nbytes_0 + 4e6, f"memory grew from {nbytes_0} to {nbytes}")
    expect(not run.count("gave-up"), "an actor that had worked was given up")
    lab.stop(run)
    return outcome


def fault_26(lab: Lab, times: int = 3) -> Outcome:
    """The learner is killed while it publishes, at random moments of a run that publishes a lot."""
    rng = random.Random(0)
    run = lab.start("--learner.publish-period", 1, record=True)
    memory = lab.until_learning(run, checkpoints=1)
    for round_ in range(times):
        version = memory.version
        lab.until(run, lambda: memory.version > version, "a publication")  # noqa: B023
        time.sleep(rng.uniform(0, 0.02))
        kill(run.find("learner 0"))
        lab.until(run, lambda: run.count("learner", "resumed at") > round_, "the resume")  # noqa: B023
        expect(memory.version >= version, "the version went back")
        lab.until_env_steps(run)
        saved = run.num_saved()  # without one it would be given up
        lab.until(run, lambda: run.num_saved() > saved, "a checkpoint")  # noqa: B023
    lab.stop(run)
    for lane in range(4):
        _, unrolls = read_records(lab.record, run.folder)
        found = {int(u.header.sequence): int(u.header.version) for u in unrolls
                 if u.header.lane == lane}  # fmt: skip
        versions = [found[sequence] for sequence in sorted(found)]
        expect(versions == sorted(versions), "an actor went back to older weights")
    return Outcome()
