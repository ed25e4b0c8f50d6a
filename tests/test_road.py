"""The whole road through real processes: what the learner got is what the environments did."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from asyncrl import cli
from asyncrl.checkpoint import Checkpoints
from asyncrl.spec_json import spec_from_json
from asyncrl.types import Spec
from tests.counting_env import length_of, terminates
from tests.runs import EXACT, REPOSITORY

LAUNCH_FILES = Path(__file__).parent / "launch_files"


def read_records(path: Path, run_folder: Path) -> tuple[Spec, list]:
    spec = spec_from_json(json.loads((run_folder / "plan.json").read_text())["spec"])
    data, size = path.read_bytes(), spec.layout.nbytes
    assert len(data) % size == 0
    return spec, [spec.layout.views(data, start) for start in range(0, len(data), size)]


def check_lane(spec: Spec, unrolls: list) -> list[tuple[float, int]]:
    """Every step of every environment once and in order; returns the episodes that ended.

    Across a restart of the actor the sequence goes on by one, the generation grows, and every
    environment opens a new episode.
    """
    episodes = []
    previous = None
    for unroll in unrolls:
        header = unroll.header
        identity = (int(header.generation), int(header.sequence))
        joins = previous is not None and identity[0] == int(previous.header.generation)
        if previous is not None:
            assert identity[1] == int(previous.header.sequence) + 1
            assert identity[0] >= int(previous.header.generation)
        if joins:
            assert np.array_equal(unroll.obs[0], previous.obs[-1])
            assert np.array_equal(unroll.first[0], previous.first[-1])
        else:
            assert unroll.first[0].all()
            returns = np.zeros(spec.num_envs)
        for env in range(spec.num_envs):
            for t in range(spec.unroll_length):
                identity, episode, step = (int(x) for x in unroll.obs[t, env])
                after = [int(x) for x in unroll.obs[t + 1, env]]
                length = length_of(identity, episode)
                assert unroll.first[t, env] == (step == 0)
                if step == length:  # the true final observation: what follows is a reset step
                    assert not unroll.valid[t, env]
                    assert after == [identity, episode + 1, 0]
                    flags = (unroll.terminated, unroll.truncated, unroll.reward)
                    assert not any(flag[t, env] for flag in flags)
                    continue
                ends = step + 1 == length
                assert unroll.valid[t, env]
                assert after == [identity, episode, step + 1]
                assert unroll.reward[t, env] == 10 * (step + 1) + unroll.action[t, env]
                assert unroll.terminated[t, env] == (ends and terminates(identity, episode))
                assert unroll.truncated[t, env] == (ends and not terminates(identity, episode))
                assert unroll.log_prob[t, env] == pytest.approx(np.log(1 / 3))
                returns[env] += unroll.reward[t, env]
                assert unroll.episode_length[t, env] == (length if ends else 0)
                if ends:
                    assert unroll.episode_return[t, env] == returns[env]
                    episodes.append((returns[env], length))
                    returns[env] = 0
        previous = unroll
    return episodes


def test_every_step_once_and_in_order_across_kill_9_of_actors(start, tmp_path, monkeypatch):
    """Then SIGTERM: a checkpoint, 143, nobody left; then the same command goes on from there."""
    record = tmp_path / "record.bin"
    monkeypatch.setenv("RECORD", str(record))
    launch_file = LAUNCH_FILES / "recorder.py"
    run = start("road", launch_file)
    rng = random.Random(0)
    run.wait_until(lambda: run.metrics() and run.metrics()[-1]["env_steps"] > 2_000)
    for death in range(3):
        name = f"actor {rng.randrange(2)}"
        victim = run.find(name)
        victim.send_signal(signal.SIGKILL)
        run.wait_until(lambda: run.count("restarted", "actor") > death)  # noqa: B023
        assert run.count("death", f"{name} died: signal SIGKILL")
        restarted_at = run.metrics()[-1]["env_steps"]
        run.wait_until(lambda: run.metrics()[-1]["env_steps"] > restarted_at + 2_000)  # noqa: B023
    run.children()
    run.signal(signal.SIGTERM)
    status, output = run.finish(30)
    assert status == 143, output
    assert not run.orphans()

    spec, unrolls = read_records(record, run.folder)
    lanes = [[u for u in unrolls if u.header.lane == lane] for lane in range(4)]
    episodes = [episode for lane in lanes for episode in check_lane(spec, lane)]
    last = run.metrics()[-1]
    assert last["env_steps"] == sum(int(u.valid.sum()) for u in unrolls)
    assert last["episodes"] == len(episodes)
    rows = (run.folder / "episodes.csv").read_text().splitlines()[1:]
    logged = sorted((float(r.split(",")[4]), int(r.split(",")[5])) for r in rows)
    assert logged == sorted(episodes)

    record.rename(tmp_path / "before.bin")
    steps = last["env_steps"]
    again = start("road", launch_file, "--total-env-steps", steps + 3_000)
    status, output = again.finish()
    assert status == 0, output
    assert again.count("learner", f"resumed at {steps} env steps") == 1
    all_steps = [row["env_steps"] for row in again.metrics()]
    assert all_steps == sorted(all_steps)
    assert steps + 3_000 <= all_steps[-1] < steps + 5_000
    _, after = read_records(record, run.folder)
    for lane in range(4):
        old = {(int(u.header.generation), int(u.header.sequence)) for u in lanes[lane]}
        fresh = [
            u
            for u in after
            if u.header.lane == lane
            and (int(u.header.generation), int(u.header.sequence)) not in old
        ]
        check_lane(spec, fresh)
        assert int(fresh[0].header.generation) > max(generation for generation, _ in old)
        assert int(fresh[0].header.sequence) == max(sequence for _, sequence in old) + 1
    status, output = start("road", launch_file).finish()  # there is nothing left to do
    assert status == 0 and "run road is finished" in output and again.count("start") == 2


def test_ctrl_c_twice_ends_at_once_and_the_last_checkpoint_is_whole(start, tmp_path, monkeypatch):
    monkeypatch.setenv("RECORD", str(tmp_path / "record.bin"))
    run = start("twice", LAUNCH_FILES / "recorder.py")
    run.wait_until(lambda: list((run.folder / "checkpoints").glob("checkpoint_*")))
    run.children()
    run.signal(signal.SIGINT)
    run.wait_until(lambda: run.count("stopping"))  # two at once may be heard as one
    run.signal(signal.SIGINT)
    status, output = run.finish(15)
    assert status == 130, output
    assert "Traceback" not in output
    assert not run.orphans()
    assert Checkpoints(run.folder / "checkpoints").newest_valid() is not None


LAME = """
import sys
import gymnasium as gym, asyncrl
from asyncrl.stores.rollout import RolloutConfig

