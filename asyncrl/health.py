"""Whether a run is well, in one line, from its files only: for the panel and health checks."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from asyncrl.folder import holder
from asyncrl.logs import Event, last_lines, parse_events, parse_row
from asyncrl.metrics import counted

SILENT_SECONDS = 300.0  # as long as a learner may go without a heartbeat; three rows, if longer


class Health(NamedTuple):
    """What `asyncrl watch RUN --health` says, and whether it exits with 0."""

    well: bool
    words: str


class Life:
    """The newest events that tell how a run is: its start or end, its last checkpoint."""

    def __init__(self):
        self.phase: Event | None = None
        self.checkpoint: Event | None = None

    @property
    def ended(self) -> bool:
        return self.phase is not None and self.phase.kind == "end"

    def take(self, events: Iterable[Event]) -> None:
        for event in events:
            if event.kind in ("start", "end"):
                self.phase = event
            elif event.kind == "checkpoint":
                self.checkpoint = event


def health(
    row: dict, life: Life, now: float, held: bool = True, log_seconds: float = 0.0
) -> Health:
    """How a run is by its last row of metrics and its events, at a time in unix seconds; `held`:
    whether a process has it locked, `log_seconds`: between two rows."""
    if life.ended:
        status = life.phase.fields.get("status", "?")
        words = f"ended with status {status}, {_ago(now - life.phase.time)}"
        return Health(str(status) == "0", words)
    moments = row.get("time", -1e18), life.phase.time if life.phase else -1e18
    # Of what is to come nothing is known: the clock was set back since.
    told, begun = (moment if moment < now + SILENT_SECONDS else -1e18 for moment in moments)
    latest = max(told, begun)
    never = "no row of metrics yet" if latest < 0 else f"last heard from {_ago(now - latest)}"
    if life.phase and not held:
        words = "killed: no process holds its folder; start it again to resume it"
        return Health(False, f"{never}, {words}")
    if now - latest > max(SILENT_SECONDS, 3 * log_seconds):
        return Health(False, f"{never}: not started, stuck or killed; see events.log")
    if told < begun:
        return Health(True, f"starting since {max(0, now - begun):.0f} s")
    words = [f"heard from {_ago(now - latest)}", counted(row.get("actors/alive", 0), "actor")]
    memory = sum(value for name, value in row.items() if name in _MEMORY)
    words += [f"{memory / 1e3:.2f} GB"] if memory else []
    fds = sum(value for name, value in row.items() if name.startswith("fds/"))
    words += [f"{fds:.0f} open files"] if fds else []
    for label, names in _COUNTS.items():
        number = sum(row.get(name) or 0 for name in names)
        words += [f"{label} {number:.0f}"] if number else []
    saved = life.checkpoint
    refused = saved is not None and "not saved" in saved.text
    if saved is not None:
        verb = "could not be saved" if refused else "saved"
        words.append(f"checkpoint {verb} {_ago(now - saved.time)}")
    well = not refused and row.get("actors/alive", 1) > 0
    return Health(well, ("well: " if well else "in trouble: ") + ", ".join(words))


_MEMORY = {f"memory/{role}_mb" for role in
           ("supervisor", "learner", "actors", "evaluator", "shared")}  # fmt: skip
_COUNTS = {
    "restarts": ("actors/restarts", "learner/restarts", "evaluator/restarts"),
    "envs made anew": ("envs/rebuilt",),
    "updates skipped": ("updates/skipped",),
    "log lines lost": ("log/dropped",),
}


def look(folder: Path) -> Health:
    """How the run in a folder is now; reads the ends of its files only."""
    row, life, log_seconds = {}, Life(), 0.0
    for line in last_lines(folder / "metrics.jsonl"):
        row = parse_row(line) or row
    life.take(parse_events(last_lines(folder / "events.log", 1 << 20)))
    held = is_held(folder)
    with suppress(OSError, ValueError, TypeError, KeyError):
        config = json.loads((folder / "config.json").read_bytes())
        log_seconds = float(config["config"]["learner"]["log_seconds"])
    return health(row, life, time.time(), held, log_seconds)


def is_held(folder: Path) -> bool:
    """Whether some process has the run in a folder; True where one may not look."""
    try:
        return holder(folder) is not None
    except OSError:
        return True


def _ago(seconds: float) -> str:
    minutes = int(seconds) // 60
    if minutes < 60:
        return f"{minutes} min ago" if minutes else f"{max(0, int(seconds))} s ago"
    return f"{minutes // 60} h {minutes % 60:02d} min ago"
