"""Normalisers: what a model knows of the scale of its observations and of its returns.

Their numbers are buffers, so they are published to the actors, saved and resumed like weights.
They move only where an algorithm says so, never while a model is called.
"""

from __future__ import annotations

import torch
from gymnasium import spaces
from torch import Tensor, nn

from asyncrl.models.torsos import is_image


class RunningStatistics(nn.Module):
    """Mean and population variance, by element, of all rows seen; 0 and 1 before there are any.

    Batches are merged by the parallel formula of Chan et al. 1979 in float64: the result is that
    of all rows at once. Behind `horizon` rows old ones fade: a new row then weighs 1 / horizon.
    """

    def __init__(self, shape: tuple[int, ...], horizon: float = float("inf")):
        super().__init__()
        self.horizon = horizon
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))  # of rows

    @torch.no_grad()
    def update(self, rows: Tensor, valid: Tensor) -> None:
        """Merge rows (T, B, *shape) where valid (T, B); a row that is not finite never counts."""
        shape = self.mean.shape
        if rows.shape != (*valid.shape, *shape):
            raise ValueError(
                f"expected rows of shape {(*valid.shape, *shape)}, as many as valid has, got "
                f"{tuple(rows.shape)}"
            )
        rows = rows.double().reshape(valid.numel(), -1)
        counts = (valid.flatten() & rows.isfinite().all(1)).unsqueeze(1)
        new = counts.sum()
        mean = torch.where(counts, rows, 0).sum(0) / new.clamp(min=1)
        variance = torch.where(counts, rows - mean, 0).square().sum(0) / new.clamp(min=1)
        total = self.count + new
        share = new / total.clamp(min=1)  # of the new rows in what will be known; 0 without any
        delta = mean.reshape(shape) - self.mean
        self.variance.lerp_(variance.reshape(shape), share).add_(share * (1 - share) * delta**2)
        self.mean.add_(share * delta)
        self.count.copy_(total.clamp(max=self.horizon))


class ObservationNormalizer(RunningStatistics):
    """Observations at mean 0 and variance 1, clipped to [-10, 10]; for Box spaces but images."""

    def __init__(self, space: spaces.Space):
        if not isinstance(space, spaces.Box) or is_image(space):
            raise ValueError(
                "expected a Box that is no image (not 2 or 3 axes) for normalize_obs, got "
                f"{space}; leave it off, images are scaled anyway, or flatten the observation"
            )
        super().__init__(space.shape)

    def forward(self, obs: Tensor) -> Tensor:
        """(..., *shape) -> float32 of that shape."""
        scaled = (obs.double() - self.mean) * (self.variance + 1e-8).rsqrt()
        return scaled.clamp(-10, 10).float()


class PopArt(nn.Module):
    """The last layer of a value in true units whose weights live in units of the returns' scale.

    `renormalize` moves the scale and corrects the layer so that its outputs stay what they are
    (van Hasselt et al. 2016). Returns fade behind a million rows and the scale stays within 1e-4
    and 1e6, about as in Hessel et al. 2019.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = layer
        self.statistics = RunningStatistics((), horizon=1e6)

    @property
    def scale(self) -> Tensor:
        """0-d float64 standard deviation of the returns."""
        return self.statistics.variance.sqrt().clamp(1e-4, 1e6)

    def forward(self, features: Tensor) -> Tensor:
        """(N, features) -> (N, 1)."""
        return self.layer(features) * self.scale.float() + self.statistics.mean.float()

    @torch.no_grad()
    def renormalize(self, value_target: Tensor, valid: Tensor) -> None:
        """Take in value_target (T, B) where valid (T, B), both in true units."""
        old_mean, old_scale = self.statistics.mean.clone(), self.scale
        self.statistics.update(value_target, valid)
        weight, bias = self.layer.weight, self.layer.bias
        weight.copy_(weight * (old_scale / self.scale))
        bias.copy_((bias * old_scale + old_mean - self.statistics.mean) / self.scale)
