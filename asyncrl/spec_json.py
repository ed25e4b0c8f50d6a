"""A `Spec` in plain JSON and back, as plan.json has it."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from asyncrl.types import Field, Spec, Tree, space_fields


def spec_to_json(spec: Spec) -> dict:
    """`spec_from_json` is its inverse."""
    return {
        "unroll_length": spec.unroll_length,
        "num_envs": spec.num_envs,
        "num_states": spec.num_states,
        "values": spec.values,
        "observation_space": space_to_json(spec.observation_space),
        "action_space": space_to_json(spec.action_space),
        "state": fields_to_json(spec.state),
    }


def spec_from_json(data: dict) -> Spec:
    return Spec(
        unroll_length=data["unroll_length"],
        num_envs=data["num_envs"],
        num_states=data["num_states"],
        values=data.get("values", False),  # older revisions had none
        observation_space=space_from_json(data["observation_space"]),
        action_space=space_from_json(data["action_space"]),
        state=fields_from_json(data["state"]),
    )


def space_to_json(space: spaces.Space) -> dict:
    """A space in plain JSON types; `space_from_json` is its inverse."""
    if isinstance(space, spaces.Dict):
        return {"dict": {key: space_to_json(part) for key, part in space.spaces.items()}}
    if isinstance(space, spaces.Tuple):
        return {"tuple": [space_to_json(part) for part in space.spaces]}
    if isinstance(space, spaces.Discrete):
        return {"discrete": int(space.n), "start": int(space.start), "dtype": str(space.dtype)}
    if isinstance(space, spaces.MultiDiscrete):
        start = space.start.tolist()
        return {"multi_discrete": space.nvec.tolist(), "start": start, "dtype": str(space.dtype)}
    if isinstance(space, spaces.MultiBinary):
        return {"multi_binary": space.n if isinstance(space.n, int) else list(space.n)}
    space_fields(space)  # refuses every other kind in words
    low, high = (
        str(bound.flat[0])
        if bound.size and (bound == bound.flat[0]).all()
        else [str(value) for value in bound.flat]
        for bound in (space.low, space.high)
    )  # as text, because JSON has no infinity
    return {"box": list(space.shape), "low": low, "high": high, "dtype": str(space.dtype)}


def space_from_json(data: dict) -> spaces.Space:
    if "dict" in data:
        # Pairs, for a plain dict would be sorted.
        return spaces.Dict([(key, space_from_json(part)) for key, part in data["dict"].items()])
    if "tuple" in data:
        return spaces.Tuple([space_from_json(part) for part in data["tuple"]])
    if "discrete" in data:
        dtype = np.dtype(data["dtype"]).type
        return spaces.Discrete(data["discrete"], start=data["start"], dtype=dtype)
    if "multi_discrete" in data:
        dtype = np.dtype(data["dtype"]).type
        return spaces.MultiDiscrete(np.array(data["multi_discrete"]), dtype, start=data["start"])
    if "multi_binary" in data:
        return spaces.MultiBinary(data["multi_binary"])
    shape, dtype = tuple(data["box"]), np.dtype(data["dtype"])

    def bound(value) -> np.ndarray:
        numbers = np.array(value, dtype=str).astype(dtype)
        return np.broadcast_to(numbers, shape) if numbers.ndim == 0 else numbers.reshape(shape)

    return spaces.Box(bound(data["low"]), bound(data["high"]), shape, dtype.type)


def fields_to_json(tree: Tree) -> Any:
    if isinstance(tree, dict):
        return {"dict": {key: fields_to_json(part) for key, part in tree.items()}}
    if isinstance(tree, tuple):
        return {"tuple": [fields_to_json(part) for part in tree]}
    return {"shape": list(tree.shape), "dtype": tree.dtype}


def fields_from_json(data: Any) -> Tree:
    if "dict" in data:
        return {key: fields_from_json(part) for key, part in data["dict"].items()}
    if "tuple" in data:
        return tuple(fields_from_json(part) for part in data["tuple"])
    return Field(tuple(data["shape"]), data["dtype"])
