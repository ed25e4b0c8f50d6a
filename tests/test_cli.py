"""What cannot work is refused with one clear message and status 2, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncrl import cli, folder, memory, supervisor
from asyncrl.folder import Refused, RunFolder
from asyncrl.plan import Plan, prepare
from tests.runs import REPOSITORY

LAUNCH_FILE = """
from asyncrl.actor import ActorConfig
from asyncrl.algorithms.dqn import DQNConfig
from asyncrl.config import Config
from asyncrl.envs import EnvConfig
from asyncrl.evaluate import EvaluationConfig
from asyncrl.models import ModelConfig
from asyncrl.stores.replay import ReplayConfig

config = Config(
    env=EnvConfig("CartPole-v1"),
    model=ModelConfig(hidden=(8,)),
    algorithm=DQNConfig(replay=ReplayConfig(capacity=5_000, learning_starts=100)),
    actor=ActorConfig(lanes_per_actor=2, envs_per_lane=2, unroll_length=4),
    evaluation=EvaluationConfig(period_steps=0),
)
shadow = config
"""


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ASYNCRL_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture
def launch_file(tmp_path) -> Path:
    path = tmp_path / "launch.py"
    path.write_text(LAUNCH_FILE)
    return path


@pytest.fixture
def in_this_process(monkeypatch):
    """The child that prepares a run costs seconds: do its work in this process."""

    def prepare_here(launch_file: Path, original: Path, options: list[str]) -> Plan:
        from asyncrl import plan

        made = []

        def keep(*arguments):
            made.append(prepare(*arguments))
            return made[0]

        with monkeypatch.context() as patched, open(os.devnull, "w") as null:
            patched.setattr(plan, "prepare", keep)
            patched.setattr(plan.signal, "signal", lambda number, handler: None)
            status = plan.prepare_main(launch_file, original, os.dup(null.fileno()), options)
        if status != 0:
            raise SystemExit(status)
        return made[0]

    def began(*arguments):
        raise AssertionError("expected a refusal, but the run began")

    monkeypatch.setattr(folder, "prepare_in_child", prepare_here)
    monkeypatch.setattr(supervisor, "Supervisor", began)


def refusal(capfd, *arguments: object) -> str:
    """What a command that exits with 2 says, lines joined; it draws frames around some messages."""
    capfd.readouterr()
    try:
        status = cli.main([str(argument) for argument in arguments])
    except SystemExit as exit:
        status = exit.code
    output, errors = capfd.readouterr()
    assert status == 2, output + errors
    assert not output
    return " ".join(errors.replace("│", " ").split())


REFUSED_OPTIONS = [
    ("--env.id CartPol-v1", "knows no environment 'CartPol-v1'; did you mean CartPole-v1"),
    ("--env.id nowhere:Nothing-v0", "cannot import 'nowhere:Nothing-v0'"),
    ("--env.id Pendulum-v1", "expected a Discrete action space for a Q head, got Box"),
    ("--env.protocol classic", "'classic' needs an id that starts with 'ALE/'"),
    ("--algorithm.gama 0.9", "--algorithm.gamma"),
    ("--actors 3", "--actor.num-actors"),
    ("--seed much", "much"),
    ("--seed -1", "expected seed from 0 to 2**63 - 1, got -1"),
    ("--schedule lockstp", "lockstep"),
    ("--total-env-steps 0", "expected total_env_steps >= 1, got 0"),
    ("--profile shado", "named 'shado', got config, shadow; did you mean --profile shadow?"),
    ("--profile", "expected a name after --profile"),
    ("--algorithm.gamma 2", "expected 0 <= gamma <= 1"),
    ("--algorithm.replay.learning-starts 10", "learning_starts of at least one batch of 32"),
    ("--algorithm.replay.tolerance 19", "expected a tolerance of at least 20 env steps, got 19"),
    (
        "--algorithm.replay.capacity 15",
        "expected a replay capacity of at least one unroll of every lane, 16 env steps, got 15",
    ),
    (
        "--algorithm.sequence-length 1300 --algorithm.batch-size 1 "
        "--algorithm.replay.learning-starts 1300",
        "expected a replay capacity of at least 325 unrolls of every lane, 5200 env steps, got "
        "5000: a draw looks 1300 rows ahead",
    ),
    (
        "--algorithm.sequence-length 3 --algorithm.burn-in 2",
        "expected burn_in=0 for a model without a memory, got 2",
    ),
    ("--algorithm.burn-in 2", "expected sequence_length of at least 1 with burn_in"),
    ("--model.lstm 4", "expected sequence_length of at least 1 for a model with a memory, got 0"),
    (
        "--model.lstm 4 --algorithm.sequence-length 2",
        "expected a stored state at least each 2 steps, as many as a sequence is learned from "
        "(sequence_length=2, loss_on='all'), got one each 4 (unroll_length=4, num_states=1)",
    ),
    (
        "--model.lstm 4 --algorithm.sequence-length 2 --algorithm.loss-on last "
        "--algorithm.num-states 2",
        "expected a stored state at least each 1 steps, as many as a sequence is learned from "
        "(sequence_length=2, loss_on='last'), got one each 2",
    ),
    ("--algorithm.rollout.max-lag 3", "--algorithm.rollout.max-lag"),
    ("--algorithm.replay.capacity 1000000000000", "GB replay"),
    ("--actor.num-threads 1000000", "expected actor.num_threads of at most 1,000, got 1,000,000"),
    (
        "--actor.num-actors 2000 --actor.envs-per-lane 1 --algorithm.replay.capacity 50000",
        "GB 2001 processes of about 300 MB",
    ),
    ("--learner.device cuda:x", "expected a device that torch can use here, got 'cuda:x': "),
    (
        "--actor.num-actors auto --learner.device cuda:99",
        "expected a device that torch can use here, got 'cuda:99': there are",
    ),
]


@pytest.mark.parametrize("options, expected", REFUSED_OPTIONS)
def test_options_that_cannot_work(in_this_process, runs, launch_file, capfd, options, expected):
    message = refusal(capfd, "train", launch_file, "x", *options.split())
    assert expected in message
    assert "Traceback" not in message
    assert not runs.exists()


@pytest.mark.fault_23
def test_memory_is_refused_with_the_arithmetic(in_this_process, runs, launch_file, capfd):
    message = refusal(
        capfd, "train", launch_file, "x", "--algorithm.replay.capacity", "1" + "0" * 12
    )
    words = message.partition("asyncrl: expected ")[2].split()
    needed, available = float(words[0]), float(words[5])
    assert words[1:5] == ["GB", "of", "memory,", "got"] and needed > 1000 > available
    parts = [float(part.split()[-1]) for part in message.split(" GB ")[2:-1]]
    assert needed == pytest.approx(sum(parts), rel=0.01)
    assert message.endswith(
        "lower --algorithm.replay.capacity, --actor.num-actors or --actor.envs-per-lane"
    )


@pytest.mark.parametrize(
    "source, expected",
    [
        ("1 / 0", "launch.py (line 1) cannot be used: ZeroDivisionError: division by zero"),
        ("x = (", "launch.py cannot be used: SyntaxError"),
        ("import no_such_module", "(line 1) cannot be used: ModuleNotFoundError"),
        ("", "define a Config named 'config', got none; write `config = Config(...)` in it"),
        ("config = 3", "define a Config named 'config', got none"),
        (
            "import asyncrl\nhome = asyncrl.Config(asyncrl.EnvConfig('CartPole-v1'))",
            "got home; choose one of these by --profile, or write `config = Config(...)` in it",
        ),
        (
            LAUNCH_FILE.replace(
                '"CartPole-v1"', '"tests.counting_env:Counting-v0", kwargs={"kind": "dict"}'
            ).replace("ModelConfig(", "ModelConfig(frame_stack=4, "),
            "expected frame_stack >= 1, and 1 for Dict and Tuple observations, got 4 for Dict",
        ),
        (
            "from asyncrl import *\nconfig = Config(EnvConfig('Pendulum-v1'), policy=Mixture(("
            "Part('own', Sample()), Part('wild', EpsilonGreedy()))), algorithm=PPOConfig())",
            "expected outputs 'q' or 'logits' of discrete actions",
        ),
        (
            "from asyncrl import *\nclass Two(Random):\n def __call__(self, *x):\n"
            "  return *(y[:2] for y in super().__call__(*x)[:2]), ()\n"
            "config = Config(EnvConfig('CartPole-v1'), policy=Two())",
            "expected the policy Two to give numpy arrays, actions int64 (3,) and "
            "log-probabilities float32 (3,), got int64 (2,) and float32 (2,)",
        ),
        (
            "from asyncrl import *\n"
            "algorithm = PPOConfig(rollout=ReplayConfig())\n"
            "config = Config(EnvConfig('CartPole-v1'), algorithm=algorithm)",
            "expected a RolloutConfig for rollout, got ReplayConfig: on-policy algorithms learn",
        ),
        (
            "from asyncrl import *\n"
            "later = Piecewise((500, 900), (1.0, 0.0, 1.0))\n"
            "policy = Mixture((Part('one', Greedy(), later), Part('other', Random(), 0.0)))\n"
            "config = Config(EnvConfig('CartPole-v1'), policy=policy)",
            "expected finite weights >= 0 with a sum > 0, got [0.0, 0.0] for ('one', 'other') at "
            "500 env steps",
        ),
        (
            "from asyncrl import *\n"
            "far = Switch(Greedy(), Random(), 'x')\n"
            "policy = Mixture((Part('own', Greedy()), Part('far', far)))\n"
            "config = Config(EnvConfig('CartPole-v1'), policy=policy)",
            "got 'x' for ('own', 'far'); name one of them, or add Part('x', ...)",
        ),
        (
            "from asyncrl import *\n"
            "config = Config(EnvConfig('CartPole-v1'), policy=Switch(Greedy(), Random(), 'x'))",
            "got 'x' for ('Switch',); name one of them, or add Part('x', ...)",
        ),
        (
            "from asyncrl import *\n"
            "algorithm = A2CConfig(rollout=ReplayConfig(priority_exponent=0.6))\n"
            "config = Config(EnvConfig('CartPole-v1'), algorithm=algorithm)",
            "expected a RolloutConfig for rollout, got ReplayConfig: on-policy algorithms learn "
            "from each unroll once, in order; a replay, uniform or prioritised, is DQNConfig's",
        ),
        (
            "from asyncrl import *\n"
            "algorithm = DQNConfig(replay=RolloutConfig())\n"
            "config = Config(EnvConfig('CartPole-v1'), algorithm=algorithm)",
            "expected replay to be a ReplayConfig, got RolloutConfig",
        ),
        (
            LAUNCH_FILE.replace('"CartPole-v1"', '"tests.counting_env:make_one"'),
            "make_one",
        ),
        (
            "from asyncrl import *\nclass Bare:\n def __call__(self, *x): ...\n"
            "config = Config(EnvConfig('CartPole-v1'), policy=Bare())",
            "asyncrl: expected a policy with initial_state(B) for Bare, got Bare without it: a ",
        ),
        (
            "from asyncrl import *\nconfig = Config(EnvConfig('CartPole-v1'), total_env_steps='x')",
            "launch.py (line 2) cannot be used: expected Config.total_env_steps to be int, got 'x'",
        ),
        (
            "from asyncrl import *\nconfig = Config(env='CartPole-v1')",
            "asyncrl: expected env to be EnvConfig, got 'CartPole-v1'; write "
            "EnvConfig('CartPole-v1')",
        ),
        (
            "from asyncrl import *\nimport torch\n"
            "config = Config(EnvConfig('CartPole-v1'), model=torch.nn.Linear(4, 2))",
            "asyncrl: expected model to be a function of (observation space, action space) that "
            "makes a model, got a model, Linear; write model=lambda obs, act: ...",
        ),
        ("import sys\nsys.exit(0)", "(line 2) cannot be used: expected it to go on, but it calls"),
        ("exit('enough')", "(line 1) cannot be used: expected it to go on, but it calls exit"),
    ],
)
def test_launch_files_that_cannot_work(in_this_process, runs, launch_file, capfd, source, expected):
    launch_file.write_text(source)
    message = refusal(capfd, "train", launch_file, "x")
    assert expected in message and "Warning" not in message
    assert not expected.startswith("asyncrl: ") or message.startswith(expected)
    assert not runs.exists()


@pytest.mark.parametrize("who", ["policy Own", "model Own"])
def test_an_error_in_code_of_the_users_is_told_with_its_traceback(
    in_this_process, runs, launch_file, capfd, who
):
    """A ValueError of asyncrl's own is told in words alone."""
    part = f"policy=Own(), model={'Own' if 'model' in who else 'ModelConfig()'}"
    launch_file.write_text(
        "from asyncrl import *\nimport torch\nclass Own(torch.nn.Module):\n"
        " __init__ = lambda self, *spaces: super().__init__()\n"
        " initial_state = lambda self, B: ()\n"
        " def forward(self, *x):\n  a, b = [1, 2, 3]\n"
        f"config = Config(EnvConfig('CartPole-v1'), {part})"
    )
    message = refusal(capfd, "train", launch_file, "x")
    words = f"(line 7) cannot be used: RuntimeError: the {who} raised ValueError: too many values"
    assert words in message and 'launch.py", line 7, in forward' in message
    assert not runs.exists()


