"""Sequences from the replay: rows in order, beginning where a recurrent state is stored.

S states are stored of each unroll, before rows 0, T/S, 2T/S ..., so entry e of a lane is its row
e * period with period = T/S: the replay begins every unroll at a multiple of it. States are kept in
half precision and are refreshed by whoever learns (Kapturowski et al. 2019: a stored state, and
burn-in, against what became untrue of it since).

A sequence ends at a seam: behind it nothing is valid. Inside, ends of episodes are data; `first`
tells the model to forget.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from asyncrl.stores.circle import Circle
from asyncrl.stores.selection import Index
from asyncrl.types import Field, Spec, Tree, tree_leaves, tree_map


class Sequence(NamedTuple):
    """T steps of N environments, time-major: burn-in, rows to learn from and their windows."""

    obs: Tree  # (T+1, N, *obs): single frames
    first: Tensor  # (T+1, N) bool
    state: Tree  # (N, *state) before row 0: what was stored, and {"frames": (N, k-1, *frame)}
    action: Tensor  # (T, N, *action)
    reward: Tensor  # (T, N)
    terminated: Tensor  # (T, N) bool
    truncated: Tensor  # (T, N) bool: also where a seam cuts
    valid: Tensor  # (T, N) bool: False on reset steps, and from a seam on, where one row repeats
    learn: Tensor  # (T, N) bool: the rows of the loss
    weight: Tensor  # (N,) 0 for the rare draw that found no drawable sequence
    index: Index


class SequenceShape(NamedTuple):
    """How long sequences are and what is learned of them."""

    length: int  # rows learned from
    burn_in: int  # rows before them
    n_step: int
    last: bool = False  # learn from the last of them alone
    state_dtype: str = "float16"  # of stored floating-point states

    @property
    def window(self) -> int:
        """T, rows read: every learned row has its whole n-step window."""
        return self.burn_in + self.length + self.n_step - 1

    @property
    def learned(self) -> slice:
        end = self.burn_in + self.length
        return slice(end - 1 if self.last else self.burn_in, end)

    def stored(self, spec: Spec) -> Tree:
        """Fields of the states kept: what a spec's state has beside stacked frames."""

        def field(leaf: Field) -> Field:
            real = leaf.dtype.startswith("float") and self.state_dtype == "float16"
            return Field(leaf.shape, "float16") if real else leaf

        return tree_map(field, memory_of(spec.state))


def memory_of(state: Tree) -> Tree:
    """A model's state without the frames of a stack, which the replay finds among its rows."""
    if not isinstance(state, dict):
        return state
    return {name: part for name, part in state.items() if name != "frames"}


