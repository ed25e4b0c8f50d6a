"""run_main.sh and setup_env.sh, with stand-ins for docker, Python and pip: nothing is installed.

A copy of the scripts lives in a folder whose name has a space, beside a folder of tools that is the
whole PATH. Each stand-in adds its command line to a log, one call a line.
"""

import configparser
import csv
import os
import pty
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
COPIED = [
    "run_main.sh",
    "setup_env.sh",
    "setup.cfg",
    "pyproject.toml",
    "constraints.txt",
    ".dockerignore",
    "docker/Dockerfile",
    "tests/run.sh",
]
TOOLS = ["basename", "bash", "cat", "cp", "dirname", "env", "find", "flock", "head", "id", "mkdir"]
TOOLS += ["readlink", "rm", "sed", "sha256sum", "sleep", "sort", "tail", "timeout", "touch"]
TOOLS += ["xargs"]

# What every stand-in begins with. The one that WORKER names works until it is told to stop, by a
# signal or by the file that is called enough; it gives up in the end, should a test have failed.
PREAMBLE = """#!/usr/bin/env bash
log() { printf '%q ' "$@" >>"$CALLS"; echo >>"$CALLS"; }
work() {
  [[ ${WORKER:-} == "$1" ]] || return 0
  trap 'log got INT; exit 130' INT
  trap 'log got TERM; exit 143' TERM
  log "$1" is working
  for ((i = 0; i < 1000; i++)); do
    [[ ! -e $STAND_INS/enough ]] || return 0
    sleep 0.02
  done
}
"""

ASYNCRL = """
log asyncrl "$@"
log runs "$ASYNCRL_RUNS"
work asyncrl
exit "${STATUS:-0}"
"""

# Python answers -c truthfully, makes an environment of nothing but itself, and its pip installs
# the asyncrl above.
PYTHON = """
case "$1 ${2:-}" in
  -c*) exec "$REAL_PYTHON" "$@" ;;
  '-m venv')
    log venv "$3"
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python"
    ;;
  '-m pip')
    log pip "${@:3}"
    echo 'pip says something'
    work pip
    [[ ! ${PIP_FAILS:-} ]] || { echo 'pip says: no space left'; exit 7; }
    cp "$STAND_INS/asyncrl" "$(dirname "$0")/asyncrl"
    ;;
  '-m ruff') log ruff; exit "${RUFF_STATUS:-0}" ;;
  '-m pytest') log pytest "${@:3}"; exit "${STATUS:-0}" ;;
esac
"""

DOCKER = """
log docker "$@"
case "$1" in
  info)
    [[ ! ${HANGS:-} ]] || exec sleep 30
    [[ ${RUNTIMES:-} ]] || exit 1
    echo "$RUNTIMES"
    ;;
  build)
    [[ ! ${BUILD_FAILS:-} ]] || exit 17
    touch "$STAND_INS/image-${5#asyncrl:}"
    ;;
  image) [[ -e "$STAND_INS/image-${3#asyncrl:}" ]] ;;
  container)
    [[ $2 != inspect ]] || { [[ ${CONTAINER:-} ]] && echo "$CONTAINER"; }
    ;;
  run)
    work docker
    exit "${STATUS:-0}"
    ;;
esac
"""


def write_script(path: Path, text: str) -> None:
    path.write_text(PREAMBLE + text)
    path.chmod(0o755)


