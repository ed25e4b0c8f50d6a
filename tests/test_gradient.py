"""A small net's parameters as one vector: the optimizer's steps and what is saved are the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from asyncrl.algorithms import gradient
from asyncrl.algorithms.gradient import GradientStep


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.unused, self.idle = nn.Linear(2, 2), nn.Parameter(torch.ones(5))

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        return (self.body(x) + 0 * self.idle.sum()).square().mean()


def batches(count: int) -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(1)
    return [3 * torch.randn(16, 4, generator=made) for _ in range(count)]


def built(net: Net, as_vector: bool, monkeypatch) -> GradientStep:
    with monkeypatch.context() as patch:
        patch.setattr(gradient, "is_large", lambda model: not as_vector)
        step = GradientStep(net, 1e-2, 0.2, 1e-5)
    assert (step.vector is not None) == as_vector and len(step.leaves) == (1 if as_vector else 7)
    return step


@pytest.mark.parametrize("as_vector", [True, False])
def test_steps_are_those_of_torchs_adam(as_vector, monkeypatch):
    net, twin = Net(), Net()
    ours = built(net, as_vector, monkeypatch)
    theirs = torch.optim.Adam(twin.parameters(), 1e-2, eps=1e-5, foreach=False)
    clipped = 0
    for x in batches(20):
        metrics = ours(net.loss(x), 0)
        theirs.zero_grad()
        twin.loss(x).backward()
        norm = nn.utils.clip_grad_norm_(twin.parameters(), 0.2)
        theirs.step()
        clipped += norm.item() > 0.2
        assert metrics["loss/grad_norm"].item() == pytest.approx(norm.item())
        for mine, its in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)
    assert 3 < clipped < 17
    assert torch.equal(net.unused.weight, Net().unused.weight)


def test_a_checkpoint_of_either_kind_is_one_for_the_other(monkeypatch):
    nets = Net(), Net()
    steps = [built(net, kind, monkeypatch) for net, kind in zip(nets, (True, False), strict=True)]
    first, rest = batches(9)[:4], batches(9)[4:]
    for net, step in zip(nets, steps, strict=True):
        for x in first:
            step(net.loss(x), 0)
    swapped = [built(net, kind, monkeypatch) for net, kind in zip(nets, (False, True), strict=True)]
    for net, old, new in zip(nets, steps, swapped, strict=True):
        new.load_state_dict(old.state_dict())
        assert new.count == 4
        for index in range(1, 5):  # of the body; the first is idle
            for name, moment in old.state_dict()["moments"][index].items():
                assert torch.equal(new.state_dict()["moments"][index][name], moment)
        for x in rest:
            new(net.loss(x), 0)
    for mine, its in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)


def test_weights_that_are_loaded_or_written_to_are_the_vectors_parts(monkeypatch):
    net, other = Net(), Net()
    step = built(net, True, monkeypatch)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
        net.load_state_dict(other.state_dict())
        net.idle.mul_(3)
    expected = torch.cat([p.flatten() for p in other.parameters() if p is not other.idle])
    at = net.idle.storage_offset()
    assert at == 0 and torch.equal(step.vector[:5], torch.full((5,), 6.0))
    assert torch.equal(step.vector[5:], expected)


def test_what_is_no_plain_row_of_numbers_stays_as_it_is():
    images = nn.Sequential(nn.Conv2d(3, 4, 2)).to(memory_format=torch.channels_last)
    wide = nn.ParameterList(
        [nn.Parameter(torch.zeros(2, dtype=t)) for t in (torch.float32, torch.float64)]
    )
    large = nn.Linear(600, 600)
    for model in (images, wide, large):
        step = GradientStep(model, 1e-2, 0.5, 1e-5)
        assert step.vector is None and step.leaves is step.parameters