def test_so_is_one_in_an_environment(in_this_process, runs, launch_file, capfd):
    launch_file.write_text(
        "from asyncrl import *\ndef make(num_envs):\n int('abc')\n"
        "config = Config(EnvConfig(make), ModelConfig(), algorithm=PPOConfig())"
    )
    message = refusal(capfd, "train", launch_file, "x")
    words = "(line 3) cannot be used: RuntimeError: the environment's constructor raised ValueError"
    assert words in message and 'launch.py", line 3, in make' in message
    assert not runs.exists()


def test_a_launch_file_that_is_not_there(runs, capfd):
    message = refusal(capfd, "train", "launch/nothing.py", "x")
    assert "expected a launch file, got launch/nothing.py, which is not there" in message
    assert not runs.exists()


@pytest.mark.parametrize("command", ["train", "doctor"])
@pytest.mark.parametrize("run_id", ["a/b", "../../etc", "..", "", " ", "-x ", "käse", "x" * 300])
def test_run_ids_that_are_no_folder_names(runs, launch_file, capfd, command, run_id):
    message = refusal(capfd, command, launch_file, run_id)
    assert "expected RUN_ID" in message or "expected a run id of at most 200 letters" in message
    assert not runs.exists()


class Child:
    """In place of the Python that prepares a run: a shell that runs a script."""

    def __init__(self, path: Path, monkeypatch):
        self.path, self.monkeypatch = path, monkeypatch

    def prepares(self, script: str, *options: str) -> int:
        """The status that the attempt ends with."""
        self.path.write_text(f"#!/bin/sh\n{script}\n")
        self.path.chmod(0o755)
        self.monkeypatch.setattr(folder, "program", lambda *arguments: [str(self.path), *arguments])
        with pytest.raises(SystemExit) as exit:
            folder.prepare_in_child(Path("launch.py"), Path("launch.py"), list(options))
        return exit.value.code


