"""`asyncrl doctor`: what a run needs against what there is, a line each, before it is begun."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil

from asyncrl import folder, limits, preflight
from asyncrl.metrics import counted
from asyncrl.plan import EXIT_REFUSED
from asyncrl.preflight import Check
from asyncrl.provenance import versions

NEEDED = ("torch", "numpy", "gymnasium", "psutil", "rich", "safetensors", "tyro")
SLOW_DISK_NBYTES = 20e6  # a second, written and fsynced


def doctor(launch_file: Path | None, run_id: str | None, options: list[str], runs: Path) -> int:
    """Print all checks; with a launch file also those of what it asks for. Exit status 0 or 2."""
    refused = 0
    for check in _checks(launch_file, run_id, options, runs):
        first, *more = check.lines
        print(f"{check.verdict:<8}  {check.name:<12}  {first}", flush=True)
        for line in more:
            print(f"{'':<22}  {line}")
        if check.remedy:
            print(f"{'':<22}  to do: {check.remedy}", flush=True)
        refused += check.verdict == "refused"
    if refused:
        print(f"{refused} of these would keep a run from starting, or from being saved")
    return EXIT_REFUSED if refused else 0


def _checks(
    launch_file: Path | None, run_id: str | None, options: list[str], runs: Path
) -> Iterator[Check]:
    yield packages()
    yield processors()
    yield gpu()
    place = runs / run_id if run_id else runs
    yield preflight.can_write(place)
    yield disk_speed(place)
    if run_id:
        yield lock(place)
    if launch_file is None:
        yield machine_memory()
        return
    if not os.path.isfile(launch_file):
        words = f"expected a launch file, got {launch_file}, which is not there"
        yield Check("launch file", "refused", (words,), "launch/ holds examples")
        return
    begun = time.monotonic()
    try:
        if run_id:  # with the options that it has, against the configuration that it has
            plan = folder.RunFolder(place).prepare(launch_file, options)
        else:
            plan = folder.prepare_in_child(launch_file.resolve(), launch_file.resolve(), options)
    except folder.Refused as error:
        words, remedy = (error.args[:-1], error.args[-1]) if error.args[1:] else (error.args, "")
        yield Check("run folder", "refused", words, remedy)
        return
    except SystemExit:
        words = f"expected {launch_file} to be usable; what it said stands above or on stderr"
        yield Check("launch file", "refused", (words,), "mend it, or the options given here")
        return
    seconds = time.monotonic() - begun
    actors = f"{counted(plan.num_actors, 'actor')}, {counted(plan.num_lanes, 'lane')}"
    actors += f", schedule {plan.schedule}"
    words = f"{launch_file}: env and model made in {seconds:.1f} s; {actors}"
    yield Check("launch file", "ok", (words,))
    yield preflight.memory(plan)
    yield preflight.disk(plan, place)
    yield preflight.descriptors(plan)
    yield from preflight.schedules(plan)


def packages() -> Check:
    """Versions of what decides a run; what is missing of what is needed."""
    missing = []
    for name in NEEDED:
        try:
            version(name)
        except PackageNotFoundError:
            missing.append(name)
    found = ", ".join(f"{name} {number}" for name, number in versions().items())
    if missing:
        words = f"expected {', '.join(missing)} to be installed; there are {found}"
        return Check("packages", "refused", (words,), "./run_main.sh installs all of it")
    if not _has_distribution("ale-py"):
        remedy = "for Atari: pip install -e '.[atari]' in the project's folder"
        return Check("packages", "warning", (f"{found}, no ale-py",), remedy)
    return Check("packages", "ok", (found,))


def _has_distribution(name: str) -> bool:
    try:
        requires(name)
    except PackageNotFoundError:
        return False
    return True


def processors() -> Check:
    """Kind and number; the container's quota."""
    cores, quota = len(os.sched_getaffinity(0)), limits.container_cores()
    words = f"{platform.machine()}, {cores} cores"
    if quota is not None:
        words += f", of which the container's quota leaves {quota:.2g}"
    if platform.machine() != "x86_64":
        remedy = "shared memory counts on x86-64's order of stores: take an x86-64 machine"
        return Check("processor", "warning", (words,), remedy)
    if (quota or cores) < 2:
        remedy = "acting and learning take turns on a single core: give the run two or more"
        return Check("processor", "warning", (words,), remedy)
    return Check("processor", "ok", (words,))


def gpu() -> Check:
    """Whether torch can use one, and how much of its memory is free."""
    import torch

    drivers = sorted(Path("/dev").glob("nvidia[0-9]*"))
    if not torch.cuda.is_available():
        if drivers:
            built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "has no CUDA"
            words = f"{drivers[0]} is there, but torch {torch.__version__} ({built}) cannot use it"
            remedy = "install a torch with CUDA, or a driver that is new enough for it (nvidia-smi)"
            return Check("GPU", "warning", (words,), remedy)
        return Check("GPU", "ok", ("none; learning and acting run on the processor",))
    lines = []
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        try:
            free, total = torch.cuda.mem_get_info(index)
            torch.zeros(1, device=f"cuda:{index}").add_(1).item()
        except RuntimeError as error:
            words = f"expected {name} to compute, got {str(error).splitlines()[0]}"
            remedy = "look at nvidia-smi, restart the driver, or use --learner.device cpu"
            return Check("GPU", "refused", (words,), remedy)
        lines.append(f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free")
    return Check("GPU", "ok", tuple(lines))


def disk_speed(place: Path, nbytes: int = 8 << 20) -> Check:
    """How fast what is written is safe; a checkpoint waits for it."""
    place = next(path for path in (place, *place.absolute().parents) if path.exists())
    probe = place / f".asyncrl-doctor-{os.getpid()}"
    begun = time.monotonic()
    try:
        with open(probe, "wb") as file:
            file.write(os.urandom(1 << 20) * (nbytes >> 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Check("disk speed", "warning", (f"not measured: {error}",))
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    rate = nbytes / (time.monotonic() - begun)
    free = shutil.disk_usage(place).free
    words = f"{rate / 1e6:.0f} MB/s written and synced, {free / 1e9:.1f} GB free"
    if rate < SLOW_DISK_NBYTES:
        remedy = "checkpoints will take long: set ASYNCRL_RUNS to a local disk"
        return Check("disk speed", "warning", (words,), remedy)
    return Check("disk speed", "ok", (words,))


def lock(place: Path) -> Check:
    """Whether the run's folder is free."""
    try:
        name = folder.holder(place)
    except OSError as error:
        remedy = "give permission, or choose another run id"
        return Check("run folder", "refused", (f"expected to read {place}, got {error}",), remedy)
    if name is not None:
        remedy = f"asyncrl watch {place.name} shows it; stop that one or take another id"
        return Check("run folder", "refused", (f"{place} is held by {name}",), remedy)
    if not folder.has_begun(place):
        return Check("run folder", "ok", (f"{place} is new",))
    words = f"{place} is there and free: a start with its configuration resumes it"
    return Check("run folder", "ok", (words,))


def machine_memory() -> Check:
    """What there is, where no launch file says what is needed."""
    available, container = psutil.virtual_memory().available, limits.container_memory()
    words = f"{available / 1e9:.1f} GB available"
    if container is not None:
        words += f", the container's limit leaves {container / 1e9:.1f} GB"
    least = min(available, available if container is None else container)
    if least < 2e9:
        remedy = "a run takes about 300 MB a process and its replay; name a launch file to see it"
        return Check("memory", "warning", (words,), remedy)
    return Check("memory", "ok", (words,))
