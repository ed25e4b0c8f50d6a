"""Lanes x rows of tensors in which the newest row overwrites the oldest.

Rows are counted from the start of each lane and never wrap in the arithmetic of others; only this
file knows the circle.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from asyncrl.transfer import staged
from asyncrl.types import Field


class Circle:
    """How row r of a lane lies in columns of shape (lanes * rows, num_envs, ...)."""

    def __init__(self, num_lanes: int, rows: int, num_envs: int, device: torch.device):
        self.num_lanes, self.rows, self.num_envs, self.device = num_lanes, rows, num_envs, device

    def column(self, field: Field) -> Tensor:
        """A column of zeros."""
        shape = (self.num_lanes * self.rows, self.num_envs, *field.shape)
        if self.device.type == "cpu":
            return torch.from_numpy(np.zeros(shape, field.dtype))  # pages come when written
        return torch.zeros(shape, dtype=getattr(torch, field.dtype), device=self.device)

    def flat(self, lane: Any, row: Tensor) -> Tensor:
        """Index into a column's first axis."""
        return lane * self.rows + row % self.rows

    def pieces(self, lane: int, begin: int, end: int) -> list[slice]:
        """The one or two runs of a column that rows [begin, end) of a lane are."""
        base, size = lane * self.rows, self.rows
        start, count = begin % size, end - begin
        head = min(count, size - start)
        pieces = [slice(base + start, base + start + head)]
        return pieces if head == count else [*pieces, slice(base, base + count - head)]

    def at(self, column: Tensor, lane: int, row: int) -> Tensor:
        """A view of one row."""
        return column[lane * self.rows + row % self.rows]

    def read(self, column: Tensor, lane: int, begin: int, end: int) -> Tensor:
        """A copy of rows [begin, end)."""
        return torch.cat([column[piece] for piece in self.pieces(lane, begin, end)])

    def write(self, column: Tensor, lane: int, begin: int, new: np.ndarray | Tensor) -> None:
        """Rows from `begin` on; `new` (count, num_envs, ...) may lie on another device."""
        new = staged(new, self.device)
        done = 0
        for piece in self.pieces(lane, begin, begin + len(new)):
            count = piece.stop - piece.start
            column[piece].copy_(new[done : done + count], non_blocking=True)
            done += count
