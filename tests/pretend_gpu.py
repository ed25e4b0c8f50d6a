"""A GPU for machines without one: a device of torch whose tensors lie in the CPU's memory, apart.

What runs on it is computed by the CPU, so its results are the CPU's. As on a GPU, no operation may
mix its tensors with others; `moved` tells what was copied to or from it, and who waited for a
number. It shows nothing of CUDA itself, of its memory or its speed.

    python tests/pretend_gpu.py LAUNCH_FILE [OPTION VALUE ...]

trains on it and on the CPU, from the same unrolls, and prints as JSON what `compared` gives.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretend"
INDEXING = {"aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_"}
FACTORIES = ("arange", "arange.start", "arange.start_step", "randint", "randint.generator",
             "randint.low", "randint.low_generator")  # fmt: skip
moved: Counter[str] = Counter()  # copies "in" and "out", bytes "bytes in" and "bytes out", "waits"


class OnDevice(torch.Tensor):
    """A tensor of the device; `inner` is what the CPU has of it."""

    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=torch.device(NAME, 0),
        )  # fmt: skip
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return run(operation, *args, **(kwargs or {}))

    def tolist(self):
        moved["waits"] += 1
        return self.inner.tolist()


def run(operation, *args, **kwargs):
    """One operation of torch, on the CPU."""
    name = operation.name().removesuffix(".default")
    operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = {id(x.inner): x for x in operands if isinstance(x, OnDevice)}
    plain_args, plain = tree_map(_inner, (list(args), kwargs))
    wanted = plain.pop("device", None)
    if wanted is not None:
        plain["device"] = "cpu"
    for option in ("pin_memory", "non_blocking"):
        plain.pop(option, None)
    if name == "aten::copy_":
        _count(isinstance(args[1], OnDevice), isinstance(args[0], OnDevice), plain_args[1])
        plain_args[0].copy_(plain_args[1])
        return args[0]
    stays = bool(there) or wanted is None
    goes = stays if wanted is None else torch.device(wanted).type == NAME
    if name == "aten::_to_copy":
        stays = bool(there)
        goes = stays if wanted is None else goes
        _count(stays, goes, plain_args[0])
    elif there:
        for x in operands:
            if x.ndim and not isinstance(x, OnDevice):
                if name not in INDEXING:
                    raise RuntimeError(
                        f"{name}: expected all on one device, got {tuple(x.shape)} on the CPU"
                    )
                _count(False, True, x)
        moved["waits"] += name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
    found = operation(*plain_args, **plain)

    def wrapped(x):
        if not isinstance(x, torch.Tensor) or not goes:
            return x
        return there[id(x)] if id(x) in there else OnDevice(x)

    return tree_map(wrapped, found)


def _inner(x):
    return x.inner if isinstance(x, OnDevice) else x


def _count(from_device: bool, to_device: bool, x: torch.Tensor) -> None:
    if from_device != to_device:
        way = "in" if to_device else "out"
        moved.update({way: 1, f"bytes {way}": x.nbytes, "waits": not to_device})


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]


def install() -> list[torch.library.Library]:
    """Make the device known to this process, as long as what it returns is kept."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(run, "PrivateUse1")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    aten = torch.library.Library("aten", "IMPL")
    for name in FACTORIES:  # whose results grow as they are made
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(torch.ops.aten, packet), overload or "default")

        def made(*args, operation=operation, **kwargs):
            kwargs = {k: x for k, x in kwargs.items() if k not in ("device", "pin_memory")}
            return OnDevice(operation(*args, **kwargs))

        aten.impl(f"aten::{name}", made, "PrivateUse1")
    tensor, generator = torch.tensor, torch.Generator

    def on_device(*args, device=None, **kwargs):
        made = tensor(*args, **kwargs)
        return made if device is None else made.to(device)

    class Generator:  # the device has none of its own
        def __new__(cls, device="cpu"):
            return generator()

    torch.tensor, torch.Generator = on_device, Generator
    return [everything, aten]


# -- training on it, and on the CPU ----------------------------------------------------------------

UPDATES = 3


def trained(config, unrolls: list[bytearray], device: str) -> tuple[dict, list[Counter]]:
    """The algorithm's state after some updates on a device, and what each of them moved."""
    from asyncrl.costs import wire

    torch.manual_seed(0)
    spec, model = wire(config)
    algorithm = config.algorithm.build(model, torch.device(device))
    store = algorithm.store(spec, config.actor.num_lanes, 0)
    counts: list[Counter] = []
    for turn in range(100):
        for lane in range(lanes := config.actor.num_lanes):
            unroll = spec.layout.views(unrolls[(turn * lanes + lane) % len(unrolls)])
            unroll.header.lane[...], unroll.header.sequence[...] = lane, turn
            store.insert(lane, unroll)
        if hasattr(store.limiter, "starts_at") and turn == 3:  # before a replay is filled
            store.limiter.starts_at = float(store.limiter.inserted)
        while turn >= 3 and store.updates_allowed() and len(counts) < UPDATES:
            moved.clear()
            algorithm.update(store)
            counts.append(moved.copy())
    return algorithm.state_dict(), counts


def compared(config) -> dict:
    """Largest difference of weights and moments, of what actors send, and what updates moved."""
    from asyncrl import costs
    from asyncrl.state import flatten
    from asyncrl.transfer import to_host

    costs.PLAY_SECONDS = 0.3
    played_on = {}
    for device in ("cpu", NAME):
        torch.manual_seed(0)
        acting = replace(config, actor=replace(config.actor, device=device))
        _, played_on[device] = costs.time_actor(acting)
    unrolls, unrolls_there = played_on.values()
    views = costs.wire(config)[0].layout.views
    pairs = [(views(a), views(b)) for a, b in zip(unrolls, unrolls_there, strict=False)]
    acting = {
        "unrolls": len(pairs),
        "actions differ": bool(any((a.action != b.action).any() for a, b in pairs)),
        "log_prob": max(float(np.abs(a.log_prob - b.log_prob).max()) for a, b in pairs),
    }
    states, config_there = trained(config, unrolls, "cpu")[0], config
    if hasattr(config.algorithm, "replay"):
        on_device = replace(config.algorithm.replay, device=NAME)
        config_there = replace(config, algorithm=replace(config.algorithm, replay=on_device))
    states_there, counts = trained(config_there, unrolls, NAME)
    moved.clear()
    host = to_host(states_there["model"])
    published = moved.copy()
    ours, theirs = flatten(states)[0], flatten(states_there)[0]
    return {
        "updates": counts,
        "publication": published,
        "dtypes": len({array.dtype for array in host.values()}),
        "difference": max(
            float(np.abs(ours[name].astype(float) - theirs[name]).max())
            for name in ours.keys() | theirs.keys()
            if ours[name].size
        ),
        "on device": all(isinstance(x, OnDevice) for x in states_there["model"].values()),
        "acting": acting,
    }


if __name__ == "__main__":
    from asyncrl.config import resolve
    from asyncrl.costs import small_replay
    from asyncrl.models.lstm import LSTM

    kept = install()
    launch, *options = sys.argv[1:]
    options += ["--algorithm.precision", "float32", "--actor.precision", "float32"]
    resolved = small_replay(resolve(Path(launch), options))
    if getattr(resolved.model, "lstm", 0):  # torch's own needs a real one
        OnDevice.is_cuda, LSTM.LONG = False, 10**9
    print(json.dumps(compared(resolved)))
