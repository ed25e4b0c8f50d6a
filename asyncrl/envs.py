"""Environments: a group of B of them behind `send` and `recv`, and the Atari protocols.

`EnvGroup` alone knows which row is a reset step. Environments run with Gymnasium's NEXT_STEP
autoreset: an env that ended at row t shows its true final observation as obs[t+1]; on row t+1 it
ignores the action, resets, and the row is not valid. A lost life under the protocol "classic" ends
the return (`terminated`) but not the game: no reset step follows.
"""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import importlib
import os
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from typing import Annotated, Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import tyro
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

# The first three are not for changing: the model stacks frames, the algorithm clips rewards, and
# episodic_life would restart the whole game at each lost life (life_loss_info does not).
_FIXED = dict(stack_num=1, reward_clipping=False, episodic_life=False)
_FRAMES = dict(frameskip=4, maxpool=True, grayscale=True, img_height=84, img_width=84)
_ATARI = _FIXED | _FRAMES | dict(max_num_frames_per_episode=108_000)
# classic: Mnih et al. 2015 as in Baselines. ALE presses FIRE at a reset only, not after a lost
# life, so a greedy policy that never fires stands still until max_idle_steps ends the game.
_CLASSIC = dict(
    repeat_action_probability=0.0, full_action_space=False, life_loss_info=True, noop_max=30
)
# machado: Machado et al. 2018. Sticky actions are the only randomness.
_MACHADO = dict(
    repeat_action_probability=0.25, full_action_space=True, life_loss_info=False, noop_max=0
)
_PROTOCOLS = {
    "classic": _ATARI | _CLASSIC | {"use_fire_reset": True},
    "machado": _ATARI | _MACHADO | {"use_fire_reset": False},
    "none": {},
}
# 5 minutes of play. machado has no guard: its published scores were measured without one.
_MAX_IDLE_STEPS = {"classic": 4_500, "machado": 0, "none": 0}


class EnvStalled(TimeoutError):
    """Environments did not answer in time."""


class EnvDied(RuntimeError):
    """The process of an environment died."""


class EnvDataError(RuntimeError):
    """An environment handed out what its spaces or Gymnasium's contract rule out."""


@dataclass(frozen=True)
class EnvConfig:
    """Which environment, and how it is run."""

    id: Annotated[str | Callable[..., VectorEnv], tyro.conf.arg(constructor=str)] = (
        "ALE/Breakout-v5"
    )
    """A Gymnasium id ("ALE/Breakout-v5", "CartPole-v1", "module:Name-v0"), an import string
    ("module:callable"), or any callable(num_envs, **kwargs) that returns a VectorEnv."""

    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments for the environment or the callable."""

    vectorization: Literal["auto", "sync", "async", "native"] = "auto"
    """One after another (sync), a process each (async), or the environment's own vector env
    (native). auto: native for ALE and callables, else sync, the faster where steps are cheap."""

    protocol: Literal["auto", "none", "classic", "machado"] = "auto"
    """Atari rules. classic: a lost life ends the return, no sticky actions, minimal actions,
    no-ops and FIRE at a reset. machado: sticky actions, all 18 actions, game over only.
    auto: classic for ALE ids, none otherwise."""

    max_idle_steps: int | None = None
    """End a game as truncated after so many env steps without reward (0: never).
    By default 4500 (5 minutes of play) under classic, where an agent that does not press FIRE
    after a lost life would stand still for half an hour; else 0."""

    num_threads: int = 0
    """Threads of ALE's pool (0: one a core)."""

    atari: dict[str, Any] = field(default_factory=dict)
    """Parameters of ALE's vector env that differ from the protocol's own."""

    @property
    def is_ale(self) -> bool:
        return isinstance(self.id, str) and self.id.rpartition(":")[2].startswith("ALE/")

    @property
    def is_callable(self) -> bool:
        """Whether `id` is or names a callable; "module:Name-v0" is a Gymnasium id."""
        if not isinstance(self.id, str):
            return True
        return ":" in self.id and self.id.rpartition(":")[2].isidentifier()

    def resolved(self) -> EnvConfig:
        """The same with every default written out, as config.json shows it."""
        vectorization, protocol, idle = self.vectorization, self.protocol, self.max_idle_steps
        if vectorization == "auto":
            vectorization = "native" if self.is_ale or self.is_callable else "sync"
        is_native = vectorization == "native"
        if protocol == "auto":
            protocol = "classic" if self.is_ale and is_native else "none"
        if self.is_callable and not is_native:
            raise ValueError(
                f"env.vectorization: expected 'auto' or 'native', got {vectorization!r}: "
                f"{self.id} makes its own vector env"
            )
        if protocol != "none" and not (self.is_ale and is_native):
            raise ValueError(
                f"env.protocol: {protocol!r} needs an id that starts with 'ALE/' and native "
                f"vectorization, got {self.id!r} and {vectorization!r}; use 'none'"
            )
        rules = _PROTOCOLS[protocol]
        atari = {name: self.kwargs.get(name, value) for name, value in rules.items()} | self.atari
        if atari and protocol == "none":
            raise ValueError("env.atari: the protocol 'none' has no parameters; use env.kwargs")
        for name, fixed in _FIXED.items() if atari else ():
            if atari[name] != fixed:
                raise ValueError(
                    f"env: expected {name}={fixed}, got {atari[name]!r}: the model stacks frames, "
                    "the algorithm clips rewards, life_loss_info=True ends returns at lost lives"
                )
        if (idle or 0) < 0 or self.num_threads < 0:
            raise ValueError("env: max_idle_steps and num_threads must be 0 or more")
        return replace(
            self,
            vectorization=vectorization,
            protocol=protocol,
            max_idle_steps=_MAX_IDLE_STEPS[protocol] if idle is None else idle,
            atari=atari,
        )


