"""Policies that mix others within an episode, and one that explores where it is unsure.

    Certainty       actions nearly as good as the best are drawn nearly as often
    RandomSwitch    two policies that take over from each other at random
    Switch          one policy nearly up to where episodes of late have ended, then another

`Switch` is decided for each environment as its episode opens; nothing here loops over environments.
What the two policies inside would do is worked out for all environments at each step, so both keep
their memories, and the action and log-probability are those of the one that acts. All three follow
the action selection of Quickblink's RLframework (2021).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from asyncrl.sampling import preferences, sample
from asyncrl.schedules import check_range, value_at


@dataclass(frozen=True)
class Certainty:
    """Actions drawn in proportion to relu(value - best value + margin) + base.

    The best has margin + base; what lies `margin` or more below it has `base` only. Where all
    values are close it explores, where one stands out it is nearly greedy.
    """

    margin: Any = 1.0
    """In units of the values: a positive number, or a schedule over env steps."""
    base: Any = 0.02
    """At least 0: a number, or a schedule over env steps."""

    def __post_init__(self):
        check_range("margin", self.margin, above=True)
        check_range("base", self.base)

    def initial_state(self, num_envs: int) -> Any:
        return ()

    def __call__(self, outputs, state, first, step, context, rng):
        values = preferences(outputs)
        margin, base = (value_at(part, context.env_steps) for part in (self.margin, self.base))
        scores = np.maximum(values - values.max(-1, keepdims=True) + margin, 0) + base
        scores = np.where(values == -np.inf, 0, scores)  # actions that are not there
        with np.errstate(divide="ignore"):
            return *sample({"logits": np.log(scores)}, rng), state


class RandomSwitchState(NamedTuple):
    """Which of the two acts in each environment, and the state of both."""

    other: np.ndarray  # (B,) bool: the second one acts
    parts: tuple


@dataclass(frozen=True)
class RandomSwitch:
    """Two policies: `one` opens each episode, and before each further step they change places with
    the given probability. Each stays for 1 / probability env steps on average."""

    one: Any
    other: Any
    probability: Any = 0.05
    """From 0 to 1: a number, or a schedule over env steps."""

    def __post_init__(self):
        check_range("probability", self.probability, most=1)

    @property
    def inside(self) -> dict[str, Any]:
        return {"one": self.one, "other": self.other}

    def check(self, names: tuple[str, ...]) -> None:
        check_inside(self.inside, names)

    def initial_state(self, num_envs: int) -> RandomSwitchState:
        parts = self.one.initial_state(num_envs), self.other.initial_state(num_envs)
        return RandomSwitchState(np.zeros(num_envs, bool), parts)

    def __call__(self, outputs, state: RandomSwitchState, first, step, context, rng):
        changes = rng.random(len(first)) < value_at(self.probability, context.env_steps)
        other = ~first & (state.other ^ changes)
        policies = self.one, self.other
        *acted, parts = act(policies, state.parts, other, outputs, first, step, context, rng)
        return *acted, RandomSwitchState(other, parts)


class SwitchState(NamedTuple):
    """Up to which step of its episode `before` acts in each environment; the state of both."""

    switch_at: np.ndarray  # (B,) int64, never negative
    parts: tuple


@dataclass(frozen=True)
class Switch:
    """Follows `before` until `margin` env steps before the length of a recent episode of the
    policy called `reference`, then `after`: explores near the frontier of what is mastered.

    As an episode opens, one of the reference's last 64 episodes is drawn for it, each as likely.
    While the reference has not ended any, `initial_length` stands for all of them; by default that
    has `after` act from the start, as there is no frontier yet. Where a length is less than
    `margin`, `after` acts from the start too. A mixture that draws at each life is refused:
    lengths are those of whole games.
    """

    before: Any
    after: Any
    reference: str
    """The name of a policy of the same mixture; its own is possible."""
    margin: int = 10
    initial_length: int = 0

    def __post_init__(self):
        if not isinstance(self.reference, str) or not self.reference:
            raise ValueError(
                "expected the name of a policy of the mixture as reference, got "
                f"{self.reference!r}; its recent episodes say where to switch"
            )
        if self.margin < 0 or self.initial_length < 0:
            raise ValueError(
                "expected margin and initial_length of at least 0 env steps, got "
                f"{self.margin} and {self.initial_length}"
            )

    @property
    def inside(self) -> dict[str, Any]:
        return {"before": self.before, "after": self.after}

    def check(self, names: tuple[str, ...]) -> None:
        """ValueError where the reference is none of those that the mixture ever draws."""
        if self.reference not in names:
            raise ValueError(
                f"expected a reference that the mixture draws, got {self.reference!r} for "
                f"{names}; name one of them, or add Part({self.reference!r}, ...)"
            )
        check_inside(self.inside, names)

    def initial_state(self, num_envs: int) -> SwitchState:
        parts = self.before.initial_state(num_envs), self.after.initial_state(num_envs)
        return SwitchState(np.zeros(num_envs, np.int64), parts)

    def __call__(self, outputs, state: SwitchState, first, step, context, rng):
        switch_at = state.switch_at
        if first.any():
            lengths = context.recent_lengths.get(self.reference, ())
            drawn = rng.choice(lengths if len(lengths) else [self.initial_length], len(first))
            switch_at = np.where(first, np.maximum(drawn - self.margin, 0), switch_at)
        policies, after = (self.before, self.after), step >= switch_at
        *acted, parts = act(policies, state.parts, after, outputs, first, step, context, rng)
        return *acted, SwitchState(switch_at, parts)


def act(policies: tuple, states: tuple, other: np.ndarray, outputs: dict, *rest) -> tuple:
    """(action, log_prob, states) of two policies: the second's where `other` (B,) is True."""
    results = [policy(outputs, own, *rest) for policy, own in zip(policies, states, strict=True)]
    (action, log_prob, one), (other_action, other_log_prob, two) = results
    wide = other.reshape(-1, *(1,) * (action.ndim - 1))
    action = np.where(wide, other_action, action)
    return action, np.where(other, other_log_prob, log_prob), (one, two)


def check_inside(policies: dict[str, Any], names: tuple[str, ...]) -> None:
    """Have policies inside a policy check the names they refer to."""
    for policy in policies.values():
        getattr(policy, "check", lambda names: None)(names)
