"""The panel against files that grow, tear, are cut back or vanish, and streams that close."""

import io
import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from asyncrl import panel as panel_module
from asyncrl.logs import EventLog, RunLog
from asyncrl.panel import Panel, Tail, count, duration, sparkline, stacked

ROW = {
    "env_steps": 250_000, "elapsed_seconds": 100.0, "episodes": 4000, "episode/return": 21.5,
    "episode/return/greedy": 30.0, "episode/length/greedy": 812.4, "rate/env_steps": 2500.0,
    "rate/updates": 600.0, "lag/min": 0,
    "lag/mean": 1.5, "lag/max": 4, "ring/fill": 0.25, "replay/fill": 1.0, "limiter/target": 8.0,
    "limiter/samples_per_insert": 7.98, "limiter/waiting": "actors", "time/learner/update": 0.8,
    "time/learner/wait": 0.05, "time/actor/env": 0.4, "time/actor/wait": 0.6, "actors/alive": 4,
    "loss/q": 0.012345, "loss/q_mean": 2.5, "loss/q_variance": 0.4, "loss/grad_norm": 9.0,
    "actors/restarts": 0, "bottleneck": "learner: 80 % of its time in updates; actors wait 60 %",
}  # fmt: skip


def text_of(panel, width=80, height=24):
    panel._read()
    console = Console(width=width, height=height, file=io.StringIO(), color_system=None)
    console.print(panel.view(width, height))
    return console.file.getvalue()


def colored(folder) -> str:
    panel = Panel(folder, 1_000_000, io.StringIO())
    panel._read()
    console = Console(width=80, height=24, file=io.StringIO(), force_terminal=True,
                      color_system="standard")  # fmt: skip
    console.print(panel.view(80, 24))
    return console.file.getvalue()


def test_tail_reads_complete_lines_once(tmp_path):
    tail = Tail(tmp_path / "log")
    assert tail.read() == ([], False)
    with open(tail.path, "ab", buffering=0) as file:
        file.write("a\nb ü\ntor".encode())
        assert tail.read() == (["a", "b ü"], False)
        assert tail.read() == ([], False)
        file.write(b"n\n")
        assert tail.read() == (["torn"], False)


def test_what_is_too_much_for_one_reading_is_read_on(tmp_path, monkeypatch):
    monkeypatch.setattr(panel_module, "READ_NBYTES", 300)
    log = RunLog(tmp_path, tensorboard=False)
    for step in range(20):
        log.write({"env_steps": step, "episode/return": float(step)})
    shown = Panel(tmp_path, 100, io.StringIO())
    shown.refresh()
    assert shown.returns == list(range(20))


def test_of_many_returns_as_many_are_kept_as_can_be_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(panel_module, "MAX_RETURNS", 8)
    panel = Panel(tmp_path, 100, io.StringIO())
    for step in range(1, 101):
        panel._take({"env_steps": step, "episode/return": float(step)})
        assert len(panel.returns) <= 8
    assert panel.returns == [16, 32, 48, 64, 80, 96]  # none of them closer to the next
    assert "  100.0" in text_of(panel)


@pytest.mark.parametrize("grown", ["", "3 other\n", "3 other\n4\n5\n6\n"])
def test_tail_notices_a_file_cut_back_even_if_it_grew_again(tmp_path, grown):
    tail = Tail(tmp_path / "log")
    tail.path.write_text("1\n2\n3\n4\n")
    tail.read()
    os.truncate(tail.path, 4)
    with open(tail.path, "a") as file:
        file.write(grown)
    assert tail.read() == (["1", "2", *grown.splitlines()], True)
    assert tail.read() == ([], False)


def test_tail_notices_a_replaced_file_and_outlives_a_missing_one(tmp_path):
    tail = Tail(tmp_path / "log")
    tail.path.write_text("1\n")
    tail.read()
    tail.path.unlink()
    assert tail.read() == ([], False)
    tail.path.write_text("one\ntwo\n")
    assert tail.read() == (["one", "two"], True)