def make(num_envs):
    if sys.argv[1:3] == ["actor", "1"]:
        raise RuntimeError("this actor's environments cannot be made")
    autoreset = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}
    return gym.make_vec("CartPole-v1", num_envs, "sync", autoreset)

config = asyncrl.Config(
    env=asyncrl.EnvConfig(make),
    model=asyncrl.ModelConfig(hidden=(16,)),
    algorithm=asyncrl.PPOConfig(rollout=RolloutConfig(ahead=0), num_minibatches=2, epochs=1),
    actor=asyncrl.ActorConfig(num_actors=2, lanes_per_actor=1, envs_per_lane=2, unroll_length=8),
    learner=asyncrl.LearnerConfig(log_seconds=0.5, num_threads=1, tensorboard=False, device="cpu"),
    evaluation=asyncrl.EvaluationConfig(period_steps=0),
    total_env_steps=2_000,
)
"""


def test_an_on_policy_run_goes_on_without_actors_that_were_given_up(start, tmp_path):
    """The rest of them has used up its permits by then: only the learner can give it more."""
    (tmp_path / "lame.py").write_text(LAME)
    run = start("lame", tmp_path / "lame.py", constants={"MAX_RESTARTS": 2})
    run.wait_until(lambda: run.count("gave-up"))
    assert len(run.metrics()) > 1  # rows go on while nothing comes in
    status, output = run.finish(30)
    assert status == 0, output
    assert run.metrics()[-1]["env_steps"] >= 2_000


SLOW = """
import time
import gymnasium as gym
import asyncrl


class Slow(gym.Wrapper):
    seconds = 2.5  # of the first step

    def step(self, action):
        time.sleep(self.seconds)
        self.seconds = 0.7
        return self.env.step(action)


