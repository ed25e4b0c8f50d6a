"""What a network computes in: float32, or bfloat16 where the hardware multiplies it."""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import torch
from torch import nn

Precision = Literal["auto", "float32", "bfloat16"]


def device_called(name: str) -> torch.device:
    """A device by torch's name; "auto": the GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def computes_in_bfloat16(precision: Precision, device: torch.device, model: nn.Module) -> bool:
    """Whether `precision` means bfloat16 for this model on this device.

    "auto" wants a large model, for a small one loses by the conversions, and hardware that
    multiplies bfloat16; a CPU without instructions for it is several times slower than in float32.
    """
    if precision != "auto":
        return precision == "bfloat16"
    if not is_large(model):
        return False
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Where more than the 8 bits of bfloat16 are needed; for next to nothing where nobody casts."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def is_large(model: nn.Module) -> bool:
    """Whether arithmetic outweighs the overhead of its operations on a CPU: the Nature net's does,
    that of a few layers of hundreds of units does not."""
    return sum(parameter.numel() for parameter in model.parameters()) >= 300_000
