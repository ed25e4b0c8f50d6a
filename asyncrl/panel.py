"""The run on a terminal, from its files only: the supervisor and `asyncrl watch` show the same."""

import errno
import math
import os
import sys
import time
from collections import deque
from contextlib import suppress
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.panel import Panel as Frame
from rich.table import Table
from rich.text import Text

from asyncrl.health import Life, health
from asyncrl.logs import Event, parse_events, parse_row
from asyncrl.metrics import counted, percent

PLAIN_PERIOD_SECONDS = 10
READ_NBYTES = 8 << 20  # at a time: after a week there are many
MAX_RETURNS = 4_000  # kept: then every second one is dropped, and of those to come
COLORS = {  # of time shares: work is cool, waiting is warm
    "update": "cyan", "env": "cyan", "inference": "blue", "sync": "blue", "publish": "magenta",
    "pull": "magenta", "wait": "yellow", "checkpoint": "green", "log": "white",
}  # fmt: skip
EVENT_COLORS = {
    ("death", "gave-up", "refused", "stuck", "error"): "red",
    ("restarted", "stopping", "warning"): "yellow",
}
LOSSES = (  # of what is learned, as far as a row has them; their order is that on the screen
    ("loss/q", "Q loss"), ("loss/policy", "policy"), ("loss/value", "value"),
    ("loss/entropy", "entropy"), ("loss/q_mean", "mean Q"), ("loss/q_variance", "variance"),
)  # fmt: skip


class Tail:
    """Reads what was appended to a file of lines since the last call."""

    def __init__(self, path):
        self.path, self._position, self._last = Path(path), 0, b""

    def read(self) -> tuple[list[str], bool]:
        """New complete lines, as many as fit into a few MB, and whether they replace all earlier
        ones: the file was cut back or exchanged. A file that is not there has no new lines."""
        with suppress(OSError), open(self.path, "rb") as file:
            # What was read last must still stand there: a file may be cut back and grow again.
            file.seek(max(0, self._position - len(self._last)))
            again = file.read(len(self._last)) != self._last
            if again:
                file.seek(0)
                self._position, self._last = 0, b""
            data = file.read(READ_NBYTES)
            while b"\n" not in data and (more := file.read(READ_NBYTES)):
                data += more
            data = data[: data.rfind(b"\n") + 1]
            self._position += len(data)
            self._last = (self._last + data)[-256:]
            return data.decode("utf-8", "replace").split("\n")[:-1], again
        return [], False


