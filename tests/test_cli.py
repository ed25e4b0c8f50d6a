"""What cannot work is refused with one clear message and status 2, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from asyncrl import cli, folder, supervisor
from asyncrl.folder import RunFolder
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
    ("--seed -1", "expected seed >= 0, got -1"),
    ("--schedule lockstp", "lockstep"),
    ("--total-env-steps 0", "expected total_env_steps >= 1, got 0"),
    ("--profile shado", "define a Config named 'shado', got config, shadow; did you mean 'shadow'"),
    ("--profile", "expected a name after --profile"),
    ("--algorithm.gamma 2", "expected 0 <= gamma <= 1"),
    ("--algorithm.replay.learning-starts 10", "learning_starts of at least one batch of 32"),
    ("--algorithm.replay.tolerance 19", "expected a tolerance of at least 20 env steps, got 19"),
    (
        "--algorithm.replay.capacity 15",
        "expected a replay capacity of at least one unroll of every lane, 16 env steps, got 15",
    ),
    ("--algorithm.replay.capacity 1000000000000", "GB replay"),
    ("--actor.num-actors 200 --actor.envs-per-lane 1", "GB 201 processes of about 300 MB"),
]


@pytest.mark.parametrize("options, expected", REFUSED_OPTIONS)
def test_options_that_cannot_work(in_this_process, runs, launch_file, capfd, options, expected):
    message = refusal(capfd, "train", launch_file, "x", *options.split())
    assert expected in message
    assert "Traceback" not in message
    assert not runs.exists()


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
            "expected the policy Two to give actions (3,) and log-probabilities (3,), got (2,)",
        ),
        (
            "from asyncrl import *\n"
            "algorithm = PPOConfig(rollout=ReplayConfig())\n"
            "config = Config(EnvConfig('CartPole-v1'), algorithm=algorithm)",
            "expected a RolloutConfig for rollout, got ReplayConfig: on-policy algorithms learn",
        ),
        (
            LAUNCH_FILE.replace('"CartPole-v1"', '"tests.counting_env:make_one"'),
            "make_one",
        ),
    ],
)
def test_launch_files_that_cannot_work(in_this_process, runs, launch_file, capfd, source, expected):
    launch_file.write_text(source)
    assert expected in refusal(capfd, "train", launch_file, "x")
    assert not runs.exists()


def test_a_launch_file_that_is_not_there(runs, capfd):
    message = refusal(capfd, "train", "launch/nothing.py", "x")
    assert "expected a launch file, got launch/nothing.py, which is not there" in message
    assert not runs.exists()


@pytest.mark.parametrize("run_id", ["a/b", "..", "", " ", "-x ", "käse"])
def test_run_ids_that_are_no_folder_names(runs, launch_file, capfd, run_id):
    message = refusal(capfd, "train", launch_file, run_id)
    assert "expected RUN_ID" in message or "expected a run id of letters" in message
    assert not runs.exists()


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


@pytest.mark.parametrize("command", ["", "train", "eval", "plot", "watch"])
def test_help(capsys, command):
    try:
        status = cli.main([*command.split(), "--help"])
    except SystemExit as exit:
        status = exit.code
    text = capsys.readouterr().out
    assert status == 0 and text.startswith(f"usage: asyncrl {command}".strip())
    assert len(text.splitlines()) > 8


def test_for_real(runs, launch_file):
    """Through processes: a run that is refused, and the options of a launch file."""
    commands = {
        "refused": [str(launch_file), "x", "--algorithm.gama", "0.9"],
        "help": ["launch/cartpole_dqn.py", "x", "--help"],
    }
    started = {
        name: subprocess.Popen(
            [sys.executable, "-m", "asyncrl.cli", "train", *arguments],
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
