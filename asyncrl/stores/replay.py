"""Replay: lanes x rows, single frames, stacks and n-step windows gathered at sampling.

Each lane is a circle of R rows of B environments. An unroll writes T+1 rows; its row T is only an
observation to bootstrap from, and the next unroll overwrites it with row 0 of its own, which is the
same moment. Where the next unroll does not follow on (an actor was replaced, an unroll is missing)
there is a *seam*: row T stays, row T-1 is cut like a truncation, and the frames of the new unroll's
state go in before its row 0 as context rows. Context rows and row T are not valid: never drawn.

Rows are counted from the start of the lane and never wrap in the arithmetic; only `_at` knows the
circle. Everything lies in tensors on one device, so that sampling needs no data from elsewhere.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from asyncrl.stores.limiter import RateLimiter
from asyncrl.types import Field, Spec, Tree, Unroll, tree_leaves, tree_map


@dataclass(frozen=True)
class ReplayConfig:
    """How much is kept and how often it is learned from."""

    capacity: int = 1_000_000
    """Env steps kept."""
    samples_per_insert: float = 8.0
    """Transitions drawn an env step: batch_size / samples_per_insert env steps an update."""
    learning_starts: int = 20_000
    """Env steps before the first update."""
    tolerance: int = 0
    """Env steps that actors may run ahead of the ratio (0: twice the least possible)."""
    device: str = "auto"
    """"auto": on the GPU when it fits there, else in host memory; or a torch device."""


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
    weight: Tensor  # (N,) 0 for the rare draw that found no drawable row


@dataclass
class Lane:
    """Where one lane stands; rows are absolute."""

    end: int = 0  # one past the newest row, which is the provisional row T
    follows: tuple[int, int] | None = None  # (generation, sequence) that would join on
    restored: bool = False  # from a checkpoint, and nothing inserted since


class Replay:
    """Uniform replay of the last `capacity` env steps of all lanes."""

    streams = True  # checkpoints keep its unrolls in segment files

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
    ):
        self.spec, self.num_lanes, self.capacity = spec, num_lanes, capacity
        self.batch_size, self.frame_stack, self.n_step = batch_size, frame_stack, n_step
        self.limiter, self.seed = limiter, seed
        self.device = torch.device(device)
        self.nbytes(spec, num_lanes, capacity)  # refuses what cannot be
        self.rows = self.rows_per_lane(spec, num_lanes, capacity, frame_stack, n_step)
        self.lanes = [Lane() for _ in range(num_lanes)]
        self.unrolls: deque[tuple[int, int, int]] = deque()  # (lane, row 0, inserted before)
        self.generator = torch.Generator(self.device).manual_seed(seed)

        def column(field: Field) -> Tensor:
            shape = (num_lanes * self.rows, spec.num_envs, *field.shape)
            if self.device.type == "cpu":
                return torch.from_numpy(np.zeros(shape, field.dtype))  # pages come when written
            return torch.zeros(shape, dtype=getattr(torch, field.dtype), device=self.device)

        flag = Field((), "bool")
        self.obs = tree_map(column, spec.obs)
        self.action = column(spec.action)
        self.reward = column(Field((), "float32"))
        self.first, self.terminated, self.truncated, self.valid, self.drawable = (
            column(flag) for _ in range(5)
        )

    @staticmethod
    def rows_per_lane(
        spec: Spec, num_lanes: int, capacity: int, frame_stack: int, n_step: int
    ) -> int:
        """Rows of a lane: its share of the capacity, and room for row T, context and windows."""
        share = -(-capacity // (num_lanes * spec.num_envs))
        return share + spec.unroll_length + 1 + frame_stack + n_step

    @classmethod
    def nbytes(
        cls, spec: Spec, num_lanes: int, capacity: int, frame_stack: int = 1, n_step: int = 1
    ) -> int:
        """Memory the columns will take, for the preflight; ValueError for too small a capacity."""
        least = spec.unroll_length * spec.num_envs * num_lanes
        if capacity < least:
            raise ValueError(
                f"expected a replay capacity of at least one unroll of every lane, {least} env "
                f"steps, got {capacity}; raise the capacity or shorten the unrolls"
            )
        row = sum(field.nbytes for field in tree_leaves(spec.obs)) + spec.action.nbytes + 4 + 5
        rows = cls.rows_per_lane(spec, num_lanes, capacity, frame_stack, n_step)
        return num_lanes * rows * spec.num_envs * row

    # -- inserting -------------------------------------------------------------------------------

    def insert(self, lane_index: int, unroll: Unroll) -> int:
        """Take in one unroll (numpy views, copied); returns its valid env steps."""
        lane, T, context = self.lanes[lane_index], self.spec.unroll_length, self.frame_stack - 1
        identity = (int(unroll.header.generation), int(unroll.header.sequence))
        old_end = lane.end
        if identity == lane.follows and not lane.restored:
            begin = lane.end - 1
        else:
            if identity == lane.follows:  # joins on to rows that a checkpoint did not keep:
                lane.end -= 1 + context  # its own state stands in for them, in the same place
            begin = self._open_seam(lane_index, unroll)
        lane.restored = False
        lane.follows = (identity[0], identity[1] + 1)
        lane.end = begin + T + 1

        tree_map(
            lambda column, new: self._write(column, lane_index, begin, new), self.obs, unroll.obs
        )
        self._write(self.first, lane_index, begin, unroll.first)
        for column, new in (
            (self.action, unroll.action),
            (self.reward, unroll.reward),
            (self.terminated, unroll.terminated),
            (self.truncated, unroll.truncated),
            (self.valid, unroll.valid),
        ):
            self._write(column, lane_index, begin, new)
            self._at(column, lane_index, begin + T, begin + T + 1).zero_()

        self._find_drawable(lane_index, max(min(old_end, begin) - self.n_step, 0))
        num_valid = int(unroll.valid.sum())
        self.unrolls.append((lane_index, begin, self.limiter.inserted))
        self.limiter.inserted += num_valid
        self._forget_old()
        return num_valid

    def _open_seam(self, lane_index: int, unroll: Unroll) -> int:
        """Cut the lane at its end and lay down context rows; returns the row for row 0."""
        lane, context = self.lanes[lane_index], self.frame_stack - 1
        if lane.end >= 2:
            last = lane.end - 2
            ended = self._at(self.terminated, lane_index, last, last + 1)
            self._at(self.truncated, lane_index, last, last + 1).copy_(~ended)
            # The row behind a cut must not be drawn with a stack that runs across it.
        if context:
            rows = unroll.state["frames"][0].swapaxes(0, 1)  # (k-1, B, *frame)
            self._write(self.obs, lane_index, lane.end, rows)
            for column in (self.first, self.valid, self.drawable):
                flags = np.zeros((context, self.spec.num_envs), bool)
                self._write(column, lane_index, lane.end, flags)
        return lane.end + context

    def _find_drawable(self, lane_index: int, begin: int) -> None:
        """Set `drawable` from row `begin` on, and clear it where the circle bit into a stack."""
        lane = self.lanes[lane_index]
        oldest = max(lane.end - self.rows, 0)
        begin = max(begin, oldest)
        fresh = self._is_drawable(lane_index, begin, lane.end)
        self._write(self.drawable, lane_index, begin, fresh)
        bitten_end = min(oldest + self.frame_stack - 1, begin)
        if oldest < bitten_end:
            still = self._is_drawable(lane_index, oldest, bitten_end)
            still &= self._read(self.drawable, lane_index, oldest, bitten_end)
            self._write(self.drawable, lane_index, oldest, still)

    def _is_drawable(self, lane_index: int, begin: int, end: int) -> Tensor:
        """(end - begin, B): valid, with its whole stack and its whole window in the live rows."""
        lane = self.lanes[lane_index]
        last, oldest = lane.end - 1, max(lane.end - self.rows, 0)
        env = torch.arange(self.spec.num_envs, device=self.device)
        row = torch.arange(begin, end, device=self.device).unsqueeze(1).expand(-1, len(env))

        complete = row + self.n_step <= last
        for step in range(self.n_step):
            later = row + step
            at = self._flat(lane_index, later)
            ends = self.terminated[at, env] | self.truncated[at, env]
            complete = complete | (ends & (later < last))
        reach = row
        for _ in range(self.frame_stack - 1):
            reach = torch.where(self.first[self._flat(lane_index, reach), env], reach, reach - 1)
        return self.valid[self._flat(lane_index, row), env] & complete & (reach >= oldest)

    def _forget_old(self) -> None:
        """Draw nothing older than `capacity` env steps, not even from a lane that stands still."""
        T = self.spec.unroll_length
        while self.unrolls:
            lane_index, begin, inserted_before = self.unrolls[0]
            oldest = self.lanes[lane_index].end - self.rows
            expired = self.limiter.inserted - inserted_before > self.capacity
            if not expired and begin + T > oldest:
                return
            if begin + T > oldest:
                begin = max(begin, oldest)
                end = min(begin + T, self.lanes[lane_index].end)
                for piece in self._pieces(lane_index, begin, end):
                    self.drawable[piece] = False
            self.unrolls.popleft()

    # -- sampling --------------------------------------------------------------------------------

    def sample(self) -> Sample:
        """`batch_size` transitions, uniform over the drawable rows, with replacement."""
        lane, row, env, weight = self._draw()
        self.limiter.sampled += self.batch_size
        return self._gather(lane, row, env, weight)

    def _draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Uniform by rejection, without asking the device how many were rejected.

        Four times the batch and more are proposed among the live rows and the first drawable ones
        taken. Nearly all live rows are drawable; should too few be found, the rest has weight 0.
        """
        N, B = self.batch_size, self.spec.num_envs
        oldest = [max(lane.end - self.rows, 0) for lane in self.lanes]
        live = [(lane.end - old) * B for lane, old in zip(self.lanes, oldest, strict=True)]
        ends = np.cumsum(live)
        proposals = torch.randint(
            int(ends[-1]), (4 * N + 16,), generator=self.generator, device=self.device
        )
        ends = torch.as_tensor(ends, device=self.device)
        lane = torch.bucketize(proposals, ends, right=True)
        within = proposals - (ends[lane] - torch.as_tensor(live, device=self.device)[lane])
        row = torch.as_tensor(oldest, device=self.device)[lane] + within // B
        env = within % B
        good = self.drawable[self._flat(lane, row), env]
        chosen = torch.argsort((~good).to(torch.uint8), stable=True)[:N]
        return lane[chosen], row[chosen], env[chosen], good[chosen].float()

    def _gather(self, lane: Tensor, row: Tensor, env: Tensor, weight: Tensor) -> Sample:
        """Read the drawn rows, their windows and both stacks."""
        running = torch.ones_like(env, dtype=torch.bool)
        steps = torch.zeros_like(env)
        rewards, terminated = [], torch.zeros_like(running)
        for step in range(self.n_step):
            at = self._flat(lane, row + step)
            rewards.append(torch.where(running, self.reward[at, env], 0.0))
            steps = steps + running
            terminated = terminated | (running & self.terminated[at, env])
            running = running & ~(self.terminated[at, env] | self.truncated[at, env])
        obs, first, state = self._observe(lane, row, env)
        next_obs, next_first, next_state = self._observe(lane, row + steps, env)
        return Sample(
            obs, first, state, self.action[self._flat(lane, row), env], torch.stack(rewards), steps,
            terminated, next_obs, next_first, next_state, weight,
        )  # fmt: skip

    def _observe(self, lane: Tensor, row: Tensor, env: Tensor) -> tuple[Tree, Tensor, dict]:
        """The observation at a row as a model wants it: (1, N, ...), first, the frames before."""
        at = self._flat(lane, row)
        first = self.first[at, env].unsqueeze(0)
        if self.frame_stack == 1:
            return tree_map(lambda column: column[at, env].unsqueeze(0), self.obs), first, {}
        rows, reach = [at], row
        for _ in range(self.frame_stack - 1):
            reach = torch.where(self.first[self._flat(lane, reach), env], reach, reach - 1)
            rows.append(self._flat(lane, reach))
        at = torch.stack(rows[::-1], dim=1)  # (N, k), oldest first
        # One look-up for the whole stack; index_select over (row, env) pairs is the fast path.
        frames = self.obs.flatten(0, 1)
        stack = frames.index_select(0, (at * self.spec.num_envs + env.unsqueeze(1)).flatten())
        stack = stack.unflatten(0, at.shape)
        return stack[:, -1].unsqueeze(0), first, {"frames": stack[:, :-1]}

    # -- the circle ------------------------------------------------------------------------------

    def _flat(self, lane: Any, row: Tensor) -> Tensor:
        """Index into a column's first axis."""
        return lane * self.rows + row % self.rows

    def _pieces(self, lane_index: int, begin: int, end: int) -> list[slice]:
        """The one or two runs of a column that rows [begin, end) of a lane are."""
        base, size = lane_index * self.rows, self.rows
        start, count = begin % size, end - begin
        head = min(count, size - start)
        pieces = [slice(base + start, base + start + head)]
        return pieces if head == count else [*pieces, slice(base, base + count - head)]

    def _at(self, column: Tensor, lane_index: int, begin: int, end: int) -> Tensor:
        """A view of rows that do not wrap (a single row never does)."""
        (piece,) = self._pieces(lane_index, begin, end)
        return column[piece]

    def _read(self, column: Tensor, lane_index: int, begin: int, end: int) -> Tensor:
        return torch.cat([column[piece] for piece in self._pieces(lane_index, begin, end)])

    def _write(self, column: Tensor, lane_index: int, begin: int, new: np.ndarray | Tensor) -> None:
        new = torch.as_tensor(new)
        done = 0
        for piece in self._pieces(lane_index, begin, begin + len(new)):
            count = piece.stop - piece.start
            column[piece].copy_(new[done : done + count], non_blocking=True)
            done += count

    # -- the limiter and the checkpoint ----------------------------------------------------------

    def updates_allowed(self) -> int:
        """Updates that may run now."""
        return self.limiter.updates_allowed()

    def insert_limit(self) -> float:
        """Env steps that actors may have started in all."""
        return self.limiter.insert_limit()

    def expire(self, version: int) -> None:
        """What weights of any age acted is learned from; age in env steps decides."""

    def metrics(self) -> dict[str, float]:
        """For a row of metrics: the share of the capacity in use."""
        return {"replay/fill": min(self.limiter.inserted / self.capacity, 1.0)}

    def position(self) -> dict:
        """What `restart_at` needs so that the unrolls inserted from here on rebuild the rows."""
        return {
            "inserted": self.limiter.inserted,
            "lanes": [[lane.end, *(lane.follows or (-1, -1))] for lane in self.lanes],
        }

    def restart_at(self, position: dict) -> None:
        """Empty the replay, to be rebuilt by inserting the unrolls since a `position()`."""
        self.drawable.zero_()
        self.valid.zero_()
        self.unrolls.clear()
        self.limiter.inserted = position["inserted"]
        for lane, (end, generation, sequence) in zip(self.lanes, position["lanes"], strict=True):
            lane.end, lane.restored = end, end > 0
            lane.follows = (generation, sequence) if end else None

    def state_dict(self) -> dict:
        """What is not rebuilt from the unrolls."""
        limiter = self.limiter
        return {
            "inserted": limiter.inserted,
            "sampled": limiter.sampled,
            "starts_at": limiter.starts_at,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Call it when the unrolls are in; if most are lost, `learning_starts` come in first."""
        limiter = self.limiter
        limiter.inserted, limiter.sampled = state["inserted"], state["sampled"]
        limiter.starts_at = state["starts_at"]
        generator = state["generator"]
        if generator.numel() == self.generator.get_state().numel():
            self.generator.set_state(generator)
        else:  # saved on another kind of device
            self.generator.manual_seed(self.seed + limiter.inserted)
        held = limiter.inserted - (self.unrolls[0][2] if self.unrolls else limiter.inserted)
        if held < min(limiter.inserted, limiter.learning_starts, self.capacity // 2):
            limiter.refill()
