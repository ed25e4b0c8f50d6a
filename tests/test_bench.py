"""How fast a launch file will be, and with how many actors: arithmetic by hand, then for real."""

from __future__ import annotations

import json

import pytest

from asyncrl import bench, cli, costs
from asyncrl.bench import Shape, choose, divisions
from asyncrl.config import resolve
from asyncrl.costs import Cost, Forecast, forecast
from asyncrl.folder import _without_auto

LAUNCH_FILE = """
from asyncrl import *
config = Config(
    EnvConfig("CartPole-v1"), ModelConfig(hidden=(16,)),
    actor=ActorConfig(envs_per_lane=4, unroll_length=8),
    algorithm=DQNConfig(batch_size=32, replay=ReplayConfig(learning_starts=64)),
    total_env_steps=600, learner=LearnerConfig(device="cpu", tensorboard=False),
    evaluation=EvaluationConfig(period_steps=0),
)
ppo = Config(
    EnvConfig("CartPole-v1"), ModelConfig(hidden=(16,)), algorithm=PPOConfig(epochs=2),
    actor=ActorConfig(envs_per_lane=4, unroll_length=8), total_env_steps=600,
    learner=LearnerConfig(device="cpu"),
)
"""


@pytest.fixture
def launch_file(tmp_path):
    path = tmp_path / "launch.py"
    path.write_text(LAUNCH_FILE)
    return path


@pytest.mark.parametrize(
    "num_actors, acting, learning, cores, schedule, rate, limit",
    [
        (1, Cost(2e-3, 2e-3), Cost(1e-3, 1e-3), 8, "async", 500, "the actors"),
        (4, Cost(2e-3, 2e-3), Cost(1e-3, 1e-3), 8, "async", 1000, "the learner"),
        (4, Cost(2e-3, 2e-3), Cost(1e-3, 1e-3), 2, "async", 2 / 3e-3, "the processors"),
        (1, Cost(1e-3, 2e-3), Cost(1e-3, 2e-3), 2, "async", 500, "the processors"),
        (2, Cost(2e-3, 2e-3), Cost(1e-3, 1e-3), 8, "lockstep", 500, "turns"),
        (9, Cost(2e-3, 2e-3), Cost(1e-3, 1e-3), 2, "lockstep", 500, "turns"),
        (4, Cost(2e-3, 2e-3), Cost(2e-3, 2e-3), 8, "serial", 250, "turns"),
        (1, Cost(1e-3, 1e-3), Cost(1e-3, 1e-3), 1.5, "async", 750, "the processors"),
        (8, Cost(2e-3, 1e-3, {}, 1e-3), Cost(1e-3, 1e-3, {}, 1e-3), 16, "async", 500, "the GPU"),
        (8, Cost(2e-3, 1e-3, {}, 3e-3), Cost(1e-3, 1e-3), 16, "lockstep", 250, "turns"),
    ],
)
def test_the_slowest_decides_or_all_processors_are_busy(
    num_actors, acting, learning, cores, schedule, rate, limit
):
    found = forecast(num_actors, acting, learning, cores, schedule)
    assert found.rate == pytest.approx(rate) and found.bottleneck.startswith(limit)


def test_more_processes_have_to_be_worth_it():
    shapes = [Shape(1, 2, 8, 1), Shape(2, 2, 4, 1), Shape(4, 2, 2, 2)]

    def best(*rates, now=0):
        found = zip(shapes, (Forecast(rate, "") for rate in rates), strict=True)
        return shapes.index(choose(dict(found), shapes[now]))

    assert best(100, 101, 102) == 0
    assert best(100, 110, 112) == 1
    assert best(100, 110, 150) == 2
    assert best(100, 102, 101, now=2) == 2  # as it is, where that is as good
    assert shapes[1].options(shapes[0]) == "--actor.num-actors 2 --actor.envs-per-lane 4"
    assert shapes[2].options(shapes[1]).endswith("--learner.num-threads 2")


def test_the_number_of_environments_stays_as_it_is(launch_file):
    config = resolve(launch_file, ["--actor.num-actors", "2", "--actor.envs-per-lane", "3"])
    found = list(divisions(config, cores=4))
    assert found == [(1, 1, 12), (1, 2, 6), (2, 1, 6), (2, 2, 3), (4, 1, 3)]
    options = ["--profile", "ppo", "--algorithm.rollout.num-unrolls", "2"]
    assert list(divisions(resolve(launch_file, options), cores=4)) == [(1, 2, 4), (2, 1, 4)]


def test_a_resumed_run_keeps_the_number_that_was_found():
    auto = ["--seed", "3", "--actor.num-actors", "auto", "--x", "auto"]
    assert _without_auto(auto) == ["--seed", "3", "--x", "auto"]
    number = ["--actor.num-actors", "2"]
    assert _without_auto(["--actor.num-actors=auto", *number]) == number


@pytest.fixture
def quickly(monkeypatch):
    monkeypatch.setattr(costs, "PLAY_SECONDS", 0.1)
    monkeypatch.setattr(costs, "LEARN_SECONDS", 0.1)
    monkeypatch.setattr(bench, "CHILD_ENVIRONMENT", {})