class Step(NamedTuple):
    """Row t, whose action was just sent; arrays (B, ...) that nobody writes again."""

    obs: Any  # tree of (B, *obs): obs[t+1]
    first: np.ndarray  # bool: obs[t+1] opens an episode
    reward: np.ndarray  # float32, unclipped
    terminated: np.ndarray  # bool: also at a lost life under "classic"
    truncated: np.ndarray  # bool
    valid: np.ndarray  # bool: False exactly at a reset step
    game_over: np.ndarray  # bool: the episode ended, lives and all; row t+1 is a reset step
    episode_return: np.ndarray  # float32: of the whole game that ended here, else 0
    episode_length: np.ndarray  # int32: its env steps, else 0


def seed_for(seed: int, lane: int, generation: int) -> int:
    """The seed of a lane's first environment; the others take the next ones."""
    word = np.random.SeedSequence([seed, lane, generation]).generate_state(1)[0]
    return int(word % (2**31 - 2**16))  # room for seed + B in the int32 that ALE takes


def make_envs(config: EnvConfig, num_envs: int) -> EnvGroup:
    """Build B environments and check what they are.

    Async workers die with the thread that calls this, as Linux counts parents by thread.
    """
    config = config.resolved()
    try:
        env = _make_vector_env(config, num_envs)
    except (EOFError, ConnectionError) as error:
        raise EnvDied(f"{config.id}: a worker died at its start, see its traceback") from error
    try:
        return EnvGroup(env, config, num_envs)
    except BaseException:
        _close(env)
        raise


def _make_vector_env(config: EnvConfig, num_envs: int) -> VectorEnv:
    if config.is_callable:
        make = _import(config.id) if isinstance(config.id, str) else config.id
        return make(num_envs, **config.kwargs)
    _find_id(config.id)
    kwargs = config.kwargs | config.atari
    if config.vectorization == "native":
        if config.is_ale:
            kwargs["num_threads"] = config.num_threads
        return gym.make_vec(config.id, num_envs, "vector_entry_point", **kwargs)
    how: dict[str, Any] = {"autoreset_mode": AutoresetMode.NEXT_STEP}
    wrappers = []
    if config.vectorization == "async":
        # fork: a worker's parent must be us for it to die with us, so no forkserver (the default
        # from Python 3.14 on); and nothing of the user's has to be pickled.
        how["context"] = "fork"
        wrappers = [_dying_with(os.getpid())]
    return gym.make_vec(config.id, num_envs, config.vectorization, how, wrappers, **kwargs)


def _import(name: str) -> Callable[..., VectorEnv]:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"env.id: cannot import {name!r}: {error}") from error


