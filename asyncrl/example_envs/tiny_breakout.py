"""Breakout on 10 x 10 fields, by the rules of MinAtar (Young and Tian 2019, arXiv 1903.03176)."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
from gymnasium import spaces

SIZE = 10
PADDLE, BALL, TRAIL, BRICKS = range(4)  # channels of an observation
BRICK_ROWS = slice(1, 4)


class TinyBreakout(gym.Env):
    """A ball, three rows of bricks and a paddle of one field; reward 1 a brick, over once missed.

    Actions: stay, left, right; with probability `sticky` the last one is repeated instead.
    Observation: (10, 10, 4) uint8, 255 where paddle, ball, the ball's last field or a brick is. The
    ball moves diagonally, a field a step. It turns back at a brick that it breaks; while it goes
    through bricks from there it breaks no other. Bricks come back when all are broken and the ball
    reaches the paddle's row. Hit with the paddle where it already was it bounces up, hit where it
    would have gone it goes back the way it came.
    """

    def __init__(self, sticky: float = 0.1):
        self.sticky = sticky
        self.observation_space = spaces.Box(0, 255, (SIZE, SIZE, 4), np.uint8)
        self.action_space = spaces.Discrete(3)

    def reset(
        self, *, seed: int | None = None, options: dict | None = None
    ) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        from_left = bool(self.np_random.integers(2))
        self.ball = self.trail = (3, 0 if from_left else SIZE - 1)  # (row, column)
        self.down, self.right = 1, 1 if from_left else -1  # fields a step
        self.paddle, self.last_action, self.in_bricks = 4, 0, False
        self.bricks = np.zeros((SIZE, SIZE), bool)
        self.bricks[BRICK_ROWS] = True
        return self._observation(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        if self.np_random.random() < self.sticky:
            action = self.last_action
        self.last_action = action
        self.paddle = min(max(self.paddle + (0, -1, 1)[action], 0), SIZE - 1)

        row, column = self.trail = self.ball
        to_row, to_column = row + self.down, column + self.right
        if not 0 <= to_column < SIZE:
            to_column, self.right = column, -self.right
        was_in_bricks, self.in_bricks = self.in_bricks, False
        reward, missed = 0.0, False
        if to_row < 0:
            to_row, self.down = 0, 1
        elif self.bricks[to_row, to_column]:
            self.in_bricks = True
            if not was_in_bricks:
                self.bricks[to_row, to_column] = False
                reward, to_row, self.down = 1.0, row, -self.down
        elif to_row == SIZE - 1:
            if not self.bricks.any():
                self.bricks[BRICK_ROWS] = True
            missed = self.paddle not in (column, to_column)
            if not missed:
                if self.paddle != column:
                    self.right = -self.right
                to_row, self.down = row, -1
        self.ball = to_row, to_column
        return self._observation(), reward, missed, False, {}

    def _observation(self) -> np.ndarray:
        obs = np.zeros((SIZE, SIZE, 4), np.uint8)
        obs[SIZE - 1, self.paddle, PADDLE] = 255
        obs[(*self.ball, BALL)] = obs[(*self.trail, TRAIL)] = 255
        obs[self.bricks, BRICKS] = 255
        return obs