@pytest.fixture
def child(tmp_path, monkeypatch):
    return Child(tmp_path / "python", monkeypatch)


def test_a_preparation_that_ends_without_a_plan_says_why(child, capfd):
    assert child.prepares("kill -9 $$") == 1
    assert "was ended by SIGKILL" in capfd.readouterr().err
    assert child.prepares("exit 0") == 2
    assert "expected launch.py to define a Config, but it ended" in capfd.readouterr().err
    assert child.prepares("exit 0", "--help") == 0
    assert child.prepares("exit 2") == 2
    assert child.prepares("kill -15 $$") == 143
    assert not capfd.readouterr().err


def test_a_preparation_that_hangs_is_told_and_given_up_with_its_stacks(child, monkeypatch, capfd):
    monkeypatch.setattr(folder, "WORD_SECONDS", 0.1)
    code = "import faulthandler, time; faulthandler.enable(); time.sleep(0.5)"
    assert child.prepares(f"exec {sys.executable} -c '{code}'") == 2
    told = capfd.readouterr().err
    assert "still waiting: libraries are imported, launch.py is" in told
    assert "given up after 300 s" in told
    monkeypatch.setattr(folder, "PREPARE_SECONDS", 4.0)
    monkeypatch.setattr(folder, "STACK_SECONDS", 30.0)
    assert child.prepares(f"exec {sys.executable} -c '{code.replace('0.5', '600')}'") == 2
    told = capfd.readouterr().err
    assert "Fatal Python error: Aborted" in told and 'File "<string>", line 1 in' in told
    assert "to be made, within 4 s, got none; the stacks above show" in told