def test_view_says_what_matters_within_80_by_24(tmp_path):
    log = RunLog(tmp_path / "breakout", tensorboard=False)
    events = EventLog(tmp_path / "breakout" / "events.log")
    log.write(ROW | {"time": time.time(), "eval/return": 33.0, "eval/env_steps": 200_000})
    log.write(ROW | {"time": time.time(), "env_steps": 500_000, "elapsed_seconds": 200.0})
    for i in range(9):
        events.event("restarted", f"actor {i} restarted [with brackets]")
    events.event("death", "actor 9 died: signal SIGKILL\nTraceback\n  more", pid=5)
    text = text_of(Panel(tmp_path / "breakout", 1_000_000, io.StringIO()))
    lines = text.splitlines()
    assert len(lines) <= 23 and {len(line) for line in lines} == {80}
    for words in (
        "breakout", " 50 %", "500,000 of 1 M env steps · 3 min left · 3 min so far",
        "2,500 env steps/s · 600 updates/s · 4 actors", "21.5  4,000 episodes", "greedy 30.0",
        "greedy 812.4",
        "33.0 at 200,000 env steps", "25 %", "100 %", "7.98 samples per insert, target 8",
        "actors wait", "1.5 versions on average, 0 to 4", "update 80 %", "wait 60 %",
        "learner: 80 % of its time in updates", "9 died: signal SIGKILL", "8 restarted [with br",
    ):  # fmt: skip
        assert words in text, words
    assert "actor 0" not in text and "Traceback" not in text
    (death,) = [line for line in colored(tmp_path / "breakout").splitlines() if "9 died" in line]
    (again,) = [line for line in colored(tmp_path / "breakout").splitlines() if "8 restart" in line]
    assert "\x1b[31mdeath" in death and "\x1b[33mrestarted" in again  # red, yellow
    assert "last row" not in text
    losses = "losses      Q loss 0.0123 · mean Q 2.5 · variance 0.4"
    assert losses in text_of(Panel(tmp_path / "breakout", 1_000_000, io.StringIO()), height=30)


@pytest.mark.parametrize("width, height", [(60, 20), (40, 12), (20, 5), (5, 2), (200, 60)])
def test_view_fits_any_terminal(tmp_path, width, height):
    RunLog(tmp_path / "r", tensorboard=False).write(ROW)
    text = text_of(Panel(tmp_path / "r", 1_000_000, io.StringIO()), width, height)
    assert max(map(len, text.splitlines())) <= width
    assert width < 40 or ("250,000 of 1 M" in text and "80 % of its" in text)


@pytest.mark.parametrize("row", [{}, {"env_steps": 0}, {"env_steps": 5, "bottleneck": None}])
def test_view_of_almost_nothing(tmp_path, row):
    panel = Panel(tmp_path / "new", None, io.StringIO())
    assert "waiting for the first metrics" in text_of(panel)
    RunLog(tmp_path / "new", tensorboard=False).write(row)
    assert "new" in text_of(panel)


def test_an_old_last_row_is_said(tmp_path):
    RunLog(tmp_path, tensorboard=False).write(ROW | {"time": time.time() - 7300})
    assert "last row 2 h 01 min ago" in text_of(Panel(tmp_path, None, io.StringIO()))


def test_a_cut_back_log_takes_its_returns_with_it(tmp_path):
    log = RunLog(tmp_path, tensorboard=False)
    log.write(ROW | {"episode/return": 1.0})
    positions = log.positions()
    log.write(ROW | {"episode/return": 2.0, "eval/return": 9.0})
    panel = Panel(tmp_path, None, io.StringIO())
    panel._read()
    assert panel.returns == [1.0, 2.0] and panel.evaluation == (250_000, 9.0)
    RunLog(tmp_path, positions, tensorboard=False).write(ROW | {"episode/return": 3.0})
    panel._read()
    assert panel.returns == [1.0, 3.0] and panel.evaluation is None


def test_a_row_that_was_cut_off_before_it_was_printed(tmp_path):
    """A learner that dies before its first checkpoint takes all rows with it."""
    log, stream = RunLog(tmp_path, tensorboard=False), io.StringIO()
    positions = log.positions()
    log.write(ROW)
    panel = Panel(tmp_path, None, stream)
    panel.refresh()
    log.write(ROW)
    panel.refresh()  # too soon after the first to be printed
    RunLog(tmp_path, positions, tensorboard=False)
    panel.close()
    assert len(stream.getvalue().splitlines()) == 1


