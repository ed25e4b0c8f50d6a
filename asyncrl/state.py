"""Nested state dicts, as algorithms and stores give them, and the flat form that is saved."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def flatten(tree: dict, prefix: str = "") -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Split nested dicts into {path: array} and {path: number}. Paths are joined by '|'; in a name
    itself it is written %7C, and % is %25."""
    arrays: dict[str, np.ndarray] = {}
    numbers: dict[str, float] = {}
    for key, value in tree.items():
        path = prefix + str(key).replace("%", "%25").replace("|", "%7C")
        if isinstance(value, dict):
            inner_arrays, inner_numbers = flatten(value, path + "|")
            arrays |= inner_arrays
            numbers |= inner_numbers
        elif isinstance(value, Tensor):
            arrays[path] = value.detach().cpu().contiguous().numpy()
        else:
            numbers[path] = value
    return arrays, numbers


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """Of the generators that models draw from where nothing else is named."""
    on_gpu = {"cuda_rng": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"rng": torch.get_rng_state()} | on_gpu


def set_rng_state(state: dict, device: torch.device) -> None:
    """As `rng_state` has it, as far as it was saved on such a device."""
    torch.set_rng_state(state["rng"])
    if device.type == "cuda" and "cuda_rng" in state:
        torch.cuda.set_rng_state(state["cuda_rng"], device)


def unflatten(leaves: dict) -> dict:
    """The inverse of `flatten`: arrays become tensors again."""
    tree: dict = {}
    for path, value in leaves.items():
        *parents, key = (name.replace("%7C", "|").replace("%25", "%") for name in path.split("|"))
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[key] = torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value
    return tree