class Box:
    """A machine with the repository on it, and not much else."""

    def __init__(self, folder: Path):
        self.repo = folder / "a repository"
        self.elsewhere = folder / "elsewhere"
        self.tools = folder / "tools"
        self.stand_ins = folder / "stand-ins"
        for made in (self.elsewhere, self.tools, self.stand_ins, self.repo / "launch"):
            made.mkdir(parents=True)
        for name in COPIED:
            (self.repo / name).parent.mkdir(exist_ok=True)
            shutil.copy2(REPO / name, self.repo / name)
        for name in ("breakout_dqn", "cartpole_ppo"):
            (self.repo / "launch" / f"{name}.py").write_text("config = None\n")
        (self.repo / "asyncrl").mkdir()
        (self.repo / "asyncrl" / "__init__.py").write_text("")
        for name in TOOLS:
            found = shutil.which(name)
            assert found, f"these tests need {name}"
            (self.tools / name).symlink_to(found)
        write_script(self.stand_ins / "asyncrl", ASYNCRL)
        write_script(self.tools / "python3", PYTHON)
        write_script(self.tools / "docker", DOCKER)
        self.started: list[subprocess.Popen] = []
        self.environment = {
            "PATH": str(self.tools),
            "CALLS": str(folder / "calls"),
            "STAND_INS": str(self.stand_ins),
            "REAL_PYTHON": sys.executable,
        }

    def start(self, *arguments: str, script: str = "run_main.sh", **environment: str):
        """Starts the script from a folder that is not the repository."""
        process = subprocess.Popen(
            [self.repo / script, *arguments],
            cwd=self.elsewhere,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Whoever runs the tests in the background has SIGINT ignored, and bash keeps that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.started.append(process)
        return process

    def finish(self, process):
        process.out, process.err = process.communicate(timeout=20)
        return process

    def run(self, *arguments: str, **options: str):
        return self.finish(self.start(*arguments, **options))

    def calls(self, *beginning: str) -> list[list[str]]:
        """The calls of the stand-ins that begin like this, in order."""
        path = Path(self.environment["CALLS"])
        lines = path.read_text().splitlines() if path.exists() else []
        calls = [shlex.split(line) for line in lines]
        return [call for call in calls if call[: len(beginning)] == list(beginning)]

    def wait_for_call(self, *beginning: str) -> None:
        deadline = time.monotonic() + 10
        while not self.calls(*beginning):
            assert time.monotonic() < deadline, f"no call of {beginning} came"
            time.sleep(0.01)


@pytest.fixture
def box(tmp_path):
    box = Box(tmp_path)
    yield box
    for process in box.started:
        if process.poll() is None:
            process.kill()
            process.communicate()


NVIDIA = '{"nvidia":{"path":"nvidia-container-runtime"},"runc":{}}'


# --- what is asked for ----------------------------------------------------------------------


def test_help_goes_to_stdout_and_no_arguments_are_refused(box):
    for option in ("--help", "-h"):
        asked = box.run(option)
        assert (asked.returncode, asked.err) == (0, "")
        assert "usage: ./run_main.sh RUN_ID [LAUNCH_FILE]" in asked.out
    unasked = box.run()
    assert (unasked.returncode, unasked.out) == (2, "")
    assert unasked.err == asked.out
    assert box.calls() == []


@pytest.mark.parametrize(
    "run_id", ["", "a/b", "..", ".hidden", "-x", "--seed", "a b", "a\nb", "é", "a;b", "$(id)"]
)
def test_bad_run_id(box, run_id):
    refused = box.run(run_id)
    assert refused.returncode == 2
    assert refused.err.startswith("bad RUN_ID\nexpected: letters, digits,")
    assert f"got:      '{run_id}'\nto do:" in refused.err
    assert box.calls() == []


@pytest.mark.parametrize("run_id", ["a", "Breakout_1.2-b", "_", "7"])
def test_good_run_id(box, run_id):
    assert box.run(run_id).returncode == 0
    assert box.calls("asyncrl")[0][3] == run_id


@pytest.mark.parametrize("launch_file", ["launch/nothing.py", "launch", "/nowhere/x.py", ""])
def test_unknown_launch_file(box, launch_file):
    refused = box.run("x", launch_file)
    assert refused.returncode == 2
    assert refused.err.startswith("no such launch file\nexpected: a Python file")
    assert f"got:      '{launch_file}'" in refused.err
    assert refused.err.endswith("launch/breakout_dqn.py\n          launch/cartpole_ppo.py\n")
    assert box.calls() == []


def test_bad_runtime(box):
    refused = box.run("x", ASYNCRL_RUNTIME="podman")
    assert refused.returncode == 2
    assert "bad ASYNCRL_RUNTIME\nexpected: docker or local\ngot:      'podman'" in refused.err
    assert box.calls() == []


# --- which runtime --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "runtimes, forced, goes_to",
    [
        (NVIDIA, "", "docker"),
        (NVIDIA, "local", "asyncrl"),
        ('{"runc":{}}', "", "asyncrl"),
        ('{"runc":{}}', "docker", "docker"),
        ("", "", "asyncrl"),
    ],
)
def test_choice_of_runtime(box, runtimes, forced, goes_to):
    assert box.run("x", RUNTIMES=runtimes, ASYNCRL_RUNTIME=forced).returncode == 0
    gone_to = [call[0] for call in box.calls("docker", "run") + box.calls("asyncrl")]
    assert gone_to == [goes_to]
    if forced == "local":
        assert box.calls("docker") == []


