"""What a model remembers on its way through a sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from asyncrl.types import Tree, tree_map


def states_before(
    model: nn.Module, obs: Tree, first: Tensor, state: Tree, rows: Sequence[int]
) -> tuple[dict[str, Tensor], Tree]:
    """(outputs (T, B, ...), states (len(rows), B, ...) before `rows`, which grow from 1 to T-1).

    Outputs are those of one call with obs (T, B, ...), first (T, B) and the state before row 0.
    The states lack "frames". A model that has a method `states`, as built-in ones do, goes through
    all rows at once; others are called for each stretch between two of them.
    """
    if callable(getattr(model, "states", None)):
        outputs, _, states = model.states(obs, first, state, rows)
    else:
        pieces, states = [], []
        for begin, end in pairwise((0, *rows, len(first))):
            states.append(state)
            piece = tree_map(lambda leaf: leaf[begin:end], obs)  # noqa: B023
            output, state = model(piece, first[begin:end], state)
            pieces.append(output)
        outputs = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
        states = [without_frames(state) for state in states[1:]]
    return outputs, tree_map(lambda *parts: torch.stack(parts), *states)


def without_frames(state: Tree) -> Tree:
    """A state without the frames of a stack."""
    if not isinstance(state, dict):
        return state
    return {name: part for name, part in state.items() if name != "frames"}


def preparation(model: nn.Module, device: torch.device) -> Callable | None:
    """`model.prepare`, where there is one and it is worth it: a GPU does the same in passing."""
    return getattr(model, "prepare", None) if device.type == "cpu" else None
