"""What a launch file says is of its declared type, or refused by the name of the field."""

from __future__ import annotations

import json
from array import array
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from asyncrl import (
    A2CConfig,
    Config,
    DQNConfig,
    EnvConfig,
    EpsilonGreedy,
    LearnerConfig,
    Linear,
    Mixture,
    ModelConfig,
    Part,
    PPOConfig,
    ReplayConfig,
)  # fmt: skip
from asyncrl.config import ConfigError, complete, load_launch_file, resolve
from asyncrl.describe import describe, differences

NAN = float("nan")
CONFIG = Config(EnvConfig("CartPole-v1"))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"total_env_steps": 1e6}, "total_env_steps to be int, got 1000000.0"),
        ({"seed": True}, "seed to be int, got True"),
        ({"schedule": "sync"}, "schedule to be Literal.*got 'sync'"),
        ({"algorithm": DQNConfig(batch_size=32.5)}, "algorithm.batch_size to be int, got 32.5"),
        ({"algorithm": DQNConfig(precision="fp8")}, "algorithm.precision to be .*got 'fp8'"),
        ({"algorithm": DQNConfig(num_quantiles=8.0)}, "algorithm.num_quantiles to be int"),
        ({"algorithm": A2CConfig(precision="half")}, "algorithm.precision to be .*got 'half'"),
        ({"model": ModelConfig(hidden=(8, 8.5))}, r"model.hidden to be tuple.*got \(8, 8.5\)"),
        ({"model": ModelConfig(initial_log_std=NAN)}, "model.initial_log_std to be float, got nan"),
        ({"policy": Mixture((Part(3, EpsilonGreedy()),))}, r"policy.parts\[0\].name to be str"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(changes, words):
    with pytest.raises(ConfigError, match=f"expected {words}"):
        complete(replace(CONFIG, **changes))


@pytest.mark.parametrize(
    "make",
    [
        lambda: LearnerConfig(checkpoint_seconds=NAN),
        lambda: LearnerConfig(log_seconds=0),
        lambda: replace(CONFIG, seed=2**63),
        lambda: ModelConfig(hidden=(64, 0)),
        lambda: ReplayConfig(samples_per_insert=float("inf")),
        lambda: ReplayConfig(importance_exponent=Linear(0.4, 7.0, 9)),
        lambda: DQNConfig(learning_rate=Linear(1e-3, -1e-3, 9)),
        lambda: DQNConfig(max_grad_norm=NAN),
        lambda: DQNConfig(adam_eps=-1.0),
        lambda: DQNConfig(adam_eps=0.0),  # 0 / 0 where a gradient is 0
        lambda: A2CConfig(clip_rho=0.0),
        lambda: PPOConfig(clip_ratio=0.0),
        lambda: DQNConfig(reward_clip=NAN),
        lambda: DQNConfig(reward_scale=NAN),
        lambda: DQNConfig(reward_scale=0.0),
        lambda: DQNConfig(distribution="c51", value_min=-float("inf")),
        lambda: DQNConfig(munchausen_temperature=NAN),
        lambda: A2CConfig(optimizer_eps=NAN),
        lambda: PPOConfig(clip_ratio=Linear(0.2, -0.2, 9)),
        lambda: PPOConfig(entropy_coef=NAN),
    ],
)
def test_a_number_that_cannot_be_is_refused(make):
    with pytest.raises(ValueError, match=r"expected .*, got"):
        make()


def test_a_list_may_stand_for_a_tuple_and_an_int_for_a_float():
    config = replace(CONFIG, model=ModelConfig(hidden=[8, 8]), algorithm=DQNConfig(gamma=1))
    assert complete(config).model.hidden == [8, 8]


def test_every_profile_of_every_launch_file_is_of_its_declared_types():
    files, profiles = sorted((Path(__file__).parent.parent / "launch").glob("*.py")), 0
    for file in files:
        found = vars(load_launch_file(file)).values()
        profiles += len([complete(config) for config in found if isinstance(config, Config)])
    assert profiles > len(files) > 20


@pytest.mark.parametrize(
    "source, words",
    [
        (b"x = 1\nn = int('abc')", r"launch.py \(line 2\) cannot be used: ValueError: invalid lit"),
        (b"x = '\xff\xfe'", r"launch.py cannot be used: SyntaxError: .*"),
        (b"from asyncrl import *\nEpsilonGreedy(2.0)", r"\(line 2\) .*expected epsilon of .*got 2"),
        (b"import asyncrl\nasyncrl.main(__file__)", r"\(line 2\) .*below `if __name__ == .__main"),
    ],
)
def test_a_launch_file_that_raises_is_named_with_its_line(tmp_path, source, words):
    (tmp_path / "launch.py").write_bytes(source)
    with pytest.raises(ConfigError, match=words):
        load_launch_file(tmp_path / "launch.py")


@pytest.mark.parametrize(
    "source, words",
    [
        ("Config(3, total_env_steps='many')", "Config.env to be EnvConfig, got 3"),
        ("Config(EnvConfig('x'), seed='1')", "Config.seed to be int, got '1'"),
        ("ActorConfig(envs_per_lane='2')", "ActorConfig.envs_per_lane to be int, got '2'"),
        ("Mixture(Part('a', Greedy()))", r"Mixture.parts to be tuple\[.*, got Part\(name='a'"),
        ("Mixture((Greedy(),))", r"Mixture.parts to be tuple\[.*, got \(Greedy\(\),\)"),
    ],
)
def test_a_type_that_is_not_the_declared_one_is_told_before_it_is_compared(tmp_path, source, words):
    (tmp_path / "launch.py").write_text(f"from asyncrl import *\nconfig = {source}")
    with pytest.raises(ConfigError, match=rf"launch.py \(line 2\) .* used: expected {words}"):
        load_launch_file(tmp_path / "launch.py")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "field, words",
    [
        ("env='CartPole-v1'", r"EnvConfig, got 'CartPole-v1'; write EnvConfig\('CartPole-v1'\)$"),
        ("env=lambda n: 3", r"EnvConfig, got <lambda> \(.*launch.py:2\)$"),
        ("env=EnvConfig('x'), model=3", "a function of .* got 3; write model=lambda obs, act: ..."),
        ("env=EnvConfig", r"env to be EnvConfig, got EnvConfig; write EnvConfig\(...\)$"),
        ("EnvConfig('x'), model=ModelConfig", r"got a class; write ModelConfig\(\)$"),
        ("EnvConfig('x'), algorithm=PPOConfig", r"as DQNConfig\(\), .* got PPOConfig$"),
        ("EnvConfig('x'), algorithm='ppo'", r"as DQNConfig\(\), .* got 'ppo'$"),
        ("EnvConfig('x'), algorithm=None", r"as DQNConfig\(\), .* got None$"),
    ],
)
def test_fields_are_looked_at_before_the_options(tmp_path, field, words):
    (tmp_path / "launch.py").write_text(f"from asyncrl import *\nconfig = Config({field})")
    with pytest.raises(ConfigError, match=words):
        resolve(tmp_path / "launch.py", [])


