"""What there is against what is needed: refused before anything is made, with what to do."""

from __future__ import annotations

import dataclasses
import json
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from asyncrl import cli, doctor, limits, preflight
from asyncrl.folder import Refused
from asyncrl.plan import Plan, prepare
from tests.runs import REPOSITORY
from tests.test_cli import begin, in_this_process, launch_file, locked, runs

__all__ = ["in_this_process", "launch_file", "runs"]  # fixtures


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def group(folder: Path, version: int, limit: object, used: int, cache: int = 0) -> None:
    """A memory cgroup as the kernel shows it."""
    if version == 2:
        write(folder, memory__max=limit, memory__current=used)
        write(folder, memory__stat=f"anon 1\ninactive_file {cache}\nactive_file 9")
    else:
        write(folder, memory__limit_in_bytes=limit, memory__usage_in_bytes=used)
        write(folder, memory__stat=f"cache 1\ninactive_file 7\ntotal_inactive_file {cache}")


@pytest.mark.fault_23
def test_memory_of_containers(tmp_path):
    own = "0::/system.slice/job.service\n"
    assert limits.container_memory(tmp_path, own) is None
    group(tmp_path / "system.slice" / "job.service", 2, "max", 5)
    assert limits.container_memory(tmp_path, own) is None
    group(tmp_path / "system.slice", 2, 8_000, 5_000, cache=1_000)  # also counts for us
    assert limits.container_memory(tmp_path, own) == 4_000
    group(tmp_path / "system.slice" / "job.service", 2, 6_000, 3_500)
    assert limits.container_memory(tmp_path, own) == 2_500
    group(tmp_path, 2, 9_000, 8_000)  # a container that sees itself as the root
    assert limits.container_memory(tmp_path, "0::/\n") == 1_000
    assert limits.container_memory(tmp_path, "0::/docker/of/the/host\n") == 1_000


@pytest.mark.fault_23
def test_memory_of_containers_version_1(tmp_path):
    own = "12:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n0::/\n"
    group(tmp_path / "memory", 1, 9223372036854771712, 5)  # no limit, as version 1 says it
    assert limits.container_memory(tmp_path, own) is None
    group(tmp_path / "memory", 1, 4_000, 3_000, cache=500)
    assert limits.container_memory(tmp_path, own) == 1_500


def test_processors_of_containers(tmp_path):
    assert limits.container_cores(tmp_path, "0::/a\n") is None
    write(tmp_path / "a", cpu__max="max 100000")
    assert limits.container_cores(tmp_path, "0::/a\n") is None
    write(tmp_path, cpu__max="350000 100000")
    assert limits.container_cores(tmp_path, "0::/a\n") == 3.5
    old = tmp_path / "cpu"
    write(old, cpu__cfs_quota_us=-1, cpu__cfs_period_us=100_000)
    assert limits.container_cores(tmp_path, "4:cpu,cpuacct:/x\n") is None
    write(old / "x", cpu__cfs_quota_us=150_000, cpu__cfs_period_us=100_000)
    assert limits.container_cores(tmp_path, "4:cpu,cpuacct:/x\n") == 1.5


def test_threads_are_no_more_than_the_quota(monkeypatch):
    monkeypatch.setattr(limits.os, "sched_getaffinity", lambda pid: set(range(8)))
    for quota, cores in ((None, 8), (64.0, 8), (3.5, 3), (0.5, 1)):
        monkeypatch.setattr(limits, "container_cores", lambda quota=quota: quota)
        assert limits.usable_cores() == cores


def make_plan(memory=1_000_000_000, disk=0, num_actors=4, vectorization="sync") -> Plan:
    config = {
        "env": {"vectorization": vectorization},
        "actor": {"envs_per_lane": 100, "lanes_per_actor": 2},
        "algorithm": {"replay": {"learning_starts": 0}},
    }
    return Plan(
        config=config, spec={}, weights={}, memory=[["replay", memory]], disk_nbytes=disk,
        policies=[], num_actors=num_actors, num_lanes=2 * num_actors, slots_per_lane=4,
        total_env_steps=1, schedule="async", evaluates=False,
    )  # fmt: skip


def test_a_run_shorter_than_its_warm_up_is_told(tmp_path):
    plan = make_plan(memory=0)
    for starts, verdict in ((500, "ok"), (501, "warning")):
        config = plan.config | {"algorithm": {"replay": {"learning_starts": starts}}}
        found = dataclasses.replace(plan, config=config, total_env_steps=1_000)
        assert preflight.warm_up(found).verdict == verdict
    assert [check.name for check in preflight.preflight(found, tmp_path)] == ["warm-up"]
    assert preflight.warm_up(plan).verdict == "ok"  # nothing to wait for in a rollout queue


