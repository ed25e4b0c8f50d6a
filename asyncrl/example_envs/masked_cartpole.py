"""CartPole that shows where cart and pole are, not how fast they move."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.envs.classic_control.cartpole import CartPoleEnv

SHOWN = [0, 2]  # of CartPole's position, velocity, angle, angular velocity


class MaskedCartPole(CartPoleEnv):
    """Gymnasium's CartPole in all but its observation: (cart position, pole angle), float32.

    Velocities have to be told from earlier observations, so a policy needs memory (an LSTM, or a
    frame stack): non-Markov pole balancing, as in Wierstra et al. 2007, Solving deep memory POMDPs
    with recurrent policy gradients. Takes CartPole's arguments; registered with a limit of 500
    steps, as CartPole-v1 is.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        whole = self.observation_space
        self.observation_space = spaces.Box(whole.low[SHOWN], whole.high[SHOWN], dtype=np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict | None = None
    ) -> tuple[np.ndarray, dict]:
        obs, info = super().reset(seed=seed, options=options)
        return obs[SHOWN], info

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, *others = super().step(action)
        return obs[SHOWN], *others