def test_a_launch_file_has_its_own_rules_of_annotations(tmp_path):
    """Not those of the file that executes it, where they are words."""
    (tmp_path / "launch.py").write_text("class Mine:\n    size: int = 3\n")
    assert load_launch_file(tmp_path / "launch.py").Mine.__annotations__ == {"size": int}


@pytest.mark.parametrize("make", [np.float32, np.float64, lambda x: np.array([x]), torch.tensor])
def test_a_resume_sees_changes_in_numbers_of_numpy_and_torch(make):
    one, other = ({"level": describe(make(level))} for level in (0.5, 0.25))
    assert json.loads(json.dumps(one)) == one
    assert len(differences(one, other)) == 1 and not differences(one, one)


def test_lists_are_as_good_as_tuples(tmp_path, recwarn):
    parts = 'ModelConfig(hidden=[8, 4]), Mixture([Part("a", Greedy()), Part("b", Random())])'
    text = f"from asyncrl import *\nconfig = Config(EnvConfig('CartPole-v1'), {parts})\n"
    (tmp_path / "launch.py").write_text(text)
    config = resolve(tmp_path / "launch.py", ["--seed", "3"])
    assert config.model.hidden == [8, 4] and config.policy.names == ("a", "b")
    config = resolve(tmp_path / "launch.py", ["--model.hidden", "3", "5"])
    assert config.model.hidden == (3, 5) and not recwarn.list
    (tmp_path / "launch.py").write_text(text.replace('"b", R', "0, R"))
    with pytest.raises(ConfigError, match=r"expected policy.parts\[1\].name to be str, got 0"):
        resolve(tmp_path / "launch.py", [])


def test_of_a_large_array_config_json_has_a_digest():
    one = np.zeros((84, 84), np.float32)
    other = one.copy()
    other[83, 83] = 1
    told = describe(one)
    assert told.startswith("<float32 (84, 84), SHA-256 of its values ") and len(told) < 200
    assert describe(other) != told == describe(one.copy())
    assert not differences({"level": one.tolist()}, {"level": told})  # as it was told before
    assert differences({"level": other.tolist()}, {"level": told})
    assert "SHA-256" in describe(array("d", [1.0] * 1_000))