def test_a_target_net_that_hardly_moves_is_told(tmp_path):
    plan = dataclasses.replace(make_plan(memory=0), total_env_steps=100_000)
    replay = {"learning_starts": 0, "samples_per_insert": 8.0}  # 25,000 updates of 32
    for polyak, period, verdict in (
        (1.0, 2_000, "ok"), (0.005, 1, "ok"), (0.005, 2_000, "warning"), (0.8, 2_000, "ok"),
    ):  # fmt: skip
        algorithm = {"polyak": polyak, "target_period": period, "batch_size": 32, "replay": replay}
        found = dataclasses.replace(plan, config=plan.config | {"algorithm": algorithm})
        assert preflight.target_net(found).verdict == verdict
    assert "target net" not in [check.name for check in preflight.schedules(plan)]  # there is none


def test_a_run_longer_than_it_learns_is_told(tmp_path):
    file = REPOSITORY / "launch" / "cartpole_ppo.py"
    for options, verdict in (
        ([], "ok"),
        (["--total-env-steps", "200000"], "warning"),
        (["--total-env-steps", "200000", "--algorithm.learning-rate.steps", "200000"], "ok"),
    ):
        plan = prepare(file, options, file)
        check = preflight.learning_rate(plan)
        assert check.verdict == verdict
        warnings = [check.name for check in preflight.preflight(plan, tmp_path)]
        assert ("learning rate" in warnings) == (verdict == "warning")
    never = dataclasses.replace(plan, learns_until=0)
    assert "0 from some 0 of 200,000" in preflight.learning_rate(never).lines[0]
    assert preflight.learning_rate(make_plan()).verdict == "ok"  # of a plan of an older revision


def test_processes_of_single_environments_are_counted_with_the_evaluators():
    file = REPOSITORY / "launch" / "cartpole_dqn.py"
    own = "--actor.envs-per-lane 3 --actor.num-actors 2 --evaluation.num-envs 7"
    for more, expected in (
        ("--env.vectorization async", "13 processes of single"),
        ("--env.vectorization async --evaluation.period-steps 0", "6 processes of single"),
        ("", ""),
    ):
        names = [name for name, _ in prepare(file, f"{own} {more}".split(), file).memory]
        found = [name for name in names if "single environments" in name]
        assert len(found) == bool(expected) and all(name.startswith(expected) for name in found)


@pytest.mark.fault_23
def test_memory_verdicts(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "container_memory", lambda: None)
    for available, verdict in ((10**10, "ok"), (1_050_000_000, "warning"), (10**8, "refused")):
        check = preflight.memory(make_plan(), available)
        assert check.verdict == verdict and "1.00 GB" in check.lines[0]
        assert "1.000 GB  replay" in check.lines[1]
        assert ("lower --algorithm.replay.capacity" in check.remedy) == (verdict != "ok")
    without = make_plan()
    del without.config["algorithm"]["replay"]
    remedy = preflight.memory(without, 10**8).remedy
    assert remedy == "lower --actor.num-actors or --actor.envs-per-lane"
    monkeypatch.setattr(preflight, "container_memory", lambda: 5 * 10**8)
    with pytest.raises(Refused) as refused:
        preflight.preflight(make_plan(), tmp_path, available=10**10)
    assert "got 0.50 GB (left of the container's limit)" in refused.value.args[0]


def test_open_files_are_refused_by_the_hard_limit_only(monkeypatch):
    set_to = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (64, 300))
    monkeypatch.setattr(resource, "setrlimit", lambda which, to: set_to.append(to))
    check = preflight.descriptors(make_plan())
    assert check.verdict == "ok" and set_to[0][0] > 64
    check = preflight.descriptors(make_plan(vectorization="async"))  # 200 workers an actor
    assert check.verdict == "refused" and "limit 300" in check.lines[0]
    assert "ulimit -Hn" in check.remedy


def test_disk_verdicts(tmp_path):
    assert preflight.disk(make_plan(), tmp_path / "new").verdict in ("ok", "warning")
    check = preflight.disk(make_plan(disk=10**15), tmp_path / "new")
    assert check.verdict == "refused" and "expected 1100000.00 GB of disk" in check.lines[0]
    assert "0.22 MB of " in preflight.disk(make_plan(disk=200_000), tmp_path / "new").lines[0]
    assert not list(tmp_path.iterdir())