def test_runs_that_cannot_be_written(in_this_process, tmp_path, launch_file, monkeypatch, capfd):
    (tmp_path / "file").write_text("")  # root may write anywhere, but not below a file
    monkeypatch.setenv("ASYNCRL_RUNS", str(tmp_path / "file" / "runs"))
    message = refusal(capfd, "train", launch_file, "x")
    assert "expected a run folder that can be written" in message


def test_a_run_has_one_holder(in_this_process, runs, launch_file, capfd):
    with RunFolder(runs / "x") as run:
        run.begin(run.prepare(launch_file, []))
        before = sorted(runs.rglob("*"))
        message = refusal(capfd, "train", launch_file, "x")
        assert f"expected run x to be free, but process {os.getpid()} (since " in message
        assert sorted(runs.rglob("*")) == before


def test_somebody_who_looks_for_a_moment_keeps_nobody_out(in_this_process, runs, launch_file):
    begin(runs, launch_file)
    looks = os.open(runs / "x", os.O_RDONLY)
    fcntl.flock(looks, fcntl.LOCK_SH)
    threading.Timer(0.3, os.close, [looks]).start()
    with RunFolder(runs / "x") as run:
        assert run.held


def test_a_launch_file_that_was_moved_imports_from_its_new_place(
    in_this_process, runs, launch_file, tmp_path
):
    for place in ("old", "new"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "sizes.py").write_text("HIDDEN = 8,\n")
        text = LAUNCH_FILE.replace("hidden=(8,)", "hidden=HIDDEN")
        (tmp_path / place / "own.py").write_text("from sizes import HIDDEN\n" + text)
    begin(runs, tmp_path / "old" / "own.py")
    shutil.rmtree(tmp_path / "old")
    for module in ("sizes", "asyncrl_launch_file"):
        sys.modules.pop(module, None)
    with RunFolder(runs / "x") as run:
        run.prepare(tmp_path / "new" / "own.py", [])
        assert run.launch["file"] == str(tmp_path / "new" / "own.py")
        run.prepare(runs / "x" / "launch.py", [])  # as if none were named: the one from before
        assert run.launch["file"] == str(tmp_path / "old" / "own.py")


