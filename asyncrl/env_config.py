"""Which environment, by what rules: the configuration, and the two Atari protocols."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import tyro
from gymnasium.vector import VectorEnv

from asyncrl.foreign import name_of

# The first three are not for changing: the model stacks frames, the algorithm clips rewards, and
# episodic_life would restart the whole game at each lost life (life_loss_info does not).
_FIXED = dict(stack_num=1, reward_clipping=False, episodic_life=False)
_ALWAYS = ("reward_clipping", "episodic_life")  # of these, without a protocol too
_FRAMES = dict(frameskip=4, maxpool=True, grayscale=True, img_height=84, img_width=84)
_ATARI = _FIXED | _FRAMES | dict(max_num_frames_per_episode=108_000)
# classic: Mnih et al. 2015 as in Baselines, but for resets: Baselines makes 1 to 30 no-ops and then
# FIRE, ALE 0 to 29, or FIRE and 0 to 28. It does not fire after a lost life, so a greedy policy
# that never fires stands still until max_idle_steps ends the game.
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


@dataclass(frozen=True)
class EnvConfig:
    """Which environment, and how it is run."""

    id: Annotated[str | Callable[..., VectorEnv], tyro.conf.arg(constructor=str)] = (
        "ALE/Breakout-v5"
    )
    """A Gymnasium id ("ALE/Breakout-v5", "CartPole-v1", "module:Name-v0"; "asyncrl/..." are the
    package's own examples), an import string ("module:callable"), or any callable(num_envs,
    **kwargs) that returns a VectorEnv."""

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
    """Threads of ALE's pool, of each group (0: one an environment, as far as there are cores)."""

    atari: dict[str, Any] = field(default_factory=dict)
    """Parameters of ALE's vector env that differ from the protocol's own."""

    @property
    def ale_parameters(self) -> dict[str, Any]:
        """What ALE is made with, where this is an ALE environment."""
        return _ATARI | self.kwargs | self.atari

    @property
    def is_ale(self) -> bool:
        return isinstance(self.id, str) and self.id.rpartition(":")[2].startswith("ALE/")

    @property
    def is_callable(self) -> bool:
        """Whether `id` is or names a callable; "module:Name-v0" is a Gymnasium id."""
        if not isinstance(self.id, str):
            return True
        return ":" in self.id and self.id.rpartition(":")[2].isidentifier()

    @property
    def name(self) -> str:
        """The id, or what callable stands for it."""
        return self.id if isinstance(self.id, str) else name_of(self.id)

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
                f"{self.name} is called with num_envs to make a vector env itself; for single "
                "environments gymnasium.register them and give the id"
            )
        if protocol != "none" and not (self.is_ale and is_native):
            raise ValueError(
                f"env.protocol: {protocol!r} needs an id that starts with 'ALE/' and native "
                f"vectorization, got {self.name!r} and {vectorization!r}; use 'none'"
            )
        rules = _PROTOCOLS[protocol]
        atari = {name: self.kwargs.get(name, value) for name, value in rules.items()} | self.atari
        if atari and protocol == "none":
            raise ValueError("env.atari: the protocol 'none' has no parameters; use env.kwargs")
        kwargs = self.kwargs
        if self.is_ale and is_native and protocol == "none":
            kwargs = {name: _FIXED[name] for name in _ALWAYS} | kwargs
        for name, fixed in _FIXED.items():
            if (got := (kwargs | atari).get(name, fixed)) != fixed and (atari or name in _ALWAYS):
                raise ValueError(
                    f"env: expected {name}={fixed}, got {got!r}: the model stacks frames, "
                    "the algorithm clips rewards, life_loss_info=True ends returns at lost lives"
                )
        if (idle or 0) < 0 or self.num_threads < 0:
            raise ValueError("env: max_idle_steps and num_threads must be 0 or more")
        return replace(
            self,
            kwargs=kwargs,
            vectorization=vectorization,
            protocol=protocol,
            max_idle_steps=_MAX_IDLE_STEPS[protocol] if idle is None else idle,
            atari=atari,
        )
