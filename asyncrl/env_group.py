"""B environments behind `send` and `recv`; the only place that knows which row is a reset step.

Environments run with Gymnasium's NEXT_STEP autoreset: an env that ended at row t shows its true
final observation as obs[t+1]; on row t+1 it ignores the action, resets, and the row is not valid. A
lost life under the protocol "classic" ends the return (`terminated`) but not the game: no reset
step follows. An environment whose episodes are parts of a game, such as lives, says in
`info["game_goes_on"]` at the end of one that the next reset goes on with the same game.
"""

from __future__ import annotations

import contextlib
import time
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv

from asyncrl.env_actions import Actions, environments_with
from asyncrl.env_config import EnvConfig
from asyncrl.env_contract import check_observation_space, check_vector_env, is_ale


class EnvDied(RuntimeError):
    """The process of an environment died."""


class EnvDataError(RuntimeError):
    """An environment handed out what its spaces or Gymnasium's contract rule out."""


class Step(NamedTuple):
    """Row t, whose action was just sent; arrays (B, ...) that nobody writes again."""

    obs: Any  # tree of (B, *obs): obs[t+1]
    first: np.ndarray  # bool: obs[t+1] opens an episode
    reward: np.ndarray  # float32, unclipped
    terminated: np.ndarray  # bool: also at a lost life under "classic"
    truncated: np.ndarray  # bool
    valid: np.ndarray  # bool: False exactly at a reset step
    game_over: np.ndarray  # bool: the episode ended, lives and all; row t+1 is a reset step
    goes_on: np.ndarray  # bool: it did, but it was part of a game that the next one goes on with
    episode_return: np.ndarray  # float32: of the episode, lives and all, that ended here, else 0
    episode_length: np.ndarray  # int32: its env steps, else 0


