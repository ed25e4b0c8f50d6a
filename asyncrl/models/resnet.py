"""The residual torso of IMPALA (Espeholt et al. 2018), as Beyond the Rainbow (Clark et al. 2024)
has it: wider, with spectral norm in its residual blocks and a max-pool to a fixed size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from asyncrl.models.layers import ScaledConv2d, SpectralConv2d


class ResidualBlock(nn.Module):
    """x + two convolutions of it, each behind a ReLU."""

    def __init__(self, channels: int, spectral_norm: bool):
        super().__init__()
        convolution = SpectralConv2d if spectral_norm else nn.Conv2d
        self.first = convolution(channels, channels, 3, padding=1)
        self.second = convolution(channels, channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        return image + self.second(torch.relu(self.first(torch.relu(image))))


class ImpalaTorso(nn.Module):
    """(N, C, H, W) -> (N, features): three stages of 16, 32 and 32 channels (times `width`), each
    half as large as before.

    A stage is a convolution, a max-pool and two residual blocks. The last map is pooled to
    (pool, pool) where `pool` is not 0, so that the layer behind it does not grow with the image.
    """

    def __init__(
        self,
        channels: int,
        height: int,
        image_width: int,
        width: int = 1,
        spectral_norm: bool = False,
        pool: int = 0,
        pixel_scale: float = 1.0,
    ):
        super().__init__()
        layers: list[nn.Module] = []
        for outputs in (16 * width, 32 * width, 32 * width):
            convolution = ScaledConv2d(pixel_scale, channels, outputs, 3, padding=1)
            layers += [convolution, nn.MaxPool2d(3, 2, padding=1)]
            layers += [ResidualBlock(outputs, spectral_norm) for _ in range(2)]
            channels, pixel_scale = outputs, 1.0
            height, image_width = -(-height // 2), -(-image_width // 2)
        if pool > min(height, image_width):
            raise ValueError(
                f"expected a pool of at most the last map's {height} x {image_width}, got {pool}; "
                "lower it or set 0, for no pooling"
            )
        if pool:
            layers.append(nn.AdaptiveMaxPool2d(pool))
            height = image_width = pool
        self.convolutions = nn.Sequential(*layers, nn.Flatten(), nn.ReLU())
        self.features = channels * height * image_width

    def forward(self, image: Tensor) -> Tensor:
        return self.convolutions(image)
