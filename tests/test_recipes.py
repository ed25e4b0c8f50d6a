"""Launch files: each of their profiles can begin; their recipes stay what they are, which is the
papers' but for what is said beside each number."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from functools import cache, reduce
from pathlib import Path

import pytest

from asyncrl import (
    EpsilonGreedy,
    EpsilonLadder,
    Exponential,
    Greedy,
    Linear,
    Piecewise,
    Random,
    Switch,
)
from asyncrl.config import Config, load_launch_file
from asyncrl.plan import Plan, prepare
from asyncrl.spec_json import spec_from_json
from tests.test_launch_files import LAUNCH_FILES

PACKAGES = {"breakout": "ale_py", "pong": "ale_py", "lunarlander": "Box2D"}


@cache
def profiles(launch_file: Path) -> dict[str, Config]:
    made = vars(load_launch_file(launch_file)).items()
    return {name: config for name, config in made if isinstance(config, Config)}


@pytest.mark.parametrize("launch_file", LAUNCH_FILES, ids=lambda path: path.stem)
def test_every_profile_can_begin(launch_file, monkeypatch):
    """In the memory that the header speaks of."""
    for begins, package in PACKAGES.items():
        if launch_file.stem.startswith(begins):
            pytest.importorskip(package)
    monkeypatch.setattr("asyncrl.costs.best_num_actors", lambda config: 2)
    header = launch_file.read_text().split('"""')[1]
    assert "config" in profiles(launch_file)
    for name, profile in profiles(launch_file).items():
        plan = prepare(launch_file, ["--profile", name], launch_file)
        assert plan == Plan(**json.loads(json.dumps(dataclasses.asdict(plan))))
        assert plan.total_env_steps == profile.total_env_steps and plan.schedule == "async"
        assert plan.num_lanes == plan.num_actors * profile.actor.lanes_per_actor
        spec = spec_from_json(plan.spec)
        assert spec.num_envs == profile.actor.envs_per_lane
        assert spec.num_states == getattr(profile.algorithm, "num_states", 1)
        is_home = name.startswith("home")
        promised = re.search(r"home\*?: .*?(\d+) GB" if is_home else r"(\d+) GB of mem", header)
        gigabytes = sum(nbytes for _, nbytes in plan.memory) / 1e9
        assert gigabytes < (float(promised[1]) if promised else 4)


# -- recipes -------------------------------------------------------------------------------------


def recipe(launch_file: str, name: str = "config") -> Config:
    (path,) = (path for path in LAUNCH_FILES if path.stem == launch_file)
    return profiles(path)[name]


def check(config: Config, numbers: dict) -> None:
    for name, want in numbers.items():
        assert reduce(getattr, name.split("."), config) == want, name


