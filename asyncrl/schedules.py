"""Schedules: numbers that change over env steps, for policies, mixtures and algorithms."""

from __future__ import annotations

from dataclasses import dataclass

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

    def at(self, env_steps: int) -> float:
        return max(self.start * self.factor ** (env_steps / self.period), self.end)


Schedule = float | Linear | Piecewise | Exponential


def value_at(schedule: Schedule, env_steps: int) -> float:
    """The value of a constant or a schedule after `env_steps`."""
    return schedule.at(env_steps) if hasattr(schedule, "at") else float(schedule)
