"""Torsos: from observations of any space to a vector of features, one row a sample.

Built after a `ModelConfig`; where it says `noisy`, the last layer of a torso is.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from gymnasium import spaces
from torch import Tensor, nn

from asyncrl.models.layers import Linear, NoisyLinear, scale
from asyncrl.models.resnet import ImpalaTorso

if TYPE_CHECKING:
    from asyncrl.models.config import ModelConfig

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}


class NatureTorso(nn.Module):
    """Three convolutions and a layer of Mnih et al. 2015, for images of at least 36 x 36."""

    def __init__(
        self, channels: int, height: int, width: int, features: int,
        linear: type[nn.Linear] = Linear,
    ):  # fmt: skip
        super().__init__()
        if min(height, width) < 36:
            raise ValueError(
                f"expected an image of at least 36 x 36 for the torso nature, got {height} x "
                f"{width}; use small, impala or auto"
            )
        self.convolutions = nn.Sequential(
            scale(nn.Conv2d(channels, 32, 8, 4)), nn.ReLU(),
            scale(nn.Conv2d(32, 64, 4, 2)), nn.ReLU(),
            scale(nn.Conv2d(64, 64, 3, 1)), nn.ReLU(), nn.Flatten(),
        )  # fmt: skip
        with torch.no_grad():
            flat = self.convolutions(torch.zeros(1, channels, height, width)).shape[1]
        self.linear = scale(linear(flat, features))

    def forward(self, image: Tensor) -> Tensor:
        return torch.relu(self.linear(self.convolutions(image)))


class SmallImageTorso(nn.Module):
    """One 3 x 3 convolution and a layer (Young and Tian 2019, MinAtar), for tiny images."""

    def __init__(
        self, channels: int, height: int, width: int, features: int,
        linear: type[nn.Linear] = Linear,
    ):  # fmt: skip
        super().__init__()
        self.convolution = scale(nn.Conv2d(channels, 16, 3, padding=1))
        self.linear = scale(linear(16 * height * width, features))

    def forward(self, image: Tensor) -> Tensor:
        return torch.relu(self.linear(torch.relu(self.convolution(image)).flatten(1)))


IMAGE_TORSOS = {"nature": NatureTorso, "small": SmallImageTorso, "impala": ImpalaTorso}


class ImageEncoder(nn.Module):
    """(N, k, *frame) of stacked (H, W), (H, W, C) or (C, H, W) frames -> (N, features)."""

    def __init__(self, space: spaces.Box, stack: int, config: ModelConfig):
        super().__init__()
        shape = space.shape
        self.channels_last_frames = len(shape) == 3 and shape[2] < shape[0]
        if len(shape) == 2:
            (height, width), channels = shape, 1
        elif self.channels_last_frames:
            height, width, channels = shape
        else:
            channels, height, width = shape
        self.pixel_scale = 1 / 255 if space.dtype == "uint8" else 1.0
        kind = config.torso
        if kind == "auto":
            kind = "nature" if min(height, width) >= 36 else "small"
        names = ("torso_width", "torso_pool", "spectral_norm") if kind == "impala" else ()
        options = {name.removeprefix("torso_"): getattr(config, name) for name in names}
        linear = NoisyLinear if config.noisy else Linear
        size = channels * stack, height, width, config.features
        self.torso = IMAGE_TORSOS[kind](*size, linear=linear, **options)
        self.features = config.features

    def forward(self, frames: Tensor) -> Tensor:
        if self.channels_last_frames:
            frames = frames.movedim(-1, 2)
        image = frames.flatten(1, -3)  # (N, k * C, H, W)
        # Channels last while they are bytes, then to the type the convolutions compute in: a
        # third of the time that one pass for both takes on a CPU.
        image = torch.stack(image.unbind(1), -1).movedim(-1, 1)
        device_type = image.device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else self.torso_dtype
        image = image.to(dtype)
        return self.torso(image if self.pixel_scale == 1 else image.mul_(self.pixel_scale))

    @property
    def torso_dtype(self) -> torch.dtype:
        return next(self.torso.parameters()).dtype


class VectorEncoder(nn.Module):
    """(N, k, *shape) numbers, flags or one-hot categories -> (N, features) by an MLP."""

    def __init__(self, space: spaces.Space, stack: int, config: ModelConfig):
        super().__init__()
        self.categories = None
        size = stack * spaces.flatdim(space)
        if isinstance(space, spaces.Discrete):
            self.categories, self.start = int(space.n), int(space.start)
        elif isinstance(space, spaces.MultiDiscrete):
            size = stack * len(space.nvec.flat)
        sizes = (size, *config.hidden)
        layers: list[nn.Module] = []
        for index, (inputs, outputs) in enumerate(pairwise(sizes)):
            noisy = config.noisy and index == len(sizes) - 2
            linear = NoisyLinear if noisy else nn.Linear
            layers += [scale(linear(inputs, outputs)), ACTIVATIONS[config.activation]()]
        self.layers = nn.Sequential(*layers)
        self.features = sizes[-1]

    def forward(self, values: Tensor) -> Tensor:
        if self.categories is not None:
            values = nn.functional.one_hot(values.long() - self.start, self.categories)
        return self.layers(values.flatten(1).to(self.layers[0].weight.dtype))


def is_image(space: spaces.Space) -> bool:
    """Whether convolutions serve a space: a Box of 2 or 3 axes."""
    return isinstance(space, spaces.Box) and len(space.shape) in (2, 3)


def encoder(space: spaces.Space, stack: int, config: ModelConfig) -> nn.Module:
    """The torso that serves a space: images by convolutions, the rest by an MLP, trees by parts."""
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        return TreeEncoder(space, config)
    return (ImageEncoder if is_image(space) else VectorEncoder)(space, stack, config)


class TreeEncoder(nn.Module):
    """Dict and Tuple observations: an encoder a part, features side by side."""

    def __init__(self, space: spaces.Dict | spaces.Tuple, config: ModelConfig):
        super().__init__()
        is_dict = isinstance(space, spaces.Dict)
        parts = space.spaces.items() if is_dict else enumerate(space.spaces)
        self.keys = [key for key, _ in parts]
        self.parts = nn.ModuleList([encoder(space.spaces[key], 1, config) for key in self.keys])
        self.features = sum(part.features for part in self.parts)

    def forward(self, tree) -> Tensor:
        """Leaves are (N, ...) without a stack axis, or trees of such."""
        outputs = []
        for key, part in zip(self.keys, self.parts, strict=True):
            value = tree[key]
            outputs.append(part(value if isinstance(part, TreeEncoder) else value.unsqueeze(1)))
        return torch.cat(outputs, dim=1)
