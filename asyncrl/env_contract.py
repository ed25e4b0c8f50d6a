"""What every environment promises, looked at as it is made."""

from __future__ import annotations

import warnings
from typing import Any

from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv

from asyncrl.env_config import EnvConfig


def is_ale(env: VectorEnv) -> bool:
    """Whether they are ALE's own, perhaps wrapped."""
    return type(env.unwrapped).__module__.startswith("ale_py")


def check_vector_env(env: Any, config: EnvConfig, num_envs: int) -> None:
    """ValueError for what is no VectorEnv of so many, in one batch, with autoreset NEXT_STEP."""
    if not isinstance(env, VectorEnv):
        raise ValueError(
            f"env.id: expected {config.id} to make a gymnasium.vector.VectorEnv, got "
            f"{type(env).__name__}; wrap it as SyncVectorEnv([make_one] * num_envs)"
        )
    batch = env.unwrapped.batch_size if is_ale(env) else num_envs
    if env.num_envs != num_envs or batch != num_envs:
        raise ValueError(
            f"env.id: expected {config.id} to make {num_envs} environments stepped together, got "
            f"{env.num_envs} in batches of {batch}"
        )
    mode = env.metadata.get("autoreset_mode")
    if is_ale(env):
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


def check_observation_space(space: spaces.Space, config: EnvConfig, name: str = "obs") -> None:
    """ValueError for a space that unrolls cannot hold."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        named = isinstance(space, spaces.Dict)
        parts = space.spaces if named else dict(enumerate(space))
        wrong = [key for key in parts if named and not isinstance(key, str)]
        if wrong or not parts:
            got = f"the key {wrong[0]!r}" if wrong else f"{space}"
            raise ValueError(f"{config.id}: {name}: expected parts, named by strings, got {got}")
        for key, part in parts.items():
            check_observation_space(part, config, f"{name}[{key!r}]")
        return
    known = spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary
    if not isinstance(space, known) or space.dtype.kind not in "biuf":
        raise ValueError(
            f"{config.id}: {name}: expected Box, Discrete, MultiDiscrete, MultiBinary, or Dict or "
            f"Tuple of them, got {space}; wrap the environment to show one of these"
        )
