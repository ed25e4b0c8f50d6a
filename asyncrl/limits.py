"""What the machine and the container leave a run: memory, processors, descriptors; from /proc.

Containers are cgroups: version 2 has one tree, version 1 one for each kind of thing. A limit counts
wherever on the way from our own group up to the root it is set.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def container_memory(root: Path = CGROUPS, own: str | None = None) -> int | None:
    """Bytes that the limits of our own cgroups leave us, or None where there is no limit.

    `own`: the text of /proc/self/cgroup.
    """
    left = []
    for folder, version in _folders(root, "memory", own):
        limit, used, cache = (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        )[version == 1]
        with contextlib.suppress(OSError, ValueError):
            nbytes = int((folder / limit).read_text())  # "max" is none
            statistics = dict(map(str.split, (folder / "memory.stat").read_text().splitlines()))
            left.append(nbytes - int((folder / used).read_text()) + int(statistics.get(cache, 0)))
    return min((nbytes for nbytes in left if nbytes < 1 << 60), default=None)


def container_cores(root: Path = CGROUPS, own: str | None = None) -> float | None:
    """Processors that the quota of our own cgroups comes to, or None where there is none."""
    quotas = []
    for folder, version in _folders(root, "cpu", own):
        with contextlib.suppress(OSError, ValueError):
            if version == 2:
                quota, period = map(int, (folder / "cpu.max").read_text().split())
            else:
                quota = int((folder / "cpu.cfs_quota_us").read_text())
                period = int((folder / "cpu.cfs_period_us").read_text())
            quotas += [quota / period] if quota > 0 else []
    return min(quotas, default=None)


def processor_share() -> float:
    """Processors' worth of computing that is ours: a container's quota may be 1.5."""
    cores, quota = len(os.sched_getaffinity(0)), container_cores()
    return cores if quota is None else min(cores, quota)


def usable_cores() -> int:
    """Processors that threads can keep busy: more of them would only be throttled."""
    return max(1, int(processor_share()))


def make_room_for_descriptors(needed: int) -> int:
    """Raise the soft limit of open files to `needed` as far as may be; returns what it is now.

    Children inherit it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return wanted
    return soft if soft != resource.RLIM_INFINITY else 1 << 30


def _folders(root: Path, kind: str, own: str | None) -> Iterator[tuple[Path, int]]:
    """(folder, cgroup version) of our own group of a kind and of all groups around it."""
    if own is None:
        try:
            own = Path("/proc/self/cgroup").read_text()
        except OSError:
            own = ""
    found = [line.split(":", 2) for line in own.splitlines() if line.count(":") >= 2]
    for number, kinds, path in found or [["0", "", "/"]]:
        if number == "0":
            top, version = root, 2
        elif kind in kinds.split(","):
            top, version = root / kind, 1
        else:
            continue
        folder = top / path.lstrip("/")
        # A container may see itself as the root while its path is told from outside: what is not
        # there is passed over.
        while True:
            yield folder, version
            if folder == top:
                break
            folder = folder.parent
