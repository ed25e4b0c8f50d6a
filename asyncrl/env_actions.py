"""Actions on their way from a policy to the environments: shape, start, dtype and bounds."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from gymnasium import spaces

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # by size


def environments_with(wrong: np.ndarray) -> np.ndarray:
    """Which of B environments have any True in (B, ...)."""
    return np.nonzero(wrong.reshape(len(wrong), -1).any(1))[0]


class Actions:
    """How policies see an action space, and their actions made into those of the environments.

    Policies see discrete actions in one row and from 0 on, whatever their shape, start and dtype:
    they have `space`, the environments `own`.
    """

    def __init__(self, own: spaces.Space, env_id: Any):
        self.own, self._id = own, env_id
        self._start = np.ravel(own.start) if np.any(getattr(own, "start", 0)) else None
        self._low, self._high, self._slack = 0, 1, 0
        self._from_zero = not isinstance(own, spaces.Box)
        if isinstance(own, spaces.Discrete):
            self.space, self._high = spaces.Discrete(own.n), own.n - 1
        elif isinstance(own, spaces.MultiDiscrete):
            self.space, self._high = spaces.MultiDiscrete(own.nvec.ravel()), own.nvec.ravel() - 1
        elif isinstance(own, spaces.MultiBinary):
            self.space = spaces.MultiBinary(prod(own.shape))
        elif isinstance(own, spaces.Box) and own.dtype.kind in "iuf":
            self.space, self._low, self._high = own, own.low, own.high
            if own.dtype.kind == "f":
                # What rounding may add to a bound; anything, where the other one is infinite:
                # actions there are plain Gaussian and know no bound.
                self._slack = 1e-5 * np.maximum(np.abs(own.low), np.abs(own.high))
        else:
            raise ValueError(
                f"{env_id}: expected an action space Discrete, MultiDiscrete, MultiBinary or Box, "
                f"got {own}; wrap the environment to take one of these"
            )

        if 0 in self.space.shape:
            raise ValueError(f"{env_id}: expected an action space of some numbers, got {own}")

    def for_env(self, action: np.ndarray) -> np.ndarray:
        """(B, *action) of a policy as (B, *own), within the bounds; else ValueError."""
        if self.space.dtype.kind == "f":
            action = action.astype(self.space.dtype, casting="same_kind", copy=False)
            self._expect(np.isfinite(action), action, "finite numbers")
        if self._from_zero and action.dtype.kind in "iu":
            outside = action.view(UNSIGNED[action.itemsize]) > self._high  # so is what is negative
        else:
            outside = (action < self._low) | (action > self._high)
        if np.count_nonzero(outside):  # ALE would never answer: its thread drops the row
            nearest = np.clip(action, self._low, self._high)
            low, high = (np.asarray(bound).tolist() for bound in (self._low, self._high))
            self._expect(np.abs(action - nearest) <= self._slack, action, f"{low} to {high}")
            action = nearest
        action = action.astype(self.space.dtype, casting="same_kind", copy=False)
        if self._start is not None:
            action = action + self._start
        return action.reshape(-1, *self.own.shape).astype(self.own.dtype, copy=False)

    def _expect(self, fine: np.ndarray, action: np.ndarray, expected: str) -> None:
        if not fine.all():
            envs = environments_with(~fine)
            raise ValueError(
                f"{self._id}: actions: expected {expected}, got {action[envs].tolist()} for "
                f"environments {envs.tolist()}; look at the policy, and at its model's outputs"
            )
