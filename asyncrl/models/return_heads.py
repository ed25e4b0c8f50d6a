"""Heads that know the distribution of the return, not only its mean (distributional RL).

Each is described by a small record that an algorithm makes of its settings: `outputs` says what a
model gives beside "q" (A), for users' models too, and `build` makes the built-in head.

    C51   "logits_of_return" (A, K)       of K fixed values of the return
    QR    "quantiles" (A, K)              at the K midpoints (i + 1/2) / K
    IQN   "quantiles" (A, K), "taus" (K)  at fractions that are drawn in training
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi
from typing import ClassVar

import torch
from gymnasium import spaces
from torch import Tensor, nn

from asyncrl.models.heads import num_actions
from asyncrl.models.layers import StreamConfig, scale

Shapes = dict[str, tuple[int, ...]]


def midpoints(count: int, device: torch.device | None = None) -> Tensor:
    """(count,) fractions in the middle of equal parts of [0, 1]."""
    return (torch.arange(count, device=device) + 0.5) / count


@dataclass(frozen=True)
class C51:
    """Probabilities of fixed values of the return (Bellemare et al. 2017)."""

    num_atoms: int
    value_min: float
    value_max: float

    def atoms(self, device: torch.device | None = None) -> Tensor:
        """(K,) values of the return."""
        return torch.linspace(self.value_min, self.value_max, self.num_atoms, device=device)

    def outputs(self, actions: int) -> Shapes:
        """Shapes behind (T, B) of what a model puts out."""
        return {"q": (actions,), "logits_of_return": (actions, self.num_atoms)}

    def build(self, stream: StreamConfig, action_space: spaces.Space, dueling: bool):
        streams = Streams(stream, num_actions(action_space), self.num_atoms, dueling)
        return CategoricalHead(streams, self.atoms())


@dataclass(frozen=True)
class QR:
    """Quantiles at fixed fractions (Dabney et al. 2018a)."""

    num_quantiles: int

    def outputs(self, actions: int) -> Shapes:
        """Shapes behind (T, B) of what a model puts out."""
        return {"q": (actions,), "quantiles": (actions, self.num_quantiles)}

    def build(self, stream: StreamConfig, action_space: spaces.Space, dueling: bool):
        streams = Streams(stream, num_actions(action_space), self.num_quantiles, dueling)
        return QuantileHead(streams)


@dataclass(frozen=True)
class IQN:
    """Quantiles at any fraction, which is an input (Dabney et al. 2018b)."""

    own_layer: ClassVar[bool] = True  # the last one before Q lies behind the fractions
    num_tau: int
    num_acting_tau: int

    def outputs(self, actions: int) -> Shapes:
        """Shapes behind (T, B) of what a model puts out in training."""
        count = self.num_tau
        return {"q": (actions,), "quantiles": (actions, count), "taus": (count,)}

    def build(self, stream: StreamConfig, action_space: spaces.Space, dueling: bool):
        return ImplicitQuantileHead(self, stream, num_actions(action_space), dueling)


class Streams(nn.Module):
    """(N, features) -> (N, A, K), K numbers an action; dueling splits each of them."""

    def __init__(self, stream: StreamConfig, actions: int, count: int, dueling: bool):
        super().__init__()
        self.shape = actions, count
        self.advantage = stream(actions * count, 0.01)
        self.value = stream(count, 1.0) if dueling else None

    def forward(self, features: Tensor) -> Tensor:
        numbers = self.advantage(features).unflatten(-1, self.shape)
        if self.value is not None:
            numbers = numbers - numbers.mean(-2, keepdim=True)
            numbers = numbers + self.value(features).unsqueeze(-2)
        return numbers


class CategoricalHead(nn.Module):
    """{"q": (N, A), "logits_of_return": (N, A, K)}."""

    def __init__(self, streams: Streams, atoms: Tensor):
        super().__init__()
        self.streams = streams
        self.register_buffer("atoms", atoms)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        logits = self.streams(features)
        q = (logits.softmax(-1) * self.atoms).sum(-1)
        return {"q": q, "logits_of_return": logits}


class QuantileHead(nn.Module):
    """{"q": (N, A), "quantiles": (N, A, K)}."""

    def __init__(self, streams: Streams):
        super().__init__()
        self.streams = streams

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        quantiles = self.streams(features)
        return {"q": quantiles.mean(-1), "quantiles": quantiles}


class ImplicitQuantileHead(nn.Module):
    """{"q": (N, A), "quantiles": (N, A, K), "taus": (N, K)}; q is the mean of those quantiles.

    In training one fraction is drawn from each of `num_tau` equal parts of [0, 1]: the loss has
    the same expectation as with independent ones, and less variance. Else they are the midpoints
    of `num_acting_tau` parts, so that whoever acts draws nothing. Fractions enter as 64 cosines
    that multiply the features, before the last hidden layer.
    """

    def __init__(self, config: IQN, stream: StreamConfig, actions: int, dueling: bool):
        super().__init__()
        self.config = config
        self.register_buffer("frequencies", pi * torch.arange(64, dtype=torch.float32))
        self.embedding = scale(nn.Linear(64, stream.features))
        self.streams = Streams(stream, actions, 1, dueling)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        taus = self.taus(len(features), features.device)
        waves = torch.cos(taus.unsqueeze(-1) * self.frequencies)
        mixed = features.unsqueeze(1) * torch.relu(self.embedding(waves))  # (N, K, features)
        quantiles = self.streams(mixed.flatten(0, 1)).unflatten(0, taus.shape)  # (N, K, A, 1)
        quantiles = quantiles.squeeze(-1).transpose(1, 2)
        return {"q": quantiles.mean(-1), "quantiles": quantiles, "taus": taus}

    def taus(self, rows: int, device: torch.device) -> Tensor:
        """(rows, K) fractions."""
        if not self.training:
            return midpoints(self.config.num_acting_tau, device).expand(rows, -1)
        count = self.config.num_tau
        drawn = torch.rand(rows, count, device=device)
        return (torch.arange(count, device=device) + drawn) / count