def test_what_a_run_has_saved_takes_no_room_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda place: SimpleNamespace(free=700))
    assert preflight.disk(make_plan(disk=2_000), tmp_path).verdict == "refused"
    for name in ("replay/segment.bin", "checkpoints/checkpoint_1/tensors", "checkpoints/best/x"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(bytes(600))
    assert preflight.disk(make_plan(disk=2_000), tmp_path).verdict == "warning"


def test_gpu_verdicts(monkeypatch):
    if not torch.cuda.is_available() and not list(Path("/dev").glob("nvidia[0-9]*")):
        assert doctor.gpu().verdict == "ok"
    monkeypatch.setattr(doctor.Path, "glob", lambda self, pattern: [Path("/dev/nvidia0")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check = doctor.gpu()
    assert check.verdict == "warning" and "/dev/nvidia0 is there, but torch" in check.lines[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a card")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (3 * 10**9, 8 * 10**9))
    monkeypatch.setattr(torch, "zeros", lambda size, device: torch.ones(size))
    assert doctor.gpu().lines == ("a card, 3.0 of 8.0 GB free",)

    def broken(index):
        raise RuntimeError("CUDA error: uncorrectable ECC error\nmore")

    monkeypatch.setattr(torch.cuda, "mem_get_info", broken)
    assert doctor.gpu().verdict == "refused" and "ECC error" in doctor.gpu().lines[0]


def test_packages_that_are_missing(monkeypatch):
    assert doctor.packages().verdict in ("ok", "warning")
    monkeypatch.setattr(doctor, "NEEDED", ("torch", "no-such-package"))
    check = doctor.packages()
    assert check.verdict == "refused" and "expected no-such-package to be" in check.lines[0]


def test_run_folders(tmp_path):
    assert doctor.lock(tmp_path / "x").lines == (f"{tmp_path / 'x'} is new",)
    assert doctor.lock(tmp_path).lines == (f"{tmp_path} is new",)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "lock").write_text("process 7 (since then)\n")
    assert "with its configuration resumes it" in doctor.lock(tmp_path).lines[0]
    for held in (tmp_path / "lock", tmp_path):
        with locked(held):
            check = doctor.lock(tmp_path)
        assert check.verdict == "refused" and "is held by process 7" in check.lines[0]
    (tmp_path / "file").write_text("")
    assert preflight.can_write(tmp_path / "file" / "x").verdict == "refused"
    assert doctor.lock(tmp_path / "file" / "x").verdict == "refused"


def test_a_disk_that_cannot_be_written_is_not_timed(tmp_path):
    (tmp_path / "file").write_text("")  # root may write anywhere, but not below a file
    for place in (tmp_path / "file", tmp_path / "file" / "x"):
        check = doctor.disk_speed(place)
        assert check.verdict == "warning" and "not measured" in check.lines[0]


def test_a_run_that_has_another_configuration(in_this_process, runs, launch_file, capsys):
    begin(runs, launch_file, "--seed", "3")
    assert cli.main(["doctor", str(launch_file), "x"]) == 0
    capsys.readouterr()
    assert cli.main(["doctor", str(launch_file), "x", "--algorithm.gamma", "0.5"]) == 2
    out, _ = capsys.readouterr()
    assert "algorithm.gamma: 0.99 -> 0.5" in out and "seed: " not in out
    assert "to do: resume it without these changes" in out
    config = json.loads((runs / "x" / "config.json").read_text())
    del config["config"]["algorithm"]["n_step"]  # as of a revision that had no such option yet
    (runs / "x" / "config.json").write_text(json.dumps(config))
    assert cli.main(["doctor", str(launch_file), "x"]) == 0
    capsys.readouterr()
    assert cli.main(["doctor", str(launch_file), "x", "--algorithm.n-step", "3"]) == 2
    assert "algorithm.n_step: None -> 3" in capsys.readouterr().out
    (runs / "x" / "launch.json").write_text("[]")
    assert cli.main(["doctor", str(launch_file), "x"]) == 2
    assert "as the run wrote it" in capsys.readouterr().out


def test_doctor_for_real(in_this_process, runs, launch_file, capsys):
    assert cli.main(["doctor", str(launch_file), "x", "--seed", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    verdicts = {line[10:22].strip(): line.split()[0] for line in lines if line[0] != " "}
    assert {"packages", "GPU", "write access", "disk", "descriptors"} <= set(verdicts)
    assert set(verdicts.values()) <= {"ok", "warning"}
    assert "1 actor, 2 lanes, schedule async" in "".join(lines)
    assert not (runs / "x").exists()
    for wrong in (["--algorithm.replay.capacity", "1" + "0" * 12], ["--seed", "much"]):
        assert cli.main(["doctor", str(launch_file), "x", *wrong]) == 2
        out, errors = capsys.readouterr()
        assert "refused" in out and "to do: " in out and "Traceback" not in errors
        assert "would keep a run from starting" in out
    assert cli.main(["doctor", "nowhere.py"]) == 2
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--seed=3"])
