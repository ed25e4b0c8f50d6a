"""Layers that networks are built of beside torch's own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from asyncrl.models.precision import without_autocast

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}


def scale(layer: nn.Module, gain: float = 2**0.5) -> nn.Module:
    """Orthogonal weights of the given gain and zero bias."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Linear(nn.Linear):
    """`nn.Linear` of (N, inputs), computed as (W x')': with 16 to 48 rows and two threads MKL takes
    a third of the time that it needs for x W'. Of fewer rows it may need twice as much."""

    def forward(self, features: Tensor) -> Tensor:
        if features.is_cuda or len(features) < 16:
            return super().forward(features)
        return torch.addmm(self.bias.unsqueeze(1), self.weight, features.t()).t()


def linear(inputs: int, outputs: int, noisy: bool) -> nn.Linear:
    """The linear layer for that, of which only large ones are worth a `Linear`."""
    if noisy:
        return NoisyLinear(inputs, outputs)
    return (Linear if inputs * outputs > 1 << 20 else nn.Linear)(inputs, outputs)


def hidden_layer(inputs: int, outputs: int, activation: str, noisy: bool) -> nn.Sequential:
    """(N, inputs) -> (N, outputs), with a name of `ACTIVATIONS` behind it."""
    return nn.Sequential(scale(linear(inputs, outputs, noisy)), ACTIVATIONS[activation]())


@dataclass(frozen=True)
class StreamConfig:
    """What lies between features and the last layer of a head; calling it builds a `Stream`."""

    features: int
    hidden: int = 0  # width of a layer of its own (0: none)
    activation: str = "relu"
    noisy: bool = False

    def __call__(self, outputs: int, gain: float) -> Stream:
        return Stream(self, outputs, gain)


class Stream(nn.Module):
    """(N, features) -> (N, outputs), float32: values need more than the 8 bits of bfloat16."""

    def __init__(self, config: StreamConfig, outputs: int, gain: float):
        super().__init__()
        inputs, width, noisy = config.features, config.hidden, config.noisy
        self.hidden = nn.Identity()
        if width:
            self.hidden = hidden_layer(inputs, width, config.activation, noisy)
        self.last = scale(linear(width or inputs, outputs, noisy), gain)

    def forward(self, features: Tensor) -> Tensor:
        features = self.hidden(features)
        with without_autocast(features.device.type):
            return self.last(features.float())


class NoisyLinear(nn.Linear):
    """A linear layer whose weights are Gaussian, by factorised noise (Fortunato et al. 2018).

    weight + weight_sigma * outer(noise_out, noise_in), bias + bias_sigma * noise_out. The noise is
    a buffer that only `redraw` changes: the learner redraws it before each update, an actor before
    each unroll. Means begin as those of the layer's other kind, 0.01 in a last layer, not as in the
    paper, within 1 / root of the inputs: noise is all there is to begin with.
    """

    def __init__(self, inputs: int, outputs: int, sigma: float = 0.5):
        super().__init__(inputs, outputs)
        deviation = sigma / inputs**0.5
        self.weight_sigma = nn.Parameter(torch.full((outputs, inputs), deviation))
        self.bias_sigma = nn.Parameter(torch.full((outputs,), deviation))
        self.register_buffer("noise_in", torch.zeros(inputs))
        self.register_buffer("noise_out", torch.zeros(outputs))
        self.redraw()

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None) -> None:
        """New noise: sign(x) sqrt(|x|) of normal x, drawn by torch's own generator or this one."""
        for noise in (self.noise_in, self.noise_out):
            noise.normal_(generator=generator)
            noise.copy_(noise.sign() * noise.abs().sqrt())

    @torch.no_grad()
    def silence(self) -> None:
        """No noise, for evaluation: the weights are their means until the next `redraw`."""
        self.noise_in.zero_()
        self.noise_out.zero_()

    def forward(self, features: Tensor) -> Tensor:
        noise = torch.outer(self.noise_out, self.noise_in)
        weight = torch.addcmul(self.weight, self.weight_sigma, noise)
        bias = torch.addcmul(self.bias, self.bias_sigma, self.noise_out)
        return nn.functional.linear(features, weight, bias)


def noisy_layers(*models: nn.Module) -> list[NoisyLinear]:
    """All of them, wherever in the models they are."""
    layers = [layer for model in models for layer in model.modules()]
    return [layer for layer in layers if isinstance(layer, NoisyLinear)]


class ScaledConv2d(nn.Conv2d):
    """A convolution of `factor` times the image: its few weights are multiplied, not the pixels."""

    def __init__(self, factor: float, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.factor = factor

    def forward(self, image: Tensor) -> Tensor:
        weight = self.weight if self.factor == 1 else self.weight * self.factor
        return self._conv_forward(image, weight, self.bias)


class SpectralConv2d(nn.Conv2d):
    """A convolution divided by its weight's spectral norm, that of its (out, in * k * k) matrix.

    One power iteration each time it is called in training, from where the last one ended; in
    evaluation the vectors stay. Miyato et al. 2018; in a torso, Gogianu et al. 2021.
    """

    def __init__(self, *args, iterations: int = 15, **kwargs):
        super().__init__(*args, **kwargs)
        left, right = self.weight.flatten(1).shape
        self.register_buffer("left", nn.functional.normalize(torch.randn(left), dim=0))
        self.register_buffer("right", nn.functional.normalize(torch.randn(right), dim=0))
        for _ in range(iterations):
            self.iterate()

    @torch.no_grad()
    def iterate(self) -> None:
        """Move both vectors closer to the largest singular ones."""
        matrix = self.weight.flatten(1)
        self.left.copy_(nn.functional.normalize(matrix @ self.right, dim=0))
        self.right.copy_(nn.functional.normalize(self.left @ matrix, dim=0))

    def normalized(self) -> Tensor:
        """The weight, of spectral norm 1 once the vectors have arrived."""
        left, right = self.left.clone(), self.right.clone()  # backward needs them as they are now
        return self.weight / (left @ (self.weight.flatten(1) @ right))

    def forward(self, image: Tensor) -> Tensor:
        with without_autocast(image.device.type):
            if self.training:
                self.iterate()
            weight = self.normalized()
        return self._conv_forward(image, weight, self.bias)