# Behind each number that of the paper, and why ours differs, if it does. Periods of papers are in
# frames, four to an env step; ours are in env steps, those of target nets in updates.
CLASSIC = {"env.id": "ALE/Breakout-v5", "env.protocol": "classic", "model.frame_stack": 4}
# Rainbow's parts double and 3-step (Hessel et al. 2018).
DQN = CLASSIC | {
    "model.dueling": False,  # off, as in DQN
    "model.torso": "auto",  # Nature's, the same
    "model.features": 512,  # 512
    "model.lstm": 0,  # 0
    "policy": EpsilonGreedy(Linear(1.0, 0.01, 250_000)),  # 62,500: slower, without noisy nets
    "algorithm.gamma": 0.99,  # 0.99
    "algorithm.n_step": 3,  # 3
    "algorithm.double": True,  # the same
    "algorithm.huber": True,  # the same: errors are clipped
    "algorithm.reward_clip": 1.0,  # 1
    "algorithm.batch_size": 32,  # 32
    "algorithm.learning_rate": 1e-4,  # 6.25e-5: larger for a fifth of the env steps
    "algorithm.adam_eps": 1.5e-4,  # 1.5e-4
    "algorithm.max_grad_norm": 10,  # not told; 10 in dueling nets (Wang et al. 2016)
    "algorithm.target_period": 2_000,  # 2,000
    "algorithm.polyak": 1.0,  # copied, the same
    "algorithm.distribution": "none",  # the same
    "algorithm.replay.capacity": 1_000_000,  # 1,000,000
    "algorithm.replay.samples_per_insert": 8,  # 8: a batch every 4 env steps
    "algorithm.replay.learning_starts": 20_000,  # 20,000
    "algorithm.replay.priority_exponent": 0,  # 0
    "total_env_steps": 10_000_000,  # 50,000,000: a day's work for one machine
}
# Hessel et al. 2018.
RAINBOW = DQN | {
    "model.dueling": True,  # the same
    "model.noisy": True,  # the same
    "policy": EpsilonGreedy(Piecewise((20_000,), (1.0, 0.0))),  # 0: a random start fills the replay
    "algorithm.distribution": "c51",  # the same
    "algorithm.num_atoms": 51,  # 51
    "algorithm.value_min": -10,  # -10
    "algorithm.value_max": 10,  # 10
    "algorithm.learning_rate": 6.25e-5,  # 6.25e-5
    "algorithm.replay.priority_exponent": 0.5,  # 0.5
    "algorithm.replay.importance_exponent": Linear(0.4, 1.0, 10_000_000),  # over its whole run too
}
# Kapturowski et al. 2019. It sums the loss over 80 steps; ours is the mean of 40.
R2D2 = DQN | {
    "model.dueling": True,  # the same
    "model.lstm": 512,  # 512, with the last action and reward, which ours is not told
    "policy": EpsilonLadder(0.4, 7.0),  # 0.4 and 7, of 256 actors
    "algorithm.gamma": 0.997,  # 0.997
    "algorithm.n_step": 5,  # 5
    "algorithm.sequence_length": 40,  # 80: half, for more updates
    "algorithm.burn_in": 20,  # 40: half
    "algorithm.loss_on": "all",  # the same
    "algorithm.huber": True,  # squared
    "algorithm.value_rescaling": True,  # the same
    "algorithm.reward_clip": 0,  # 0
    "algorithm.batch_size": 32,  # 64: half, for more updates
    "algorithm.learning_rate": 1e-4,  # 1e-4
    "algorithm.adam_eps": 1e-3 / 40,  # 1e-3, of a sum
    "algorithm.max_grad_norm": 40 / 40,  # not told; 40 in SEED RL, of a sum
    "algorithm.target_period": 500,  # 2,500: fewer updates in all
    "algorithm.replay.capacity": 1_000_000,  # 4,000,000: memory
    "algorithm.replay.samples_per_insert": 8,  # about 0.4: env steps are dearer on one machine
    "algorithm.replay.priority_exponent": 0.9,  # 0.9
    "algorithm.replay.importance_exponent": 0.6,  # 0.6
    "algorithm.replay.refresh_states": True,  # states stay as stored
    "actor.unroll_length": 20,  # sequences begin every 40 env steps
}
# Clark et al. 2024 and its authors' code.
BTR = DQN | {
    "model.dueling": True,  # the same
    "model.torso": "impala",  # the same
    "model.torso_width": 2,  # 2
    "model.torso_pool": 6,  # 6
    "model.spectral_norm": True,  # the same
    "model.noisy": True,  # the same
    "policy": EpsilonGreedy(Exponential(1.0, 0.01, 0.999, 2_000)),  # so for half of the run, then 0
    "algorithm.distribution": "iqn",  # the same
    "algorithm.num_tau": 8,  # 8
    "algorithm.num_acting_tau": 8,  # 8
    "algorithm.munchausen": 0.9,  # 0.9
    "algorithm.munchausen_temperature": 0.03,  # 0.03
    "algorithm.munchausen_clip": -1,  # -1
    "algorithm.gamma": 0.997,  # 0.997
    "algorithm.batch_size": 256,  # 256
    "algorithm.learning_rate": 1e-4,  # 1e-4
    "algorithm.adam_eps": 2e-5,  # 0.005 / 256
    "algorithm.target_period": 500,  # 500
    "algorithm.replay.capacity": 1_000_000,  # 2 ** 20
    "algorithm.replay.samples_per_insert": 4,  # 4: a batch every 64 env steps
    "algorithm.replay.learning_starts": 200_000,  # 200,000
    "algorithm.replay.priority_exponent": 0.2,  # 0.2
    "algorithm.replay.importance_exponent": 0.45,  # 0.45
    "total_env_steps": 50_000_000,  # 50,000,000
}
HOME = {"total_env_steps": 1_000_000, "algorithm.replay.capacity": 200_000}
RECIPES = {
    "breakout_dqn": (DQN, {
        "algorithm.double": False, "algorithm.learning_rate": 2e-4,
        "algorithm.target_period": 500, "algorithm.replay.samples_per_insert": 4,
    }),
    "breakout_rainbow": (RAINBOW, {
        "algorithm.learning_rate": 1e-4, "algorithm.target_period": 500,
        "algorithm.replay.samples_per_insert": 4,
        "algorithm.replay.importance_exponent": Linear(0.4, 1.0, 1_000_000),
    }),
    "breakout_r2d2": (R2D2, {
        "model.features": 256, "model.lstm": 256, "algorithm.batch_size": 8,
        "algorithm.target_period": 100,
    }),
    "breakout_btr": (BTR, {
        "model.torso_width": 1, "model.features": 256, "algorithm.batch_size": 32,
        "policy": EpsilonGreedy(Exponential(1.0, 0.01, 0.999, 100)),
        "algorithm.replay.samples_per_insert": 2, "algorithm.replay.learning_starts": 20_000,
    }),
}  # fmt: skip


