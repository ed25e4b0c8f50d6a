"""Environments by configuration: Gymnasium ids, import strings, callables."""

from __future__ import annotations

import ctypes
import difflib
import importlib
import inspect
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from asyncrl.env_config import EnvConfig
from asyncrl.env_group import EnvDied, EnvGroup, close_env
from asyncrl.limits import usable_cores


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
        raise EnvDied(f"{config.name}: a worker died at its start, see its traceback") from error
    try:
        return EnvGroup(env, replace(config, id=config.name), num_envs)
    except BaseException:
        close_env(env)
        raise


def _make_vector_env(config: EnvConfig, num_envs: int) -> VectorEnv:
    if config.is_callable:
        make = _import(config.id) if isinstance(config.id, str) else config.id
        _check_callable(make, config.name)
        return make(num_envs, **config.kwargs)
    _find_id(config.id)
    kwargs = config.kwargs | config.atari
    if config.vectorization == "native":
        if config.is_ale:
            kwargs["num_threads"] = config.num_threads or min(num_envs, usable_cores())
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


def _check_callable(make: Any, name: str) -> None:
    """Refuse a class of single environments, and what cannot be called with num_envs."""
    if isinstance(make, type) and issubclass(make, gym.Env):
        raise ValueError(
            "env.id: expected a function of num_envs that makes a gymnasium.vector.VectorEnv, got "
            f"{name}, a class of single environments; wrap it as lambda num_envs: "
            f"SyncVectorEnv([{make.__name__}] * num_envs), or gymnasium.register it and give its id"
        )
    try:
        signature = inspect.signature(make)
    except (TypeError, ValueError):  # of what was written in C; or it is no callable
        return
    try:
        signature.bind_partial(1)
    except TypeError as error:
        raise ValueError(
            f"env.id: expected {name} to take num_envs, got ({', '.join(signature.parameters)}); "
            "write def make(num_envs): return SyncVectorEnv([make_one] * num_envs)"
        ) from error


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
            remedy = "pip install -e '.[atari]' in the project's folder"
            raise ValueError(f"env.id: {name!r} needs {remedy}") from error
        gym.register_envs(ale_py)
    if known_as.startswith("asyncrl/"):
        import asyncrl.example_envs as example_envs

        gym.register_envs(example_envs)
    try:
        gym.spec(known_as)
    except gym.error.Error as error:  # unregistered, malformed, or without its version
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
