"""Schedules: numbers that change over env steps, for policies, mixtures and algorithms."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite

import numpy as np


@dataclass(frozen=True)
class Linear:
    """From `start` to `end` over the first `steps` env steps, `end` ever after."""

    start: float
    end: float
    steps: int

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"expected a schedule of at least 1 env step, got {self.steps}")

    @property
    def turns(self) -> tuple[int, ...]:
        """Env steps where it has its least and greatest values."""
        return 0, self.steps

    def at(self, env_steps: int) -> float:
        done = min(max(env_steps / self.steps, 0.0), 1.0)
        return self.start + done * (self.end - self.start)


@dataclass(frozen=True)
class Piecewise:
    """`values[i]` from `boundaries[i - 1]` up to `boundaries[i]` env steps: one value more."""

    boundaries: tuple[int, ...]
    values: tuple[float, ...]

    def __post_init__(self):
        if len(self.values) != len(self.boundaries) + 1 or list(self.boundaries) != sorted(
            self.boundaries
        ):
            raise ValueError(
                "expected growing boundaries and one value more than boundaries, got "
                f"boundaries={self.boundaries} and values={self.values}"
            )

    @property
    def turns(self) -> tuple[int, ...]:
        return 0, *self.boundaries

    def at(self, env_steps: int) -> float:
        return self.values[int(np.searchsorted(self.boundaries, env_steps, side="right"))]


@dataclass(frozen=True)
class Exponential:
    """From `start` on, multiplied by `factor` every `period` env steps, smoothly, down to `end`."""

    start: float
    end: float
    factor: float
    period: int

    def __post_init__(self):
        if not 0 < self.end <= self.start or not 0 < self.factor < 1 or self.period < 1:
            raise ValueError(
                "expected 0 < end <= start, 0 < factor < 1 and a period of at least 1 env step, "
                f"got {self.start}, {self.end}, {self.factor} and {self.period}"
            )

    @property
    def turns(self) -> tuple[int, ...]:
        return 0, 2**62

    def at(self, env_steps: int) -> float:
        return max(self.start * self.factor ** (env_steps / self.period), self.end)


Schedule = float | Linear | Piecewise | Exponential
_SAMPLES = (0, *(2**k for k in range(40)))  # where a schedule of the user's own is asked


def value_at(schedule: Schedule, env_steps: int) -> float:
    """The value of a constant or a schedule after `env_steps`."""
    return schedule.at(env_steps) if hasattr(schedule, "at") else float(schedule)


def turns(schedule: Schedule) -> tuple[int, ...]:
    """Env steps at which its extremes show; powers of two where it does not say."""
    if not hasattr(schedule, "at"):
        return (0,)
    return getattr(schedule, "turns", _SAMPLES)


def check_range(
    name: str, schedule: Schedule, least: float = 0.0, most: float = inf, above: bool = False
) -> None:
    """ValueError where a number or a schedule is ever less than `least` (or, with `above`, as
    little), more than `most`, infinite or not a number."""
    for env_steps in turns(schedule):
        value = value_at(schedule, env_steps)
        enough = value > least if above else value >= least
        if not enough or not value <= most or not isfinite(value):
            bounds = f"above {least:g}" if above else f"of at least {least:g}"
            bounds += f" and at most {most:g}" if isfinite(most) else ""
            when = f" at {env_steps} env steps of {schedule}" if hasattr(schedule, "at") else ""
            raise ValueError(f"expected {name} {bounds}, got {value:g}{when}")