@pytest.mark.fault_20
def test_a_resume_with_another_configuration(in_this_process, runs, launch_file, capfd):
    with RunFolder(runs / "x") as run:
        run.begin(run.prepare(launch_file, ["--seed", "3"]))
    files = {path: path.read_bytes() for path in runs.rglob("*.json")}
    message = refusal(capfd, "train", launch_file, "x", "--algorithm.gamma", "0.9")
    assert "algorithm.gamma: 0.99 -> 0.9" in message
    assert "seed" not in message.partition("expected")[2]  # as it was given at the first start
    launch_file.write_text(LAUNCH_FILE.replace("(8,)", "(9,)"))
    assert "model.hidden: [8] -> [9]" in refusal(capfd, "train", launch_file, "x")
    assert files == {path: path.read_bytes() for path in runs.rglob("*.json")}
    for name, content in (("config.json", ""), ("config.json", "[]"), ("launch.json", "{")):
        (runs / "x" / name).write_text(content)
        message = refusal(capfd, "train", launch_file, "x")
        assert f"expected {runs / 'x' / name} as the run wrote it, got" in message


MAY_CHANGE = """total-env-steps 99; learner.device cpu; learner.num-threads 1
learner.save-replay False; learner.checkpoint-seconds 9.0; evaluation.period-steps 7
evaluation.num-episodes 3; actor.nice 7; actor.num-threads 2; actor.device cpu; env.num-threads 2"""


@pytest.mark.parametrize("change", MAY_CHANGE.replace("\n", "; ").split("; "))
def test_a_resume_with_what_may_change(in_this_process, runs, launch_file, change):
    begin(runs, launch_file)
    name, value = change.split()
    with RunFolder(runs / "x") as run:
        plan = run.prepare(launch_file, [f"--{name}", value])
        run.begin(plan)
    found = json.loads((runs / "x" / "config.json").read_text())["config"]
    for part in name.replace("-", "_").split("."):
        found = found[part]
    assert str(found) == value


@pytest.mark.parametrize("change", ["num-actors 2", "envs-per-lane 3", "unroll-length 5"])
def test_a_resume_with_what_may_not_change(in_this_process, runs, launch_file, capfd, change):
    files = begin(runs, launch_file)
    name, value = change.split()
    message = refusal(capfd, "train", launch_file, "x", f"--actor.{name}", value)
    assert f"actor.{name.replace('-', '_')}: " in message and f"-> {value}" in message
    changed = [path.name for path, content in files.items() if path.read_bytes() != content]
    assert set(changed) <= {"lock"}  # which says since when


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """By somebody else."""
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def begin(runs: Path, launch_file: Path, *options: str) -> dict[Path, bytes]:
    """A run that was begun and is not running; its files."""
    with RunFolder(runs / "x") as run:
        run.begin(run.prepare(launch_file, list(options)))
    return {path: path.read_bytes() for path in (runs / "x").iterdir() if path.is_file()}


