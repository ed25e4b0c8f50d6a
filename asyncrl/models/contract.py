"""What every model promises, tried once before a run starts."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from asyncrl.foreign import call
from asyncrl.types import Field, Tree, space_fields, tree_leaves, tree_map

CONTRACT = (
    "a model has initial_state(B) -> state and is called as "
    "model(obs (T, B, ...), first (T, B), state) -> (outputs {name: (T, B, ...)}, state)"
)


def state_fields(model: nn.Module, head: Any, *spaces: spaces.Space) -> Tree:
    """Fields of a model's state for one environment, by `try_model`."""
    return try_model(model, head, *spaces)[0]


def try_model(
    model: nn.Module, head: Any, observation_space: spaces.Space, action_space: spaces.Space
) -> tuple[Tree, dict[str, Tensor]]:
    """Fields of a model's state for one environment, and its outputs (T, B, ...) of nothing.

    The model is called on two steps of three environments, and on one, as actors do. ValueError,
    with the contract, where it has no state contract, changes its state's shape, or lacks the
    outputs that `head` stands for ("q", or "actor_critic": a value and logits, or mean and log_std;
    or a record of `return_heads`).
    """
    if not hasattr(model, "initial_state"):
        raise ValueError(
            f"expected a model with initial_state(B), got {type(model).__name__} without it: "
            f"{CONTRACT}; return {{}} where there is no memory"
        )
    T, B = 2, 3
    who = f"the model {type(model).__name__}"
    state = call(who, model.initial_state, B)
    for leaf in tree_leaves(state):
        if not isinstance(leaf, torch.Tensor) or leaf.shape[:1] != (B,):
            shape = tuple(getattr(leaf, "shape", ()))
            raise ValueError(
                f"expected model.initial_state({B}) to give tensors whose first axis is {B}, got "
                f"{type(leaf).__name__} of shape {shape}: {CONTRACT}"
            )
        if leaf.requires_grad:
            raise ValueError(
                f"expected model.initial_state({B}) to give constants, got a tensor with a "
                "gradient; states are stored and sent on: write .detach() behind it"
            )
    stack = getattr(model, "frame_stack", 1)
    if (stack > 1) != (isinstance(state, dict) and "frames" in state):
        raise ValueError(
            "expected 'frames' in the state of a model where its frame_stack is above 1, and only "
            f"there, got frame_stack={stack} and the state {_fields(state)}: it stands for rows "
            "that are kept anyway; give what the model itself remembers another name"
        )
    space = deepcopy(observation_space)  # whose seed is the environment's
    space.seed(0)

    def stacked(field: Field, *samples: Any) -> torch.Tensor:
        rows = np.stack([np.asarray(sample, field.dtype) for sample in samples])
        rows = rows.clip(-10, 10) if rows.dtype.kind == "f" else rows  # bounds may be far away
        return torch.from_numpy(rows.reshape(T, B, *field.shape))

    samples = [space.sample() for _ in range(T * B)]
    obs = tree_map(stacked, space_fields(observation_space), *samples)
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(
                f"expected finite parameters, got others in {name} before anything was learned; "
                "look at how the model fills it"
            )
    expected = _expected(head, action_space)
    outputs, after = _tried(who, model, obs, state)
    for name, shape in expected.items():
        got = tuple(outputs[name].shape) if name in outputs else None
        if got != (T, B, *shape):
            raise ValueError(
                f"expected a model output {name!r} of shape {(T, B, *shape)} for {action_space} "
                f"and an algorithm that learns a head {head!r}, got {got or sorted(outputs)}"
            )
    training = model.training
    model.eval()  # as actors have it, who go step by step
    one = _tried(who, model, tree_map(lambda leaf: leaf[:1], obs), after)[0]
    model.train(training)
    for name in expected:  # behind (T, B) shapes may differ: IQN draws other numbers of fractions
        if name not in one or one[name].shape[:2] != (1, B):
            raise ValueError(
                f"expected a model output {name!r} of shape (1, {B}, ...) for one step, got "
                f"{tuple(one[name].shape) if name in one else sorted(one)}: {CONTRACT}"
            )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"expected {who} to have parameters that learn, got none")
    return _fields(state), outputs


def _tried(who: str, model: nn.Module, obs: Tree, state: Tree) -> tuple[dict[str, Tensor], Tree]:
    """(outputs, state) of a call with opening observations; the state is like the one before."""
    T, B = tree_leaves(obs)[0].shape[:2]
    with torch.no_grad():
        returned = call(who, model, obs, torch.ones(T, B, dtype=torch.bool), state)
    kinds = [type(part).__name__ for part in returned] if isinstance(returned, tuple) else ()
    if len(kinds) != 2 or not isinstance(returned[0], dict):
        got = f"a tuple of {kinds}" if kinds else f"a {type(returned).__name__}"
        raise ValueError(
            f"expected {who} to return (outputs, state), got {got}; return outputs, state: "
            f"{CONTRACT}"
        )
    outputs, after = returned
    before, fields = _fields(state), _fields(after)
    if before != fields:
        raise ValueError(
            f"expected a model to return a state like the one it was given, got {fields} after "
            f"{before}: {CONTRACT}"
        )
    return outputs, after


def _fields(state: Tree) -> Tree:
    """Per environment; the types of what is no tensor."""

    def field(leaf: Any) -> Field | str:
        if not isinstance(leaf, Tensor):
            return type(leaf).__name__
        return Field(tuple(leaf.shape[1:]), Field.of(leaf).dtype)

    return tree_map(field, state)


def _expected(head: Any, space: spaces.Space) -> dict[str, tuple[int, ...]]:
    """Shapes behind (T, B) of the outputs that a head has for an action space."""
    discrete = isinstance(space, spaces.Discrete)
    if head != "actor_critic":
        if not discrete:
            raise ValueError(
                f"expected a Discrete action space for a value-based algorithm, got {space}; use "
                "A2C or PPO for others"
            )
        return {"q": (int(space.n),)} if head == "q" else head.outputs(int(space.n))
    if discrete:
        return {"value": (), "logits": (int(space.n),)}
    if isinstance(space, spaces.MultiDiscrete | spaces.MultiBinary):
        counts = space.nvec.flatten() if isinstance(space, spaces.MultiDiscrete) else [2]
        return {"value": (), "logits": (*space.shape, int(max(counts)))}
    if space.dtype.itemsize < 4:
        raise ValueError(
            f"expected actions of float32 or float64, got {space}: rounded to {space.dtype} an "
            "action is not the one whose log-probability is known; give the Box another dtype"
        )
    names = ("mean", "log_std", "low", "high")
    return {"value": ()} | {name: tuple(space.shape) for name in names}
