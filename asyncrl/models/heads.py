"""Heads: from features to what a policy acts on and an algorithm learns from, by name.

N rows of features make N rows of outputs. Actions begin at 0 whatever `start` a space has: the
environment's side of the actor takes care of it.
"""

from __future__ import annotations

from math import prod

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from asyncrl.models.layers import StreamConfig, scale
from asyncrl.models.normalizers import PopArt
from asyncrl.models.precision import without_autocast


def num_actions(space: spaces.Space) -> int:
    """Of a Discrete space; ValueError for others."""
    if not isinstance(space, spaces.Discrete):
        raise ValueError(
            f"expected a Discrete action space for a Q head, got {space}; "
            "value-based algorithms serve discrete actions only"
        )
    return int(space.n)


class QHead(nn.Module):
    """{"q": (N, A)}: the value of each discrete action; dueling splits it (Wang et al. 2016)."""

    def __init__(self, stream: StreamConfig, action_space: spaces.Space, dueling: bool):
        super().__init__()
        self.advantage = stream(num_actions(action_space), 0.01)
        self.value = stream(1, 1.0) if dueling else None

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        q = self.advantage(features)
        if self.value is not None:
            q = self.value(features) + q - q.mean(1, keepdim=True)
        return {"q": q}


class ActorCriticHead(nn.Module):
    """{"value": (N,)} in true units beside the parameters of one distribution of actions."""

    def __init__(
        self,
        features: int,
        action_space: spaces.Space,
        normalize_returns: bool = False,
        initial_log_std: float = 0.0,
    ):
        super().__init__()
        self.policy = distribution(features, action_space, initial_log_std)
        value = scale(nn.Linear(features, 1), 1.0)
        self.value = PopArt(value) if normalize_returns else value

    def forward(self, features: Tensor, value_features: Tensor | None = None) -> dict[str, Tensor]:
        """Both (N, features); without the second the first serve policy and value."""
        value_features = features if value_features is None else value_features
        with without_autocast(features.device.type):  # values need more than 8 bits
            value = self.value(value_features.float()).squeeze(1)
            return {"value": value, **self.policy(features.float())}


# -- distributions of actions --------------------------------------------------------------------


def distribution(features: int, space: spaces.Space, initial_log_std: float) -> nn.Module:
    """The last layer of a policy: the parameters of the distribution that fits a space."""
    if isinstance(space, spaces.Discrete):
        return Categorical(features, int(space.n))
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1:
        return MultiCategorical(features, space.nvec.tolist())
    if isinstance(space, spaces.MultiBinary) and len(space.shape) == 1:
        return MultiCategorical(features, [2] * space.shape[0])
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
        return Gaussian(features, space, initial_log_std)
    raise ValueError(
        "expected an action space of Discrete, MultiDiscrete or MultiBinary with one axis, or a "
        f"Box of floats, got {space}; wrap the environment so that its actions are one of these"
    )


class Categorical(nn.Module):
    """{"logits": (N, A)}."""

    def __init__(self, features: int, num_actions: int):
        super().__init__()
        self.layer = scale(nn.Linear(features, num_actions), 0.01)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        return {"logits": self.layer(features)}


class MultiCategorical(nn.Module):
    """{"logits": (N, D, A)} of D choices at once; -inf where one has fewer than A categories."""

    def __init__(self, features: int, counts: list[int]):
        super().__init__()
        self.layer = scale(nn.Linear(features, sum(counts)), 0.01)
        self.shape = len(counts), max(counts)
        present = torch.arange(max(counts)) < torch.tensor(counts).unsqueeze(1)  # (D, A)
        self.register_buffer("place", present.flatten().nonzero().squeeze(1))  # of each output

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        present = self.layer(features)
        logits = present.new_full((len(present), prod(self.shape)), -torch.inf)
        return {"logits": logits.index_copy(1, self.place, present).unflatten(1, self.shape)}


class Gaussian(nn.Module):
    """{"mean", "log_std", "low", "high"}, each (N, *action), of u ~ Normal(mean, exp(log_std)).

    The action is low + (tanh(u) + 1) / 2 * (high - low) where both bounds are finite, else u. There
    the mean stays within 4, of which tanh is 0.999: farther out a float32 action no longer tells
    its u, and the gradient of its log-probability would be wrong. The standard deviation is learned
    and is the same for every observation.
    """

    farthest = 4.0

    def __init__(self, features: int, space: spaces.Box, initial_log_std: float):
        super().__init__()
        low, high = (torch.tensor(part, dtype=torch.float32) for part in (space.low, space.high))
        width = high - low
        bounded = low.isfinite() & high.isfinite()
        if (bounded & ~(width.isfinite() & (width > 0))).any():
            raise ValueError(
                "expected low < high and a finite high - low wherever a Box of actions has both "
                f"bounds, got low={space.low} and high={space.high}; drop actions that leave no "
                "choice, and give those without bounds infinite ones"
            )
        self.shape = space.shape
        self.layer = scale(nn.Linear(features, prod(space.shape)), 0.01)
        self.log_std = nn.Parameter(torch.full(space.shape, float(initial_log_std)))
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        mean = self.layer(features).reshape(-1, *self.shape)
        bounded = self.low.isfinite() & self.high.isfinite()
        mean = torch.where(bounded, self.farthest * torch.tanh(mean / self.farthest), mean)
        constants = {"log_std": self.log_std, "low": self.low, "high": self.high}
        return {"mean": mean} | {k: part.expand_as(mean) for k, part in constants.items()}
