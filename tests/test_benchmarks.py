"""What the benchmarks count, by hand numbers; and that each of them can be asked for help."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time

import pytest
import torch
from torch import nn

from asyncrl.algorithms.gradient import GradientStep
from tests.runs import REPOSITORY

FOLDER = REPOSITORY / "benchmarks"
NO_OPTIONS = ("measure", "peers", "full_replay", "paced_cartpole", "endurance")
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py")
                 if path.stem not in NO_OPTIONS and "peer_" not in path.stem)  # fmt: skip


@pytest.fixture
def benchmark(monkeypatch):
    """`benchmark(name)` imports one, as if its folder were the program's."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(benchmark, name, monkeypatch, capsys):
    asked, show = [], argparse.ArgumentParser.print_help
    monkeypatch.setattr(
        argparse.ArgumentParser, "print_help", lambda self: (asked.append(self), show(self))
    )
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        benchmark(name).main()
    assert ended.value.code == 0
    assert f"python benchmarks/{name}.py" in capsys.readouterr().out  # how to run it
    assert [option.option_strings for option in asked[0]._actions if not option.help] == []


@pytest.mark.parametrize("one_vector", [True, False])
def test_training_without_guards_learns_the_same(benchmark, one_vector):
    torch.manual_seed(0)
    batches = torch.randn(5, 7, 3)

    def trained(*without) -> list[torch.Tensor]:
        torch.manual_seed(1)
        net = nn.Linear(3, 2)
        if not one_vector:  # what is not contiguous cannot be part of one
            net.weight = nn.Parameter(torch.randn(3, 2).t())
        step = GradientStep(net, 0.1, 0.5, 1e-5)
        assert (step.vector is not None) == one_vector
        for number, batch in enumerate(batches):
            loss = net(batch).square().mean()
            if number in without:
                with benchmark("guards").without_guards():
                    step(loss, 0)
            else:
                step(loss, 0)
        return [parameter.detach().clone() for parameter in net.parameters()]

    assert all(map(torch.equal, trained(), trained(1, 2, 4)))


class Finished:
    """A program whose rows are all there; env steps arrive 256 at a time, updates one by one."""

    def __init__(self, rows: list[dict]):
        self.process, self.begun, self._rows = self, time.time(), rows
        self.pid = os.getpid()

    def rows(self) -> list[dict]:
        return self._rows

    def poll(self) -> None:
        return None

    def stop(self) -> None:
        self.stopped = True


def test_rates_are_those_of_updates_where_env_steps_come_in_lumps(benchmark, monkeypatch):
    throughput = benchmark("throughput")
    monkeypatch.setattr(throughput, "SETTLE_SECONDS", 0.0)
    lumps = [0, 256, 256, 512, 1024]  # rows of 0, 1, 2, 3, 4 s; 50 updates in each second
    now = time.time()
    rows = [{"time": now + i, "env_steps": its, "updates": 50 * i} for i, its in enumerate(lumps)]
    found = throughput.measure("x", program := Finished(rows), 3.0, 32, 4)
    assert program.stopped
    assert found["env steps/s"] == pytest.approx(200) and found["updates/s"] == pytest.approx(50)
    assert found["env steps an update"] == pytest.approx((1024 - 256) / 150)
    assert found["samples/s"] == pytest.approx(1600)
    counted = throughput.measure("x", Finished(rows), 3.0)  # how many an update is not known
    assert counted["env steps/s"] == pytest.approx((1024 - 256) / 3)


def test_rows_to_measure_between_have_new_env_steps_and_updates(benchmark):
    counts = [(0, 0), (10, 0), (10, 4), (10, 8), (20, 8), (30, 12), (40, 12), (50, 16)]
    rows = [{"time": i, "env_steps": s, "updates": u} for i, (s, u) in enumerate(counts)]
    fresh = benchmark("throughput").whole_rounds(rows, 2)
    assert [row["time"] for row in fresh] == [4, 5, 7]


def test_ratios_are_those_of_each_repeat(benchmark):
    rates = {
        "asyncrl": [30.0, 60.0],
        "sb3": [10.0, 30.0],
        "sb3-32": [15.0, 10.0],
        "sb3-tuned": [40.0, 50.0],
        "plain": [60, 60],
    }
    rows = {name: {"env steps/s": values} for name, values in rates.items()}
    assert benchmark("throughput").add_ratios(rows) == "sb3"  # of peers as they are installed
    assert rows["asyncrl"]["/ best peer"] == rows["asyncrl"]["/ sb3"] == [3.0, 2.0]
    assert rows["asyncrl"]["/ plain"] == [0.5, 1.0]


def test_what_is_busy_is_counted(benchmark):
    throughput = benchmark("throughput")
    before, own = throughput.machine_seconds(), time.process_time()
    while time.process_time() - own < 0.5:
        pass
    assert throughput.machine_seconds() - before > 0.4  # the kernel counts in hundredths


def test_a_peer_is_told_of_the_cores(benchmark, tmp_path, monkeypatch):
    peers, told = benchmark("peers"), tmp_path / "told"
    script = "import os, sys; open(sys.argv[1], 'w').write(os.environ['BENCHMARK_CORES'])"
    monkeypatch.setattr(peers, "usable_cores", lambda: 3)
    monkeypatch.setattr(peers, "REPOSITORY", tmp_path)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "peer_sf.py").write_text(
        script.replace("sys.argv[1]", repr(str(told)))
    )
    program = peers.start("sf", "ppo", tmp_path, 1, {}, [])
    assert program.process.wait(60) == 0 and told.read_text() == "3"
