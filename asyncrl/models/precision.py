"""What a network computes in: float32, or bfloat16 where the hardware multiplies it."""

from __future__ import annotations

import contextlib
import functools
import sys
from typing import Any, Literal

import torch
from torch import nn

Precision = Literal["auto", "float32", "bfloat16"]


def device_called(name: str) -> torch.device:
    """A device by torch's name; "auto": the GPU where there is one that works."""
    if name == "auto":
        name = "cuda" if _gpu_works() else "cpu"
    return torch.device(name)


@functools.cache
def _gpu_works() -> bool:
    if not torch.cuda.is_available():
        return False
    if trouble := gpu_trouble():
        print(f"asyncrl: the GPU is not used: {trouble}", file=sys.stderr)
    return not trouble


def gpu_trouble() -> str:
    """Why a GPU that is there cannot be used: the driver is too old for this torch, or torch for
    it; "" where it can."""
    try:
        torch.zeros(1, device="cuda").add_(1).item()
    except (RuntimeError, AssertionError) as error:
        return str(error).partition("\n")[0]
    return ""


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
