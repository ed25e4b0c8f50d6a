"""One line that says how a run is."""

from __future__ import annotations

import time

import pytest

from asyncrl import cli
from asyncrl.folder import RunFolder
from asyncrl.health import SILENT_SECONDS, Life, health, is_held, look
from asyncrl.logs import Event, EventLog, RunLog

NOW = 1_000_000.0
ROW = {
    "time": NOW - 3, "actors/alive": 2, "actors/restarts": 0, "learner/restarts": 0,
    "memory/learner_mb": 1_200.0, "memory/actors_mb": 600.0, "memory/rss_mb": 5e9,
    "memory/shared_mb": 200.0, "fds/learner": 30, "fds/actors": 40,
}  # fmt: skip


def life(*events: tuple) -> Life:
    found = Life()
    for ago, kind, text, *status in events:
        found.take([Event(NOW - ago, kind, text, {"status": str(*status) or "1"})])
    return found


START, SAVED = (500, "start", "run x started"), (100, "checkpoint", "checkpoint_1 saved")


@pytest.mark.parametrize(
    "row, events, well, words",
    [
        (ROW, [START, SAVED], True,
         "well: heard from 3 s ago, 2 actors, 2.00 GB, 70 open files, checkpoint saved 1 min ago"),
        (ROW | {"learner/restarts": 1, "actors/restarts": 2, "log/dropped": 7, "envs/rebuilt": 4},
         [START], True, "restarts 3, envs made anew 4, log lines lost 7"),
        (ROW, [START, (9, "checkpoint", "not saved: no space")], False,
         "in trouble: heard from 3 s ago"),
        (ROW, [START, (9, "checkpoint", "not saved")], False, "could not be saved 9 s ago"),
        (ROW | {"actors/alive": 0}, [START], False, "in trouble"),
        (ROW, [(900, "end", "ended"), (20, "start", "again")], True, "2 actors"),
        (ROW, [(2, "start", "again")], True, "starting since 2 s"),
        ({}, [(20, "start", "begun")], True, "starting since 20 s"),
        ({}, [(400, "start", "begun")], False, "last heard from 6 min ago: not started, stuck or"),
        ({}, [], False, "no row of metrics yet"),
        (ROW | {"time": NOW - SILENT_SECONDS - 1}, [(9_000, "start", "begun")], False,
         "last heard from 5 min ago: not started, stuck or killed"),
        (ROW | {"time": NOW - 9_000}, [(9_900, "start", "begun")], False, "from 2 h 30 min ago"),
        # The clock was set back by an hour.
        (ROW, [(-3_500, "start", "begun")], True, "well: heard from 3 s ago, 2 actors"),
        (ROW | {"time": NOW - 400}, [(-3_500, "start", "begun")], False, "heard from 6 min ago"),
        (ROW | {"time": NOW + 3_500}, [(-3_000, "start", "begun")], False, "stuck or killed"),
        ({}, [(-3, "start", "begun")], True, "starting since 0 s"),
        (ROW, [START, (130, "end", "run x ended")], False, "ended with status 1, 2 min ago"),
        (ROW, [START, (130, "end", "run x ended", 0)], True, "ended with status 0, 2 min ago"),
    ],
)  # fmt: skip
def test_health_in_words(row, events, well, words):
    found = health(row, life(*events), NOW)
    assert found.well == well and words in found.words, found


def test_a_run_that_writes_seldom_is_not_silent():
    row, events = ROW | {"time": NOW - 1_000}, life((9_000, "start", "begun"))
    assert not health(row, events, NOW, log_seconds=300).well
    assert health(row, events, NOW, log_seconds=600).well


def test_a_run_whose_supervisor_was_killed_is_not_well(tmp_path):
    EventLog(tmp_path / "events.log").event("start", "run x started")
    log = RunLog(tmp_path, tensorboard=False)
    log.write(ROW | {"time": time.time()})
    (tmp_path / "config.json").write_text('{"config": {"learner": {"log_seconds": 5}}}')
    with RunFolder(tmp_path):
        assert look(tmp_path).well
        (tmp_path / "lock").unlink()
        assert look(tmp_path).well
    found = look(tmp_path)
    assert not found.well and "killed: no process holds its folder; start it again" in found.words
    assert not is_held(tmp_path)


def test_watch_shows_that_a_run_was_killed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ASYNCRL_RUNS", str(tmp_path))
    EventLog(tmp_path / "x" / "events.log").event("start", "run x started")
    RunLog(tmp_path / "x", tensorboard=False).write(ROW | {"time": time.time()})
    (tmp_path / "x" / "config.json").write_text("{}")

    def enough(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", enough)
    assert cli.main(["watch", "x"]) == 0
    assert 'health="last heard from 0 s ago, killed: no process' in capsys.readouterr().out


@pytest.mark.parametrize("line", ["5", '{"time": "x"}', '{"time": Infinity}', "[" * 9_000, "null"])
def test_rows_that_are_none(tmp_path, line):
    RunLog(tmp_path, tensorboard=False).write(ROW)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(f"{line}\n")
    assert not look(tmp_path).well


def test_watch_tells_it_and_exits_by_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ASYNCRL_RUNS", str(tmp_path))
    log, events = RunLog(tmp_path / "x", tensorboard=False), EventLog(tmp_path / "x" / "events.log")
    (tmp_path / "x" / "config.json").write_text("{}")
    assert cli.main(["watch", "x", "--health"]) == 1
    events.event("start", "run x started")
    run = RunFolder(tmp_path / "x").__enter__()
    assert look(tmp_path / "x").words.startswith("starting")
    for _ in range(3_000):  # more than is read
        log.write(ROW | {"time": time.time(), "filler": 1.0})
    with open(tmp_path / "x" / "metrics.jsonl", "a") as file:
        file.write('{"time": 3')
    capsys.readouterr()
    assert cli.main(["watch", "x", "--health"]) == 0
    assert capsys.readouterr().out.startswith("well: heard from 0 s ago, 2 actors, 2.00 GB")
    events.event("end", "run x ended", status=143)
    assert cli.main(["watch", "x", "--health"]) == 1
    assert "ended with status 143" in capsys.readouterr().out
    assert cli.main(["watch", "x"]) == 0  # not for ever
    assert capsys.readouterr().out.splitlines()[-1].startswith("x ended with status 143, 0 s ago")
    run.__exit__()
