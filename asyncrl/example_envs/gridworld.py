"""A square of fields with goals and fire, of which one sees the nearest only."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
from gymnasium import spaces

FIRE, GOAL, WALL = range(3)  # planes of an observation
MOVES = np.array([(-1, 0), (1, 0), (0, -1), (0, 1)])  # up, down, left, right


class GridWorld(gym.Env):
    """Reward 1 for entering a goal, -1 for entering fire; either then appears on another free
    field. A wall stops. It never ends by itself; registered with a limit of 50 steps.

    Observation: (3, 2 radius + 1, 2 radius + 1) uint8, planes of fire, goals and walls around
    oneself, 255 where there is one. What has gone out of sight is still there: memory helps.
    """

    def __init__(self, size: int = 9, num_goals: int = 4, num_fires: int = 2, radius: int = 1):
        if radius < 1 or size**2 < num_goals + num_fires + 2:
            raise ValueError(
                "expected a radius of at least 1 and a free field beside all things, got radius "
                f"{radius} and {num_goals} goals and {num_fires} fires on {size} x {size} fields"
            )
        self.size, self.radius = size, radius
        self.things = [FIRE] * num_fires + [GOAL] * num_goals
        self.observation_space = spaces.Box(0, 255, (3, 2 * radius + 1, 2 * radius + 1), np.uint8)
        self.action_space = spaces.Discrete(4)

    def reset(
        self, *, seed: int | None = None, options: dict | None = None
    ) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        outside = ((0, 0), *((self.radius, self.radius),) * 2)
        self.planes = np.pad(np.zeros((3, self.size, self.size), np.uint8), outside)
        self.planes[WALL] = np.pad(
            np.zeros((self.size, self.size), np.uint8), self.radius, constant_values=255
        )
        self.place = None
        self.place = self._free_field()  # (row, column) in the planes
        for thing in self.things:
            self.planes[thing][self._free_field()] = 255
        return self._observation(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        new_place = tuple(int(x) for x in self.place + MOVES[action])
        if not self.planes[WALL][new_place]:
            self.place = new_place
        reward = 0.0
        for thing, worth in ((GOAL, 1.0), (FIRE, -1.0)):
            if self.planes[thing][self.place]:
                reward = worth
                self.planes[thing][self._free_field()] = 255
                self.planes[thing][self.place] = 0
        return self._observation(), reward, False, False, {}

    def _free_field(self) -> tuple[int, int]:
        """Any field without a thing, and not one's own."""
        free = self.planes.max(0) == 0
        if self.place is not None:
            free[self.place] = False
        row, column = self.np_random.choice(np.argwhere(free))
        return int(row), int(column)

    def _observation(self) -> np.ndarray:
        row, column = self.place
        r = self.radius
        return self.planes[:, row - r : row + r + 1, column - r : column + r + 1].copy()
