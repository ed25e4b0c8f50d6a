"""What a network computes in: float32, or bfloat16 where the hardware multiplies it."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["auto", "float32", "bfloat16"]


def computes_in_bfloat16(precision: Precision, device: torch.device) -> bool:
    """Whether `precision` means bfloat16 on this device; without matrix units for it, bfloat16 is
    several times slower than float32 on a CPU."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported()