def test_a_lock_file_that_is_deleted_frees_nothing(in_this_process, runs, launch_file, capfd):
    with RunFolder(runs / "x") as run:
        run.begin(run.prepare(launch_file, []))
        (runs / "x" / "lock").unlink()
        named = f"to be free, but process {os.getpid()} holds"  # by what the kernel says
        assert named in refusal(capfd, "train", launch_file, "x")
        assert run.keep() is None
        assert f"but process {os.getpid()} (since" in refusal(capfd, "train", launch_file, "x")
    assert folder.holder(runs / "x") is None


def test_a_run_folder_that_vanishes_comes_back_locked(in_this_process, runs, launch_file, capfd):
    names = {"launch.py", "launch.json", "plan.json", "config.json"}
    with RunFolder(runs / "x") as run:
        run.begin(run.prepare(launch_file, []))
        before = {name: (runs / "x" / name).read_bytes() for name in names}
        shutil.rmtree(runs)
        (runs / "x" / "checkpoints").mkdir(parents=True)  # as the learner makes it
        assert run.keep() is None
        assert before == {name: (runs / "x" / name).read_bytes() for name in names}
        assert f"but process {os.getpid()} (since" in refusal(capfd, "train", launch_file, "x")
        (runs / "x" / "plan.json").unlink()
        (runs / "x").rename(runs / "y")  # is free from the next look on
        assert run.keep() is None and folder.holder(runs / "y") is None
        assert (runs / "x" / "plan.json").exists() and folder.holder(runs / "x")
        assert not (runs / "y" / "plan.json").exists()


def test_a_run_folder_that_another_run_has_taken(in_this_process, runs, launch_file, monkeypatch):
    with RunFolder(runs / "x") as run:
        run.begin(run.prepare(launch_file, []))
        (runs / "x").rename(runs / "y")
        (runs / "x").mkdir()
        with locked(runs / "x"):
            assert run.keep() is None  # perhaps for an instant only
            monkeypatch.setattr(folder, "STRANGER_SECONDS", 0.0)
            assert f"process {os.getpid()} holds {runs / 'x'} now" in run.keep()
            (runs / "x" / "lock").write_bytes(run.words)
            assert run.keep() is None  # it is this process itself, by another inode
            (runs / "x" / "lock").unlink()
        assert not list((runs / "x").iterdir())
        (runs / "x" / "config.json").write_text("{}")
        assert f"another run is in {runs / 'x'} now" in run.keep()
        assert os.path.samefile(run.own_place, runs / "y")


def test_a_run_that_another_start_has_begun_meanwhile(in_this_process, runs, launch_file):
    with RunFolder(runs / "x") as slow:
        plan = slow.prepare(launch_file, ["--algorithm.gamma", "0.5"])
        files = begin(runs, launch_file)
        with pytest.raises(Refused, match="expected run x to be new, but another process has"):
            slow.begin(plan)
    for path, content in files.items():
        assert path.name == "lock" or path.read_bytes() == content


def test_another_model_behind_the_same_function_is_refused(
    in_this_process, runs, launch_file, capfd
):
    """A function is known by its name only; the weights it makes are not those that were saved."""
    own = LAUNCH_FILE.replace("ModelConfig(hidden=(8,))", "lambda obs, act: WIDE(obs, act)")
    own = own.replace("config = Config(", "WIDE = ModelConfig(hidden=(8,))\nconfig = Config(")
    launch_file.write_text(own)
    begin(runs, launch_file)
    launch_file.write_text(own.replace("(8,)", "(9,)"))
    message = refusal(capfd, "train", launch_file, "x")
    assert "model.encoder.layers.0.0.bias.shape: [8] -> [9]" in message
    assert (runs / "x" / "launch.py").read_text() == own
    launch_file.write_text(other := own + "# other words\n")
    begin(runs, launch_file)
    (kept,) = (runs / "x").glob("launch_until_*.py")
    assert kept.read_text() == own and (runs / "x" / "launch.py").read_text() == other
    assert kept.name in (runs / "x" / "events.log").read_text()
    (runs / "x" / "plan.json").unlink()  # with nothing to compare with it is the learner's word
    begin(runs, launch_file)


