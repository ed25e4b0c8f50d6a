"""What a run came from: versions of packages and of this source, and the launch file as it was.

Code may be another when a run is resumed: options and shapes are compared, the bodies of functions
cannot be. So what is another is said in events.log, and a launch file that is replaced is kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import time
from pathlib import Path

from asyncrl.disk import write_atomically
from asyncrl.logs import EventLog


def provenance() -> dict:
    """What decides a run beside its configuration, for config.json."""
    return {"versions": versions(), "git": git_revision()}


def versions() -> dict[str, str]:
    """Of Python, and of the packages that decide a run."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("torch", "numpy", "gymnasium", "ale-py"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """Of the source that runs here; None where nobody knows."""
    if given := os.environ.get("ASYNCRL_GIT"):  # a docker image has no git
        return given
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        result = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
            capture_output=True, text=True, timeout=5,
        )  # fmt: skip
        return result.stdout.strip() or None
    return None


def say_what_changed(folder: Path, source: bytes, config: dict) -> None:
    """Warn, in events.log, of what is another than at the last start of the run in `folder`.

    `source`: of the launch file it goes on with, `config`: for config.json. OSError where the
    former launch file cannot be kept.
    """
    events = EventLog(folder / "events.log")
    with contextlib.suppress(FileNotFoundError):
        before = (folder / "launch.py").read_bytes()
        if before != source:
            kept = folder / time.strftime("launch_until_%Y%m%d_%H%M%S.py")
            write_atomically(kept, before)
            events.event("warning", f"launch.py is another than before, which is {kept.name} now; "
                         "bodies of functions are not compared")  # fmt: skip
    try:
        last = json.loads((folder / "config.json").read_bytes())
        then = {**last["versions"], "asyncrl": last["git"]}
    except (OSError, ValueError, TypeError, KeyError):  # it has been refused, where it matters
        return
    now = {**config["versions"], "asyncrl": config["git"]}
    changed = [
        f"{name} {then.get(name)} -> {now.get(name)}"
        for name in {**then, **now}
        if then.get(name) != now.get(name)
    ]
    if changed:
        events.event("warning", "versions are others than before: " + ", ".join(changed))