def test_no_docker_at_all(box):
    (box.tools / "docker").unlink()
    assert box.run("x").returncode == 0
    assert len(box.calls("asyncrl")) == 1


def test_docker_forced_without_a_daemon(box):
    refused = box.run("x", ASYNCRL_RUNTIME="docker")
    assert refused.returncode == 2
    assert "expected: a docker daemon that answers" in refused.err
    assert box.calls("docker", "run") == box.calls("venv") == []


def test_a_daemon_that_hangs_holds_nothing_up(box):
    started = time.monotonic()
    assert box.run("x", HANGS="1").returncode == 0
    assert time.monotonic() - started < 20
    assert len(box.calls("asyncrl")) == 1


# --- in a local environment -----------------------------------------------------------------


def test_local_command_line(box):
    options = ("--seed", "1", "--name", "two words", "--empty", "")
    assert box.run("x", "launch/cartpole_ppo.py", *options).returncode == 0
    launch_file = str(box.repo / "launch/cartpole_ppo.py")
    assert box.calls("asyncrl") == [["asyncrl", "train", launch_file, "x", *options]]


def test_default_launch_file_is_that_of_the_repository(box):
    (box.elsewhere / "launch").mkdir()
    (box.elsewhere / "launch/breakout_dqn.py").write_text("")
    assert box.run("x", "--seed", "1").returncode == 0
    launch_file = str(box.repo / "launch/breakout_dqn.py")
    assert box.calls("asyncrl") == [["asyncrl", "train", launch_file, "x", "--seed", "1"]]


def test_launch_file_of_the_callers_folder_comes_first(box):
    own = box.elsewhere / "launch" / "cartpole_ppo.py"
    own.parent.mkdir()
    own.write_text("")
    assert box.run("x", "launch/cartpole_ppo.py").returncode == 0
    assert box.run("x", str(box.repo / "launch/cartpole_ppo.py")).returncode == 0
    launch_files = [call[2] for call in box.calls("asyncrl")]
    assert launch_files == [str(own), str(box.repo / "launch/cartpole_ppo.py")]


def test_started_through_a_symbolic_link(box):
    link = box.elsewhere / "go"
    link.symlink_to(box.repo / "run_main.sh")
    subprocess.run([link, "x"], env=box.environment, capture_output=True, check=True, timeout=20)
    assert box.calls("runs") == [["runs", str(box.repo / "runs")]]


@pytest.mark.parametrize("given", ["", "/some/runs", "my runs"])
def test_runs_folder(box, given):
    box.run("x", ASYNCRL_RUNS=given)
    expected = {"": box.repo / "runs", "my runs": box.elsewhere / "my runs"}.get(given, given)
    assert box.calls("runs") == [["runs", str(expected)]]


def test_a_run_goes_on_with_its_own_launch_file(box):
    own = box.repo / "runs" / "x" / "launch.py"
    own.parent.mkdir(parents=True)
    own.touch()
    box.run("x", "--seed", "1")
    assert box.calls("asyncrl")[0][1:] == ["train", str(own), "x", "--seed", "1"]


def test_exit_status_is_passed_through(box):
    for status in (0, 1, 2, 130):
        assert box.run("x", STATUS=str(status)).returncode == status


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_reaches_asyncrl_once(box, number, status):
    process = box.start("x", WORKER="asyncrl")
    box.wait_for_call("asyncrl", "is", "working")
    process.send_signal(number)
    assert box.finish(process).returncode == status
    assert box.calls("got") == [["got", number.name.removeprefix("SIG")]]


# --- the set-up of the environment ----------------------------------------------------------


def test_installs_once_with_the_constraints(box):
    first = box.run("x")
    second = box.run("y")
    assert "this takes some minutes" in first.err
    assert "this takes some minutes" not in second.err
    assert box.calls("venv") == [["venv", str(box.repo / ".venv")]]
    constraints = f"{box.repo}/constraints.txt"
    assert box.calls("pip") == [
        ["pip", "install", "--constraint", constraints, "--editable", f"{box.repo}[all]"]
    ]
    assert "pip says something" in (box.repo / ".venv/setup.log").read_text()
    assert len(box.calls("asyncrl")) == 2


