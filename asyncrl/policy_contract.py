"""What every policy promises, tried once before a run starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

from asyncrl.env_actions import Actions
from asyncrl.foreign import call
from asyncrl.policies import Context, Mixture, unroll_rng
from asyncrl.types import Tree, tree_map

CONTRACT = (
    "a policy has initial_state(B) -> state and is called as policy(outputs, state, first, step, "
    "context, rng) -> (action (B, ...), log_prob (B,), state)"
)


def check_policy(mixture: Mixture, outputs: dict[str, np.ndarray], space: spaces.Space) -> None:
    """Let all parts, and what is inside them, act once on a model's outputs (B, ...); ValueError,
    with the part's name, for one that cannot."""
    lengths = {name: np.zeros(0, np.int64) for name in mixture.names}
    context, rng = Context(0, recent_lengths=lengths), unroll_rng(0, 0, 0)
    for part in mixture.parts:
        check_part(part.name, part.policy, outputs, space, context, rng)


def check_part(
    name: str,
    policy: Any,
    outputs: dict[str, np.ndarray],
    space: spaces.Space,
    context: Any,
    rng: np.random.Generator,
) -> None:
    """Let a policy, and those inside it, act once on a model's outputs (B, ...) of nothing.

    ValueError, with its name, where it has no state contract, changes its state's shape, returns
    anything but (action, log_prob, state), or actions that are none of the space.
    """
    if isinstance(policy, type):
        raise ValueError(
            f"expected a policy for {name}, got the class {policy.__qualname__}; write "
            f"{policy.__qualname__}()"
        )
    if not hasattr(policy, "initial_state"):
        got = getattr(policy, "__qualname__", type(policy).__qualname__)
        raise ValueError(
            f"expected a policy with initial_state(B) for {name}, got {got} without it: "
            f"{CONTRACT}; return () where there is no memory"
        )
    for inner, own in getattr(policy, "inside", {}).items():
        check_part(f"{name}.{inner}", own, outputs, space, context, rng)
    who, B = f"the policy {name}", len(next(iter(outputs.values())))
    state, step = call(who, policy.initial_state, B), np.zeros(B, np.int64)
    before = _kinds(state)
    result = call(who, policy, outputs, state, step == 0, step, context, rng)
    if not isinstance(result, tuple) or len(result) != 3:
        got = f"a tuple of {len(result)}" if isinstance(result, tuple) else type(result).__name__
        raise ValueError(
            f"expected {who} to return (action, log_prob, state), got {got}: {CONTRACT}"
        )
    action, log_prob, state = result
    wanted = (action, (B, *space.shape), space.dtype), (log_prob, (B,), np.dtype(np.float32))
    if not all(
        isinstance(array, np.ndarray)
        and array.shape == shape
        and np.can_cast(array.dtype, dtype, "same_kind")
        for array, shape, dtype in wanted
    ):
        actions, log_probs = (f"{dtype} {shape}" for _, shape, dtype in wanted)
        raise ValueError(
            f"expected {who} to give numpy arrays, actions {actions} and log-probabilities "
            f"{log_probs}, got {' and '.join(_kinds((action, log_prob)))}; "
            "docs/algorithms/mixtures.md has an example"
        )
    if np.isnan(log_prob).any():
        raise ValueError(f"expected log-probabilities from {who}, got {log_prob.tolist()}")
    Actions(space, who).for_env(action)
    if _kinds(state) != before:
        raise ValueError(
            f"expected {who} to return a state like its initial_state({B}), {before}, got "
            f"{_kinds(state)}; let it have one structure at every call"
        )


def check_log_probs(log_prob: np.ndarray, policy: np.ndarray, names: Sequence[str]) -> None:
    """ValueError where one of an unroll (T, B) is no number, with the name of the policy."""
    if (bad := np.isnan(log_prob)).any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"expected log-probabilities from the policy {names[policy[at]]}, got {log_prob[at]} "
            f"for environment {at[1]} at step {at[0]} of an unroll; -inf is the least there is"
        )


def _kinds(tree: Tree) -> Tree:
    """Dtypes and shapes of arrays, types of all else, in words."""

    def kind(leaf: Any) -> str:
        is_array = isinstance(leaf, np.ndarray | np.generic)
        return f"{leaf.dtype} {leaf.shape}" if is_array else type(leaf).__name__

    return tree_map(kind, tree)
