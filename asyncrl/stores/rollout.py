"""Rollouts: a first-in first-out queue of unrolls, each learned from once.

An update takes `num_unrolls` unrolls, the oldest first, side by side as one `Rollout`. Actors may
begin at most `ahead` rollouts more than the one being learned from, so the queue is bounded and so
is the lag of what comes out of it: back-pressure instead of growth.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from asyncrl.transfer import staged
from asyncrl.types import Spec, Tree, Unroll, tree_leaves, tree_map

MOST_PREPARED = 1 << 28


@dataclass(frozen=True)
class RolloutConfig:
    """What one on-policy update learns from, and how far acting may run ahead of it."""

    num_unrolls: int = 0
    """Unrolls in one update's rollout (0: as many as there are lanes)."""
    ahead: int = 1
    """Rollouts that actors may collect while the learner is busy with one; 0: they wait."""
    max_lag: int = 8
    """Unrolls acted by weights older than this many versions are dropped (0: none are)."""

    def __post_init__(self):
        if self.num_unrolls < 0 or self.ahead < 0 or self.max_lag < 0:
            raise ValueError(
                "expected rollout.num_unrolls, rollout.ahead and rollout.max_lag of at least 0, "
                f"got {self.num_unrolls}, {self.ahead} and {self.max_lag}"
            )
        if 0 < self.max_lag <= self.ahead:
            raise ValueError(
                f"expected rollout.max_lag above rollout.ahead={self.ahead}, got {self.max_lag}: "
                "actors that far ahead act with weights that old, and all they do would be "
                "dropped; raise max_lag or lower ahead"
            )


class Rollout(NamedTuple):
    """T steps of N environments, time-major: what one on-policy update learns from."""

    obs: Tree  # (T+1, N, *obs)
    first: Tensor  # (T+1, N) bool
    action: Tensor  # (T, N, *action)
    log_prob: Tensor  # (T, N) of the behaviour that acted
    reward: Tensor  # (T, N) unclipped
    terminated: Tensor  # (T, N) bool
    truncated: Tensor  # (T, N) bool
    valid: Tensor  # (T, N) bool
    state: Tree  # (N, *state) before row 0
    value: Any = ()  # (T+1, N) of obs, by whoever acted; () where the spec has none


class RolloutLimiter:
    """Counts what came in and what was learned from; the queue's bound is the rate limit."""

    filling = False  # one rollout is enough

    def __init__(self, uses: int, rounds_ahead: int):
        self.samples_per_insert = float(uses)  # epochs: how often each transition is learned from
        self.rounds_ahead = rounds_ahead  # unrolls of each lane begun and not yet inserted
        self.inserted = 0  # env steps
        self.sampled = 0  # transitions, once for each use

    def actual(self) -> float:
        """Samples per insert so far, nan before anything came in."""
        return self.sampled / self.inserted if self.inserted else float("nan")


