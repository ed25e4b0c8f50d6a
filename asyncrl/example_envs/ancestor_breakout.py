"""Atari Breakout as asyncrl's main ancestor played it (Quickblink's RLframework, 2021)."""

from __future__ import annotations

import numpy as np
from ale_py import Action
from ale_py.env import AtariEnv
from gymnasium import spaces

FIELD = np.s_[26::2, 4:-4:2]  # of the 210 x 160 screen: without score and edges, every other pixel
AIR = np.s_[34:-10, 2:-2]  # of an observation: black but for the ball, once bricks are above it
ACTIONS = (Action.NOOP, Action.RIGHT, Action.LEFT)


class AncestorBreakout(AtariEnv):
    """Breakout of which an episode is one life; the next `reset` goes on with the game.

    Observation: (92, 76) uint8, grey, of the last of the 3 or 4 frames (as likely) that an action
    lasts. Actions: stay, right, left; each reset presses FIRE until the ball is to be seen.

    A lost life terminates. A reset thereafter begins a new game only when the last life is lost (or
    when it is seeded), so that five episodes in a row are one game and their returns add up to its
    score; `info["game_goes_on"]` says that it is not over. After `stall_steps` without reward the
    life is played to its end at random within that step, and what random play scores is not
    counted. Registered with a limit of 10,000 steps; a life cut by it goes on as the next episode.
    """

    def __init__(
        self,
        num_frames: tuple[int, int] = (3, 4),
        stall_steps: int = 400,
        render_mode: str | None = None,
    ):
        if not 1 <= num_frames[0] < num_frames[1] or stall_steps < 1:
            raise ValueError(
                "expected num_frames (fewest, most) of at least 1 that differ and stall_steps of "
                f"at least 1, got {num_frames} and {stall_steps}"
            )
        super().__init__(
            "breakout",
            obs_type="grayscale",
            frameskip=(num_frames[0], num_frames[1] + 1),
            repeat_action_probability=0.0,
            render_mode=render_mode,
        )
        self.stall_steps = stall_steps
        self._action_set, self.action_space = ACTIONS, spaces.Discrete(len(ACTIONS))
        self.observation_space = spaces.Box(0, 255, (92, 76), np.uint8)
        self._lives = 0  # as the episode began

    def reset(
        self, *, seed: int | None = None, options: dict | None = None
    ) -> tuple[np.ndarray, dict]:
        if seed is not None or self._lives == 0 or self.ale.game_over():
            super().reset(seed=seed, options=options)
        self._lives, self._idle_steps = self.ale.lives(), 0
        for _ in range(60):  # one is enough, mostly
            self.ale.act(Action.FIRE)
            if self._get_obs()[AIR].any():
                break
        return self._get_obs(), self._get_info()

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, reward, *_, info = super().step(action)
        self._idle_steps = 0 if reward else self._idle_steps + 1
        if self._idle_steps >= self.stall_steps and self.ale.lives() == self._lives:
            self._lose_life()
            obs, info = self._get_obs(), self._get_info()
        return obs, reward, self.ale.lives() < self._lives, False, info

    def _lose_life(self) -> None:
        """Random play, a frame an action, until the ball is lost."""
        for _ in range(100_000):
            self.ale.act(ACTIONS[self.np_random.integers(len(ACTIONS))])
            if self.ale.lives() < self._lives:
                return

    def _get_info(self) -> dict:
        return super()._get_info() | {"game_goes_on": not self.ale.game_over()}

    def _get_obs(self) -> np.ndarray:
        return self.ale.getScreenGrayscale()[FIELD].copy()
