"""CartPole that shows a grey picture of 40 x 80 instead of four numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.envs.classic_control.cartpole import CartPoleEnv

HEIGHT, WIDTH = 40, 80  # pixels
AXLE_ROW = 31.5  # where the pole is fixed, from the top
CART = np.float32([0.25, 0.15])  # half width and half height, in metres
POLE = 0.06  # half width, in metres
CART_GREY, POLE_GREY = 120, 255


class PixelCartPole(CartPoleEnv):
    """Gymnasium's CartPole in all but its observation: (40, 80) uint8, the whole track, black
    where there is nothing.

    Edges are smooth (a pixel half covered is half as bright), so that what moves by a tenth of a
    pixel still shows; how fast it moves has to be told from earlier pictures, by a frame stack or
    an LSTM. Drawn by numpy in a few hundredths of a millisecond, without pygame. Takes CartPole's
    arguments; registered with a limit of 500 steps, as CartPole-v1 is.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.observation_space = spaces.Box(0, 255, (HEIGHT, WIDTH), np.uint8)
        self._pixel = 2 * self.x_threshold / WIDTH  # metres
        # Of pixels' centres, in metres: (1, W) and (H, 1), from the middle and above the axle.
        self._x = np.float32(self._pixel * (np.arange(WIDTH) - (WIDTH - 1) / 2))[None]
        self._y = np.float32(self._pixel * (AXLE_ROW - np.arange(HEIGHT)))[:, None]

    def reset(
        self, *, seed: int | None = None, options: dict | None = None
    ) -> tuple[np.ndarray, dict]:
        _, info = super().reset(seed=seed, options=options)
        return self._draw(), info

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        _, *others = super().step(action)
        return self._draw(), *others

    def _draw(self) -> np.ndarray:
        position, _, angle, _ = np.float32(self.state)
        x, y, length = self._x - position, self._y, 2 * self.length
        cart = np.minimum(self._cover(CART[0] - np.abs(x)), self._cover(CART[1] - np.abs(y)))
        along = np.clip(x * np.sin(angle) + y * np.cos(angle), 0, length)
        away = np.hypot(x - along * np.sin(angle), y - along * np.cos(angle))
        pole = self._cover(POLE - away)
        return np.maximum(CART_GREY * cart, POLE_GREY * pole).astype(np.uint8)

    def _cover(self, depth: np.ndarray) -> np.ndarray:
        """How much of a pixel is covered whose centre lies `depth` metres inside an edge."""
        return np.clip(depth / self._pixel + 0.5, 0, 1)
