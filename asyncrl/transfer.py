"""Between host memory and a GPU, by way of page-locked memory: nobody waits for a copy to it.

The memory is PyTorch's own pool of it, which hands a block out anew once its copy is done.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def staged(source: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """What a copy to `device` with non_blocking begins from: the source itself, or, from host
    memory to a GPU, a page-locked copy, so that the source may be written again at once."""
    tensor = torch.as_tensor(source)
    crosses = device.type == "cuda" and tensor.device.type == "cpu"
    return tensor.pin_memory() if crosses else tensor


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
        locked = whole.device.type == "cuda"
        copy = torch.empty(whole.shape, dtype=whole.dtype, pin_memory=locked).copy_(whole)
        parts = copy.split([tensor.numel() for tensor in group.values()])
        for (name, tensor), part in zip(group.items(), parts, strict=True):
            arrays[name] = part.view(tensor.shape).numpy()
    return arrays
