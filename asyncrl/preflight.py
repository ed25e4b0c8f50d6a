"""What a run will take against what there is, before anything is made: `train` refuses by it and
`asyncrl doctor` tells all of it."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from asyncrl.folder import Refused
from asyncrl.limits import container_memory, make_room_for_descriptors
from asyncrl.plan import Plan


@dataclass(frozen=True)
class Check:
    """One thing looked at: "ok", "warning" or "refused", in words, with what to do about it."""

    name: str
    verdict: str
    lines: tuple[str, ...]  # the first says it, the others are the arithmetic
    remedy: str = ""


def preflight(plan: Plan, folder: Path, available: int | None = None) -> list[Check]:
    """Refuse, with the arithmetic, a run that memory, disk or descriptors cannot hold; returns
    what is worth a warning."""
    checks = memory(plan, available), disk(plan, folder), descriptors(plan), *schedules(plan)
    for check in checks:
        if check.verdict == "refused":
            raise Refused(*check.lines, *filter(None, [check.remedy]))
    return [check for check in checks if check.verdict == "warning"]


def memory(plan: Plan, available: int | None = None) -> Check:
    """Rings, weights, replay and processes against what the machine and the container leave."""
    needed = sum(nbytes for _, nbytes in plan.memory)
    limits = {"available": psutil.virtual_memory().available if available is None else available}
    if (container := container_memory()) is not None:
        limits["left of the container's limit"] = container
    source = min(limits, key=limits.get)
    parts = tuple(f"    {nbytes / 1e9:8.3f} GB  {what}" for what, nbytes in plan.memory)
    there = f"{limits[source] / 1e9:.2f} GB"
    if needed > limits[source]:
        words = f"expected {needed / 1e9:.2f} GB of memory, got {there} ({source}); the run needs:"
        remedy = f"lower {_capacity(plan)}--actor.num-actors or --actor.envs-per-lane"
        return Check("memory", "refused", (words, *parts), remedy)
    words = f"{needed / 1e9:.2f} GB of {there} ({source}):"
    if needed > 0.9 * limits[source]:
        remedy = "little is left: lower --algorithm.replay.capacity if others need memory here"
        return Check("memory", "warning", (words, *parts), remedy)
    return Check("memory", "ok", (words, *parts))


def disk(plan: Plan, folder: Path) -> Check:
    """Checkpoints and replay against what is free where the run's folder lies or will lie."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    for path in (*folder.glob("replay/*.bin"), *folder.glob("checkpoints/*/*")):  # its own
        with contextlib.suppress(OSError):
            free += path.lstat().st_size
    needed = _amount(plan.disk_nbytes * 1.1)
    if plan.disk_nbytes * 1.1 > free:
        remedy = "make room, or lower --learner.keep-checkpoints"
        if _capacity(plan):
            remedy += (
                " or --algorithm.replay.capacity, or use --learner.save-replay False (a resumed "
                "run then fills its replay anew)"
            )
        words = f"expected {needed} of disk in {place} for what is saved, got {_amount(free)}"
        return Check("disk", "refused", (f"{words}; {remedy}",))
    words = f"{needed} of {_amount(free)} free in {place}"
    if plan.disk_nbytes * 2.2 > free:
        remedy = "a fast run may need twice that, as two checkpoints hold a replay each"
        return Check("disk", "warning", (words,), remedy)
    if free < 2e9:
        return Check("disk", "warning", (words,), "make room for checkpoints, logs and videos")
    return Check("disk", "ok", (words,))


def descriptors(plan: Plan) -> Check:
    """Open files of the process that has the most; the soft limit is raised where it may be."""
    inherited = plan.num_lanes + plan.num_actors + 20  # lanes, doorbells, weights, logs
    env, actor = plan.config.get("env", {}), plan.config.get("actor", {})
    workers = actor.get("envs_per_lane", 0) * actor.get("lanes_per_actor", 0)
    pipes = 4 * workers if env.get("vectorization") == "async" else 0
    needed = inherited + 60 + max(pipes, 2 * plan.num_actors)  # 60: Python, torch, CUDA
    limit = make_room_for_descriptors(needed)
    words = f"about {needed} open files a process, limit {limit:,}"
    if needed > limit:
        return Check(
            "descriptors", "refused", (f"expected {words}",),
            "raise the limit (ulimit -Hn, docker run --ulimit nofile=4096) or lower "
            "--actor.num-actors or --actor.envs-per-lane",
        )  # fmt: skip
    return Check("descriptors", "ok", (words,))


def schedules(plan: Plan) -> list[Check]:
    """What depends on how long the run is."""
    has_target = "polyak" in plan.config.get("algorithm", {})
    return [warm_up(plan), learning_rate(plan), *([target_net(plan)] if has_target else [])]


def warm_up(plan: Plan) -> Check:
    """Whether a run goes on for longer than its replay waits before the first update."""
    replay = plan.config.get("algorithm", {}).get("replay") or {}
    starts, total = replay.get("learning_starts", 0), plan.total_env_steps
    words = f"first update after {starts:,} of {total:,} env steps"
    if starts > total / 2:
        remedy = (
            f"for so short a run lower --algorithm.replay.learning-starts, say to {total // 10}"
        )
        return Check("warm-up", "warning", (words,), remedy)
    return Check("warm-up", "ok", (words,))


def learning_rate(plan: Plan) -> Check:
    """Whether a run goes on for longer than it learns."""
    until, total = plan.learns_until, plan.total_env_steps
    if until is None or until >= 0.95 * total:
        return Check("learning rate", "ok", ("above 0 until the end",))
    words = f"0 from some {until:,} of {total:,} env steps on: nothing is learned there"
    remedy = "a schedule is not stretched: begin the run with a longer one, where it is a Linear "
    remedy += "by --algorithm.learning-rate.steps"
    return Check("learning rate", "warning", (words,), remedy)


def target_net(plan: Plan) -> Check:
    """Whether a net that follows softly gets anywhere: `polyak` is a share at each move of it."""
    algorithm = plan.config["algorithm"]
    polyak, period = algorithm.get("polyak") or 1, algorithm.get("target_period") or 1
    rows = algorithm.get("batch_size", 1) * max(1, algorithm.get("sequence_length", 1))
    per_step = (algorithm.get("replay") or {}).get("samples_per_insert", 1) / rows
    updates = plan.total_env_steps * per_step
    if polyak == 1 or period == 1 or period / polyak <= 0.1 * updates:
        return Check("target net", "ok", ("follows",))
    words = f"goes {polyak:g} of the way each {period:,} of some {updates:,.0f} updates: it stays "
    remedy = "with a small polyak set --algorithm.target-period 1"
    return Check("target net", "warning", (words + "what it was at the start",), remedy)


def can_write(folder: Path) -> Check:
    """Whether a run could be saved in `folder`, by making a file there and taking it away."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    probe = place / f".asyncrl-doctor-{os.getpid()}"
    try:
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        words = f"expected to write in {place}, got {error}"
        return Check("write access", "refused", (words,), "give permission, make room, or set "
                     "ASYNCRL_RUNS to a folder elsewhere")  # fmt: skip
    return Check("write access", "ok", (f"{place}",))


def _capacity(plan: Plan) -> str:
    replay = plan.config.get("algorithm", {}).get("replay")
    return "--algorithm.replay.capacity, " if replay else ""


def _amount(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"