class Panel:
    """Shows a run: a live panel on a terminal, else a plain line now and then.

    Args:
        run_folder: the run's folder; its files may come later, be cut back or replaced.
        total_env_steps: the budget; None takes `total_env_steps` of the rows.
        stream: where to write, standard output by default.

    Call `refresh()` about once a second and `close()` at the end. Neither raises when the stream or
    a file fails; a stream whose reader has gone is pointed to /dev/null, so that the interpreter
    does not fail on it at exit either.
    """

    def __init__(self, run_folder, total_env_steps: int | None = None, stream=None):
        self.run_id, self.total_env_steps = Path(run_folder).resolve().name, total_env_steps
        self._metrics = Tail(Path(run_folder) / "metrics.jsonl")
        self._event_log = Tail(Path(run_folder) / "events.log")
        self._start_time, self._plain_time = time.time(), -math.inf
        self.events: deque[Event] = deque(maxlen=20)
        self.life = Life()
        self.held = True  # whether a process has the run; who watches from elsewhere finds out
        self._forget()
        self._stream = sys.stdout if stream is None else stream
        self._live = None
        if self._stream is not None and self._stream.isatty():
            console = Console(file=self._stream)
            if not console.is_dumb_terminal:
                self._live = Live(
                    console=console, auto_refresh=False, vertical_overflow="crop",
                    redirect_stdout=False, redirect_stderr=False,
                )  # fmt: skip

    def _forget(self) -> None:
        self.row, self._unshown = {}, False
        self.evaluation: tuple[float, float] | None = None  # (env_steps, return)
        self.returns: list[float] = []  # evenly spaced
        self.last_return, self._num_returns, self._return_period = math.nan, 0, 1
        self._progress: deque[tuple[float, float]] = deque(maxlen=30)  # (elapsed s, env steps)

    def refresh(self) -> None:
        """Read what is new and show it."""
        news = self._read()
        self._attempt(self._show_live if self._live else self._show_plain, news)

    def close(self) -> None:
        """Show the last row and leave the terminal in order."""
        self._plain_time = -math.inf
        self.refresh()
        if self._live:
            self._attempt(self._live.stop)

    def __enter__(self) -> "Panel":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _attempt(self, show, *arguments) -> None:
        try:
            show(*arguments)
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):  # its reader, its terminal is gone for good
                with suppress(OSError, ValueError), open(os.devnull, "w") as null:
                    os.dup2(null.fileno(), self._stream.fileno())
        except ValueError:  # a closed file
            pass

    def _show_live(self, news: list[Event]) -> None:
        self._live.start()
        console = self._live.console
        self._live.update(self.view(console.width, console.height), refresh=True)

    def _show_plain(self, news: list[Event]) -> None:
        for event in news:
            if event.kind == "end" and self._unshown:  # what it came to stands before it
                self._print_row()
            self._print(event.time, f"{event.kind}: {event.text.splitlines()[0]}")
        if self._unshown and time.monotonic() - self._plain_time >= PLAIN_PERIOD_SECONDS:
            self._print_row()

    def _read(self) -> list[Event]:
        lines: list[str] | None = None
        while lines is None or lines:
            lines, again = self._metrics.read()
            if again:
                self._forget()
            for line in lines:
                if row := parse_row(line):
                    self._take(row)
        texts: list[str] = []
        while lines := self._event_log.read()[0]:
            texts += lines
        events = parse_events(texts)
        self.events.extend(events)
        self.life.take(events)
        return [event for event in events if event.time >= self._start_time]

    def _take(self, row: dict) -> None:
        self.row, self._unshown = row, True
        self._progress.append((row.get("elapsed_seconds", 0.0), row.get("env_steps", 0)))
        if "episode/return" in row:
            self.last_return = row["episode/return"]
            self._num_returns += 1
            if self._num_returns % self._return_period == 0:
                self.returns.append(self.last_return)
            if len(self.returns) > MAX_RETURNS:
                self.returns, self._return_period = self.returns[1::2], 2 * self._return_period
        if "eval/return" in row:
            self.evaluation = row.get("eval/env_steps", row.get("env_steps", 0)), row["eval/return"]

    def _budget(self) -> tuple[float, float, float | None]:
        """Env steps done, env steps to do in all, and seconds left if they can be told."""
        steps = self.row.get("env_steps", 0)
        total = self.total_env_steps or self.row.get("total_env_steps") or 0
        (t0, s0), (t1, s1) = self._progress[0], self._progress[-1]
        rate = (s1 - s0) / (t1 - t0) if t1 > t0 else self.row.get("rate/env_steps", 0)
        return steps, total, max(0, total - steps) / rate if rate and total else None

    def _print(self, moment: float, text: str) -> None:
        stamp = datetime.fromtimestamp(moment).isoformat(sep=" ", timespec="seconds")
        print(f"{stamp} {self.run_id} {text}", file=self._stream, flush=True)

    def _print_row(self) -> None:
        """The names are those of metrics.jsonl, for grep."""
        self._unshown, self._plain_time = False, time.monotonic()
        steps, total, left = self._budget()
        text = f"env_steps={steps:.0f}" + (f" ({steps / total:.1%})" if total else "")
        if self.evaluation:
            text += f" eval/return={self.evaluation[1]:.6g}"
        names = ("episode/return", "rate/env_steps", "rate/updates", "lag/mean")
        for name in (*names, *(name for name, _ in LOSSES)):
            if name in self.row:
                text += f" {name}={self.row[name]:.6g}"
        text += f" left={duration(left).replace(' ', '')}" if left is not None else ""
        words = self.row.get("bottleneck", "not known yet")
        text += f' bottleneck="{words}"'
        well, words = health(self.row, self.life, time.time(), self.held)
        text += "" if well or words.startswith("ended") else f' health="{words}"'
        self._print(self.row.get("time", time.time()), text)

    def view(self, width: int, height: int) -> Frame:
        """The panel as a rich renderable that fits `width` x `height` characters."""
        width = min(width, 100)
        inner = max(width - 16, 8)  # of values: less frame, padding and labels
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bright_black", no_wrap=True, width=10)
        table.add_column(no_wrap=True, width=inner, overflow="ellipsis")
        waiting = [[("", "waiting for the first metrics")]]
        sections = self._sections(inner, height > 24) if self.row else waiting
        for i, section in enumerate(sections):
            if i and height >= 24:
                table.add_row()
            for line in section:
                table.add_row(*line)
        room = max(0, min(len(self.events), height - 4 - table.row_count, 5))
        for i, event in enumerate(list(self.events)[len(self.events) - room :]):
            if i == 0:
                table.add_row()
            color = next((c for kinds, c in EVENT_COLORS.items() if event.kind in kinds), "green")
            clock = datetime.fromtimestamp(event.time).strftime("%H:%M:%S")
            text = event.text.splitlines()[0]
            table.add_row(clock, Text.assemble((f"{event.kind:<10}  ", color), text))
        age = time.time() - self.row.get("time", math.inf)
        return Frame(
            table, title=Text(self.run_id, "bold"), title_align="left",
            subtitle=Text(f"last row {duration(age)} ago", "yellow") if age > 60 else None,
            subtitle_align="right", width=width, border_style="bright_black", padding=(0, 1),
        )  # fmt: skip

    def _sections(self, width: int, tall: bool) -> list[list[tuple]]:
        """Groups of lines (label, value of up to `width` characters); a line whose metrics are not
        in the row is left out, losses too where the terminal is not `tall`."""
        row, progress, learning, flow, times = self.row, [], [], [], []
        steps, total, left = self._budget()
        done = f"{percent(steps / total)}" if total else ""
        progress.append(("progress", meter(steps / (total or 1), width - 6, "green", f"{done:>6}")))
        text = Text.assemble((count(steps), "bold"), f" of {count(total)}" if total else "")
        text.append(" env steps" + (f" · {duration(left)} left" if left is not None else ""))
        with suppress(KeyError):
            text.append(f" · {duration(row['elapsed_seconds'])} so far", "bright_black")
        progress.append(("", text))
        with suppress(KeyError):
            rates = (count(row["rate/env_steps"]), "bold"), (count(row["rate/updates"]), "bold")
            text = Text.assemble(rates[0], " env steps/s · ", rates[1], " updates/s")
            progress.append(("speed", text))
            text.append(f" · {counted(row['actors/alive'], 'actor')}")
            if restarts := sum(v for name, v in row.items() if name.endswith("/restarts")):
                text.append(f" · restarts {restarts:.0f}", "yellow")

        now = number(self.last_return) if self.returns else "no episode has ended yet"
        text = Text.assemble((sparkline(self.returns, width // 2), "green"), "  ", (now, "bold"))
        learning.append(("return", text))
        if self.returns and "episodes" in row:
            text.append(f"  {count(row['episodes'])} episodes", "bright_black")
        for label, prefix in (("by policy", "episode/return/"), ("lengths", "episode/length/")):
            names = [name.removeprefix(prefix) for name in row if name.startswith(prefix)]
            words = ((f"{name} ", (number(row[prefix + name]), "bold")) for name in names)
            if names:
                learning.append((label, Text(" · ").join(Text.assemble(*pair) for pair in words)))
        if self.evaluation:
            at, value = count(self.evaluation[0]), (number(self.evaluation[1]), "bold")
            learning.append(("evaluation", Text.assemble(value, f" at {at} env steps")))
        losses = " · ".join(f"{words} {row[name]:.3g}" for name, words in LOSSES if name in row)
        if losses and tall:
            learning.append(("losses", losses))

        fills = [
            Text(f"{name} ") + meter(row[f"{name}/fill"], width // 5, "blue", f"{full:>6}")
            for name in ("ring", "replay", "rollout")
            if (full := percent(row.get(f"{name}/fill", math.nan))) != "nan %"
        ]
        if fills:
            flow.append(("fill", Text("   ").join(fills)))
        with suppress(KeyError):
            value, target = row["limiter/samples_per_insert"], row["limiter/target"]
            who = row["limiter/waiting"]
            who += " wait" if who == "actors" else " waits"
            flow.append(("limiter", f"{value:.2f} samples per insert, target {target:g} · {who}"))
        with suppress(KeyError):
            span = f"{row['lag/min']:.0f} to {row['lag/max']:.0f}"
            flow.append(("policy lag", f"{number(row['lag/mean'])} versions on average, {span}"))
        with suppress(KeyError):
            text = f"{row['log/dropped']:.0f} lines could not be written"
            flow.append(("logs", Text(text, "red")))
        well, words = health(row, self.life, time.time(), self.held)
        flow.append(("health", Text(words, "green" if well else "red")))

        for label, side in (("learner", "time/learner/"), ("actors", "time/actor/")):
            shares = {n.removeprefix(side): row[n] for n in row if n.startswith(side)}
            if shares:
                times.append((label, stacked(shares, width)))
        for i, words in enumerate(row.get("bottleneck", "").split("; ")):
            times.append(("" if i else "bottleneck", Text(words, "bold")))
        return [section for section in (progress, learning, flow, times) if section]


def count(value: float) -> str:
    """950, 12,300, 3.81 M."""
    size, unit = (1e9, " G") if value >= 1e9 else (1e6, " M") if value >= 1e6 else (1, "")
    return f"{value / size:.3g}{unit}" if unit else f"{value:,.0f}"


def number(value: float) -> str:
    """A measured value: 12,345, 180.2, 0.073."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{1 if abs(value) >= 1 else 3}f}"


def duration(seconds: float) -> str:
    """45 s, 12 min, 3 h 05 min, 2 d 04 h."""
    minutes = int(seconds) // 60
    if minutes < 60:
        return f"{minutes} min" if minutes else f"{int(seconds)} s"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60:02d} h"


def meter(fraction: float, width: int, color: str, label: str) -> Text:
    """A line of `width` characters, coloured up to `fraction`, and a label behind it."""
    full = round(min(max(fraction, 0.0), 1.0) * width)
    return Text.assemble(("━" * full, color), ("━" * (width - full), "grey37"), label)


def stacked(shares: dict[str, float], width: int) -> Text:
    """Shares of a whole as one bar of colours, largest first, with as many names as fit beside."""
    bar, legend, length, end = Text(), Text(), width // 3, 0.0
    for name, share in sorted(shares.items(), key=lambda item: (item[0] == "rest", -item[1])):
        start, end = end, min(end + share, 1.0)
        color = COLORS.get(name, "bright_black")
        bar.append("▆" * (round(end * length) - round(start * length)), color)
        words = f"  {name} {percent(share)}"
        if share >= 0.01 and length + len(legend) + len(words) <= width:
            legend.append(words, color)
    return bar.append(" " * (length - len(bar))).append(legend)


def sparkline(values: list[float], width: int) -> str:
    """Means of up to `width` equal pieces of `values`, as bars of eight heights."""
    width = min(width, len(values))
    ends = [i * len(values) // width for i in range(width + 1)] if width else []
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(ends)]
    low, high = min(means, default=0), max(means, default=0)
    return "".join("▁▂▃▄▅▆▇█"[int(7 * (mean - low) / ((high - low) or 1))] for mean in means)