def test_a_run_that_has_lost_its_launch_json_is_compared(in_this_process, runs, launch_file, capfd):
    begin(runs, launch_file, "--seed", "3")
    (runs / "x" / "launch.json").unlink()
    (runs / "x" / "launch.py").unlink()  # what is given is compared
    message = refusal(capfd, "train", launch_file, "x", "--algorithm.gamma", "0.9")
    assert "algorithm.gamma: 0.99 -> 0.9" in message and "seed: " not in message
    begin(runs, launch_file)
    assert (runs / "x" / "launch.py").read_text() == LAUNCH_FILE
    for name in ("launch.json", "config.json"):
        (runs / "x" / name).unlink()
    message = refusal(capfd, "train", launch_file, "x")  # there are checkpoints
    assert f"expected {runs / 'x' / 'config.json'} as the run wrote it, got FileNotFound" in message


@pytest.mark.parametrize(
    "name, content",
    [
        ("launch.json", {"file": "launch.py", "options": 5}),
        ("launch.json", {"file": "launch.py", "options": [5]}),
        ("launch.json", {"file": None, "options": []}),
        ("launch.json", 5),
        ("config.json", {"config": 5}),
    ],
)
def test_files_of_a_run_that_say_something_else(
    in_this_process, runs, launch_file, capfd, name, content
):
    begin(runs, launch_file)
    (runs / "x" / name).write_text(json.dumps(content))
    message = refusal(capfd, "train", launch_file, "x")
    assert f"expected {runs / 'x' / name} as the run wrote it, got TypeError: " in message


def test_a_file_in_the_place_of_the_checkpoints(in_this_process, runs, launch_file, capfd):
    begin(runs, launch_file)
    (runs / "x" / "checkpoints").rmdir()
    (runs / "x" / "checkpoints").write_text("")
    message = refusal(capfd, "train", launch_file, "x")
    assert "cannot write checkpoints: expected " in message


def test_a_full_disk_at_the_start(in_this_process, runs, launch_file, monkeypatch, capfd):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    for name in ("pwrite", "ftruncate"):
        with monkeypatch.context() as patched:
            patched.setattr(folder.os, name, full)
            message = refusal(capfd, "train", launch_file, "x")
        assert "expected a run folder that can be written, got [Errno 28]" in message
    monkeypatch.setattr(folder, "write_atomically", full)
    assert "got [Errno 28] No space left" in refusal(capfd, "train", launch_file, "x")


def test_a_system_that_gives_nothing(in_this_process, runs, launch_file, monkeypatch, capfd):
    def none(*arguments):
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patched:
        patched.setattr(memory.Segment, "create", none)
        message = refusal(capfd, "train", launch_file, "x")
    assert "expected shared memory and doorbells for 2 lanes, got [Errno 12] Cannot" in message
    monkeypatch.setattr(supervisor.Template, "start", none)
    message = refusal(capfd, "train", launch_file, "x")
    assert "expected the system to let run x begin, got [Errno 12]" in message
    assert not runs.exists()


@pytest.mark.parametrize("name", ["launch.json", "launch.py"])
def test_eval_of_a_run_that_has_lost_a_file(
    in_this_process, runs, launch_file, monkeypatch, capfd, name
):
    from asyncrl import eval

    begin(runs, launch_file)
    (runs / "x" / "config.json").write_text("{}")
    (runs / "x" / name).unlink()
    monkeypatch.setattr(eval, "read_weights", lambda *arguments: None)
    message = refusal(capfd, "eval", "x")
    assert "expected " in message and "put it back" in message and "Traceback" not in message


