"""The wire: what one unroll holds, described in one place.

Everything an actor makes is an `Unroll`: T consecutive steps of B environments, time-major, acted
with one version of the weights. `Spec` is computed once from the environment's spaces and the
model's state; it sizes the slots of the ring and makes the views into any buffer. Nobody else
knows an offset or a dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

Tree = Any  # a leaf, or nested dicts and tuples of leaves


def tree_map(function, tree: Tree, *rest: Tree) -> Tree:
    """Apply `function` to the leaves of trees of one structure (dict, tuple, NamedTuple)."""
    if isinstance(tree, dict):
        return {key: tree_map(function, tree[key], *(r[key] for r in rest)) for key in tree}
    if isinstance(tree, tuple):
        parts = [tree_map(function, *leaves) for leaves in zip(tree, *rest, strict=True)]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return function(tree, *rest)


def tree_leaves(tree: Tree) -> list:
    """The leaves of a tree, in the order `tree_map` visits them."""
    leaves: list = []
    tree_map(leaves.append, tree)
    return leaves


class Header(NamedTuple):
    """Who made an unroll: int64 scalars."""

    sequence: Any  # number of this unroll in its lane, growing by one
    lane: Any
    actor: Any
    generation: Any  # grows when the lane's environments are made anew; so do not join across it
    version: Any  # of the weights that acted
    env_steps: Any  # the learner's count when those weights were published


class Unroll(NamedTuple):
    """T steps of B environments; row t is an observation, the action on it and what that caused."""

    obs: Tree  # (T+1, B, *obs): obs[T] is what the learner bootstraps from
    first: Any  # (T+1, B) bool: obs[t] opens an episode
    action: Any  # (T, B, *action)
    log_prob: Any  # (T, B) float32 of the behaviour policy that really chose the action
    reward: Any  # (T, B) float32, unclipped
    terminated: Any  # (T, B) bool: the MDP ended here (for `classic` Atari also: a life was lost)
    truncated: Any  # (T, B) bool: the episode was cut here
    valid: Any  # (T, B) bool: a real transition; False on the reset step after an end
    policy: Any  # (T, B) uint8: which policy of the mix acted
    episode_return: Any  # (T, B) float32, meaningful where episode_length > 0
    episode_length: Any  # (T, B) int32: env steps of the whole episode that ended here, else 0
    state: Tree  # (S, B, *state) before rows 0, T/S, ...; frames of a stack (1, B, ...): row 0's
    value: Any  # (T+1, B) float32 of obs, by the weights that acted, row T perhaps by newer
    # ones that another lane has pulled; () where nobody asks for it
    header: Header


@dataclass(frozen=True)
class Field:
    """Shape and dtype of one array."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, array) -> Field:
        return cls(tuple(array.shape), str(array.dtype).removeprefix("torch."))

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Layout:
    """A tree of fields laid out in one buffer, each aligned to a cache line."""

    fields: Tree
    alignment = 64

    @property
    def nbytes(self) -> int:
        return sum(self._padded(field) for field in tree_leaves(self.fields))

    def views(self, buffer, offset: int = 0) -> Tree:
        """The same tree with numpy views into `buffer` (anything with the buffer protocol)."""
        position = offset

        def view(field: Field) -> np.ndarray:
            nonlocal position
            array = np.ndarray(field.shape, field.dtype, buffer, position)
            position += self._padded(field)
            return array

        return tree_map(view, self.fields)

    def _padded(self, field: Field) -> int:
        return -(-field.nbytes // self.alignment) * self.alignment


@dataclass(frozen=True)
class Spec:
    """The shape of every unroll of a run."""

    unroll_length: int  # T
    num_envs: int  # B, environments of one lane
    observation_space: spaces.Space
    action_space: spaces.Space
    state: Tree  # fields of the model's state for one environment
    num_states: int = 1  # S
    values: bool = False  # whether actors note what each observation is worth

    def __post_init__(self):
        if self.unroll_length < 1 or self.num_envs < 1:
            raise ValueError(
                "expected an unroll of at least 1 step of at least 1 environment, got "
                f"unroll_length={self.unroll_length} and num_envs={self.num_envs}"
            )
        if self.num_states < 1 or self.unroll_length % self.num_states:
            raise ValueError(
                f"expected num_states to divide unroll_length={self.unroll_length}, got "
                f"{self.num_states}"
            )

    @property
    def obs(self) -> Tree:
        """Fields of one observation."""
        return space_fields(self.observation_space)

    @property
    def action(self) -> Field:
        """The field of one action."""
        return space_fields(self.action_space)

    @property
    def is_recurrent(self) -> bool:
        """Whether the model's state is more than a stack of frames."""
        stack_alone = isinstance(self.state, dict) and set(self.state) <= {"frames"}
        return bool(tree_leaves(self.state)) and not stack_alone

    @property
    def layout(self) -> Layout:
        """Where each field of an unroll lies in a slot."""
        T, B, S = self.unroll_length, self.num_envs, self.num_states

        def rows(count: int, tree: Tree) -> Tree:
            return tree_map(lambda field: Field((count, B, *field.shape), field.dtype), tree)

        flag, real = Field((), "bool"), Field((), "float32")
        state = rows(S, self.state)
        if isinstance(state, dict) and "frames" in state:  # later ones are found in obs
            state["frames"] = rows(1, self.state["frames"])
        return Layout(
            Unroll(
                obs=rows(T + 1, self.obs),
                first=rows(T + 1, flag),
                action=rows(T, self.action),
                log_prob=rows(T, real),
                reward=rows(T, real),
                terminated=rows(T, flag),
                truncated=rows(T, flag),
                valid=rows(T, flag),
                policy=rows(T, Field((), "uint8")),
                episode_return=rows(T, real),
                episode_length=rows(T, Field((), "int32")),
                state=state,
                value=rows(T + 1, real) if self.values else (),
                header=Header(*(Field((), "int64") for _ in Header._fields)),
            )
        )


def poison(unroll: Unroll) -> None:
    """Fill an unroll with values that no environment makes, so that a row never written is seen.

    Floats become NaN, integers the largest of their kind, flags True (every row a first one).
    """

    def fill(array: np.ndarray) -> None:
        if array.dtype.kind == "f":
            array[...] = np.nan
        elif array.dtype.kind == "b":
            array[...] = True
        else:
            array[...] = np.iinfo(array.dtype).max

    tree_map(fill, unroll)


def space_fields(space: spaces.Space) -> Tree:
    """The fields of one sample of a space: a Field, or a tree of them for Dict and Tuple."""
    if isinstance(space, spaces.Dict):
        return {key: space_fields(part) for key, part in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(space_fields(part) for part in space.spaces)
    if isinstance(space, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
        return Field(tuple(space.shape), str(space.dtype))
    raise ValueError(
        "expected a space of Box, Discrete, MultiDiscrete, MultiBinary, Dict or Tuple, got "
        f"{type(space).__name__}; wrap the environment so that it speaks one of these"
    )
