"""Inputs that are made ready once, before weights matter, are the ones a model would have made."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium import spaces

from asyncrl.algorithms.dqn import DQN, DQNConfig
from asyncrl.algorithms.ppo import PPO, PPOConfig
from asyncrl.models import ModelConfig
from asyncrl.models.memory import preparation
from asyncrl.stores import rollout as rollouts
from asyncrl.stores.replay import Sample
from asyncrl.stores.rollout import Rollout, Steps
from tests.test_dqn import Store
from tests.test_on_policy import Given

CPU, K = torch.device("cpu"), 3
PIXELS, ACTIONS = spaces.Box(0, 255, (9, 8), np.uint8), spaces.Discrete(4)


def network(**changes):
    torch.manual_seed(0)
    return ModelConfig(**{"frame_stack": K, "features": 16, **changes})(PIXELS, ACTIONS)


def pixels(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, (*shape, *PIXELS.shape), dtype=torch.uint8)


def make_rollout(T: int = 6, N: int = 4) -> Rollout:
    torch.manual_seed(1)
    first = torch.rand(T + 1, N) < 0.3
    ends, valid = torch.zeros(T, N, dtype=torch.bool), torch.ones(T, N, dtype=torch.bool)
    action, log_prob = torch.randint(0, 4, (T, N)), torch.full((T, N), -1.4)
    state = {"frames": pixels(N, K - 1)}
    obs, reward = pixels(T + 1, N), torch.randn(T, N)
    return Rollout(obs, first, action, log_prob, reward, ends, ends, valid, state)


@pytest.mark.parametrize("changes", [{}, {"head": "actor_critic", "shared": False}], ids=str)
def test_a_network_makes_the_same_of_what_it_has_prepared(changes):
    model, first = network(**changes), torch.tensor([[False, True, False, True, False]])
    obs, state = pixels(1, 5), {"frames": pixels(5, K - 1)}
    stacks, nothing = model.prepare(obs, first, state)
    assert stacks.shape == (1, 5, 9, 8, K) and stacks.is_contiguous() and nothing == {}
    assert torch.equal(stacks[0, 1], obs[0, 1].unsqueeze(-1).expand(9, 8, K))
    assert torch.equal(stacks[0, 2], torch.stack([*state["frames"][2], obs[0, 2]], -1))
    wanted, got = model(obs, first, state)[0], model(stacks, first, {})[0]
    for name, output in wanted.items():
        torch.testing.assert_close(got[name], output, rtol=1e-6, atol=1e-6)


def test_only_stacks_of_images_are_prepared_and_only_on_a_cpu():
    assert preparation(network(), CPU) and preparation(network(), torch.device("cuda")) is None
    assert preparation(network(lstm=4), CPU) is None
    assert preparation(network(frame_stack=1), CPU) is None
    numbers = ModelConfig(frame_stack=K)(spaces.Box(-1, 1, (5,)), ACTIONS)
    assert preparation(numbers, CPU) is preparation(torch.nn.Linear(1, 1), CPU) is None


def test_steps_prepared_at_once_are_those_of_each_minibatch(monkeypatch):
    rollout, model = make_rollout(), network(head="actor_critic")
    steps, ready, large = Steps(rollout, K), Steps(rollout, K), Steps(rollout, K)
    ready.prepare(model.prepare)
    monkeypatch.setattr(rollouts, "MOST_PREPARED", 6 * 4 * 9 * 8 * K)  # without the state's frames
    large.prepare(model.prepare)
    assert ready.ready and not large.ready
    for index in (torch.randperm(24), torch.tensor([3]), torch.tensor([5, 0, 23])):
        wanted, first = model(*steps[index])[0], steps[index][1]
        for given in (ready[index], large[index]):
            assert torch.equal(given[1], first)
            assert all(torch.equal(x, wanted[name]) for name, x in model(*given)[0].items())


def counted(model):
    """Have it count the rows it prepares."""
    prepare, model.rows = model.prepare, []

    def counting(obs, first, state):
        model.rows.append(obs.shape[1])
        return prepare(obs, first, state)

    model.prepare = counting
    return model


@pytest.mark.parametrize("epochs", [1, 3])
def test_ppo_prepares_a_rollout_once_and_learns_the_same(epochs):
    config = PPOConfig(epochs=epochs, num_minibatches=2, precision="float32")
    model, plain = counted(network(head="actor_critic")), network(head="actor_critic")
    plain.prepare = None
    for its in (model, plain):
        algorithm = PPO(config, its, CPU)
        algorithm.of_sequences = False
        for _ in range(2):
            algorithm.update(Given(make_rollout()))
    assert model.rows == ([24, 24] if epochs > 1 else [])
    for mine, its in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("changes", [{}, {"double": True}, {"munchausen": 0.9}], ids=str)
def test_dqn_prepares_each_batch_once_and_learns_the_same(changes):
    config = DQNConfig(precision="float32", **changes)
    model, plain = counted(network()), network()
    plain.prepare = None
    torch.manual_seed(2)
    first = torch.rand(1, 8) < 0.3
    frames = [(pixels(1, 8), first, {"frames": pixels(8, K - 1)}) for _ in range(2)]
    steps, ends, reward = torch.ones(8).long(), torch.rand(8) < 0.2, torch.randn(1, 8)
    action, index = torch.randint(0, 4, (8,)), torch.arange(8)
    sample = Sample(*frames[0], action, reward, steps, ends, *frames[1], torch.ones(8), index)
    for its in (model, plain):
        store = Store(sample)
        store.limiter = SimpleNamespace(inserted=0)
        algorithm = DQN(config, its, CPU)
        for _ in range(3):
            algorithm.update(store)
    assert model.rows == [8, 8] * 3
    for mine, its in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, its)
