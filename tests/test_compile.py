"""Updates with compiled losses are those without, and are compiled once."""

from __future__ import annotations

import shutil
import sysconfig
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

from asyncrl.learner_config import LearnerConfig
from asyncrl.schedules import Linear
from tests.test_dqn import CONFIG, Store, Table, make_sample
from tests.test_on_policy import ALGORITHMS, Box, Given, network

pytestmark = pytest.mark.timeout(300)  # compiling takes a while
HEADER = Path(sysconfig.get_path("include"), "Python.h")
needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") and HEADER.exists()), reason="no C++ compiler or no Python.h"
)


@pytest.fixture(autouse=True)
def uncompiled():
    """Nothing that another test has compiled."""
    torch._dynamo.reset()
    counters.clear()


def assert_equal_weights(one, other) -> None:
    for mine, its in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize("name, stack", [("a2c", 1), ("ppo", 3)])
def test_on_policy(name, stack, tmp_path):
    schedule = Linear(0.5, 0.0, 1_000)
    config = replace(ALGORITHMS[name], entropy_coef=schedule, optimizer="adam")
    box = Box(tmp_path, config, network(frame_stack=stack))
    box.collect()
    rollout = box.next_rollout()
    plain, compiled = (
        LearnerConfig("cpu", compile=on).build(config, box.make_model()) for on in (False, True)
    )
    for env_steps in (0, 100, 200, 300, 1_000):
        metrics = []
        for algorithm in (plain, compiled):
            algorithm.store(box.spec, 1, 0)
            metrics.append(algorithm.update(Given(rollout, env_steps)))
        assert_equal_weights(plain, compiled)
        for key, value in metrics[0].items():
            values = [x() if callable(x) else x for x in (value, metrics[1][key])]
            torch.testing.assert_close(*values, rtol=1e-3, atol=1e-5, msg=key)
    graphs = counters["stats"]["unique_graphs"]
    assert 1 <= graphs <= 3, "neither schedules nor resets have it compiled again and again"


@needs_compiler
@pytest.mark.parametrize("changes", [{"n_step": 2, "double": True}, {"munchausen": 0.9}], ids=str)
def test_dqn(changes):
    plain, compiled = (
        LearnerConfig("cpu", compile=on).build(replace(CONFIG, **changes), Table())
        for on in (False, True)
    )
    rng = torch.Generator().manual_seed(0)
    for _ in range(5):
        rewards = torch.randn((plain.config.n_step, 8), generator=rng).tolist()
        numbers = [torch.randint(0, 2, (8,), generator=rng).tolist() for _ in range(3)]
        store = Store(make_sample(rewards, *numbers))
        metrics, its = plain.update(store), compiled.update(store)
        for key, value in metrics.items():
            torch.testing.assert_close(value, its[key], rtol=1e-4, atol=1e-5, msg=key)
        assert_equal_weights(plain, compiled)
    assert 1 <= counters["stats"]["unique_graphs"] <= 2


@needs_compiler
def test_two_teams_are_one():
    """What is compiled for one thread would have to be for the other too."""
    threads = torch.get_num_threads()
    algorithm = LearnerConfig("cpu", compile=True).build(CONFIG, Table())
    algorithm.teams.use(2)
    assert algorithm.teams.count == 1
    torch.set_num_threads(threads)


def test_without_a_compiler_it_is_refused(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    learner = LearnerConfig(compile=True)  # who only plays needs none
    with pytest.raises(ValueError, match=r"expected a C\+\+ compiler .* called no-such-compiler"):
        learner.build(CONFIG, Table())
    monkeypatch.setenv("CXX", "true")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    with pytest.raises(ValueError, match=r"got no Python.h in /nowhere; install"):
        learner.build(CONFIG, Table())


@needs_compiler
def test_an_algorithm_that_cannot_be_compiled_is_refused():
    learner = LearnerConfig(compile=True)
    with pytest.raises(ValueError, match=r"expected compile\(\) of object for learner.compile"):
        learner.build(SimpleNamespace(build=lambda model, device: object()), Table())