@pytest.mark.parametrize("launch_file", RECIPES)
def test_recipes_of_breakout(launch_file):
    full, home = RECIPES[launch_file]
    check(recipe(launch_file), full)
    check(recipe(launch_file, "home"), full | HOME | home)
    env = recipe(launch_file).env.resolved()
    rules = {"frameskip": 4, "noop_max": 30, "repeat_action_probability": 0, "img_height": 84}
    assert rules.items() <= env.atari.items() and env.max_idle_steps == 4_500


def test_epsilon_of_btr_falls_as_its_authors_does():
    """What is above 0.01 falls by a two-millionth of it each env step."""
    epsilon = recipe("breakout_btr").policy.epsilon
    for env_steps in (0, 10**6, 2 * 10**6, 5 * 10**6, 10**7, 25 * 10**6):
        theirs = 0.01 + 0.99 * math.exp(-env_steps / 2e6)
        assert epsilon.at(env_steps) == pytest.approx(theirs, abs=0.01)


@pytest.mark.parametrize(
    "launch_file, updates", [("breakout_r2d2", 24_500), ("breakout_impala", 12_500)]
)
def test_updates_that_home_promises(launch_file, updates):
    config = recipe(launch_file, "home")
    actor, algorithm = config.actor, config.algorithm
    if launch_file == "breakout_impala":
        share = actor.num_lanes * actor.envs_per_lane * actor.unroll_length
        assert config.total_env_steps / share == updates
    else:
        replay = algorithm.replay
        share = algorithm.batch_size * algorithm.sequence_length / replay.samples_per_insert
        assert (config.total_env_steps - replay.learning_starts) / share == updates


# Frames stacked, LSTM, steps of a sequence.
FULL = {"plain": (1, 0, 0), "stack": (4, 0, 0), "lstm": (1, 512, 8), "config": (4, 512, 8)}
WEAK = {"home_plain": (1, 0, 0), "home_stack": (3, 0, 0), "home_lstm": (1, 256, 8),
        "home": (3, 256, 8)}  # fmt: skip


@pytest.mark.parametrize("name", FULL | WEAK)
def test_the_recipe_of_the_ancestor(name):
    """64 sequences or transitions each 7.5 env steps, or 32 steps; Adam, mean squares, no
    clipping, no double Q."""
    config, is_full = recipe("breakout_ancestor", name), name in FULL
    frame_stack, lstm, length = (FULL | WEAK)[name]
    batch_size = 64 if is_full else 32 // (length or 1)
    updates = 5_000 if is_full else 500  # to the target net's next copy
    rate, n_step = (1e-4, 1) if is_full else (2e-4, 3)
    check(config, {
        "env.id": "asyncrl/AncestorBreakout-v0",
        "model.frame_stack": frame_stack, "model.lstm": lstm, "model.dueling": False,
        "algorithm.sequence_length": length, "algorithm.burn_in": 0,
        "algorithm.loss_on": "last" if lstm and is_full else "all",
        "algorithm.num_states": 16 if lstm else 1, "actor.unroll_length": 16,
        "algorithm.gamma": 0.99, "algorithm.n_step": n_step, "algorithm.double": False,
        "algorithm.huber": False, "algorithm.batch_size": batch_size,
        "algorithm.learning_rate": Exponential(rate, rate / 10, 0.998, int(7.5 * updates)),
        "algorithm.adam_eps": 1e-8, "algorithm.max_grad_norm": 0,
        "algorithm.target_period": updates, "algorithm.polyak": 1.0,
        "algorithm.replay.capacity": 500_000 if is_full else 100_000,
        "algorithm.replay.learning_starts": 50_000 if is_full else 5_000,
        "algorithm.replay.priority_exponent": 0,
        "algorithm.replay.samples_per_insert": pytest.approx(batch_size * (length or 1) / 7.5),
        "evaluation.epsilon": 0,
        "total_env_steps": 56_250_000 if is_full else 300_000,
    })  # fmt: skip
    mix, random_steps = config.policy, 100_000 if is_full else 30_000
    assert {part.name: part.policy for part in mix.parts} == {
        "greedy": Greedy(), "epsilon": EpsilonGreedy(0.1), "random": Random(),
        "frontier": Switch(Greedy(), EpsilonGreedy(0.1), "greedy", margin=10, initial_length=42),
    }  # fmt: skip
    for env_steps, later in ((0, 0), (random_steps - 1, 0), (random_steps, 1), (10**9, 1)):
        weights = dict(zip(mix.names, mix.weights(env_steps), strict=True))
        share = later / 3
        want = {"greedy": share, "frontier": share, "epsilon": share, "random": 1 - later}
        assert weights == pytest.approx(want)