@pytest.mark.parametrize("name", ["setup.cfg", "constraints.txt", "pyproject.toml"])
def test_an_edited_file_updates_the_environment_in_place(box, name):
    box.run("x")
    (box.repo / ".venv/added-by-the-user").touch()
    with (box.repo / name).open("a") as file:
        file.write("# edited\n")
    for _ in range(2):
        assert box.run("x").returncode == 0
    assert len(box.calls("pip")) == 2
    assert len(box.calls("venv")) == 1
    assert (box.repo / ".venv/added-by-the-user").exists()


def test_a_half_made_environment_is_redone(box):
    box.run("x")
    (box.repo / ".venv/setup.stamp").unlink()
    (box.repo / ".venv/half-made").touch()
    assert box.run("x").returncode == 0
    assert len(box.calls("venv")) == 2
    assert not (box.repo / ".venv/half-made").exists()


def test_an_environment_of_somebody_else_is_left_alone(box):
    (box.repo / ".venv").mkdir()
    assert box.run("x").returncode == 0
    shutil.rmtree(box.repo / ".venv")
    (box.repo / ".venv").mkdir()
    (box.repo / ".venv/pyvenv.cfg").write_text("by hand")
    refused = box.run("x")
    assert refused.returncode == 2 and "made by somebody else" in refused.err
    assert (box.repo / ".venv/pyvenv.cfg").read_text() == "by hand"


def test_an_interrupted_update_does_not_count_even_if_the_edit_is_undone(box):
    box.run("x")
    before = (box.repo / "setup.cfg").read_text()
    (box.repo / "setup.cfg").write_text(before + "# edited\n")
    assert box.run("x", PIP_FAILS="1").returncode == 1
    (box.repo / "setup.cfg").write_text(before)
    assert box.run("x").returncode == 0
    assert len(box.calls("venv")) == 2


def test_an_environment_whose_python_is_gone_is_redone(box):
    box.run("x")
    (box.repo / ".venv/bin/python").unlink()
    assert box.run("x").returncode == 0
    assert len(box.calls("venv")) == 2


def test_an_environment_of_another_folder_is_redone(box):
    box.run("x")
    moved = box.repo.rename(box.repo.with_name("moved"))
    box.repo = moved
    assert box.run("x").returncode == 0
    assert box.calls("venv")[1] == ["venv", str(moved / ".venv")]


def test_a_failed_install_shows_why_and_does_not_count(box):
    failed = box.run("x", PIP_FAILS="1")
    assert failed.returncode == 1
    assert "pip says: no space left\n" in failed.err
    assert "setup.log" in failed.err
    assert box.calls("asyncrl") == []
    assert box.run("x").returncode == 0
    assert len(box.calls("venv")) == 2


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_install_and_the_next_start_redoes_it(box, number, status):
    process = box.start("x", WORKER="pip")
    box.wait_for_call("pip", "is", "working")
    process.send_signal(number)
    assert box.finish(process).returncode == status
    box.wait_for_call("got", "TERM")
    assert box.calls("asyncrl") == []
    assert box.run("x").returncode == 0
    assert len(box.calls("venv")) == 2


def test_a_killed_install_is_redone(box):
    process = box.start("x", WORKER="pip")
    box.wait_for_call("pip", "is", "working")
    process.kill()
    box.finish(process)
    # The pip that was left behind keeps the next start waiting until it has gone.
    second = box.start("x")
    assert second.stderr.readline() == "waiting for another set-up to finish\n"
    assert len(box.calls("venv")) == 1
    (box.stand_ins / "enough").touch()
    assert box.finish(second).returncode == 0
    assert len(box.calls("venv")) == 2


def test_two_starts_at_once_install_once(box):
    first = box.start("x", WORKER="pip")
    box.wait_for_call("pip", "is", "working")
    second = box.start("y")
    assert second.stderr.readline() == "waiting for another set-up to finish\n"
    (box.stand_ins / "enough").touch()
    assert box.finish(first).returncode == box.finish(second).returncode == 0
    assert len(box.calls("venv")) == len(box.calls("pip", "install")) == 1
    assert len(box.calls("asyncrl")) == 2


