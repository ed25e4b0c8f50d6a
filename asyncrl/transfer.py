"""Between host memory and a GPU, by way of page-locked memory: nobody waits for a copy to it.

The memory is PyTorch's own pool of it, which hands a block out anew once its copy is done. Where
there is none to be had, copies are made by way of CUDA's own.
"""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from torch import Tensor


def staged(source: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """What a copy to `device` with non_blocking begins from: the source itself, or, from host
    memory to a GPU, a page-locked copy, so that the source may be written again at once."""
    tensor = torch.as_tensor(source)
    if device.type == "cuda" and tensor.device.type == "cpu":
        with contextlib.suppress(RuntimeError):  # no more may be locked: CUDA then copies at once
            locked = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            return locked.copy_(tensor)  # dense, as what is not takes a copy more, of another kind
    return tensor


def to_host(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Arrays of the same names: views of what lies in host memory; from a GPU one copy for all of a
    dtype, as each has to wait for it."""
    arrays, elsewhere = {}, {}
    for name, tensor in tensors.items():
        if tensor.device.type == "cpu":
            arrays[name] = tensor.detach().numpy()
        else:
            elsewhere.setdefault(tensor.dtype, {})[name] = tensor.detach()
    for group in elsewhere.values():
        whole = torch.cat([tensor.flatten() for tensor in group.values()])
        parts = _on_host(whole).split([tensor.numel() for tensor in group.values()])
        for (name, tensor), part in zip(group.items(), parts, strict=True):
            arrays[name] = part.view(tensor.shape).numpy()
    return arrays


def _on_host(tensor: Tensor) -> Tensor:
    """A copy that is there when this returns."""
    if tensor.device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)
    return tensor.cpu()