class States:
    """Recurrent states before the entries of a replay, and where its rows do not follow on."""

    def __init__(self, shape: SequenceShape, spec: Spec, rows: Circle, entries: Circle):
        self.shape, self.spec, self.rows, self.entries = shape, spec, rows, entries
        self.period = spec.unroll_length // spec.num_states
        # One cell more than there are entries: what must not be written goes there.
        num_cells = entries.num_lanes * entries.rows * entries.num_envs + 1
        self.cells = tree_map(
            lambda field: Circle(1, num_cells, 1, rows.device).column(field).squeeze(1),
            shape.stored(spec),
        )
        self.columns = tree_map(
            lambda cells: cells[:-1].unflatten(0, (-1, entries.num_envs)), self.cells
        )
        # (lanes * rows, 1): whether a row does not follow on from the one before it.
        self.seam = rows.column(Field((), "bool"))[:, :1].clone()
        self._offsets = torch.arange(shape.window + 1, device=rows.device).unsqueeze(1)
        self.refresh_rows = tuple(range(self.period, shape.window + 1, self.period))
        self.refreshed = False

    # -- inserting -------------------------------------------------------------------------------

    def insert(self, lane: int, opened: int, begin: int, end: int, state: Tree) -> None:
        """Take in an unroll whose rows are [begin, end); a seam lies at rows opened to begin, none
        where it follows on (opened = begin + 1)."""
        flags = torch.zeros((end - min(opened, begin), 1), dtype=torch.bool)
        flags[: begin + 1 - opened] = True
        self.rows.write(self.seam, lane, min(opened, begin), flags)

        def write(column: Tensor, new: Any) -> None:
            new = torch.as_tensor(new)
            if column.dtype == torch.float16:
                new = _half(new)
            self.entries.write(column, lane, begin // self.period, new)

        tree_map(write, self.columns, memory_of(state))

    def is_drawable(self, valid: Tensor, lane: int, begin: int, end: int, newest: int) -> Tensor:
        """(end - begin, num_envs): sequences from these entries on have a row to learn from, and
        all their rows, up to a seam, are in; `newest` is the lane's newest row."""
        entry = torch.arange(begin, end, device=self.rows.device).unsqueeze(1)
        row = entry * self.period + self._offsets.T
        at = self.rows.flat(lane, row)  # (entries, T+1)
        behind = self._behind(at.T).T
        there = row <= newest
        whole = there[:, -1] | (behind & there).any(1)
        learned = self.shape.learned
        learn = valid[at[:, learned]] & (there & ~behind)[:, learned].unsqueeze(2)
        return learn.any(1) & whole.unsqueeze(1)

    def _behind(self, at: Tensor) -> Tensor:
        """(T+1, N): whether a seam lies between row 0 and each row, at (T+1, N) in the columns."""
        seam = self.seam.view(-1)[at]
        seam[0] = False
        return seam.cumsum(0) > 0

    # -- sampling --------------------------------------------------------------------------------

    def gather(self, replay: Any, index: Index, weight: Tensor) -> Sequence:
        """Read the drawn sequences from a replay's columns."""
        lane, number, env = index
        begin, t = number * self.period, self._offsets
        behind = self._behind(self.rows.flat(lane, begin + t))
        t = torch.minimum(t, (~behind).sum(0) - 1)  # the row before a seam, not valid, is repeated
        at = self.rows.flat(lane, begin + t)
        flat = (at * self.rows.num_envs + env).flatten()  # whole rows by one index each are fast

        def rows(column: Tensor) -> Tensor:  # (T+1, N, ...)
            return column.flatten(0, 1).index_select(0, flat).unflatten(0, at.shape)

        valid = rows(replay.valid)[:-1]
        learn = torch.zeros_like(valid)
        learn[self.shape.learned] = valid[self.shape.learned]
        place = self.entries.flat(lane, number)
        state = tree_map(
            lambda column, field: column[place, env].to(getattr(torch, field.dtype)),
            self.columns, memory_of(self.spec.state),
        )  # fmt: skip
        frames = replay.observe(lane, begin, env)[2]
        return Sequence(
            tree_map(rows, replay.obs), rows(replay.first), state | frames if frames else state,
            rows(replay.action)[:-1], rows(replay.reward)[:-1], rows(replay.terminated)[:-1],
            rows(replay.truncated)[:-1], valid, learn, weight, index,
        )  # fmt: skip

    # -- write-backs -----------------------------------------------------------------------------

    def write(self, index: Index, state: Tree, live: Tensor) -> None:
        """Refresh stored states by `state` (rows, N, ...) before each of `refresh_rows` of drawn
        sequences; live (N,): those still there. Where a state is not finite or the sequence had
        ended, what is stored stays."""
        if not tree_leaves(self.cells):
            return
        self.refreshed = True
        lane, number, env = index
        behind = self._behind(self.rows.flat(lane, number * self.period + self._offsets))
        step = slice(self.period, None, self.period)
        good = live & ~behind[step]  # (rows, N)
        state = tree_map(lambda leaf: leaf.detach().to(env.device), memory_of(state))
        for leaf in tree_leaves(state):
            good = good & leaf.isfinite().reshape(*good.shape, -1).all(2)
        place = self.entries.flat(lane, number + self._offsets[step] // self.period)
        cell = place * self.entries.num_envs + env
        cell = torch.where(good, cell, len(tree_leaves(self.cells)[0]) - 1).flatten()
        # Two sequences may hold one entry: the later one's state, whoever writes it.
        ordered, order = cell.sort(stable=True)
        writer = order[torch.searchsorted(ordered, cell, right=True) - 1]

        def write(cells: Tensor, new: Tensor) -> None:
            new = _half(new) if cells.dtype == torch.float16 else new
            cells[cell] = new.flatten(0, 1)[writer].to(cells.dtype)

        tree_map(write, self.cells, state)

    # -- the checkpoint --------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """The states, if any was refreshed: else inserting rebuilds them."""
        if not self.refreshed:
            return {}
        return {str(i): column for i, column in enumerate(tree_leaves(self.columns))}

    def load_state_dict(self, state: dict) -> None:
        """Call it when the unrolls are in; a replay of another shape keeps what the actors sent."""
        columns = tree_leaves(self.columns)
        saved = [state.get(str(i)) for i in range(len(columns))]
        if all(s is not None and s.shape == c.shape for s, c in zip(saved, columns, strict=True)):
            self.refreshed = True
            for column, old in zip(columns, saved, strict=True):
                column.copy_(old)


def _half(state: Tensor) -> Tensor:
    """In half precision, which ends at 65,504."""
    largest = torch.finfo(torch.float16).max
    return state.clamp(-largest, largest).to(torch.float16)
