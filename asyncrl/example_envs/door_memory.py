"""Doors of which one flashes; much later they open, and the one that flashed has the reward."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class DoorMemory(gym.Env):
    """Remember which door flashed: reward 1 for entering it, 0 for another; that ends the episode.

    Observation: (num_doors + 1,) float32, the doors' lamps and a last number that is 1 while the
    doors are open. The first observation shows one lamp lit; it is dark for a number of steps drawn
    from `delay` (both ends included); then the doors open. Action i enters door i if it is open and
    does nothing else. A policy without memory gets 1 / num_doors on average, and so does one with a
    frame stack shorter than the delay; perfect is 1.
    """

    def __init__(self, num_doors: int = 4, delay: tuple[int, int] = (6, 10)):
        if num_doors < 2 or not 0 <= delay[0] <= delay[1]:
            raise ValueError(
                "expected at least 2 doors and a delay (fewest, most) of at least 0 steps, got "
                f"{num_doors} and {delay}"
            )
        self.num_doors, self.delay = num_doors, tuple(delay)
        self.observation_space = spaces.Box(0, 1, (num_doors + 1,), np.float32)
        self.action_space = spaces.Discrete(num_doors)

    def reset(
        self, *, seed: int | None = None, options: dict | None = None
    ) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._door = int(self.np_random.integers(self.num_doors))
        self._dark_steps = int(self.np_random.integers(self.delay[0], self.delay[1] + 1))
        return self._observation(self._door), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        if self._dark_steps < 0:  # the doors were open
            return self._observation(), float(action == self._door), True, False, {}
        self._dark_steps -= 1
        lit = self.num_doors if self._dark_steps < 0 else None
        return self._observation(lit), 0.0, False, False, {}

    def _observation(self, lit: int | None = None) -> np.ndarray:
        obs = np.zeros(self.num_doors + 1, np.float32)
        if lit is not None:
            obs[lit] = 1
        return obs
