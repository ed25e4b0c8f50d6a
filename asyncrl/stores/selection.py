"""Which entries of the replay may be drawn, and how: uniformly or in proportion to priority.

An entry is a row of a lane (single transitions) or a row before which a recurrent state is stored
(sequences), once for each environment. Entries are counted from the start of their lane.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from asyncrl.schedules import value_at
from asyncrl.stores.circle import Circle
from asyncrl.stores.sum_tree import SumTree
from asyncrl.types import Field

LEAST_ERROR = 1e-6  # added to every TD error, so that nothing drawable is never drawn again


class Index(NamedTuple):
    """Where drawn entries lie, for write-backs; it stays on the replay's device."""

    lane: Tensor  # (N,) int64
    number: Tensor  # (N,) int64 in its lane, never used twice
    env: Tensor  # (N,) int64


class Selection:
    """The drawable entries and, where `priority_exponent` is not 0, their priorities.

    An entry's priority is (|TD error| + LEAST_ERROR) ** priority_exponent, the largest so far as
    long as it was not learned from, and 0 where it may not be drawn (Schaul et al. 2016).
    """

    def __init__(
        self,
        circle: Circle,
        generator: torch.Generator,
        priority_exponent: float,
        importance_exponent: Any,
    ):
        self.circle, self.generator = circle, generator
        self.priority_exponent, self.importance_exponent = priority_exponent, importance_exponent
        self.drawable = circle.column(Field((), "bool"))
        self.largest = torch.ones((), device=circle.device)
        self.tree = None
        if priority_exponent:
            self.tree = SumTree(self.drawable.numel(), circle.device)
            self.priority = self.tree.leaves.view_as(self.drawable)

    @staticmethod
    def nbytes(num_entries: int, priority_exponent: float) -> int:
        """Memory for entries of single environments, in bytes."""
        return num_entries + (SumTree.nbytes(num_entries) if priority_exponent else 0)

    def write(self, lane: int, begin: int, drawable: Tensor, new: int) -> None:
        """Which entries from `begin` on, drawable (count, num_envs), may be drawn from now on.

        Those from number `new` on have come in; earlier ones keep the priority they have.
        """
        end = begin + len(drawable)
        if self.tree:
            before = self.circle.read(self.priority, lane, begin, end)
            number = torch.arange(begin, end, device=self.circle.device).unsqueeze(1)
            priority = torch.where((number < new) & (before > 0), before, self.largest)
            self._write_priority(lane, begin, priority.masked_fill_(~drawable, 0))
        self.circle.write(self.drawable, lane, begin, drawable)

    def clear(self, lane: int, begin: int, end: int) -> None:
        """Draw none of the entries [begin, end) again."""
        nothing = self.drawable.new_zeros((end - begin, self.circle.num_envs))
        self.write(lane, begin, nothing, end)

    def forget(self) -> None:
        """Draw nothing until something new comes in."""
        self.drawable.zero_()
        if self.tree:
            self.priority.zero_()
            self.tree.refresh(0, self.tree.size)

    def _write_priority(self, lane: int, begin: int, priority: Tensor) -> None:
        self.circle.write(self.priority, lane, begin, priority)
        for piece in self.circle.pieces(lane, begin, begin + len(priority)):
            width = self.circle.num_envs
            self.tree.refresh(piece.start * width, piece.stop * width)

    # -- draws -----------------------------------------------------------------------------------

    def draw(
        self, num: int, begins: list[int], ends: list[int], env_steps: int
    ) -> tuple[Index, Tensor]:
        """`num` entries, with replacement, and their weights (num,).

        begins, ends: the oldest entry of each lane that may still be drawable, as far as it has
        not been overwritten, and one past the newest. A weight is 1 for uniform draws; else the
        importance weight, divided by the batch's largest; 0 for a draw that found nothing.
        """
        index, priority = (
            self._draw_priority(num, ends) if self.tree else self._draw(num, begins, ends)
        )
        found = priority > 0
        if not self.tree:
            return index, found.float()
        exponent = value_at(self.importance_exponent, env_steps)
        least = torch.where(found, priority, torch.inf).min()
        return index, torch.where(found, (least / priority) ** exponent, 0.0)

    def _draw(self, num: int, begins: list[int], ends: list[int]) -> tuple[Index, Tensor]:
        """Uniform by rejection, without asking the device how many were rejected.

        Four times the batch and more are proposed among the live entries and the first drawable
        ones taken. Nearly all live ones are drawable; should too few be found, the rest is not.
        """
        B, device = self.circle.num_envs, self.circle.device
        rows = self.circle.rows
        oldest = [max(begin, end - rows) for begin, end in zip(begins, ends, strict=True)]
        live = [(end - old) * B for end, old in zip(ends, oldest, strict=True)]
        lane_ends = np.cumsum(live)
        proposals = torch.randint(
            int(lane_ends[-1]), (4 * num + 16,), generator=self.generator, device=device
        )
        opens, lane_ends, oldest = _sent([lane_ends - live, lane_ends, oldest], device)
        lane = torch.bucketize(proposals, lane_ends, right=True)
        within = proposals - opens[lane]
        number = oldest[lane] + within // B
        env = within % B
        good = self.drawable[self.circle.flat(lane, number), env]
        chosen = torch.argsort((~good).to(torch.uint8), stable=True)[:num]
        return Index(lane[chosen], number[chosen], env[chosen]), good[chosen]

    def _draw_priority(self, num: int, ends: list[int]) -> tuple[Index, Tensor]:
        """In proportion to priority, one from each num-th part of the sum."""
        place, priority = self.tree.sample(num, self.generator)
        row, env = place // self.circle.num_envs, place % self.circle.num_envs
        lane, place = row // self.circle.rows, row % self.circle.rows
        newest = _sent(ends, place.device)[lane] - 1
        return Index(lane, newest - (newest - place) % self.circle.rows, env), priority

    # -- write-backs -----------------------------------------------------------------------------

    def is_live(self, index: Index, ends: list[int]) -> Tensor:
        """(N,): whether what was drawn still is where it was."""
        oldest = _sent([end - self.circle.rows for end in ends], self.circle.device)
        return index.number >= oldest.index_select(0, index.lane)

    def update(self, index: Index, td_error: Tensor, ends: list[int]) -> None:
        """Set priorities by td_error (n,), which may lie on another device.

        Skipped: entries that are no longer there or not to be drawn, and errors not finite.
        Uniform draws have no use for it.
        """
        if not self.tree:
            return
        lane, number, env = index
        error = td_error.detach().to(self.circle.device, torch.float32)
        priority = (error.abs() + LEAST_ERROR) ** self.priority_exponent
        place = self.circle.flat(lane, number) * self.circle.num_envs + env
        good = self.drawable.view(-1).index_select(0, place) & self.is_live(index, ends)
        self.tree.set(place, torch.where(good, priority, -1.0))
        self.largest = torch.maximum(self.largest, self.tree.leaves.index_select(0, place).max())

    # -- the checkpoint --------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """What inserting does not rebuild."""
        return {"largest": self.largest, "priority": self.priority} if self.tree else {}

    def load_state_dict(self, state: dict) -> None:
        """Call it when the entries are in: those that may be drawn get their priorities back.

        Where the replay has another shape than the saved one, all keep the largest.
        """
        if self.tree and "priority" in state:
            self.largest = state["largest"].to(self.circle.device)
            saved = state["priority"].to(self.circle.device)
            same = saved.shape == self.priority.shape
            saved = torch.where(saved > 0, saved, self.largest) if same else self.largest
            self.priority.copy_(torch.where(self.drawable, saved, 0.0))
            self.tree.refresh(0, self.tree.size)


def _sent(numbers: Any, device: torch.device) -> Tensor:
    """A few integers on a device, without waiting for what it still has to do."""
    return torch.from_numpy(np.array(numbers, np.int64)).to(device, non_blocking=True)