def test_a_finished_environment_waits_for_no_other(box):
    box.run("x")
    box.start(script="tests/run.sh", WORKER="pip")
    box.wait_for_call("pip", "is", "working")
    assert box.run("x").returncode == 0
    assert len(box.calls("asyncrl")) == 2


def test_a_run_does_not_hold_the_lock(box):
    box.start("x", WORKER="asyncrl")
    box.wait_for_call("asyncrl", "is", "working")
    (box.repo / ".venv/setup.stamp").unlink()
    other = box.run("y")
    assert "waiting" not in other.err
    assert len(box.calls("pip")) == 2


def test_no_python_that_is_new_enough(box):
    write_script(box.tools / "python3", '[[ $1 == --version ]] && echo "Python 3.8.10"; exit 1')
    refused = box.run("x")
    assert refused.returncode == 2
    assert "expected: Python 3.10 or newer on PATH" in refused.err
    assert "got:      python3 is Python 3.8.10" in refused.err
    assert not (box.repo / ".venv").exists()


def test_a_newer_python_beside_an_old_one_is_taken(box):
    write_script(box.tools / "python3.12", PYTHON)
    write_script(box.tools / "python3", "exit 1")
    assert box.run("x").returncode == 0
    assert len(box.calls("asyncrl")) == 1


# --- in docker ------------------------------------------------------------------------------


def options_of(call: list[str], name: str) -> list[str]:
    return [call[i + 1] for i, word in enumerate(call) if word == name]


def mounts_of(call: list[str]) -> list[list[str]]:
    """What each --mount says, read as docker does: a line of CSV."""
    return [field for option in options_of(call, "--mount") for field in csv.reader([option])]


def mounts(run_folder: Path | str, launch_folder: Path | str) -> list[list[str]]:
    return [
        ["type=bind", f"source={run_folder}", "target=/runs/x"],
        ["type=bind", f"source={launch_folder}", "target=/launch", "readonly"],
    ]


def test_docker_command_line(box):
    options = ("--seed", "1", "--name", "two words")
    assert box.run("x", "launch/cartpole_ppo.py", *options, RUNTIMES=NVIDIA).returncode == 0
    (call,) = box.calls("docker", "run")
    (build,) = box.calls("docker", "build")
    image = build[build.index("--tag") + 1]
    assert re.fullmatch("asyncrl:[0-9a-f]{12}", image)
    assert build[-1] == str(box.repo)
    assert options_of(build, "--file") == [str(box.repo / "docker/Dockerfile")]

    before, after = call[2 : call.index(image)], call[call.index(image) + 1 :]
    assert after == ["train", "/launch/cartpole_ppo.py", "x", *options]
    assert {"--rm", "--init"} < set(before)
    assert options_of(before, "--gpus") == ["all"]
    assert options_of(before, "--stop-timeout") == ["60"]
    assert options_of(before, "--name") == ["asyncrl-x"]
    assert options_of(before, "--user") == [f"{os.getuid()}:{os.getgid()}"]
    assert mounts_of(before) == mounts(box.repo / "runs/x", box.repo / "launch")
    assert not {"-i", "-t", "-it", "--interactive", "--tty"} & set(before)
    assert (box.repo / "runs/x").is_dir()
    assert box.calls("venv") == []


def test_docker_without_the_nvidia_runtime_asks_for_no_gpu(box):
    result = box.run("x", RUNTIMES='{"runc":{}}', ASYNCRL_RUNTIME="docker")
    assert result.returncode == 0 and "no GPU" in result.err
    (call,) = box.calls("docker", "run")
    assert "--gpus" not in call


def test_docker_mounts_the_users_own_folders(box):
    (box.elsewhere / "mine.py").write_text("")
    box.run("x", "mine.py", RUNTIMES=NVIDIA, ASYNCRL_RUNS="my runs")
    (call,) = box.calls("docker", "run")
    assert mounts_of(call) == mounts(box.elsewhere / "my runs/x", box.elsewhere)
    assert call[-3:] == ["train", "/launch/mine.py", "x"]
    assert (box.elsewhere / "my runs/x").is_dir()