@pytest.mark.parametrize("options", [[], ["--profile", "ppo"], ["--actor.num-actors", "auto"]])
def test_for_real(quickly, launch_file, capsys, options):
    assert cli.main(["bench", str(launch_file), *options]) == 0
    output = capsys.readouterr().out
    for words in ("2 groups of 4 envs, on cpu", "1 thread, on cpu", "as it is  about", "best here"):
        assert words in output
    lines = [line[40:].split() for line in output.splitlines() if line.startswith("  ")]
    assert all(1 < float(words[0].replace(",", "")) < 1e6 for words in lines)
    assert lines[0][2::3] == ["env", "inference", "writing", "weights"]
    assert lines[-1][2::3] == ["sync", "update"]
    for words in lines:  # shares of one time, of which others may take a part on a busy machine
        assert 25 < sum(float(share) for share in words[3::3]) <= 101


def test_other_devices_are_tried(quickly, launch_file, capsys, monkeypatch):
    """A second name of the processor stands in for a GPU."""
    monkeypatch.setattr(bench, "devices", lambda own: ["cpu", "cpu:0"])
    assert cli.main(["bench", str(launch_file)]) == 0
    output = capsys.readouterr().out
    for words in (
        "2 groups of 4 envs, on cpu:0",
        "1 thread, on cpu:0",
        "1 thread, on cpu ",
        "4 envs on",
    ):
        assert words in output
    shapes = Shape(1, 2, 4, 1), Shape(1, 2, 4, 1, "cuda", "cuda:1")
    assert shapes[1].options(shapes[0]) == "--actor.device cuda --learner.device cuda:1"


def test_what_takes_too_long_is_left_out_but_never_what_is_asked_for(
    quickly, launch_file, capsys, monkeypatch
):
    monkeypatch.setattr(bench, "TRIAL_SECONDS", 0.0)
    assert cli.main(["bench", str(launch_file)]) == 0
    output = capsys.readouterr().out
    assert "2 groups of 4 envs, on cpu" in output and "more are left out, for time" in output
    assert "1 group of" not in output


def test_trials_use_short_unrolls_unless_states_are_stored_in_them(launch_file):
    config = resolve(launch_file, ["--actor.unroll-length", "128"])
    assert costs.brief(config).actor.unroll_length == 16
    states = ["--algorithm.sequence-length", "2", "--algorithm.num-states", "4"]
    config = resolve(launch_file, ["--actor.unroll-length", "128", *states])
    assert costs.brief(config).actor.unroll_length == 128


@pytest.mark.parametrize("profile, number", [("config", 2), ("ppo", 4)])
def test_rollouts_that_grow_with_the_actors_are_cheaper_to_learn_from(
    launch_file, monkeypatch, profile, number
):
    """By hand: an actor makes 1,000 env steps a second; a learner takes 0.5 ms for each, with four
    actors' rollouts a tenth of that, where a rollout is what all of them play."""

    def time_learner(config, unrolls, threads):
        milliseconds = 0.05 if config.actor.num_actors == 4 else 0.5
        return Cost(1e-3 * milliseconds, 0.0)

    monkeypatch.setattr(costs, "usable_cores", lambda: 4)
    monkeypatch.setattr(costs, "processor_share", lambda: 4.0)
    monkeypatch.setattr(costs, "time_actor", lambda config: (Cost(1e-3, 1e-3), []))
    monkeypatch.setattr(costs, "time_learner", time_learner)
    config = resolve(launch_file, ["--profile", profile, "--schedule", "async"])
    assert costs.best_num_actors(config) == number


BUSY = """
import time
import gymnasium as gym
from asyncrl import *

class Busy(gym.Env):
    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        begun = time.process_time()
        while time.process_time() < begun + 0.002:
            pass
        return self.observation_space.sample(), 0.0, False, False, {}

gym.register("Busy-v0", Busy)
config = Config(
    EnvConfig("Busy-v0", vectorization="async"), ModelConfig(hidden=(16,)),
    actor=ActorConfig(lanes_per_actor=1, envs_per_lane=2, unroll_length=8),
    learner=LearnerConfig(device="cpu"),
)
"""


def test_processes_of_environments_are_counted(launch_file, monkeypatch):
    monkeypatch.setattr(costs, "PLAY_SECONDS", 1.0)
    launch_file.write_text(BUSY)
    acting, _ = costs.time_actor(resolve(launch_file, []))
    assert acting.cpu >= 0.0018


def test_refusals(quickly, launch_file, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "nowhere.py"])
    assert "expected a launch file, got nowhere.py" in capsys.readouterr().err
    assert cli.main(["bench", str(launch_file), "--env.id", "CartPol-v1"]) == 2
    assert "did you mean CartPole-v1" in capsys.readouterr().err
    for source, words in (("1 / 0", "(line 1) cannot be used: Zero"), ("exit(0)", "it calls exit")):
        launch_file.write_text(source)
        assert cli.main(["bench", str(launch_file)]) == 2
        assert words in capsys.readouterr().err


def test_auto_is_measured_once_and_kept(launch_file, start):
    options = ["--actor.num-actors", "auto", "--schedule", "serial"]
    run = start("auto", launch_file, *options)
    status, output = run.finish(110)
    assert status == 0, output
    stored = json.loads((run.folder / "launch.json").read_text())["options"]
    assert stored[: len(options)] == options and stored[-2] == "--actor.num-actors"
    number = int(stored[-1])
    assert json.loads((run.folder / "plan.json").read_text())["num_actors"] == number >= 1
    again = start("auto", launch_file, *options, "--total-env-steps", 900)
    status, output = again.finish(110)
    assert status == 0, output
    assert run.count("learner", "resumed at")
