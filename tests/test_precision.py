"""Which device "auto" is, and what a GPU that fails does to a run."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from asyncrl.checkpoint import Loaded
from asyncrl.models import precision
from asyncrl.models.precision import device_called
from asyncrl.plan import Plan
from asyncrl.resume import _refusal
from asyncrl.run import Process
from asyncrl.state import rng_state, set_rng_state


@pytest.fixture
def a_gpu(monkeypatch):
    """Counted by the driver, whatever torch can do with it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    precision._gpu_works.cache_clear()
    yield
    precision._gpu_works.cache_clear()


def test_auto_is_a_gpu_that_works(a_gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch, "zeros", lambda size, device: torch.ones(size))
    assert device_called("auto").type == "cuda" and device_called("cpu").type == "cpu"
    assert capsys.readouterr().err == ""


def test_one_that_this_torch_cannot_use_is_left_alone_and_said(a_gpu, monkeypatch, capsys):
    def zeros(size, device):
        raise RuntimeError("The NVIDIA driver on your system is too old.\nMore")

    monkeypatch.setattr(torch, "zeros", zeros)
    assert device_called("auto").type == device_called("auto").type == "cpu"
    told = "asyncrl: the GPU is not used: The NVIDIA driver on your system is too old.\n"
    assert capsys.readouterr().err == told  # once


def test_a_learner_whose_gpu_has_gone_says_so_instead_of_crawling_on():
    process = object.__new__(Process)
    process.plan = Plan(**{name: None for name in FIELDS}, device="cuda")
    process.connections = process.config = Anything()
    with pytest.raises(RuntimeError, match=r"expected cuda for learning, .* --learner\.device cpu"):
        process.make_learner()


FIELDS = [field.name for field in dataclasses.fields(Plan) if field.name != "device"]


class Anything:
    """Learns on the CPU."""

    @property
    def learner(self):
        return self

    status = None

    def resolved_device(self) -> torch.device:
        return torch.device("cpu")


@pytest.mark.parametrize("error", [
    torch.cuda.OutOfMemoryError("CUDA out of memory"),
    getattr(torch, "AcceleratorError", torch.cuda.OutOfMemoryError)("CUDA error: an ECC error"),
])  # fmt: skip
def test_what_a_gpu_does_wrong_is_not_the_checkpoints_fault(error):
    def load(loaded: Loaded) -> None:
        raise error

    with pytest.raises(type(error)):
        _refusal(load, None)
    assert "RuntimeError: of another shape" in _refusal(fail, None)


def fail(loaded: Loaded) -> None:
    raise RuntimeError("of another shape")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))])  # fmt: skip
def test_what_is_drawn_on_a_device_goes_on_where_it_was(device):
    device = torch.device(device)
    saved = rng_state(device)
    drawn = torch.rand(3, device=device)
    assert not torch.equal(drawn, torch.rand(3, device=device))
    set_rng_state(saved, device)
    assert torch.equal(drawn, torch.rand(3, device=device))