@pytest.mark.parametrize("command", ["eval", "plot", "watch"])
def test_runs_that_are_not_there(runs, capfd, command):
    message = refusal(capfd, command, "x")
    assert f"expected the id of a run in {runs}, got 'x'; there are none yet" in message
    for name in ("a", "b"):
        (runs / name).mkdir(parents=True)
        (runs / name / "config.json").write_text("{}")
    assert refusal(capfd, command, "x").endswith("got 'x'; there are: a, b")
    assert sorted(path.name for path in runs.rglob("*")) == ["a", "b", "config.json", "config.json"]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("", "COMMAND"),
        ("tain", "invalid choice: 'tain'"),
        ("train", "expected LAUNCH_FILE and RUN_ID before any options"),
        ("train launch.py", "expected RUN_ID before any options"),
        ("eval", "RUN"),
        ("eval x --episodes 0", "expected a whole number of at least 1, got '0'"),
        ("eval x --epsilon 1.5", "expected a number from 0 to 1, got '1.5'"),
        ("eval x --checkpoint last", "newest"),
        ("eval x --speed 3", "unrecognized arguments: --speed 3"),
        ("plot", "RUN"),
        ("plot x --by colour", "policy"),
        ("watch", "RUN"),
    ],
)
def test_missing_and_wrong_arguments_show_the_usage(capfd, arguments, expected):
    message = refusal(capfd, *arguments.split())
    assert message.startswith("usage: asyncrl") and expected in message


@pytest.mark.parametrize("command", ["", "train", "eval", "plot", "watch", "doctor", "bench"])
def test_help(capsys, command):
    try:
        status = cli.main([*command.split(), "--help"])
    except SystemExit as exit:
        status = exit.code
    text = capsys.readouterr().out
    assert status == 0 and text.startswith(f"usage: asyncrl {command}".strip())
    assert len(text.splitlines()) > 8


def test_it_says_its_version(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])
    assert exit.value.code == 0 and capsys.readouterr().out.startswith("asyncrl")


def test_for_real(runs, launch_file):
    """Through processes: a run that is refused, and the options of a launch file."""
    commands = {
        "refused": [str(launch_file), "x", "--algorithm.gama", "0.9"],
        "help": ["launch/cartpole_dqn.py", "x", "--help"],
    }
    started = {
        name: subprocess.Popen(
            [sys.executable, "-m", "asyncrl", "train", *arguments],
            cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for name, arguments in commands.items()
    }  # fmt: skip
    ended = {name: (*child.communicate(), child.returncode) for name, child in started.items()}
    output, errors, status = ended["refused"]
    assert status == 2 and "--algorithm.gamma" in errors and "Traceback" not in errors
    output, errors, status = ended["help"]
    assert status == 0, errors
    for option in ("--seed", "--env.id", "--algorithm.replay.capacity", "--actor.num-actors"):
        assert option in output
    assert not runs.exists()


def test_it_starts_with_its_standard_streams_closed(runs):
    (runs / "x").mkdir(parents=True)
    for closed in ("<&- >&- 2>&-", ">&-", "2>&-"):
        command = f'exec "$0" -m asyncrl watch x --health {closed}'
        ended = subprocess.run(["bash", "-c", command, sys.executable], cwd=REPOSITORY)
        assert ended.returncode == 2  # a folder without a run
        made = (
            "import sys, asyncrl.foreign as f, subprocess as s; f.open_standard_streams(); "
            "sys.exit(s.run([sys.executable, '-c', 'import faulthandler as f; f.enable(); "
            "import sys; sys.stdout.flush()']).returncode)"
        )
        command = f'exec "$0" -c "$1" {closed}'
        ended = subprocess.run(["bash", "-c", command, sys.executable, made], cwd=REPOSITORY)
        assert ended.returncode == 0


def test_what_lies_in_the_current_folder_takes_the_place_of_nothing(tmp_path):
    """But modules there, which a launch file elsewhere may need, are found."""
    for name in ("asyncrl", "random", "gymnasium", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')\n")
    (tmp_path / "nearby.py").write_text("NUMBER = 7\n")
    (tmp_path / "elsewhere").mkdir()
    launch_file = tmp_path / "elsewhere" / "launch.py"
    launch_file.write_text("import nearby, random\nassert nearby.NUMBER == 7\n" + LAUNCH_FILE)
    code = "from asyncrl.program import program; print(*program('asyncrl.run'), sep='\\n')"
    run = [sys.executable, "-c", code]
    command = subprocess.run(run, capture_output=True, text=True, cwd=REPOSITORY).stdout.split("\n")
    arguments = ["prepare", "0", str(launch_file), str(launch_file), "1"]
    ended = subprocess.run(
        [*command[:-1], *arguments], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": ""},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["num_lanes"] == 2


def test_a_reader_that_leaves_gets_no_traceback(runs):
    """`asyncrl train FILE --help | head -1`"""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "asyncrl", "train", "launch/cartpole_dqn.py", "--help"]
    ended = subprocess.run(command, cwd=REPOSITORY, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert ended.stderr == "" and ended.returncode == 1
