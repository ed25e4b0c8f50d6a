"""Launch files: each of their profiles can begin, and their recipes have the papers' numbers."""

from __future__ import annotations

import dataclasses
import json
import re
from functools import cache, reduce
from pathlib import Path

import pytest

from asyncrl import EpsilonGreedy, EpsilonLadder, Exponential, Greedy, Linear, Random, Switch
from asyncrl.config import Config, load_launch_file
from asyncrl.plan import Plan, prepare
from asyncrl.types import Spec
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
        spec = Spec.from_json(plan.spec)
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


CLASSIC = {"env.id": "ALE/Breakout-v5", "env.protocol": "classic", "model.frame_stack": 4}
DQN = CLASSIC | {
    "model.dueling": True, "model.torso": "auto", "model.features": 512, "model.lstm": 0,
    "policy": EpsilonGreedy(Linear(1.0, 0.01, 250_000)),
    "algorithm.gamma": 0.99, "algorithm.n_step": 3, "algorithm.double": True,
    "algorithm.huber": True, "algorithm.reward_clip": 1.0, "algorithm.batch_size": 32,
    "algorithm.learning_rate": 1e-4, "algorithm.adam_eps": 1.5e-4,
    "algorithm.target_period": 2_000, "algorithm.polyak": 1.0, "algorithm.distribution": "none",
    "algorithm.replay.capacity": 1_000_000, "algorithm.replay.samples_per_insert": 8,
    "algorithm.replay.learning_starts": 20_000, "algorithm.replay.priority_exponent": 0,
    "total_env_steps": 10_000_000,
}  # fmt: skip
RAINBOW = DQN | {
    "model.noisy": True, "policy": EpsilonGreedy(Linear(1.0, 0.0, 30_000)),
    "algorithm.distribution": "c51", "algorithm.num_atoms": 51, "algorithm.value_min": -10,
    "algorithm.value_max": 10, "algorithm.learning_rate": 6.25e-5,
    "algorithm.replay.priority_exponent": 0.5,
    "algorithm.replay.importance_exponent": Linear(0.4, 1.0, 10_000_000),
}  # fmt: skip
R2D2 = DQN | {
    "model.lstm": 512, "policy": EpsilonLadder(0.4, 7.0), "algorithm.gamma": 0.997,
    "algorithm.n_step": 5, "algorithm.sequence_length": 40, "algorithm.burn_in": 20,
    "algorithm.loss_on": "all", "algorithm.value_rescaling": True, "algorithm.reward_clip": 0,
    "algorithm.adam_eps": 1e-3, "algorithm.max_grad_norm": 40, "algorithm.target_period": 500,
    "algorithm.replay.priority_exponent": 0.9, "algorithm.replay.importance_exponent": 0.6,
    "algorithm.replay.refresh_states": True, "actor.unroll_length": 20,
}  # fmt: skip
BTR = DQN | {
    "model.torso": "impala", "model.torso_width": 2, "model.torso_pool": 6,
    "model.spectral_norm": True, "model.noisy": True,
    "policy": EpsilonGreedy(Linear(1.0, 0.01, 500_000)), "algorithm.distribution": "iqn",
    "algorithm.num_tau": 8, "algorithm.num_acting_tau": 32, "algorithm.munchausen": 0.9,
    "algorithm.munchausen_temperature": 0.03, "algorithm.munchausen_clip": -1,
    "algorithm.gamma": 0.997, "algorithm.batch_size": 256, "algorithm.adam_eps": 2e-5,
    "algorithm.target_period": 500, "algorithm.replay.samples_per_insert": 4,
    "algorithm.replay.learning_starts": 200_000, "algorithm.replay.priority_exponent": 0.2,
    "algorithm.replay.importance_exponent": 0.45, "total_env_steps": 50_000_000,
}  # fmt: skip
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
        "algorithm.target_period": 200, "algorithm.replay.samples_per_insert": 2,
    }),
    "breakout_btr": (BTR, {
        "model.torso_width": 1, "model.features": 256, "algorithm.num_acting_tau": 8,
        "policy": EpsilonGreedy(Linear(1.0, 0.01, 100_000)), "algorithm.batch_size": 32,
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


# Frames stacked, LSTM, steps of a sequence.
FULL = {"plain": (1, 0, 0), "stack": (4, 0, 0), "lstm": (1, 512, 8), "config": (4, 512, 8)}
WEAK = {"home_plain": (1, 0, 0), "home_stack": (3, 0, 0), "home_lstm": (1, 256, 5),
        "home": (3, 256, 5)}  # fmt: skip


@pytest.mark.parametrize("name", FULL | WEAK)
def test_the_recipe_of_the_ancestor(name):
    """64 or 32 samples each 7.5 env steps; Adam, mean squares, no clipping, no double Q."""
    config, is_full = recipe("breakout_ancestor", name), name in FULL
    frame_stack, lstm, length = (FULL | WEAK)[name]
    batch_size, updates = (64, 5_000) if is_full else (32, 500)  # to the target net's next copy
    check(config, {
        "env.id": "asyncrl/AncestorBreakout-v0",
        "model.frame_stack": frame_stack, "model.lstm": lstm, "model.dueling": False,
        "algorithm.sequence_length": length, "algorithm.burn_in": 0,
        "algorithm.loss_on": "last" if lstm else "all",
        "algorithm.num_states": 16 if lstm else 1, "actor.unroll_length": 16,
        "algorithm.gamma": 0.99, "algorithm.n_step": 1, "algorithm.double": False,
        "algorithm.huber": False, "algorithm.batch_size": batch_size,
        "algorithm.learning_rate": Exponential(1e-4, 1e-5, 0.998, int(7.5 * updates)),
        "algorithm.adam_eps": 1e-8, "algorithm.max_grad_norm": 0,
        "algorithm.target_period": updates, "algorithm.polyak": 1.0,
        "algorithm.replay.capacity": 500_000 if is_full else 100_000,
        "algorithm.replay.learning_starts": 50_000 if is_full else 5_000,
        "algorithm.replay.priority_exponent": 0,
        "algorithm.replay.samples_per_insert": pytest.approx(batch_size * (length or 1) / 7.5),
        "evaluation.epsilon": 0,
        "total_env_steps": 56_250_000 if is_full else 1_000_000,
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
