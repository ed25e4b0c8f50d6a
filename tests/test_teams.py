"""Two teams of threads do what one would have done."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from asyncrl.algorithms.teams import Teams
from asyncrl.models import ModelConfig

CPU = torch.device("cpu")
PIXELS, ACTIONS = spaces.Box(0, 255, (40, 36), np.uint8), spaces.Discrete(3)
T, N = 3, 7
SECONDS = 20


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def network(**changes) -> nn.Module:
    torch.manual_seed(0)
    return ModelConfig(**{"head": "actor_critic", "frame_stack": 2, **changes})(PIXELS, ACTIONS)


def inputs(model: nn.Module) -> tuple:
    generator = torch.Generator().manual_seed(1)
    obs = torch.randint(0, 256, (T, N, 40, 36), dtype=torch.uint8, generator=generator)
    return obs, torch.rand(T, N, generator=generator) < 0.3, model.initial_state(N)


def gradients(model: nn.Module, forward, bfloat16: bool = False) -> tuple[dict, list]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        outputs = forward(*inputs(model))
    weights = torch.linspace(0.1, 1, T * N).view(T, N)  # tells environments and steps apart
    loss = (outputs["value"] * weights).sum() + (outputs["logits"].square().sum(-1) * weights).sum()
    loss.backward()
    return outputs, [parameter.grad.clone() for parameter in model.parameters()]


def two_teams(model: nn.Module) -> Teams:
    teams = Teams(model, CPU)
    teams.use(2)
    assert teams.count == 2
    return teams


@pytest.mark.parametrize("changes", [{}, {"lstm": 16}, {"shared": False}], ids=str)
def test_outputs_and_gradients_are_those_of_the_whole_batch(changes):
    model = network(**changes)
    outputs, wanted = gradients(model, lambda *batch: model(*batch)[0])
    found, halved = gradients(model, two_teams(model).forward)
    assert found.keys() == outputs.keys()
    for name, output in outputs.items():
        torch.testing.assert_close(found[name], output, rtol=0, atol=1e-6)
    for gradient, whole in zip(halved, wanted, strict=True):
        torch.testing.assert_close(gradient, whole, rtol=1e-5, atol=1e-5 * whole.abs().max())


def test_in_bfloat16_every_gradient_arrives_every_time():
    """Both teams cast the same weights at the same time."""
    model = network(lstm=16)
    teams = two_teams(model)
    _, wanted = gradients(model, lambda *batch: model(*batch)[0], bfloat16=True)
    for _ in range(30):
        found, halved = gradients(model, teams.forward, bfloat16=True)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            without = teams.forward(*inputs(model))
        torch.testing.assert_close(without["value"], found["value"])
        for gradient, whole in zip(halved, wanted, strict=True):
            close = 0.03 * whole.abs().max()
            torch.testing.assert_close(gradient, whole, rtol=0, atol=float(close))


def test_an_output_nobody_learns_from_has_no_gradient():
    model = network(shared=False)
    outputs = two_teams(model).forward(*inputs(model))
    outputs["value"].sum().backward()
    assert all(parameter.grad is not None for parameter in model.value_encoder.parameters())
    assert all(parameter.grad is None for parameter in model.encoder.parameters())


class Counting(nn.Module):
    """Counts its forward passes, which is not pure, and the environments that it has seen."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, obs, first, state):
        self.seen.append(first.shape[1])
        return {"value": torch.zeros(first.shape)}, state


def test_only_a_pure_model_with_two_teams_is_shared():
    obs, first = torch.zeros(T, N), torch.zeros(T, N, dtype=torch.bool)
    for pure, threads, seen in ((False, 2, [7]), (True, 1, [7]), (True, 2, [3, 4])):
        model = Counting()
        model.pure = pure
        teams = Teams(model, CPU)
        teams.use(threads)
        with torch.no_grad():
            assert teams.forward(obs, first, {})["value"].shape == (T, N)
        assert sorted(model.seen) == seen


def test_a_spectral_norm_is_not_pure():
    assert network().pure
    assert not network(torso="impala", spectral_norm=True).pure


def test_a_gpu_has_one_team():
    teams = Teams(nn.Identity(), torch.device("cuda"))
    teams.use(16)
    assert teams.count == 1
    assert torch.get_num_threads() == 16


def test_both_run_at_once_with_half_of_the_threads_each():
    teams, meeting = Teams(nn.Identity(), CPU), threading.Barrier(2, timeout=SECONDS)

    def threads() -> int:
        meeting.wait()  # breaks unless the other one is there too
        return torch.get_num_threads()

    teams.use(4)
    assert teams.both(threads, threads) == (2, 2)
    teams.use(5)
    assert teams.both(threads, threads) == (2, 2)


@pytest.mark.parametrize("who", [0, 1])
def test_what_one_raises_is_raised_when_the_other_has_ended(who):
    teams, ended, go = two_teams(nn.Identity()), [], threading.Event()

    def fails():
        go.set()
        raise ValueError("of a team")

    def ends():
        assert go.wait(SECONDS)
        ended.append(True)

    with pytest.raises(ValueError, match="of a team"):
        teams.both(*((fails, ends) if who == 0 else (ends, fails)))
    assert ended == [True]


def test_subnormal_numbers_are_flushed_by_both():
    """A thread begins with the mode of the one that makes it; in slow ones a net may crawl."""

    def smallest() -> float:
        return (torch.tensor([1e-30]) * 1e-10).item()

    def in_a_new_thread() -> None:
        torch.set_flush_denormal(True)
        teams = two_teams(nn.Identity())
        found.extend(teams.both(smallest, smallest))

    found: list[float] = []
    from asyncrl.algorithms import teams as module

    module._helper.cache_clear()
    thread = threading.Thread(target=in_a_new_thread)
    thread.start()
    thread.join(SECONDS)
    module._helper.cache_clear()
    assert found == [0.0, 0.0]