class EnvGroup:
    """B environments stepped together: `send` the actions, then `recv` what became of them.

    Where the env can (ALE, AsyncVectorEnv) it works between the two; otherwise `recv` does all.
    """

    def __init__(self, env: VectorEnv, config: EnvConfig, num_envs: int):
        check_vector_env(env, config, num_envs)
        is_gymnasium = isinstance(env, AsyncVectorEnv | SyncVectorEnv)
        self._is_async = isinstance(env, AsyncVectorEnv)
        self._is_ale = is_ale(env)
        self._sends = self._is_ale and env.unwrapped is env  # a wrapper has step() alone
        # Without shared memory AsyncVectorEnv does not cancel its own reset (Gymnasium 1.4).
        resets_some = self._is_ale or (is_gymnasium and getattr(env, "shared_memory", True))
        if config.max_idle_steps and not resets_some:
            raise ValueError(
                f"env.max_idle_steps: expected 0, got {config.max_idle_steps}: {type(env).__name__}"
                " cannot be asked to reset single environments; give it a time limit of its own"
            )
        self.num_envs = num_envs
        self._env, self._config = env, config
        # Theirs are new arrays each time; anybody else's may be one buffer, written again.
        self._copies = not (self._sends or (is_gymnasium and env.copy))
        atari = config.ale_parameters if self._is_ale or config.is_ale else {}
        self.env_step_frames = int(np.mean(atari.get("frameskip", 1)))  # one of (a, b) by chance
        self._max_frames = atari.get("max_num_frames_per_episode")
        self._squeezes = config.protocol != "none"  # (1, 84, 84) -> (84, 84)
        space = env.single_observation_space
        if self._squeezes:
            space = spaces.Box(space.low[0], space.high[0], dtype=space.dtype)
        check_observation_space(space, config)
        self.observation_space: spaces.Space = space
        self.actions = Actions(env.single_action_space, config.id)
        self.action_space = self.actions.space

    def reset(self, seed: int) -> Any:
        """Start every game anew: obs[0], whose `first` is True everywhere."""
        obs, info = self._reset(seed=int(seed))
        B = self.num_envs
        self._ended = np.zeros(B, bool)  # the row to come is a reset step ...
        self._cut = np.zeros(B, bool)  # ... that the env knows nothing of: we ended the game
        self._return, self._length = np.zeros(B, np.float64), np.zeros(B, np.int32)
        self._idle = np.zeros(B, np.int32)
        self._lives = info.get("lives")
        return self._observation(obs)

    def send(self, action: np.ndarray) -> None:
        """Start a step with actions (B, *action); ValueError for some that the space rules out."""
        action, expected = np.asarray(action), (self.num_envs, *self.action_space.shape)
        if action.shape != expected:
            raise ValueError(f"actions: expected shape {expected}, got {action.shape}")
        self._action = self.actions.for_env(action)
        if self._sends:
            self._env.send(self._action)
        elif self._is_async:
            try:
                self._env.step_async(self._action)
            except ConnectionError as error:
                raise self._died() from error

    def recv(self) -> Step:
        """Finish the step; how long that takes is the environments' own affair."""
        obs, reward, terminated, truncated, info = self._finish()
        if np.count_nonzero(self._cut):  # these took one step too many: forget it, reset them now
            obs, new_info = self._reset(options={"reset_mask": self._cut.copy()})
            info, going_on = info | new_info if self._is_ale else info, ~self._cut
            reward = reward * going_on
            terminated, truncated = terminated & going_on, truncated & going_on
        reset_step, valid = self._ended, ~self._ended
        reward = np.array(reward, np.float32)
        terminated, truncated = np.array(terminated, bool), np.array(truncated, bool)
        game_over = terminated | truncated
        self._check(reward, game_over, reset_step, info)

        returns, lengths = self._return + reward, self._length + valid
        if self._is_ale:
            if np.count_nonzero(terminated):
                # A lost life leaves lives over. One lost just as the time is up ends the game.
                life_lost = terminated & (info["lives"] > 0) & (info["lives"] < self._lives)
                game_over &= ~life_lost | (lengths * self.env_step_frames >= self._max_frames)
            self._lives = info["lives"]
        if self._config.max_idle_steps:
            self._idle = np.where((reward != 0) | reset_step, 0, self._idle + 1)
            self._cut = self._idle >= self._config.max_idle_steps
            if np.count_nonzero(self._cut):
                self._cut &= ~game_over
                truncated |= self._cut & ~terminated
                game_over |= self._cut
        goes_on = np.zeros(self.num_envs, bool)
        self._return, self._length = returns, lengths
        if np.count_nonzero(game_over):
            goes_on = game_over & np.array(info.get("game_goes_on", False), bool) & ~self._cut
            self._return, self._length = returns * ~game_over, lengths * ~game_over
        self._ended = game_over
        return Step(
            obs=self._observation(obs),
            first=reset_step,
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            valid=valid,
            game_over=game_over,
            goes_on=goes_on,
            episode_return=(returns - self._return).astype(np.float32),
            episode_length=lengths - self._length,
        )

    def render(self) -> Any:
        """The environments' own pictures, where they were made with a render_mode."""
        return self._env.render()

    @property
    def frames_per_second(self) -> int:
        """How fast the environments want to be shown."""
        return self._env.metadata.get("render_fps") or 30

    def close(self) -> None:
        """Let the environments go; workers that do not leave within two seconds are killed."""
        env, self._env = self._env, None
        if env is not None:
            close_env(env)

    def _reset(self, **kwargs) -> tuple[Any, dict]:
        try:
            return self._env.reset(**kwargs)
        except (EOFError, ConnectionError) as error:
            if not self._is_async:
                raise
            raise self._died() from error

    def _finish(self) -> tuple:
        if self._sends:
            return self._env.recv()
        if not self._is_async:
            return self._env.step(self._action)
        try:
            return self._env.step_wait()
        except (EOFError, ConnectionError) as error:
            raise self._died() from error

    def _died(self) -> EnvDied:
        workers = self._env.processes
        gone = wait([worker.sentinel for worker in workers], timeout=1)
        dead = []
        for i, worker in enumerate(workers):
            if worker.sentinel in gone:
                worker.join(1)  # its files close a moment before its exit code is known
                dead.append(f"{i} (pid {worker.pid}, exit code {worker.exitcode})")
        who = ", ".join(dead) or "?"
        return EnvDied(f"{self._config.id}: the process of environment {who} died")

    def _check(
        self, reward: np.ndarray, ended: np.ndarray, reset_step: np.ndarray, info: dict
    ) -> None:
        if np.count_nonzero(finite := np.isfinite(reward)) < len(reward):
            envs = environments_with(~finite)
            raise EnvDataError(
                f"{self._config.id}: expected finite rewards, got {reward[envs].tolist()} of "
                f"environments {envs.tolist()} for actions {self._action[envs].tolist()}"
            )
        if "final_obs" in info or (
            np.count_nonzero(reset_step) and ((ended | (reward != 0)) & reset_step).any()
        ):
            raise EnvDataError(
                f"{self._config.id}: expected the step after an end to reset and do no more, as "
                "autoreset NEXT_STEP has it, got a reward or an end; check the env's autoreset"
            )

    def _observation(self, obs: Any) -> Any:
        return self._adopt(self.observation_space, obs[:, 0] if self._squeezes else obs, "obs")

    def _adopt(self, space: spaces.Space, obs: Any, name: str) -> Any:
        """Check a batch of observations against its space; copy it if the env may rewrite it."""
        if isinstance(space, spaces.Dict):
            return {key: self._adopt(space[key], obs[key], f"{name}[{key!r}]") for key in space}
        if isinstance(space, spaces.Tuple):
            return tuple(self._adopt(part, obs[i], f"{name}[{i}]") for i, part in enumerate(space))
        expected, shape = (self.num_envs, *space.shape), getattr(obs, "shape", None)
        if shape != expected or obs.dtype != space.dtype:
            raise EnvDataError(
                f"{self._config.id}: {name}: expected {space.dtype} of shape {expected} as its "
                f"observation space says, got {getattr(obs, 'dtype', type(obs))} of shape {shape}"
            )
        if obs.dtype.kind == "f" and np.count_nonzero(finite := np.isfinite(obs)) < obs.size:
            raise EnvDataError(
                f"{self._config.id}: {name}: expected finite numbers, got "
                f"{np.unique(obs[~finite]).tolist()} from environments "
                f"{environments_with(~finite).tolist()}"
            )
        return obs.copy() if self._copies else obs


def close_env(env: Any) -> None:
    """Close without ever hanging: AsyncVectorEnv.close() waits for workers that may not answer."""
    if not isinstance(env, AsyncVectorEnv):
        return env.close() if hasattr(env, "close") else None
    for pipe in env.parent_pipes:
        with contextlib.suppress(OSError, AttributeError):  # dead, or None after an exception
            pipe.send(("close", None))
    deadline = time.monotonic() + 2
    for process in env.processes:
        process.join(max(0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join(2)
    env.closed = True  # or its __del__ closes it once more
