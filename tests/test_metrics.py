"""Counters against hand numbers; the run's files against kills, full disks and deleted folders."""

import json
import math
import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from asyncrl import logs
from asyncrl.logs import EventLog, RunLog, read_episodes, read_events, read_metrics
from asyncrl.metrics import EpisodeStatistics, Lags, Rate, TimeShares, bottleneck, who_waits


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until `clock.seconds` is changed."""

    class Clock:
        seconds = 1000.0

    monkeypatch.setattr(time, "perf_counter", lambda: Clock.seconds)
    monkeypatch.setattr(time, "perf_counter_ns", lambda: int(Clock.seconds * 1e9))
    return Clock


def test_time_shares_by_hand(clock):
    shares = TimeShares()
    with shares.time("update"):
        clock.seconds += 6
    with shares.time("wait"):
        clock.seconds += 1
    clock.seconds += 3
    assert shares.fractions_since_last() == pytest.approx({"update": 0.6, "wait": 0.1, "rest": 0.3})
    with shares.time("wait"):
        clock.seconds += 2
    # Only what came since the last call; what did not happen is 0, not missing.
    assert shares.fractions_since_last() == pytest.approx({"update": 0, "wait": 1, "rest": 0})
    assert shares.nanoseconds == {"update": 6_000_000_000, "wait": 3_000_000_000}


def test_nested_and_open_shares_never_count_twice(clock):
    shares = TimeShares()
    with shares.time("sync"):
        clock.seconds += 1
        with pytest.raises(KeyError), shares.time("wait"):
            clock.seconds += 2
            raise KeyError
        clock.seconds += 1
        assert shares.fractions_since_last() == pytest.approx({"sync": 0.5, "wait": 0.5, "rest": 0})
        clock.seconds += 4
    assert shares.fractions_since_last() == pytest.approx({"sync": 1, "wait": 0, "rest": 0})


def test_rate_since_last_call_and_after_a_resume(clock):
    rate = Rate(1_000_000)
    clock.seconds += 2
    assert rate.per_second_since_last(1_000_500) == 250
    clock.seconds += 10
    assert rate.per_second_since_last(1_000_500) == 0


def test_episode_statistics_are_bounded_and_by_policy():
    statistics = EpisodeStatistics(("greedy", "random"), window=3)
    assert statistics.summary() == {}
    for return_, length in [(1, 10), (2, 20), (3, 30), (7, 40)]:
        statistics.add(0, return_, length)
    statistics.add(1, -2.5, 5)
    assert statistics.num_episodes == 5
    assert statistics.summary() == {
        "episode/return": 2.5,  # of 3, 7, -2.5, the last three whoever played
        "episode/length": 25.0,
        "episode/return/greedy": 4.0,
        "episode/length/greedy": 30.0,
        "episode/return/random": -2.5,
        "episode/length/random": 5.0,
    }
    assert statistics.recent_lengths(0).tolist() == [20, 30, 40]
    assert statistics.recent_lengths(1).tolist() == [5]


def test_recent_lengths_in_a_table():
    statistics = EpisodeStatistics(("a", "b", "c"), window=6)
    for i in range(9):
        statistics.add(0, 0.0, 10 + i)
    statistics.add(2, 0.0, 7)
    table = np.full((3, 4), 99, np.int32)
    statistics.write_lengths(table)
    assert table.tolist() == [[15, 16, 17, 18], [0, 0, 0, 0], [7, 0, 0, 0]]
    wide = np.full((3, 8), 99, np.int32)  # more than are kept
    statistics.write_lengths(wide)
    assert wide[0].tolist() == [13, 14, 15, 16, 17, 18, 0, 0]


def test_episode_statistics_survive_a_checkpoint_and_a_changed_mix():
    statistics = EpisodeStatistics(("a", "b"), window=4)
    for i in range(9):
        statistics.add(i % 2, i, 10 * i)
    state = json.loads(json.dumps(statistics.state_dict()))
    same = EpisodeStatistics(("a", "b"), window=4)
    same.load_state_dict(state)
    assert same.summary() == statistics.summary() and same.num_episodes == 9
    same.add(0, 100, 1)  # still bounded after loading
    assert len(same.recent_lengths(0)) == 4
    changed = EpisodeStatistics(("c", "b"), window=4)
    changed.load_state_dict(state)
    assert changed.recent_lengths(1).tolist() == [10, 30, 50, 70]
    assert changed.recent_lengths(0).size == 0


def test_rows_come_back_as_columns(tmp_path):
    log = RunLog(tmp_path / "run", tensorboard=False)
    log.write({"env_steps": 1, "loss/td": float("nan"), "bottleneck": "balanced"})
    log.write({"env_steps": np.int64(2), "loss/td": np.float32(0.5), "eval/return": np.inf})
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"env_steps": 1, "loss/td": None, "bottleneck": "balanced"}
    assert json.loads(lines[1]) == {"env_steps": 2, "loss/td": 0.5, "eval/return": None}
    columns = read_metrics(tmp_path / "run")
    assert columns["env_steps"].tolist() == [1, 2] and columns["env_steps"].dtype == np.float64
    assert math.isnan(columns["loss/td"][0]) and columns["loss/td"][1] == 0.5
    assert columns["bottleneck"].tolist() == ["balanced", None]


def test_episodes_have_one_header_and_quoted_policies(tmp_path):
    for step in (1, 2):
        RunLog(tmp_path, tensorboard=False).write_episodes([(0.5, step, 3, "eps,0.1", -1.5, 70)])
    text = (tmp_path / "episodes.csv").read_text()
    assert text.splitlines()[0] == "time,env_steps,actor,policy,return,length"
    assert text.count("env_steps") == 1
    episodes = read_episodes(tmp_path)
    assert episodes["env_steps"].tolist() == [1, 2] and episodes["policy"][0] == "eps,0.1"
    assert episodes["return"].tolist() == [-1.5, -1.5] and episodes["length"].dtype == np.int64


def test_readers_pass_over_torn_and_foreign_lines(tmp_path):
    assert read_metrics(tmp_path) == {} and read_episodes(tmp_path)["return"].shape == (0,)
    (tmp_path / "metrics.jsonl").write_bytes(b'{"a": 1}\nnot json\n\xff\n[3]\n{"a": 2}\n{"a": 31}')
    assert read_metrics(tmp_path)["a"].tolist() == [1, 2]  # 31 may have been about to be 314
    rows = '{"a": "x", "b": [1]}\n{"a": 3, "b": {}, "limiter/waiting": "x"}\n{"bottleneck": 3}\n'
    (tmp_path / "metrics.jsonl").write_text(rows)
    columns = {name: column.tolist() for name, column in read_metrics(tmp_path).items()}
    assert columns == {"a": [3], "limiter/waiting": ["x"]}
    header = "time,env_steps,actor,policy,return,length\n"
    (tmp_path / "episodes.csv").write_text(header + "1,2,0,p,5,6\n1,2,x\n2,3,0,p,21,7\n3,4,0,p,8,9")
    assert read_episodes(tmp_path)["return"].tolist() == [5, 21]


def test_torn_tail_is_cut_when_a_run_goes_on(tmp_path):
    log = RunLog(tmp_path, tensorboard=False)
    log.write({"env_steps": 1})
    log.write_episodes([(0, 1, 0, "p", 1, 1)])
    for name in ("metrics.jsonl", "episodes.csv"):
        with open(tmp_path / name, "a") as file:
            file.write('{"torn' + "x" * 70_000)  # longer than one step of the search
    log = RunLog(tmp_path, tensorboard=False)
    log.write({"env_steps": 2})
    log.write_episodes([(0, 2, 0, "p", 2, 1)])
    assert (tmp_path / "metrics.jsonl").read_text() == '{"env_steps": 1}\n{"env_steps": 2}\n'
    assert read_episodes(tmp_path)["return"].tolist() == [1, 2]


@pytest.mark.parametrize("bad", ['"', '0,1,0,"p,1,1', f"0,{10**30},0,p,1,1", "0,1,0,p,1", "\0", ""])
def test_a_bad_line_of_episodes_hides_no_other(tmp_path, bad):
    log = RunLog(tmp_path, tensorboard=False)
    log.write_episodes([(0, 1, 0, 'a "quoted", name', 1, 1)])
    with open(tmp_path / "episodes.csv", "a") as file:
        file.write(f"{bad}\n")
    log = RunLog(tmp_path, tensorboard=False)
    log.write_episodes([(0, step, 0, "p" * 1_000, step, 1) for step in range(2, 300)])
    episodes = read_episodes(tmp_path)
    assert episodes["env_steps"].tolist() == list(range(1, 300))
    assert episodes["policy"][0] == 'a "quoted", name' and episodes["length"].dtype == np.int64


def test_resume_cuts_both_files_back_to_the_checkpoint(tmp_path):
    log = RunLog(tmp_path, tensorboard=False)
    for step in (1, 2):
        log.write({"env_steps": step})
        log.write_episodes([(0, step, 0, "p", step, 1)])
    positions = json.loads(json.dumps(log.positions()))
    for step in (3, 4, 5):
        log.write({"env_steps": step})
        log.write_episodes([(0, step, 0, "p", step, 1)])
    log = RunLog(tmp_path, resume_positions=positions, tensorboard=False)
    assert log.positions() == positions
    log.write({"env_steps": 3})
    log.write_episodes([(0, 3, 0, "p", 3, 1)])
    assert read_metrics(tmp_path)["env_steps"].tolist() == [1, 2, 3]
    assert read_episodes(tmp_path)["env_steps"].tolist() == [1, 2, 3]
    beyond = {"metrics.jsonl": 10**9, "episodes.csv": 10**9}  # the power went before a page did
    assert RunLog(tmp_path, beyond, tensorboard=False).positions() == log.positions()
    assert b"\0" not in (tmp_path / "metrics.jsonl").read_bytes()


def test_logs_can_be_had_to_survive_a_power_cut(tmp_path, monkeypatch):
    log, synced, fsync = RunLog(tmp_path, tensorboard=False), [], os.fsync
    log.write({"env_steps": 1})
    names = {path.stat().st_ino: path.name for path in (*tmp_path.iterdir(), tmp_path)}
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino) or fsync(fd))
    log.sync()
    assert [names[inode] for inode in synced] == [*log.positions(), tmp_path.name]
    (tmp_path / "metrics.jsonl").unlink()
    log.sync()  # never raises, and makes nothing
    assert not (tmp_path / "metrics.jsonl").exists()


def full_disk_child(folder):
    log = RunLog(folder, tensorboard=True)
    log.write({"env_steps": 1})
    size = (Path(folder) / "metrics.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 8, resource.RLIM_INFINITY))
    log.write({"env_steps": 2})  # the first 8 bytes of it fit
    log.write_episodes([(0, 2, 0, "p" * 100, 2, 1)] * 3)
    assert log.dropped == 4, log.dropped
    assert log.positions()["metrics.jsonl"] == size
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    log.write({"env_steps": 3})


def test_full_disk_drops_counts_and_recovers(tmp_path):
    code = f"from tests.test_metrics import full_disk_child; full_disk_child({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"env_steps": 1}, {"env_steps": 3, "log/dropped": 4}]
    assert read_episodes(tmp_path)["return"].size == 0


def test_deleted_folder_is_made_again(tmp_path):
    run = tmp_path / "run"
    log = RunLog(run)
    log.write({"env_steps": 1})
    run.rename(tmp_path / "old")
    run.write_text("a file in the way")
    log.write({"env_steps": 2})
    assert log.dropped == 1
    run.unlink()
    log.write({"env_steps": 3})
    log.write_episodes([(0, 3, 0, "p", 3, 1)])
    assert read_metrics(run)["env_steps"].tolist() == [3]
    assert read_metrics(run)["log/dropped"].tolist() == [1]
    assert read_episodes(run)["return"].tolist() == [3]
    assert scalars(run, "log/dropped") == [(3, 1.0)]


def scalars(run, tag):
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run / "tensorboard"))
    accumulator.Reload()
    return [(e.step, float(e.tensor_proto.float_val[0])) for e in accumulator.Tensors(tag)]


def test_tensorboard_curves_do_not_double(tmp_path):
    pytest.importorskip("tensorboard")
    log = RunLog(tmp_path)
    for step in (10, 20):
        log.write({"env_steps": step, "loss/td": step / 10, "bottleneck": "balanced", "x": None})
    positions = log.positions()
    for step in (30, 40, 50):
        log.write({"env_steps": step, "loss/td": -1})
    log = RunLog(tmp_path, positions)
    assert scalars(tmp_path, "loss/td") == [(10, 1.0), (20, 2.0)]  # already before the next row
    log.write({"env_steps": 30, "loss/td": 3})
    assert scalars(tmp_path, "loss/td") == [(10, 1.0), (20, 2.0), (30, 3.0)]


def test_without_tensorboard_it_says_so_and_goes_on(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.warns(UserWarning, match="no TensorBoard files"):
        log = RunLog(tmp_path)
    log.write({"env_steps": 1})
    assert read_metrics(tmp_path)["env_steps"].tolist() == [1] and log.dropped == 0


def test_logging_needs_no_torch(tmp_path):
    """The supervisor imports this file and must stay small; the file is loaded alone here."""
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('logs', {logs.__file__!r})\n"
        "sys.modules['logs'] = module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        f"module.RunLog({str(tmp_path)!r}).write({{'env_steps': 1}})\n"
        "assert not {'torch', 'asyncrl', 'tensorflow'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_events_round_trip(tmp_path):
    path = tmp_path / "logs" / "events.log"
    assert read_events(path) == []
    log = EventLog(path)
    log.event("death", "actor 0 died: signal SIGKILL", pid=123, command='say "hi" = x')
    log.event("traceback", "ValueError: no  such=thing\n  File x\n\n    y = 1", actor=1)
    log.event("checkpoint", "", path="")
    first, second, third = read_events(path)
    assert (first.kind, first.text) == ("death", "actor 0 died: signal SIGKILL")
    assert first.fields == {"pid": "123", "command": 'say "hi" = x'}
    assert abs(first.time - time.time()) < 5
    assert second.text == "ValueError: no such=thing\n  File x\n\n    y = 1"
    assert second.fields == {"actor": "1"}
    assert (third.text, third.fields) == ("-", {"path": ""})
    line = path.read_text().splitlines()[0]
    assert line[24:] == (
        '  death      actor 0 died: signal SIGKILL  pid=123 command="say \\"hi\\" = x"'
    )


def test_an_event_cut_short_does_not_spoil_the_next(tmp_path):
    log = EventLog(tmp_path / "events.log")
    log.event("start", "run")
    with open(log.path, "a") as file:
        file.write("2026-99-99T12:00:00.1Z  death      no such day\n")
        file.write('2026-01-01T12:00:00.1Z  death      text  field="open\n2026-01-01T12:0')
    assert [event.kind for event in read_events(log.path)] == ["start"]
    log.event("restart", "actor 1 restarted")
    assert [event.kind for event in read_events(log.path)] == ["start", "restart"]


def write_many_events(path, writer):
    for i in range(50):
        EventLog(path).event("test", "first\n" + "x" * 3000, writer=writer, i=i)


def test_events_of_many_processes_do_not_mix(tmp_path):
    path = tmp_path / "events.log"
    with ProcessPoolExecutor(4) as pool:
        list(pool.map(write_many_events, [path] * 4, range(4)))
    events = read_events(path)
    found = sorted((int(e.fields["writer"]), int(e.fields["i"])) for e in events)
    assert found == [(writer, i) for writer in range(4) for i in range(50)]
    assert {event.text for event in events} == {"first\n" + "x" * 3000}


def test_event_log_never_raises(tmp_path):
    (tmp_path / "file").write_text("")
    EventLog(tmp_path / "file" / "events.log").event("start", "nobody hears this")
    os.mkdir(tmp_path / "events.log")
    EventLog(tmp_path / "events.log").event("start", "nor this")


def test_an_event_that_could_not_be_written_comes_with_the_next(tmp_path):
    path = tmp_path / "events.log"
    path.mkdir()
    log = EventLog(path)
    log.event("checkpoint", "not saved: no space\nleft on device", env_steps=3)
    for _ in range(1_000):
        log.event("checkpoint", "not saved")
    path.rmdir()
    log.event("checkpoint", "saved")
    log.event("checkpoint", "saved again")
    events = read_events(path)
    assert events[0].text == "not saved: no space\nleft on device"
    assert events[0].fields == {"env_steps": "3"}
    assert [event.text for event in events[-2:]] == ["saved", "saved again"]
    assert 100 < len(events) < 1_000


@pytest.mark.parametrize(
    "row, words",
    [
        ({"env_steps": 5}, "not known yet"),
        (
            {"time/learner/update": 0.83, "time/learner/wait": 0.02, "time/actor/env": 0.3}
            | {"time/actor/wait": 0.61},
            "learner: 83 % of its time in updates; actors wait 61 % for the rate limit",
        ),
        (
            {"time/learner/sync": 0.5, "time/actor/wait": 0.4, "ring/fill": 1.0},
            "learner: 50 % of its time filling the store; actors wait 40 % for room in the ring",
        ),
        (
            {"time/learner/sync": 0.5, "time/actor/wait": 0.4, "ring/fill": 1.0}
            | {"limiter/waiting": "actors"},
            "learner: 50 % of its time filling the store; actors wait 40 % for the rate limit",
        ),
        (
            {"time/learner/update": 0.5, "time/learner/wait": 0.4, "time/actor/env": 0.7}
            | {"time/actor/inference": 0.2, "time/actor/wait": None},
            "actors: the learner waits 40 % for data; actors spend 70 % stepping environments",
        ),
        (
            {"time/learner/update": 0.95, "time/actor/inference": 0.6, "time/actor/wait": 0.05},
            "balanced: learner 95 % in updates, actors 60 % in inference",
        ),
        (
            {"time/learner/wait": 0.5, "time/learner/log": math.nan, "time/actor/wait": 0.45},
            "turns: the learner waits 50 % of its time, actors wait 45 %",
        ),
    ],
)
def test_bottleneck_in_words(row, words):
    assert bottleneck(row) == words


def test_lags_are_of_the_time_since_the_last_look():
    lags = Lags()
    assert lags.summary() == {}
    for lag in (0, 3, 3):
        lags.add(lag)
    assert lags.summary() == {"lag/min": 0, "lag/mean": 2, "lag/max": 3}
    assert lags.summary() == {"lag/min": 0, "lag/mean": 2, "lag/max": 3}  # nothing new
    lags.add(1)
    assert lags.summary() == {"lag/min": 1, "lag/mean": 1, "lag/max": 1}


def test_who_waits_longer():
    assert [who_waits(*shares) for shares in ((0.1, 0.0), (0.2, 0.3), (0.3, 0.2))] == [
        "nobody", "actors", "learner"
    ]  # fmt: skip
