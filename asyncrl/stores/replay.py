"""Replay: lanes x rows, single frames, stacks and n-step windows gathered at sampling.

Each lane is a circle of R rows of B environments. An unroll writes T+1 rows; its row T is only an
observation to bootstrap from, and the next unroll overwrites it with row 0 of its own, which is the
same moment. Where the next unroll does not follow on (an actor was replaced, an unroll is missing)
there is a *seam*: row T stays, row T-1 is cut like a truncation, and the frames of the new unroll's
state go in before its row 0 as context rows. Context rows and row T are not valid: never drawn.

Rows are counted from the start of the lane and never wrap in the arithmetic; only `Circle` knows.
Everything lies in tensors on one device, so that sampling needs no data from elsewhere. What can be
drawn are *entries*: rows, or, of sequences, rows before which a recurrent state is stored.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from asyncrl.stores.circle import Circle
from asyncrl.stores.limiter import COUNTERS, RateLimiter
from asyncrl.stores.replay_config import ReplayConfig, replay_nbytes, rows_per_lane
from asyncrl.stores.selection import Index, Selection
from asyncrl.stores.sequences import Sequence, SequenceShape, States
from asyncrl.types import Field, Spec, Tree, Unroll, tree_map

__all__ = ["Replay", "ReplayConfig", "Sample", "Sequence"]


class Sample(NamedTuple):
    """N transitions of up to n steps; `obs` and `next_obs` come with what a model needs beside."""

    obs: Tree  # (1, N, *obs)
    first: Tensor  # (1, N)
    state: dict  # {"frames": (N, k-1, *frame)} where frames are stacked
    action: Tensor  # (N, *action)
    reward: Tensor  # (n, N): zero behind an end
    steps: Tensor  # (N,) how many of the n steps count
    terminated: Tensor  # (N,) whether they end in a terminal state
    next_obs: Tree  # (1, N, *obs) after those steps
    next_first: Tensor  # (1, N)
    next_state: dict
    weight: Tensor  # (N,) of importance; 0 for the rare draw that found no drawable row
    index: Index | tuple = ()


@dataclass
class Lane:
    """Where one lane stands; rows are absolute."""

    end: int = 0  # one past the newest row, which is the provisional row T
    expired: int = 0  # rows before it are too old to be drawn
    follows: tuple[int, int] | None = None  # (generation, sequence) that would join on
    restored: bool = False  # from a checkpoint, and nothing inserted since


class Replay:
    """The last `capacity` env steps of all lanes, drawn uniformly or by priority, one by one or,
    with a `sequence_length`, in sequences."""

    streams = True  # checkpoints keep its unrolls in segment files
    nbytes = staticmethod(replay_nbytes)

    def __init__(
        self,
        spec: Spec,
        num_lanes: int,
        capacity: int,
        batch_size: int,
        limiter: RateLimiter,
        frame_stack: int = 1,
        n_step: int = 1,
        device: torch.device | str = "cpu",
        seed: int = 0,
        priority_exponent: float = 0.0,
        importance_exponent: Any = 0.4,
        sequence_length: int = 0,
        burn_in: int = 0,
        loss_on: str = "all",
        state_dtype: str = "float16",
    ):
        self.spec, self.num_lanes, self.capacity = spec, num_lanes, capacity
        self.batch_size, self.frame_stack, self.n_step = batch_size, frame_stack, n_step
        self.limiter, self.seed = limiter, seed
        self.device = torch.device(device)
        shape = SequenceShape(sequence_length, burn_in, n_step, loss_on == "last", state_dtype)
        self.window = shape.window if sequence_length else n_step  # rows a draw looks ahead
        self.period = spec.unroll_length // spec.num_states if sequence_length else 1
        self.rows = rows_per_lane(spec, num_lanes, capacity, frame_stack, self.window, self.period)
        self.lanes = [Lane() for _ in range(num_lanes)]
        self.unrolls: deque[tuple[int, int, int]] = deque()  # (lane, row 0, inserted before)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.circle = Circle(num_lanes, self.rows, spec.num_envs, self.device)
        entries = Circle(num_lanes, self.rows // self.period, spec.num_envs, self.device)
        self.selection = Selection(entries, self.generator, priority_exponent, importance_exponent)
        self.states = States(shape, spec, self.circle, entries) if sequence_length else None

        column, flag = self.circle.column, Field((), "bool")
        self.obs = tree_map(column, spec.obs)
        self.action = column(spec.action)
        self.reward = column(Field((), "float32"))
        self.first, self.terminated, self.truncated, self.valid = (column(flag) for _ in range(4))

    # -- inserting -------------------------------------------------------------------------------

    def insert(self, lane_index: int, unroll: Unroll) -> int:
        """Take in one unroll (numpy views, copied); returns its valid env steps."""
        lane, T, context = self.lanes[lane_index], self.spec.unroll_length, self.frame_stack - 1
        identity = (int(unroll.header.generation), int(unroll.header.sequence))
        old_end = lane.end
        if identity == lane.follows and not lane.restored:
            begin, opened = lane.end - 1, lane.end
        else:
            if identity == lane.follows:  # joins on to rows that a checkpoint did not keep:
                lane.end -= 1 + context  # its own state stands in for them, in the same place
            opened, begin = lane.end, self._open_seam(lane_index, unroll)
        lane.restored = False
        lane.follows = (identity[0], identity[1] + 1)
        lane.end = begin + T + 1

        write, circle = self.circle.write, self.circle
        tree_map(lambda column, new: write(column, lane_index, begin, new), self.obs, unroll.obs)
        write(self.first, lane_index, begin, unroll.first)
        for name in ("action", "reward", "terminated", "truncated", "valid"):
            column = getattr(self, name)
            write(column, lane_index, begin, getattr(unroll, name))
            circle.at(column, lane_index, begin + T).zero_()
        if self.states:
            self.states.insert(lane_index, opened, begin, lane.end, unroll.state)

        self._find_drawable(lane_index, max(min(old_end, begin) - self.window, 0), begin)
        num_valid = int(unroll.valid.sum())
        self.unrolls.append((lane_index, begin, self.limiter.inserted))
        self.limiter.inserted += num_valid
        self._forget_old()
        return num_valid

    def _open_seam(self, lane_index: int, unroll: Unroll) -> int:
        """Cut the lane at its end and lay down context rows; returns the row for row 0."""
        lane, context = self.lanes[lane_index], self.frame_stack - 1
        if lane.end >= 2:
            ended = self.circle.at(self.terminated, lane_index, lane.end - 2)
            self.circle.at(self.truncated, lane_index, lane.end - 2).copy_(~ended)
            # The row behind a cut must not be drawn with a stack that runs across it.
        begin = -(-(lane.end + context) // self.period) * self.period
        flags = np.zeros((begin - lane.end, self.spec.num_envs), bool)
        for column in (self.first, self.valid):
            self.circle.write(column, lane_index, lane.end, flags)
        if context:
            rows = unroll.state["frames"][0].swapaxes(0, 1)  # (k-1, B, *frame)
            self.circle.write(self.obs, lane_index, begin - context, rows)
        return begin

    def _entry(self, row: int) -> int:
        """The first entry at or behind a row."""
        return -(-row // self.period)

    def _find_drawable(self, lane_index: int, begin: int, new: int) -> None:
        """Say what is drawable from row `begin` on, and what no longer is where the circle has
        overwritten part of a stack; rows from `new` on have just come in."""
        lane, select = self.lanes[lane_index], self.selection
        oldest = max(lane.end - self.rows, 0)
        first, begin = self._entry(oldest), self._entry(max(begin, oldest, lane.expired))
        fresh = self._is_drawable(lane_index, begin, self._entry(lane.end))
        select.write(lane_index, begin, fresh, self._entry(new))
        bitten_end = min(self._entry(oldest + self.frame_stack - 1), begin)
        if first < bitten_end:
            still = self._is_drawable(lane_index, first, bitten_end)
            still &= select.circle.read(select.drawable, lane_index, first, bitten_end)
            select.write(lane_index, first, still, bitten_end)

    def _is_drawable(self, lane_index: int, begin: int, end: int) -> Tensor:
        """(end - begin, B): entries with their whole stacks and whole windows in the live rows."""
        lane = self.lanes[lane_index]
        last, oldest = lane.end - 1, max(lane.end - self.rows, 0)
        env = torch.arange(self.spec.num_envs, device=self.device)
        row = torch.arange(begin, end, device=self.device).unsqueeze(1) * self.period
        row = row.expand(-1, len(env))
        if self.states:
            good = self.states.is_drawable(self.valid, lane_index, begin, end, last)
        else:
            complete = row + self.n_step <= last
            for step in range(self.n_step):
                later = row + step
                at = self.circle.flat(lane_index, later)
                ends = self.terminated[at, env] | self.truncated[at, env]
                complete = complete | (ends & (later < last))
            good = self.valid[self.circle.flat(lane_index, row), env] & complete
        return good & (self._stack(lane_index, row, env)[0] >= oldest)

    def _forget_old(self) -> None:
        """Draw nothing older than `capacity` env steps, not even from a lane that stands still."""
        T = self.spec.unroll_length
        while self.unrolls:
            lane_index, begin, inserted_before = self.unrolls[0]
            lane = self.lanes[lane_index]
            oldest = lane.end - self.rows
            expired = self.limiter.inserted - inserted_before > self.capacity
            if not expired and begin + T > oldest:
                return
            lane.expired = begin + T
            if begin + T > oldest:
                self.selection.clear(
                    lane_index, self._entry(max(begin, oldest)), self._entry(begin + T)
                )
            self.unrolls.popleft()

    # -- sampling --------------------------------------------------------------------------------

    def _ends(self) -> list[int]:
        """One past the newest entry of each lane."""
        return [self._entry(lane.end) for lane in self.lanes]

    def sample(self) -> Sample:
        """`batch_size` of the drawable transitions, with replacement."""
        return self._gather(*self._draw())

    def sample_sequences(self) -> Sequence:
        """`batch_size` of the drawable sequences, with replacement."""
        return self.states.gather(self, *self._draw())

    def _draw(self) -> tuple[Index, Tensor]:
        begins = [self._entry(lane.expired) for lane in self.lanes]
        drawn = self.selection.draw(self.batch_size, begins, self._ends(), self.limiter.inserted)
        self.limiter.sampled += self.limiter.batch_size
        return drawn

    def update_priorities(self, index: Index, td_error: Tensor) -> None:
        """Draw what was drawn as `index` by td_error (N,) from now on. Skipped: what has been
        overwritten or expired since, and errors that are not finite."""
        self.selection.update(index, td_error, self._ends())

    @property
    def refresh_rows(self) -> tuple[int, ...]:
        """The rows of a sequence, 1 to T, before which `write_states` stores states."""
        return self.states.refresh_rows

    def write_states(self, index: Index, state: Tree) -> None:
        """Replace the states before `refresh_rows` of the sequences drawn as `index` by state
        (len(refresh_rows), N, *state). Skipped: what has been overwritten since, or lies behind a
        seam, and states that are not finite."""
        live = self.selection.is_live(index, self._ends())
        self.states.write(index, state, live)

    def _gather(self, index: Index, weight: Tensor) -> Sample:
        """Read the drawn rows, their windows and both stacks."""
        lane, row, env = index
        window = torch.arange(self.n_step, device=self.device).unsqueeze(1)
        at = self.circle.flat(lane, row + window), env.expand(self.n_step, -1)
        terminated = self.terminated[at]
        ends = terminated | self.truncated[at]
        running = ends.cumsum(0) == ends  # no step before it has ended
        steps = running.sum(0)
        rewards = torch.where(running, self.reward[at], 0.0)
        terminated = (terminated & running).any(0)
        obs, first, state = self.observe(lane, row, env)
        next_obs, next_first, next_state = self.observe(lane, row + steps, env)
        return Sample(
            obs, first, state, self.action[at[0][0], env], rewards, steps, terminated,
            next_obs, next_first, next_state, weight, index,
        )  # fmt: skip

    def _stack(self, lane: Any, row: Tensor, env: Tensor) -> Tensor:
        """The rows (k, *row) of the k frames that a model sees at a row, oldest first."""
        back = torch.arange(self.frame_stack - 1, device=self.device)
        before = row - back.view(-1, *[1] * row.ndim)
        goes_on = ~self.first[self.circle.flat(lane, before), env]
        steps = goes_on.long().cumprod(0).cumsum(0)  # back to each, none past where one opens
        return torch.cat([(row - steps).flip(0), row.unsqueeze(0)])

    def observe(self, lane: Tensor, row: Tensor, env: Tensor) -> tuple[Tree, Tensor, dict]:
        """The observation at a row as a model wants it: (1, N, ...), first, the frames before."""
        at = self.circle.flat(lane, row)
        first = self.first[at, env].unsqueeze(0)
        if self.frame_stack == 1:
            return tree_map(lambda column: column[at, env].unsqueeze(0), self.obs), first, {}
        at = self.circle.flat(lane, self._stack(lane, row, env)).T  # (N, k), oldest first
        # One look-up for the whole stack; index_select over (row, env) pairs is the fast path.
        frames = self.obs.flatten(0, 1)
        stack = frames.index_select(0, (at * self.spec.num_envs + env.unsqueeze(1)).flatten())
        stack = stack.unflatten(0, at.shape)
        return stack[:, -1].unsqueeze(0), first, {"frames": stack[:, :-1]}

    # -- the limiter and the checkpoint ----------------------------------------------------------

    def updates_allowed(self) -> int:
        """Updates that may run now."""
        return self.limiter.updates_allowed()

    def insert_limit(self) -> float:
        """Env steps that actors may have started in all."""
        return self.limiter.insert_limit()

    def expire(self, version: int) -> None:
        """Nothing to do: a replay forgets by age in env steps, not by version."""

    def metrics(self) -> dict[str, float]:
        """For a row of metrics: the share of the capacity in use."""
        inserted = self.limiter.inserted
        oldest = self.unrolls[0][2] if self.unrolls else inserted  # env steps before it
        return {"replay/fill": min((inserted - oldest) / self.capacity, 1.0)}

    def position(self) -> dict:
        """What `restart_at` needs so that the unrolls inserted from here on rebuild the rows."""
        return {
            "inserted": self.limiter.inserted,
            "lanes": [[lane.end, *(lane.follows or (-1, -1))] for lane in self.lanes],
        }

    def restart_at(self, position: dict) -> None:
        """Empty the replay, to be rebuilt by inserting the unrolls since a `position()`."""
        self.selection.forget()
        self.valid.zero_()
        self.unrolls.clear()
        self.limiter.inserted = position["inserted"]
        for lane, (end, generation, sequence) in zip(self.lanes, position["lanes"], strict=True):
            # What came before it had expired, or is lost.
            lane.end, lane.expired, lane.restored = end, max(end - 1, 0), end > 0
            lane.follows = (generation, sequence) if end else None

    def state_dict(self) -> dict:
        """What is not rebuilt from the unrolls."""
        return {name: getattr(self.limiter, name) for name in COUNTERS} | {
            "generator": self.generator.get_state(),
            "selection": self.selection.state_dict(),
            "states": self.states.state_dict() if self.states else {},
        }

    def load_state_dict(self, state: dict) -> None:
        """Call it when the unrolls are in; if most are lost, `learning_starts` come in first."""
        limiter = self.limiter
        for name in COUNTERS:  # older checkpoints lack the last
            setattr(limiter, name, state.get(name, state["starts_at"]))
        generator = state["generator"]
        if generator.numel() == self.generator.get_state().numel():
            self.generator.set_state(generator)
        else:  # saved on another kind of device
            self.generator.manual_seed(self.seed + limiter.inserted)
        self.selection.load_state_dict(state.get("selection", {}))
        if self.states:
            self.states.load_state_dict(state.get("states", {}))
        held = limiter.inserted - (self.unrolls[0][2] if self.unrolls else limiter.inserted)
        due = max(0, limiter.counts_from - limiter.inserted)  # it was being filled
        if held < min(limiter.learning_starts - due, self.capacity // 2):
            limiter.refill()