def test_docker_takes_any_character_in_a_path(box):
    odd = box.elsewhere / 'a, "b": c\\d &'
    odd.mkdir()
    (odd / "mine.py").write_text("")
    options = {"RUNTIMES": NVIDIA, "ASYNCRL_RUNS": str(odd)}
    assert box.run("x", str(odd / "mine.py"), **options).returncode == 0
    (call,) = box.calls("docker", "run")
    assert mounts_of(call) == mounts(odd / "x", odd)


def test_a_run_resumed_in_docker_finds_what_lies_beside_its_launch_file(box):
    def resume(*arguments: str) -> tuple[list[list[str]], str, str]:
        resumed = box.run("x", *arguments, RUNTIMES=NVIDIA)
        assert resumed.returncode == 0
        call = box.calls("docker", "run")[-1]
        assert call[-3::2] == ["train", "x"]
        return mounts_of(call), call[-2], resumed.err

    run_folder, own = box.repo / "runs/x", "/runs/x/launch.py"
    first, second, wrong = (box.elsewhere / name for name in ("first one", "second", "wrong"))
    for folder, text in ((first, "import mymodule"), (wrong, "")):
        folder.mkdir()
        (folder / "mine.py").write_text(text)
    resume("first one/mine.py")
    shutil.copy(first / "mine.py", run_folder / "launch.py")  # as asyncrl does
    assert resume()[:2] == (mounts(run_folder, first), own)

    # Another file, which asyncrl refuses; what was imported before stays where it was.
    assert resume("wrong/mine.py")[:2] == (mounts(run_folder, wrong), "/launch/mine.py")
    assert resume()[:2] == (mounts(run_folder, first), own)

    # The file has moved, or gone.
    first.rename(second)
    found, named, said = resume()
    assert (found, named) == (mounts(run_folder, run_folder), own)
    assert f"{first}, where its launch file was, is gone" in said
    for arguments, named in (("second/mine.py",), "/launch/mine.py"), ((), own):
        assert resume(*arguments)[:2] == (mounts(run_folder, second), named)


def test_a_run_without_a_note_of_its_launch_folder_is_resumed_in_docker(box):
    own = box.repo / "runs/x/launch.py"
    own.parent.mkdir(parents=True)
    own.touch()
    assert box.run("x", RUNTIMES=NVIDIA).returncode == 0
    (call,) = box.calls("docker", "run")
    assert mounts_of(call) == mounts(own.parent, own.parent)
    assert call[-3:] == ["train", "/runs/x/launch.py", "x"]


GIT = """
log git "$@"
[[ ! ${NO_HISTORY:-} ]] || exit 128
echo v1-3-gabc-dirty
"""


def test_docker_without_a_run_folder_is_refused(box):
    (box.elsewhere / "taken").touch()
    refused = box.run("x", RUNTIMES=NVIDIA, ASYNCRL_RUNS="taken")
    assert refused.returncode == 2 and "expected to make the run folder" in refused.err
    assert box.calls("docker", "run") == []


def test_docker_is_told_the_revision(box):
    assert box.run("x", RUNTIMES=NVIDIA).returncode == 0  # no git on this machine
    write_script(box.tools / "git", GIT)
    assert box.run("x", RUNTIMES=NVIDIA, NO_HISTORY="1").returncode == 0
    assert box.run("x", RUNTIMES=NVIDIA).returncode == 0
    told = [options_of(call, "--env") for call in box.calls("docker", "run")]
    assert told == [[], [], ["ASYNCRL_GIT=v1-3-gabc-dirty"]]
    asked = ["git", "-C", str(box.repo), "describe", "--always", "--dirty"]
    assert box.calls("git") == [asked, asked]


