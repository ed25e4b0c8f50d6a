"""Faults 2, 28, 29, 30: environments and updates that fail or make what is not finite."""

from __future__ import annotations

import time

import numpy as np

from asyncrl.checkpoint import Checkpoints
from tests.faults.lab import Lab, Outcome, expect
from tests.faults.processes import AT_ONCE
from tests.runs import Run
from tests.test_road import check_lane, read_records


def fault_02(lab: Lab) -> Outcome:
    """One env step in a thousand raises."""
    outcome = Outcome(bound_seconds=3.0)
    run = lab.start(fault={"kind": "raise", "chance": 1e-3}, record=True)
    memory = lab.until_learning(run)
    actors = [run.find(f"actor {i}") for i in (0, 1)]
    for _ in range(3):
        rebuilds = memory.rebuilds()
        lab.until(run, lambda: memory.rebuilds() > rebuilds, "a failure")  # noqa: B023
        at, heads = time.monotonic(), [memory.heads(i) for i in (0, 1)]
        for actor in (0, 1):
            lab.until(run, lambda: min(memory.heads(actor)) > max(heads[actor]), "unrolls")  # noqa: B023
        outcome.recovery_seconds.append(time.monotonic() - at)
    lab.until_env_steps(run)
    expect(actors == [run.find(f"actor {i}") for i in (0, 1)], "an actor was replaced")
    rebuilds = memory.rebuilds()
    lab.stop(run)
    check_events(run, "the cartridge caught fire", rebuilds)
    expect(run.metrics()[-1]["envs/rebuilt"] >= rebuilds, "failures are not in the metrics")
    spec, unrolls = read_records(lab.record, run.folder)
    episodes = 0
    for lane in range(4):
        episodes += len(check_lane(spec, [u for u in unrolls if u.header.lane == lane]))
    logged = (run.folder / "episodes.csv").read_text().count("\n") - 1
    expect(logged == episodes, f"{logged} episodes were counted, {episodes} ended")
    valid = sum(int(unroll.valid.sum()) for unroll in unrolls)
    made = sum((lab.folder / f"{actor}-0").stat().st_size for actor in (0, 1))
    outcome.transitions_lost = [round((made - valid) / (rebuilds + 1))]
    return outcome


def check_events(run: Run, words: str, at_least: int) -> None:
    """Every rebuilding of environments is in events.log with its cause."""
    texts = [event.text for event in run.events() if event.kind == "env"]
    expect(len(texts) >= at_least, f"{at_least} failures, but {len(texts)} in events.log")
    expect(all("environments made anew" in text for text in texts), "not said what was done")
    expect(any(words in text for text in texts), f"not said why: {texts[:3]}")
    traced = [text for text in texts if "Traceback" in text]
    expect(0 < len(traced) <= len({text.splitlines()[0] for text in texts}), "not said where, once")


def fault_28(lab: Lab) -> Outcome:
    """Environments hand out nan, inf, wrong shapes and dtypes, and rewards of 1e30."""
    bad = {"kind": "bad-data", "chance": 2e-3, "step": 100}
    run = lab.start(fault=[bad, {"kind": "huge", "chance": 1e-2}], record=True)
    memory = lab.until_learning(run)
    lab.until(run, lambda: memory.rebuilds() >= 6, "six failures", 120)
    lab.until_env_steps(run)
    rebuilds = memory.rebuilds()
    lab.stop(run)
    check_events(run, "EnvDataError", rebuilds)
    expect(not run.count("death"), "a process died of bad data")
    _, unrolls = read_records(lab.record, run.folder)
    for unroll in unrolls:
        for array in (unroll.obs, unroll.reward, unroll.episode_return):
            expect(np.isfinite(array).all(), "the store was given what is not finite")
    expect(max(unroll.reward.max() for unroll in unrolls) > 1e29, "no huge reward came through")
    expect_finite(run)
    return Outcome()


def expect_finite(run: Run) -> None:
    """All that checkpoints of this run hold is finite."""
    loaded = Checkpoints(run.folder / "checkpoints").newest_valid()
    expect(loaded is not None, "there is no valid checkpoint")
    for name, array in loaded.tensors.items():
        expect(np.isfinite(array).all(), f"{name} was saved and is not finite")


def fault_29(lab: Lab) -> Outcome:
    """Batches, then weights that are not finite; then always."""
    outcome = Outcome()
    for kind in ("nan-batches", "nan-weights")[: 1 if lab.quick else 2]:
        once = {"kind": kind, "step": 40, "once": str(lab.folder / f"{kind}-once")}
        run = lab.start(fault=once, run_id=kind)
        memory = lab.until_learning(run)
        lab.until(run, lambda: run.count("death", "Diverged"), "the end of the learner")  # noqa: B023
        at, version = time.monotonic(), memory.version
        lab.until(run, lambda: memory.version > version, "finite weights")  # noqa: B023
        outcome.recovery_seconds.append(time.monotonic() - at)
        lab.until_env_steps(run)
        expect(run.count("death") == 1, "it was rolled back more than once")
        lab.stop(run)
        expect_finite(run)
    begun = time.monotonic()
    constants = AT_ONCE | ({"MAX_RESTARTS": 1} if lab.quick else {})
    run = lab.start(
        "--learner.checkpoint-seconds", 1e6, fault={"kind": "nan-weights", "step": 10},
        constants=constants, run_id="always",
    )  # fmt: skip
    lab.until(run, lambda: run.count("gave-up", "learner"), "giving up", 120)
    lab.ended(run, 1, begun)
    expect("neither published nor saved" in lab.output, "not said why the run ended")
    return outcome


def fault_30(lab: Lab) -> Outcome:
    """Updates that run out of GPU memory: once, and always."""
    outcome = Outcome(stand_in="CUDA's error is raised by a stub; the OOM killer is fault 1's kill")
    once = {"kind": "gpu-memory", "step": 20, "once": str(lab.folder / "once")}
    run = lab.start(fault=once)
    lab.until_learning(run)
    learner = run.find("learner 0")
    lab.until(run, lambda: run.count("memory", "ran out of GPU memory"), "running out")
    updates = run.metrics()[-1]["updates"]
    at = time.monotonic()
    lab.until(run, lambda: run.metrics()[-1]["updates"] > updates, "the next update")
    outcome.recovery_seconds.append(time.monotonic() - at)
    expect(run.find("learner 0") == learner, "the learner was restarted")
    lab.stop(run)
    begun = time.monotonic()
    run = lab.start(fault={"kind": "gpu-memory"}, run_id="always")
    lab.ended(run, 1, begun)
    expect(run.count("death", "learner") == 1, "it was tried again and again")
    expect(run.num_saved(), "nothing was saved")
    expect("lower --algorithm.batch-size" in lab.output, "no remedy was shown")
    return outcome
