"""Where a run goes on: the newest checkpoint that can be used, or the beginning.

What was saved is never begun anew unasked: where none of it can be used, that is refused in words.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from asyncrl.checkpoint import Checkpoints, Loaded
from asyncrl.disk import CheckpointError
from asyncrl.logs import EventLog, RunLog, read_episodes, read_events, read_metrics

# "CUDA error: ..." has a class of its own in newer versions.
_DEVICE_ERRORS = (
    torch.cuda.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.cuda.OutOfMemoryError)
)  # fmt: skip
REMEDY = "put one back, or begin a run with another id"


def load_newest(
    checkpoints: Checkpoints, load: Callable[[Loaded], None], events: EventLog
) -> Loaded | None:
    """Load the newest checkpoint that `load` takes; None where there never was one.

    Where the replay of all of them is damaged, the newest is used without. CheckpointError where
    there is none that can be used, or none left of those that were saved.
    """
    refused: list[Loaded] = []
    while (loaded := checkpoints.newest_valid()) and (why := _refusal(load, loaded)):
        checkpoints.reject(loaded, why)
        refused.append(loaded)
    for path, reason in checkpoints.rejected:
        events.event("refused", f"checkpoint {path.name} not used: {reason}")
    if loaded is not None:
        return loaded
    for candidate in refused:
        bare = dataclasses.replace(candidate, segments=[])
        if candidate.segments and not _refusal(load, bare):
            events.event("refused", f"{bare.path.name} is used without its replay")
            return bare
    if checkpoints.rejected:
        reasons = "; ".join(f"{path.name}: {why}" for path, why in checkpoints.rejected)
        raise CheckpointError(f"expected a valid checkpoint, got {reasons}; {REMEDY}")
    saved = [event.text for event in read_events(events.path)
             if event.kind == "checkpoint" and event.text.startswith("checkpoint_")]  # fmt: skip
    if saved:
        raise CheckpointError(
            f"expected a checkpoint in {checkpoints.folder}, got none, but {events.path.name} has "
            f"{saved[-1]!r}; {REMEDY}"
        )
    return None


def say_what_is_cut(folder: Path, events: EventLog) -> None:
    """A run that ended before its first checkpoint begins anew, and with it its logs."""
    rows = len(read_metrics(folder).get("env_steps", ()))
    episodes = len(read_episodes(folder)["env_steps"])
    if rows or episodes:
        text = f"no checkpoint was saved yet: {rows} rows of metrics.jsonl and {episodes} episodes"
        events.event("learner", f"{text} of the start before are cut")


def say_what_is_missing(log: RunLog, positions: dict[str, int], events: EventLog) -> None:
    """Of logs that are shorter than the checkpoint knew them (`positions`): after a power cut."""
    for name, size in log.positions().items():
        if size < (expected := positions.get(name, 0)) < sys.maxsize:  # which was never opened
            text = f"expected {name} to have {expected} bytes, as its checkpoint says, got {size}"
            events.event("warning", f"{text}: what it had behind them is lost, the run goes on")


def _refusal(load: Callable[[Loaded], None], loaded: Loaded) -> str:
    """Why it cannot be loaded, or nothing where it has been."""
    try:
        load(loaded)
    except CheckpointError as error:
        return str(error)
    except _DEVICE_ERRORS:  # are not its fault
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        return (
            "expected the state of a learner of this configuration, got "
            f"{type(error).__name__}: {error}"
        )
    return ""
