"""The logs of a run: metrics.jsonl, episodes.csv, tensorboard/ and events.log, and their readers.

Writing never raises: training goes on without a disk, counts what it could not write, and tries
again.
"""

import csv
import io
import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

WORDS = {"bottleneck", "limiter/waiting"}  # metrics that are no numbers
LARGEST_BACKLOG = 20_000  # characters of events that could not be written
EPISODE_COLUMNS = {  # of episodes.csv, with the type each is read back as
    "time": float, "env_steps": int, "actor": int, "policy": str, "return": float, "length": int,
}  # fmt: skip


class RunLog:
    """The writer of metrics.jsonl, episodes.csv and tensorboard/ in a run's folder.

    Args:
        folder: the run's folder; made if it is not there, also later if somebody deletes it.
        resume_positions: `positions()` of the checkpoint that is resumed: both files are cut back
            to it. A last line torn by a kill is cut in any case, and TensorBoard is told to forget
            what lies after the last row kept, so that no curve doubles.
        tensorboard: also write event files; if TensorBoard is missing a warning says so, once.

    Writing never raises. A line that cannot be written is counted in `dropped`, which later rows
    report as `log/dropped`; every later write tries again, opening the file anew.
    """

    def __init__(self, folder, resume_positions: dict | None = None, tensorboard: bool = True):
        folder, keep = Path(folder), dict(resume_positions or {})
        header = (",".join(EPISODE_COLUMNS) + "\n").encode()
        self.dropped = 0
        self._metrics = _AppendFile(folder / "metrics.jsonl", keep.get("metrics.jsonl"))
        self._episodes = _AppendFile(folder / "episodes.csv", keep.get("episodes.csv"), header)
        self._tensorboard = None
        if tensorboard:
            try:
                self._tensorboard = _TensorBoardFile(folder)
            except Exception as error:  # whatever a broken installation may raise at import
                warnings.warn(f"no TensorBoard files are written: {error!r}", stacklevel=2)

    def write(self, row: dict) -> None:
        """Append one row of metrics, {name: number, string or None}; 0-d arrays and tensors are
        read, non-finite numbers become null. `env_steps` is TensorBoard's step."""
        if self.dropped:
            row = row | {"log/dropped": self.dropped}
        row = {name: _plain(value) for name, value in row.items()}
        if not self._metrics.append(json.dumps(row, default=str).encode() + b"\n"):
            self.dropped += 1
        if self._tensorboard:
            self._tensorboard.write(row)

    def write_episodes(self, rows: Iterable[tuple]) -> None:
        """Append ended episodes: tuples (time, env_steps, actor, policy, return, length)."""
        rows, text = list(rows), io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        if rows and not self._episodes.append(text.getvalue().encode()):
            self.dropped += len(rows)

    def positions(self) -> dict[str, int]:
        """Bytes written so far, by file name; JSON-able, for checkpoints."""
        return {log.path.name: log.size for log in (self._metrics, self._episodes)}

    def sync(self) -> None:
        """Have the bytes of `positions()` survive a power cut, where the disk can do that."""
        for path in (self._metrics.path, self._episodes.path, self._metrics.path.parent):
            with suppress(OSError):
                fd = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)