def test_docker_gets_a_terminal_where_there_is_one(box):
    ours, theirs = pty.openpty()
    try:
        subprocess.run(
            [box.repo / "run_main.sh", "x"],
            env=box.environment | {"RUNTIMES": NVIDIA},
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.PIPE,
            check=True,
            timeout=20,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    (call,) = box.calls("docker", "run")
    assert {"--interactive", "--tty"} < set(call)


def test_the_image_is_built_again_only_when_its_files_change(box):
    def builds_after(*changed: str) -> int:
        for name in changed:
            (box.repo / name).parent.mkdir(exist_ok=True)
            with (box.repo / name).open("a") as file:
                file.write("\n# edited\n")
        assert box.run("x", RUNTIMES=NVIDIA).returncode == 0
        return len(box.calls("docker", "build"))

    assert builds_after() == 1
    assert builds_after() == 1
    assert builds_after("launch/cartpole_ppo.py", "tests/run.sh", "asyncrl/__pycache__/x.pyc") == 1
    inside = ["asyncrl/__init__.py", "asyncrl/models/new.py", "docker/Dockerfile", ".dockerignore"]
    inside += ["constraints.txt", "setup.cfg", "pyproject.toml"]
    for count, name in enumerate(inside, start=2):
        assert builds_after(name) == count, name
    assert len({call[-4] for call in box.calls("docker", "run")}) == 1 + len(inside)


def test_a_failed_build_starts_nothing(box):
    assert box.run("x", RUNTIMES=NVIDIA, BUILD_FAILS="1").returncode == 1
    assert box.calls("docker", "run") == []


def test_docker_exit_status_is_passed_through(box):
    for status in (0, 1, 2, 125, 130):
        assert box.run("x", RUNTIMES=NVIDIA, STATUS=str(status)).returncode == status


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_reaches_docker_once(box, number, status):
    process = box.start("x", RUNTIMES=NVIDIA, WORKER="docker")
    box.wait_for_call("docker", "is", "working")
    process.send_signal(number)
    assert box.finish(process).returncode == status
    assert box.calls("got") == [["got", number.name.removeprefix("SIG")]]


def test_a_run_that_is_going_is_not_started_twice(box):
    refused = box.run("x", RUNTIMES=NVIDIA, CONTAINER="true")
    assert refused.returncode == 2
    assert "run x is already going, in container asyncrl-x" in refused.err
    assert box.calls("docker", "run") == []


def test_a_dead_container_is_cleared_away(box):
    assert box.run("x", RUNTIMES=NVIDIA, CONTAINER="false").returncode == 0
    assert ["docker", "container", "rm", "asyncrl-x"] in box.calls("docker")
    assert len(box.calls("docker", "run")) == 1


# --- tests/run.sh, and the files themselves -------------------------------------------------


def test_the_tests_have_an_environment_of_their_own(box):
    assert box.run("-k", "two words", script="tests/run.sh").returncode == 0
    assert box.calls("venv") == [["venv", str(box.repo / ".venv-test")]]
    assert box.calls("pip")[0][-1] == f"{box.repo}[all,test]"
    assert box.calls("ruff") == [["ruff"]]
    assert box.calls("pytest") == [["pytest", "-k", "two words"]]


@pytest.mark.parametrize("ruff, tests, status", [("1", "0", 1), ("0", "3", 3), ("0", "0", 0)])
def test_either_check_can_fail_and_pytest_comes_last(box, ruff, tests, status):
    finished = box.run(script="tests/run.sh", RUFF_STATUS=ruff, STATUS=tests)
    assert finished.returncode == status
    assert box.calls()[-1][:3] == ["pytest", "-n", "2"]  # all of them: on both processors


def requirement_names(lines: list[str]) -> set[str]:
    names = (re.match(r"[\w.-]+", line) for line in lines)
    return {re.sub(r"[-_.]+", "-", name.group()).lower() for name in names if name}


def test_every_requirement_is_pinned():
    setup = configparser.ConfigParser()
    setup.read(REPO / "setup.cfg")
    required = setup["options"]["install_requires"].splitlines()
    for name, extra in setup["options.extras_require"].items():
        if name != "peers":  # installed by hand, never by the set-up
            required += extra.splitlines()
    lines = (REPO / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    exact = re.compile(r'[\w.-]+==[\w.]+(; python_version (<|>=) "3\.11")?')
    assert [pin for pin in pins if not exact.fullmatch(pin)] == []
    assert requirement_names(required) - {"asyncrl"} <= requirement_names(pins)
    # PyTorch pins the CUDA libraries that it wants; a machine without CUDA has none.
    assert not any(name.startswith("nvidia") for name in requirement_names(pins))


@pytest.mark.parametrize("name", ["run_main.sh", "tests/run.sh", ".ci/run"])
def test_scripts_can_be_started(name):
    assert (REPO / name).stat().st_mode & stat.S_IXUSR