def _find_id(name: str) -> None:
    """Register what the id needs; refuse an unknown one with the nearest known."""
    module, _, known_as = name.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(f"env.id: cannot import {name!r}: {error}") from error
    if known_as.startswith("ALE/"):
        try:
            import ale_py
        except ImportError as error:
            raise ValueError(f"env.id: {name!r} needs pip install 'asyncrl[atari]'") from error
        gym.register_envs(ale_py)
    try:
        gym.spec(known_as)
    except gym.error.UnregisteredEnv as error:
        near = difflib.get_close_matches(known_as, gym.registry, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else "."
        raise ValueError(
            f"env.id: Gymnasium knows no environment {name!r}{hint} If a package of yours "
            "registers it, write 'package:Name-v0'."
        ) from error


def _dying_with(owner: int) -> Callable[[gym.Env], gym.Env]:
    """Not really a wrapper: the one thing that Gymnasium lets run inside a worker process."""

    def wrapper(env: gym.Env) -> gym.Env:
        if os.getpid() != owner:  # AsyncVectorEnv also builds one env in our process, for spaces
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's affair
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # drop the handler we were forked with
            pr_set_pdeathsig = 1
            ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
            if os.getppid() != owner:  # the owner died before it was watched
                os._exit(1)
        return env

    return wrapper


class EnvGroup:
    """B environments stepped together: `send` the actions, then `recv` what became of them.

    Where the env can (ALE, AsyncVectorEnv) it works between the two; otherwise `recv` does all.
    """

    def __init__(self, env: VectorEnv, config: EnvConfig, num_envs: int):
        _check_vector_env(env, config, num_envs)
        is_gymnasium = isinstance(env, AsyncVectorEnv | SyncVectorEnv)
        self._is_async = isinstance(env, AsyncVectorEnv)
        self._is_ale = _is_ale(env)
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
        atari = (_ATARI | config.kwargs | config.atari) if self._is_ale or config.is_ale else {}
        self.env_step_frames = int(atari.get("frameskip", 1))
        self._max_frames = atari.get("max_num_frames_per_episode")
        self._squeezes = config.protocol != "none"  # (1, 84, 84) -> (84, 84)
        space = env.single_observation_space
        if self._squeezes:
            space = spaces.Box(space.low[0], space.high[0], dtype=space.dtype)
        _check_observation_space(space, config)
        self.observation_space: spaces.Space = space
        self.action_space, self._action_start = _actions_from_zero(env.single_action_space, config)

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
        """Start a step with actions (B, *action)."""
        space, action = self.action_space, np.asarray(action)
        expected = (self.num_envs, *space.shape)
        if action.shape != expected:
            raise ValueError(f"actions: expected shape {expected}, got {action.shape}")
        # ALE never answers an action out of range: the thread that meets it drops the row.
        in_range = not isinstance(space, spaces.Discrete) or ((action >= 0) & (action < space.n))
        if not np.all(in_range):
            raise ValueError(f"actions: expected 0 to {space.n - 1}, got {action.tolist()}")
        action = action.astype(space.dtype, casting="same_kind", copy=False)
        self._action = action if self._action_start is None else action + self._action_start
        if self._sends:
            self._env.send(self._action)
        elif self._is_async:
            try:
                self._env.step_async(self._action)
            except ConnectionError as error:
                raise self._died() from error

    def recv(self, timeout_seconds: float | None = None) -> Step:
        """Finish the step. Only of AsyncVectorEnv can one tire after `timeout_seconds`."""
        obs, reward, terminated, truncated, info = self._finish(timeout_seconds)
        if self._cut.any():  # these took one step too many: forget it, reset them now
            obs, new_info = self._reset(options={"reset_mask": self._cut.copy()})
            info, going_on = info | new_info, ~self._cut
            reward = reward * going_on
            terminated, truncated = terminated & going_on, truncated & going_on
        reset_step = self._ended
        reward = np.array(reward, np.float32)
        terminated, truncated = np.array(terminated, bool), np.array(truncated, bool)
        game_over = terminated | truncated
        self._check(reward, (game_over | (reward != 0)) & reset_step, info)

        self._return = self._return + reward
        self._length = self._length + ~reset_step
        if self._is_ale:
            # A lost life leaves lives over. One lost just as the time is up does end the game.
            life_lost = terminated & (info["lives"] > 0) & (info["lives"] < self._lives)
            game_over &= ~life_lost | (self._length * self.env_step_frames >= self._max_frames)
            self._lives = info["lives"]
        if self._config.max_idle_steps:
            self._idle = np.where((reward != 0) | reset_step, 0, self._idle + 1)
            self._cut = (self._idle >= self._config.max_idle_steps) & ~game_over
            truncated |= self._cut & ~terminated
            game_over |= self._cut
        self._ended = game_over
        step = Step(
            obs=self._observation(obs),
            first=reset_step,
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            valid=~reset_step,
            game_over=game_over,
            episode_return=np.where(game_over, self._return, 0).astype(np.float32),
            episode_length=np.where(game_over, self._length, 0),
        )
        self._return, self._length = self._return * ~game_over, self._length * ~game_over
        return step

    def close(self) -> None:
        """Let the environments go; workers that do not leave within two seconds are killed."""
        env, self._env = self._env, None
        if env is not None:
            _close(env)

    def _reset(self, **kwargs) -> tuple[Any, dict]:
        try:
            return self._env.reset(**kwargs)
        except (EOFError, ConnectionError) as error:
            if not self._is_async:
                raise
            raise self._died() from error

    def _finish(self, timeout_seconds: float | None) -> tuple:
        if self._sends:
            return self._env.recv()
        if not self._is_async:
            return self._env.step(self._action)
        if timeout_seconds is not None:
            deadline = time.monotonic() + timeout_seconds
            polls = [p.poll(max(0, deadline - time.monotonic())) for p in self._env.parent_pipes]
            if late := [i for i, ready in enumerate(polls) if not ready]:
                raise EnvStalled(
                    f"{self._config.id}: environments {late} did not finish their step within "
                    f"{timeout_seconds:g} s"
                )
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

    def _check(self, reward: np.ndarray, no_reset: np.ndarray, info: dict) -> None:
        if not np.isfinite(reward).all():
            raise EnvDataError(
                f"{self._config.id}: expected finite rewards, got {reward.tolist()} for actions "
                f"{self._action.tolist()}"
            )
        if "final_obs" in info or no_reset.any():
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
        return obs.copy() if self._copies else obs


def _is_ale(env: VectorEnv) -> bool:
    return type(env.unwrapped).__module__.startswith("ale_py")


def _check_vector_env(env: Any, config: EnvConfig, num_envs: int) -> None:
    if not isinstance(env, VectorEnv):
        raise ValueError(
            f"env.id: expected {config.id} to make a gymnasium.vector.VectorEnv, got "
            f"{type(env).__name__}; wrap it as SyncVectorEnv([make_one] * num_envs)"
        )
    batch = env.unwrapped.batch_size if _is_ale(env) else num_envs
    if env.num_envs != num_envs or batch != num_envs:
        raise ValueError(
            f"env.id: expected {config.id} to make {num_envs} environments stepped together, got "
            f"{env.num_envs} in batches of {batch}"
        )
    mode = env.metadata.get("autoreset_mode")
    if _is_ale(env):
        mode = env.unwrapped.autoreset_mode
    elif env.metadata is VectorEnv.metadata:
        mode = None  # it has none: AtariVectorEnv left its own in the class's dict
    if mode is None:
        message = f"{config.id}: no metadata['autoreset_mode']; taken for NEXT_STEP, as Gymnasium"
        warnings.warn(message + " does", stacklevel=4)
    elif AutoresetMode(mode) is not AutoresetMode.NEXT_STEP:
        raise ValueError(
            f"env.id: expected {config.id} to have AutoresetMode.NEXT_STEP, got {mode}: unrolls "
            "hold the true final observation in its place; pass autoreset_mode=NEXT_STEP to it"
        )


def _check_observation_space(space: spaces.Space, config: EnvConfig, name: str = "obs") -> None:
    if isinstance(space, spaces.Dict | spaces.Tuple):
        for key, part in space.items() if isinstance(space, spaces.Dict) else enumerate(space):
            _check_observation_space(part, config, f"{name}[{key!r}]")
        return
    known = spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary
    if not isinstance(space, known) or space.dtype.kind not in "biuf":
        raise ValueError(
            f"{config.id}: {name}: expected Box, Discrete, MultiDiscrete, MultiBinary, or Dict or "
            f"Tuple of them, got {space}; wrap the environment to show one of these"
        )


def _actions_from_zero(space: spaces.Space, config: EnvConfig) -> tuple[spaces.Space, Any]:
    """The action space as policies see it, discrete actions from 0 on, and where they do start."""
    start = getattr(space, "start", 0)
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        count = space.n if isinstance(space, spaces.Discrete) else space.nvec
        return type(space)(count), start if np.any(start) else None
    if isinstance(space, spaces.Box) and space.dtype.kind in "iuf":
        return space, None
    raise ValueError(
        f"{config.id}: expected an action space Discrete, MultiDiscrete or Box, got {space}; "
        "wrap the environment to take one of these"
    )


def _close(env: Any) -> None:
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