class RolloutQueue:
    """The on-policy store: `insert` unrolls, `sample` rollouts."""

    streams = False  # a checkpoint holds the queue itself
    device = torch.device("cpu")  # what is learned from goes to the learner's device when drawn

    def __init__(self, config: RolloutConfig, spec: Spec, num_lanes: int, epochs: int = 1):
        self.config, self.spec = config, spec
        self.num_unrolls = config.num_unrolls or num_lanes
        self.capacity = (1 + config.ahead) * self.num_unrolls  # unrolls
        rounds = -(-self.capacity // num_lanes)
        self.limiter = RolloutLimiter(epochs, rounds)
        self.unrolls: deque[Unroll] = deque()
        self.dropped = 0  # unrolls
        self.lags: list[int] = []  # of the unrolls in the newest rollout, in versions
        self.version = 0
        self.drawn = 0  # env steps in the newest rollout

    @classmethod
    def nbytes(cls, config: RolloutConfig, spec: Spec, num_lanes: int) -> int:
        """Memory at most: the queue, the rollout made of it and one copy on its way. ValueError
        where most of what is acted would be too old."""
        num_unrolls = config.num_unrolls or num_lanes
        queue = max((1 + config.ahead) * num_unrolls, num_lanes)  # all lanes play a round at once
        rollouts = -(-queue // num_unrolls)
        if 0 < config.max_lag < rollouts:
            raise ValueError(
                f"expected rollout.max_lag of at least {rollouts}, got {config.max_lag}: up to "
                f"{queue} unrolls of {num_lanes} lanes wait, {num_unrolls} for each update, so the "
                "last are learned from that many versions late and would be dropped; raise "
                "max_lag or num_unrolls"
            )
        return (queue + 2 * num_unrolls) * spec.layout.nbytes

    # -- inserting -------------------------------------------------------------------------------

    def insert(self, lane_index: int, unroll: Unroll) -> int:
        """Take in one unroll (numpy views, copied); returns its valid env steps."""
        self.unrolls.append(tree_map(np.array, unroll))
        num_valid = int(unroll.valid.sum())
        self.limiter.inserted += num_valid
        return num_valid

    def expire(self, version: int) -> None:
        """Drop unrolls that weights older than `version - max_lag` acted; say what is newest."""
        self.version, oldest = version, version - self.config.max_lag
        if self.config.max_lag:
            kept = [unroll for unroll in self.unrolls if unroll.header.version >= oldest]
            self.dropped += len(self.unrolls) - len(kept)
            self.unrolls = deque(kept)

    def updates_allowed(self) -> int:
        """Rollouts that lie ready."""
        return len(self.unrolls) // self.num_unrolls

    def insert_limit(self) -> float:
        """Env steps that may have been started in all, were all of them valid."""
        room = self.capacity - len(self.unrolls)
        return self.limiter.inserted + room * self.spec.unroll_length * self.spec.num_envs

    # -- sampling --------------------------------------------------------------------------------

    def sample(self, device: torch.device) -> Rollout:
        """The oldest `num_unrolls` unrolls side by side, on `device`; they leave the queue."""
        unrolls = [self.unrolls.popleft() for _ in range(self.num_unrolls)]
        self.lags = [self.version - int(unroll.header.version) for unroll in unrolls]

        def side_by_side(*parts: np.ndarray) -> Tensor:
            joined = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
            return staged(joined, device).to(device, non_blocking=True)

        columns = {name: tree_map(side_by_side, *(getattr(unroll, name) for unroll in unrolls))
                   for name in Rollout._fields if name != "state"}  # fmt: skip
        first_states = (tree_map(lambda states: states[:1], unroll.state) for unroll in unrolls)
        state = tree_map(side_by_side, *first_states)
        rollout = Rollout(**columns, state=tree_map(lambda states: states[0], state))
        self.drawn = sum(int(unroll.valid.sum()) for unroll in unrolls)
        return rollout

    def used(self, times: float) -> None:
        """Count how often each step of the rollout drawn last was learned from."""
        self.limiter.sampled += round(times * self.drawn)

    # -- reports and the checkpoint --------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """For a row of metrics."""
        row = {"rollout/fill": len(self.unrolls) / self.capacity, "rollout/dropped": self.dropped}
        if self.lags:
            row["rollout/lag"] = float(np.mean(self.lags))
        return row

    def position(self) -> dict:
        """The counterpart of a replay's; there is nothing to rebuild."""
        return {}

    def restart_at(self, position: dict) -> None:
        """Empty the queue."""
        self.unrolls.clear()

    def state_dict(self) -> dict:
        """Counters and the queue itself."""
        unrolls = {}
        for index, unroll in enumerate(self.unrolls):
            leaves = enumerate(tree_leaves(unroll))
            unrolls[str(index)] = {str(i): torch.from_numpy(leaf) for i, leaf in leaves}
        limiter = self.limiter
        counters = {"inserted": limiter.inserted, "sampled": limiter.sampled}
        return counters | {"dropped": self.dropped, "unrolls": unrolls}

    def load_state_dict(self, state: dict) -> None:
        limiter = self.limiter
        limiter.inserted, limiter.sampled = state["inserted"], state["sampled"]
        self.dropped = state["dropped"]
        self.unrolls.clear()
        saved = state.get("unrolls", {})  # an empty queue leaves no trace in a checkpoint
        fields = self.spec.layout.fields
        for unroll in (saved[str(index)] for index in range(len(saved))):
            if len(unroll) != len(tree_leaves(fields)):
                self.dropped += 1  # it has no values, and now they are asked for, or it has some
                continue
            leaves = iter(unroll[str(i)].numpy() for i in range(len(unroll)))
            self.unrolls.append(tree_map(lambda _: next(leaves), fields))  # noqa: B023


# -- minibatches -----------------------------------------------------------------------------------


class Steps:
    """Every step of a rollout as a sample of its own, for models whose memory is at most a stack.

    `steps[index]` with flat indices t * N + b gives (obs (1, n, ...), first (1, n), state).
    """

    ready: tuple[Tree, Tree] | None = None  # (obs, state) of all of them, once they are prepared

    def __init__(self, rollout: Rollout, frame_stack: int):
        T, N = rollout.action.shape[:2]
        self.first = rollout.first[:T].flatten()
        self.frames = frame_stack
        if frame_stack == 1:
            self.obs = tree_map(lambda leaf: leaf[:T].flatten(0, 1), rollout.obs)
            return
        # Rows of (k-1+T, N) single frames; each step names the k rows of its stack.
        self.obs = torch.cat([rollout.state["frames"].transpose(0, 1), rollout.obs[:T]])
        self.obs = self.obs.flatten(0, 1)
        before = frame_stack - 1
        row = torch.arange(before, before + T, device=self.obs.device).unsqueeze(1).expand(T, N)
        opened = torch.where(rollout.first[:T], row, 0).cummax(0).values
        back = torch.arange(before, -1, -1, device=row.device)
        rows = torch.maximum(row.unsqueeze(2) - back, opened.unsqueeze(2))
        env = torch.arange(N, device=row.device).view(1, N, 1)
        self.rows = (rows * N + env).flatten(0, 1)  # (T * N, k)

    def prepare(self, prepare: Callable[[Tree, Tensor, Tree], tuple[Tree, Tree]]) -> None:
        """Have a model prepare all steps at once instead of each minibatch in each epoch, unless
        that takes more than `MOST_PREPARED` bytes."""
        if self.frames * sum(leaf.nbytes for leaf in tree_leaves(self.obs)) <= MOST_PREPARED:
            self.ready = prepare(*self[torch.arange(len(self.first))])

    def __getitem__(self, index: Tensor) -> tuple[Tree, Tensor, dict]:
        first = self.first[index].unsqueeze(0)
        if self.ready:
            obs, state = self.ready
            obs = tree_map(lambda leaf: leaf.index_select(1, index), obs)
            return obs, first, tree_map(lambda leaf: leaf[index], state)
        if self.frames == 1:
            return tree_map(lambda leaf: leaf[index].unsqueeze(0), self.obs), first, {}
        stack = self.obs.index_select(0, self.rows[index].flatten())
        stack = stack.unflatten(0, (len(index), self.frames))
        return stack[:, -1].unsqueeze(0), first, {"frames": stack[:, :-1]}


class Sequences:
    """Every environment of a rollout as one sequence, for any model: `sequences[envs]`."""

    def __init__(self, rollout: Rollout):
        T = len(rollout.action)
        self.obs = tree_map(lambda leaf: leaf[:T], rollout.obs)
        self.first, self.state = rollout.first[:T], rollout.state

    def __getitem__(self, envs: Tensor) -> tuple[Tree, Tensor, Tree]:
        obs = tree_map(lambda leaf: leaf[:, envs], self.obs)
        return obs, self.first[:, envs], tree_map(lambda leaf: leaf[envs], self.state)