def test_plain_lines_first_then_seldom_then_last(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(panel_module.time, "monotonic", lambda: now[0])
    stream, log = io.StringIO(), RunLog(tmp_path / "my_run", tensorboard=False)
    EventLog(tmp_path / "my_run" / "events.log").event("start", "long ago")
    time.sleep(0.01)
    with Panel(tmp_path / "my_run", 1_000_000, stream) as panel:
        panel.refresh()
        assert stream.getvalue() == ""
        for step in range(1, 26):  # a row a second
            log.write(ROW | {"time": 0, "env_steps": step, "elapsed_seconds": step})
            panel.refresh()
            panel.refresh()
            now[0] += 1
        EventLog(tmp_path / "my_run" / "events.log").event("death", "actor 1 died\nTraceback")
    lines = stream.getvalue().splitlines()
    assert [line.split("env_steps=")[1].split()[0] for line in lines if "env_steps=" in line] == [
        "1", "11", "21", "25",
    ]  # fmt: skip
    assert lines[-2].endswith(" my_run death: actor 1 died")  # the old event and the traceback not
    assert len(lines) == 5
    for words in (" my_run env_steps=25 (0.0%) ", " episode/return=21.5 ", " rate/env_steps=2500 "):
        assert words in lines[-1]
    assert lines[-1].endswith(f'bottleneck="{ROW["bottleneck"]}"')


def run_panel(folder, stdout):
    code = (
        "import sys, time; from asyncrl.panel import Panel\n"
        f"panel = Panel({str(folder)!r}, 1_000_000)\n"
        "for _ in range(3): panel.refresh(); panel._unshown = True; panel._plain_time = 0\n"
        "panel.close(); sys.exit(7)"
    )
    # A buffered stdout is what fails again when the interpreter flushes it at exit.
    environment = os.environ | {"TERM": "xterm-256color", "PYTHONUNBUFFERED": ""}
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], env=environment,
        stdout=stdout, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_closed_stdout_ends_nothing(tmp_path):
    RunLog(tmp_path, tensorboard=False).write(ROW)
    reader, writer = os.pipe()
    os.close(reader)
    with run_panel(tmp_path, writer) as process:
        os.close(writer)
        assert process.communicate()[1] == b""
        assert process.returncode == 7


def test_a_terminal_shows_the_panel_and_may_vanish(tmp_path):
    RunLog(tmp_path, tensorboard=False).write(ROW)
    for vanish in (False, True):
        terminal, process_side = pty.openpty()
        if vanish:
            os.close(terminal)
        with run_panel(tmp_path, process_side) as process:
            os.close(process_side)
            shown = b""
            while not vanish and b"\x1b[?25h" not in shown:  # the cursor is given back at the end
                shown += os.read(terminal, 65536)
            assert process.communicate()[1] == b""
            assert process.returncode == 7
        assert vanish or "samples per insert" in shown.decode()
        if not vanish:
            os.close(terminal)


def test_numbers_and_pictures_by_hand():
    assert [count(n) for n in (950, 12_300, 3_812_000, 2e9)] == ["950", "12,300", "3.81 M", "2 G"]
    assert [duration(s) for s in (45, 725, 11_100, 187_200)] == [
        "45 s", "12 min", "3 h 05 min", "2 d 04 h",
    ]  # fmt: skip
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7], 2) == "▁█" and sparkline([5.0], 9) == "▁" == sparkline([5], 1)
    bar = stacked({"wait": 0.5, "rest": 0.2, "env": 0.3}, 60)
    assert bar.plain == "▆" * 20 + "  wait 50 %  env 30 %  rest 20 %"
    assert stacked({"wait": 0.9, "env": 0.9}, 30).plain.startswith("▆" * 10 + "  ")  # no overflow


def test_a_row_is_json_from_somebody_else(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('[1]\nnonsense\n{"env_steps": 3}\n' + json.dumps(ROW))
    panel = Panel(tmp_path, None, io.StringIO())
    panel._read()
    assert panel.row == {"env_steps": 3}


def test_the_last_row_stands_before_the_end(tmp_path):
    stream = io.StringIO()
    panel = Panel(tmp_path, 100, stream)
    panel._start_time -= 1  # events are logged to the millisecond
    RunLog(tmp_path, tensorboard=False).write({"env_steps": 100})
    EventLog(tmp_path / "events.log").event("end", "run x ended")
    panel.refresh()
    panel.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 and "env_steps=100" in lines[0] and "end: run x ended" in lines[1]
