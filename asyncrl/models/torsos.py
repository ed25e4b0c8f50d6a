"""Torsos: from observations of any space to a vector of features, one row a sample.

Built after a `ModelConfig`. The last layer of an encoder is `noisy` where the config says so; it is
left to the head, with last=False, where that has one of its own for each of its streams. `width` is
what that layer puts out, `features` what the encoder does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from asyncrl.models.layers import ScaledConv2d, hidden_layer, scale
from asyncrl.models.resnet import ImpalaTorso

if TYPE_CHECKING:
    from asyncrl.models.config import ModelConfig


class NatureTorso(nn.Module):
    """(N, C, H, W) -> (N, features): three convolutions (Mnih et al. 2015), from 36 x 36 pixels."""

    def __init__(self, channels: int, height: int, width: int, pixel_scale: float = 1.0):
        super().__init__()
        if min(height, width) < 36:
            raise ValueError(
                f"expected an image of at least 36 x 36 for the torso nature, got {height} x "
                f"{width}; use small, impala or auto"
            )
        self.convolutions = nn.Sequential(
            scale(ScaledConv2d(pixel_scale, channels, 32, 8, 4)), nn.ReLU(),
            scale(nn.Conv2d(32, 64, 4, 2)), nn.ReLU(),
            scale(nn.Conv2d(64, 64, 3, 1)), nn.Flatten(), nn.ReLU(),
        )  # fmt: skip
        with torch.no_grad():
            self.features = self.convolutions(torch.zeros(1, channels, height, width)).shape[1]

    def forward(self, image: Tensor) -> Tensor:
        return self.convolutions(image)


class SmallImageTorso(nn.Module):
    """(N, C, H, W) -> (N, features): one convolution (Young and Tian 2019), for tiny images."""

    def __init__(self, channels: int, height: int, width: int, pixel_scale: float = 1.0):
        super().__init__()
        self.convolution = scale(ScaledConv2d(pixel_scale, channels, 16, 3, padding=1))
        self.features = 16 * height * width

    def forward(self, image: Tensor) -> Tensor:
        return torch.relu(self.convolution(image)).flatten(1)


IMAGE_TORSOS = {"nature": NatureTorso, "small": SmallImageTorso, "impala": ImpalaTorso}


class ImageEncoder(nn.Module):
    """(N, k, *frame) of stacked (H, W), (H, W, C) or (C, H, W) frames -> (N, features)."""

    def __init__(self, space: spaces.Box, stack: int, config: ModelConfig, last: bool):
        super().__init__()
        shape = space.shape
        self.channels_last_frames = has_channels_last(shape)
        if len(shape) == 2:
            (height, width), channels = shape, 1
        elif self.channels_last_frames:
            height, width, channels = shape
        else:
            channels, height, width = shape
        pixel_scale = 1 / 255 if space.dtype == "uint8" else 1.0
        kind = config.torso
        if kind == "auto":
            kind = "nature" if min(height, width) >= 36 else "small"
        names = ("torso_width", "torso_pool", "spectral_norm") if kind == "impala" else ()
        options = {name.removeprefix("torso_"): getattr(config, name) for name in names}
        size = channels * stack, height, width
        self.torso = IMAGE_TORSOS[kind](*size, pixel_scale=pixel_scale, **options)
        self.width = config.features
        self.features, self.last = self.torso.features, nn.Identity()
        if last:
            self.last = hidden_layer(self.features, self.width, "relu", config.noisy)
            self.features = self.width

    def forward(self, frames: Tensor) -> Tensor:
        if self.channels_last_frames:
            frames = frames.movedim(-1, 2)
        image = frames.flatten(1, -3)  # (N, k * C, H, W)
        # Channels last while they are bytes, then to the type the convolutions compute in: a
        # third of the time that one pass for both takes on a CPU.
        if not image.is_contiguous(memory_format=torch.channels_last):
            image = torch.stack(image.unbind(1), -1).movedim(-1, 1)
        device_type = image.device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else self.torso_dtype
        return self.last(self.torso(image.to(dtype)))

    @property
    def torso_dtype(self) -> torch.dtype:
        return next(self.torso.parameters()).dtype


class VectorEncoder(nn.Module):
    """(N, k, *shape) numbers, flags or one-hot categories -> (N, features) by an MLP."""

    def __init__(self, space: spaces.Space, stack: int, config: ModelConfig, last: bool):
        super().__init__()
        self.size = spaces.flatdim(space)
        self.is_categories = isinstance(space, (spaces.Discrete, spaces.MultiDiscrete))
        if self.is_categories:  # where the ones of each lie
            counts = np.ravel(space.n if isinstance(space, spaces.Discrete) else space.nvec)
            places = np.cumsum(counts) - counts - np.ravel(space.start)
            self.register_buffer("places", torch.from_numpy(places).long(), persistent=False)
        sizes = (stack * self.size, *config.hidden)
        self.width = config.hidden[-1] if config.hidden else 0
        count = len(config.hidden) - (not last and len(config.hidden) > 1)
        self.layers = nn.Sequential(*(
            hidden_layer(
                *sizes[i : i + 2], config.activation, config.noisy and i == len(config.hidden) - 1
            )
            for i in range(count)
        ))  # fmt: skip
        self.features = sizes[count]

    def forward(self, values: Tensor) -> Tensor:
        if self.is_categories:
            index = values.reshape(*values.shape[:2], -1).long() + self.places
            values = values.new_zeros((*index.shape[:2], self.size), dtype=torch.float32)
            values = values.scatter_(2, index, 1.0)
        dtype = self.layers[0][0].weight.dtype if self.width else torch.float32
        return self.layers(values.flatten(1).to(dtype))


def is_image(space: spaces.Space) -> bool:
    """Whether convolutions serve a space: a Box of 2 or 3 axes."""
    return isinstance(space, spaces.Box) and len(space.shape) in (2, 3)


def has_image(space: spaces.Space) -> bool:
    """Whether convolutions serve a space or a part of it."""
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        parts = space.spaces.values() if isinstance(space, spaces.Dict) else space.spaces
        return any(map(has_image, parts))
    return is_image(space)


def has_channels_last(shape: tuple[int, ...]) -> bool:
    """Whether an image of this shape is (H, W, C): channels are the axis that differs from two
    equal ones, or else the last where it is shorter than the first."""
    if len(shape) < 3 or shape[1] == shape[2]:
        return False
    return shape[0] == shape[1] or shape[2] < shape[0]


def encoder(space: spaces.Space, stack: int, config: ModelConfig, last: bool = True) -> nn.Module:
    """The torso that serves a space: images by convolutions, the rest by an MLP, trees by parts."""
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        return TreeEncoder(space, config, last)
    return (ImageEncoder if is_image(space) else VectorEncoder)(space, stack, config, last)


class TreeEncoder(nn.Module):
    """Dict and Tuple observations: an encoder a part, features side by side."""

    def __init__(self, space: spaces.Dict | spaces.Tuple, config: ModelConfig, last: bool):
        super().__init__()
        is_dict = isinstance(space, spaces.Dict)
        parts = space.spaces.items() if is_dict else enumerate(space.spaces)
        self.keys = [key for key, _ in parts]
        parts = [encoder(space.spaces[key], 1, config, last) for key in self.keys]
        self.parts = nn.ModuleList(parts)
        self.features = sum(part.features for part in parts)
        self.width = sum(part.width for part in parts)

    def forward(self, tree) -> Tensor:
        """Leaves are (N, ...) without a stack axis, or trees of such."""
        outputs = []
        for key, part in zip(self.keys, self.parts, strict=True):
            value = tree[key]
            outputs.append(part(value if isinstance(part, TreeEncoder) else value.unsqueeze(1)))
        return torch.cat(outputs, dim=1)