class _AppendFile:
    """A growing file with one writer, of which the first `size` bytes are known to be whole."""

    def __init__(self, path: Path, keep: int | None = None, header=b"", lines: bool = True):
        self.path, self.size = path, sys.maxsize if keep is None else keep
        self._header, self._lines = header, lines
        self.append(b"")

    def append(self, data: bytes) -> bool:
        """Whether all of `data` was written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Opened anew each time: a descriptor would go on swallowing lines after a deletion.
            with open(self.path, "a+b", buffering=0) as file:
                if file.tell() != self.size:
                    self.size = min(file.tell(), self.size)
                    if self._lines:
                        self.size = _end_of_last_line(file, self.size)
                    file.truncate(self.size)
                data = data if self.size else self._header + data
                if file.write(data) < len(data):  # the part is cut by the next call
                    return False
                self.size += len(data)
                return True
        except OSError:
            return False


class _TensorBoardFile(_AppendFile):
    """One event file a life of the writer: TensorBoard reads them as one curve in order of name,
    and at each opening START event forgets every step from that event's on. It heeds them from the
    second one only, which is why a fresh run begins with one too."""

    def __init__(self, folder: Path):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._record_writer = Event, Summary, RecordWriter
        start = SessionLog(status=SessionLog.START)
        rows = map(parse_row, last_lines(folder / "metrics.jsonl"))  # they grow
        newest = max((int(row.get("env_steps", -1)) for row in rows), default=-1)
        header = self._record(file_version="brain.Event:2")
        header += self._record(session_log=start, step=newest + 1)
        path = folder / "tensorboard" / f"events.out.tfevents.{time.time_ns()}"
        super().__init__(path, header=header, lines=False)

    def _record(self, **fields) -> bytes:
        buffer = io.BytesIO()
        event = self._event(**({"wall_time": time.time()} | fields))
        self._record_writer(buffer).write(event.SerializeToString())
        return buffer.getvalue()

    def write(self, row: dict) -> None:
        values = [
            self._summary.Value(tag=name, simple_value=value)
            for name, value in row.items()
            if isinstance(value, (int, float)) and name not in ("time", "env_steps")
        ]
        step, wall_time = int(row.get("env_steps") or 0), row.get("time") or time.time()
        summary = self._summary(value=values)
        self.append(self._record(summary=summary, step=step, wall_time=wall_time))


def _plain(value):
    """A JSON value of a number as numpy, torch or Python has it."""
    value = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _end_of_last_line(file, size: int) -> int:
    """Bytes up to and with the last newline within the first `size` bytes."""
    while size > 0:
        start = max(0, size - 65536)
        newline = os.pread(file.fileno(), size - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        size = start
    return 0


def _complete_lines(path: Path) -> Iterator[str]:
    """The lines of a file somebody may be writing to, without a torn last one; none if no file."""
    with suppress(FileNotFoundError), open(path, "rb") as file:
        yield from (line[:-1].decode("utf-8", "replace") for line in file if line[-1:] == b"\n")


def last_lines(path: Path, nbytes: int = 1 << 16) -> list[str]:
    """The lines, whole but for the first, in the last bytes of a file; none if no file."""
    with suppress(OSError), open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - nbytes))
        return file.read().decode("utf-8", "replace").split("\n")[:-1]
    return []


def parse_row(line: str) -> dict:
    """A row of metrics: its finite numbers, and the words of WORDS; {} of a line that is none."""
    with suppress(ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return {
            name: value
            for name, value in json.loads(line).items()
            if (
                isinstance(value, str)
                if name in WORDS
                else isinstance(value, (int, float)) and math.isfinite(value)
            )
        }
    return {}


def read_metrics(run_folder) -> dict[str, np.ndarray]:
    """Columns of metrics.jsonl by name, each (rows,): float64, NaN where a row has no number, or
    object (WORDS) with None. Torn and unreadable lines are passed over, names that nothing is under
    too; {} without any row."""
    lines = _complete_lines(Path(run_folder) / "metrics.jsonl")
    rows = list(filter(None, map(parse_row, lines)))
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        kind = object if name in WORDS else np.float64
        columns[name] = np.array([row.get(name) for row in rows], dtype=kind)
    return columns


def read_episodes(run_folder) -> dict[str, np.ndarray]:
    """Columns of episodes.csv by name (see EPISODE_COLUMNS), each (episodes,); `policy` is object.
    Torn and unreadable lines are passed over; without the file all are empty."""
    rows = []
    for line in _complete_lines(Path(run_folder) / "episodes.csv"):
        with suppress(ValueError, OverflowError, csv.Error):
            (cells,) = csv.reader([line], strict=True)  # a quote in one line must not hide others
            pairs = zip(EPISODE_COLUMNS.values(), cells, strict=True)
            rows.append([np.int64(cell) if kind is int else kind(cell) for kind, cell in pairs])
    columns = zip(*rows, strict=True) if rows else [()] * len(EPISODE_COLUMNS)
    return {
        name: np.array(values, dtype=object if kind is str else kind)
        for (name, kind), values in zip(EPISODE_COLUMNS.items(), columns, strict=True)
    }


@dataclass
class Event:
    """One entry of events.log; `time` in unix seconds, `text` may have several lines."""

    time: float
    kind: str
    text: str
    fields: dict[str, str] = field(default_factory=dict)


class EventLog:
    """Appends to events.log, from any number of processes at once: an event is one write.

        2026-01-01T12:00:00.123Z  death      actor 0 died: signal SIGKILL  pid=123 generation=2

    Further lines of a text (a traceback) stand below, indented by four spaces.
    """

    def __init__(self, path):
        self.path = Path(path)
        self._unwritten = ""

    def event(self, kind: str, text: str, **fields) -> None:
        """Append an event; `kind` is one word. Never raises when it cannot be written: the next
        one brings it along, up to some thousand characters of them."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        first, *more = text.splitlines() or [""]
        # Two spaces part the text from the fields, so the text's first line must not have any.
        line = f"{now}  {kind:<10} {' '.join(first.split()) or '-'}"
        if fields:
            line += "  " + " ".join(f"{name}={_quoted(value)}" for name, value in fields.items())
        data = self._unwritten + "\n    ".join([line, *more]) + "\n"
        self._unwritten = data[: data.rfind("\n", 0, LARGEST_BACKLOG) + 1]
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b", buffering=0) as file:
                size = file.tell()
                if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
                    data = "\n" + data  # behind a write that was cut short
                if file.write(data.encode("utf-8", "backslashreplace")):
                    self._unwritten = ""


def _quoted(value) -> str:
    text = str(value)
    return text if re.fullmatch(r"[^\s\"=]+", text) else json.dumps(text)


_EVENT = re.compile(r"(\d{4}-\d\d-\d\dT[\d:.]+Z)  (\S+)\s+(.*?)(?:  (\w+=.*))?")
_FIELD = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|\S+)')


def parse_events(lines: Iterable[str]) -> list[Event]:
    """Events of complete lines of events.log; lines that belong to none are passed over."""
    events: list[Event] = []
    for line in lines:
        if line.startswith("    ") and events:
            events[-1].text += "\n" + line[4:]
        with suppress(AttributeError, ValueError):  # not ours
            stamp, kind, text, fields = _EVENT.fullmatch(line).groups()
            moment = datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()
            found = {
                name: json.loads(value) if value[0] == '"' else value
                for name, value in _FIELD.findall(fields or "")
            }
            events.append(Event(moment, kind, text, found))
    return events


def read_events(path) -> list[Event]:
    """All events of an events.log, oldest first; [] if it is not there."""
    return parse_events(_complete_lines(Path(path)))