config = asyncrl.Config(
    env=asyncrl.EnvConfig(
        lambda num_envs: gym.vector.SyncVectorEnv([lambda: Slow(gym.make("CartPole-v1"))])
    ),
    model=asyncrl.ModelConfig(hidden=(16,)),
    algorithm=asyncrl.PPOConfig(num_minibatches=1),
    actor=asyncrl.ActorConfig(lanes_per_actor=3, envs_per_lane=1, unroll_length=2),
    learner=asyncrl.LearnerConfig(num_threads=1, tensorboard=False, device="cpu"),
    evaluation=asyncrl.EvaluationConfig(period_steps=0),
    total_env_steps=12,
)
"""


def test_slow_environments_are_not_taken_for_stuck(start, tmp_path):
    """Neither by their first step nor by the steps of several lanes, one after the other."""
    (tmp_path / "slow.py").write_text(SLOW)
    run = start("slow", tmp_path / "slow.py", constants={"ACTOR_SECONDS": 1.4})
    status, output = run.finish(100)
    assert status == 0 and not run.count("stuck"), output


def test_a_closed_terminal_stops_a_run_unless_nohup_says_otherwise(start):
    run = start("kept", EXACT, "--total-env-steps", 10**9, prefix=("nohup",))
    run.wait_until(lambda: run.count("start"))
    run.signal(signal.SIGHUP)
    rows = len(run.metrics())
    run.wait_until(lambda: len(run.metrics()) > rows + 2)
    assert not run.count("stopping")
    run.signal(signal.SIGTERM)
    assert run.finish(60)[0] == 143
    ignored = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # where the tests are under nohup too
    run = start("kept", EXACT, "--total-env-steps", 10**9)
    signal.signal(signal.SIGHUP, ignored)
    run.wait_until(lambda: run.count("start") > 1)
    run.signal(signal.SIGHUP)
    assert run.finish(60)[0] == 129


def test_the_best_by_evaluation_is_kept_and_plays_the_same_games_again(start):
    judged = "--evaluation.period-steps", 800, "--evaluation.epsilon", 0
    for total in (20_000, 22_000):  # the second goes on where the first ended
        run = start("judged", EXACT, "--total-env-steps", total, *judged)
        run.wait_until(lambda: run.count("evaluated") >= 2)  # noqa: B023
        assert run.finish()[0] == 0
        found = [event for event in run.events() if event.kind == "evaluated"]
        returns = [float(event.text.split()[2]) for event in found]
        best = Checkpoints(run.folder / "checkpoints").best().state
        assert best["eval/return"] == pytest.approx(max(returns), abs=0.005)
        first = found[int(np.argmax(returns))]
        assert best["eval/env_steps"] == int(first.fields["env_steps"])
    same = ["--seed", "1", "--episodes", "10", "--epsilon", "0", "--device", "cpu"]
    assert cli.main(["eval", str(run.folder), "--checkpoint", "best", *same]) == 0
    line = (run.folder / "evaluations.jsonl").read_text().splitlines()[-1]
    assert json.loads(line)["eval/return"] == pytest.approx(best["eval/return"])


def test_a_thread_of_the_launch_file_keeps_nothing_from_ending(start, tmp_path):
    """Nor does a reader of the output who has gone away."""
    launch_file = tmp_path / "threads.py"
    thread = "import threading\nthreading.Thread(target=threading.Event().wait).start()\n"
    launch_file.write_text(EXACT.read_text() + thread)
    run = start("run", launch_file, "--no-such-option", 1)
    status, output = run.finish(60)
    assert status == 2 and "no-such-option" in output
    run = start("run", launch_file, "--total-env-steps", 1_000)
    assert run.finish()[0] == 0
    command = [sys.executable, "-m", "asyncrl", "eval", str(run.folder), "--episodes", "2"]
    game = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    game.stdout.close()
    assert game.wait(60) == 128 + signal.SIGPIPE
    assert game.stderr.read() == b""


@pytest.mark.parametrize("schedule", ["async", "serial"])
def test_a_run_whose_checkpoints_are_gone_is_refused_and_its_logs_stand(schedule, start):
    run = start("run", EXACT, "--schedule", schedule, "--total-env-steps", 1_000)
    status, output = run.finish()
    assert status == 0, output
    before = (run.folder / "metrics.jsonl").read_bytes()
    shutil.rmtree(run.folder / "checkpoints")
    again = start("run", EXACT, "--schedule", schedule, "--total-env-steps", 1_000)
    status, output = again.finish()
    assert status == 2 and "put one back" in output and "Traceback" not in output
    assert not again.count("restarted", "")
    assert (run.folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("schedule", ["async", "lockstep"])
def test_a_learner_that_finds_no_checkpoint_for_a_while_is_tried_again(schedule, start):
    """A file system may go and come back; a run that went on for long is not refused for it."""
    often = ("--learner.checkpoint-seconds", 0.3, "--total-env-steps", 6_000)
    run = start("run", EXACT, "--schedule", schedule, *often)
    run.wait_until(lambda: run.num_saved() > 1)
    away = run.folder.with_name("away")
    learner = run.find("learner 0")
    (run.folder / "checkpoints").rename(away)
    learner.kill()
    run.wait_until(lambda: run.count("death", "learner") > 1)  # its next one found none
    shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
    away.rename(run.folder / "checkpoints")
    status, output = run.finish()
    assert status == 0, output
