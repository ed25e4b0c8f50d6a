"""Behaviour policies: how actors turn a model's outputs into actions.

    policy.initial_state(B) -> policy_state
    policy(outputs, policy_state, first, step, context, rng) -> (action, log_prob, policy_state)

All arrays are numpy with a leading B, and a policy is vectorised over environments. `first` (B)
says where an episode opens, `step` (B) counts env steps of each episode, `context` is what the
learner publishes beside the weights, `rng` is a counter-based generator made anew for every unroll.
A policy sees no weights, keeps no statistics and knows no process; `log_prob` is that of the action
under the behaviour that really chose it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


class Context(NamedTuple):
    """What the learner publishes for policies, and where the acting lane stands."""

    env_steps: int  # the learner's count: the clock of schedules
    lane: int = 0
    num_lanes: int = 1


# -- schedules ---------------------------------------------------------------------------------


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


Schedule = float | Linear | Piecewise


def value_at(schedule: Schedule, env_steps: int) -> float:
    """The value of a constant or a schedule after `env_steps`."""
    return schedule.at(env_steps) if hasattr(schedule, "at") else float(schedule)


# -- policies ----------------------------------------------------------------------------------


def preferences(outputs: dict) -> np.ndarray:
    """(B, A) numbers whose largest is the greedy action: Q-values, else logits."""
    return outputs["q"] if "q" in outputs else outputs["logits"]


def epsilon_greedy(
    values: np.ndarray, epsilon: np.ndarray | float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(action, log_prob): random with probability epsilon, a number or (B,), else the best."""
    B, A = values.shape
    greedy = values.argmax(1)
    explore = rng.random(B) < epsilon
    action = np.where(explore, rng.integers(A, size=B), greedy)
    probability = epsilon / A + (1 - epsilon) * (action == greedy)
    with np.errstate(divide="ignore"):
        return action, np.log(probability).astype(np.float32)


@dataclass(frozen=True)
class Random:
    """Every action equally likely."""

    def initial_state(self, num_envs: int) -> Any:
        return ()

    def __call__(self, outputs, state, first, step, context, rng):
        action, log_prob = epsilon_greedy(preferences(outputs), 1.0, rng)
        return action, log_prob, state


@dataclass(frozen=True)
class Greedy:
    """The best action by Q-value or logit."""

    def initial_state(self, num_envs: int) -> Any:
        return ()

    def __call__(self, outputs, state, first, step, context, rng):
        action = preferences(outputs).argmax(1)
        return action, np.zeros(len(action), np.float32), state


@dataclass(frozen=True)
class EpsilonGreedy:
    """A random action with probability epsilon, else the best: constant or annealed."""

    epsilon: Any = 0.05
    """A number, or a schedule over env steps."""

    def initial_state(self, num_envs: int) -> Any:
        return ()

    def __call__(self, outputs, state, first, step, context, rng):
        epsilon = value_at(self.epsilon, context.env_steps)
        action, log_prob = epsilon_greedy(preferences(outputs), epsilon, rng)
        return action, log_prob, state


@dataclass(frozen=True)
class EpsilonLadder:
    """An epsilon for each environment: base ** (1 + alpha i / (N-1)), Horgan et al. 2018."""

    base: float = 0.4
    alpha: float = 7.0

    def initial_state(self, num_envs: int) -> Any:
        return ()

    def rungs(self, num_envs: int, context: Context) -> np.ndarray:
        """(B,) epsilons of one lane; i counts the environments of all lanes."""
        index = context.lane * num_envs + np.arange(num_envs)
        last = max(context.num_lanes * num_envs - 1, 1)
        return self.base ** (1 + self.alpha * index / last)

    def __call__(self, outputs, state, first, step, context, rng):
        values = preferences(outputs)
        action, log_prob = epsilon_greedy(values, self.rungs(len(values), context), rng)
        return action, log_prob, state


@dataclass(frozen=True)
class Softmax:
    """Actions drawn by softmax(values / temperature): the policy itself if outputs are logits."""

    temperature: Any = 1.0
    """A positive number, or a schedule over env steps."""

    def initial_state(self, num_envs: int) -> Any:
        return ()

    def __call__(self, outputs, state, first, step, context, rng):
        scaled = preferences(outputs) / value_at(self.temperature, context.env_steps)
        scaled = scaled - scaled.max(1, keepdims=True)
        log_probs = scaled - np.log(np.exp(scaled).sum(1, keepdims=True))
        # Gumbel's trick: the arg max of log-probabilities plus this noise is a draw from them.
        action = (log_probs + rng.gumbel(size=scaled.shape)).argmax(1)
        log_prob = np.take_along_axis(log_probs, action[:, None], 1)[:, 0]
        return action, log_prob.astype(np.float32), state


class MixtureState(NamedTuple):
    """Which policy acts in each environment, and the state of each policy."""

    choice: np.ndarray  # (B,) uint8
    parts: tuple


@dataclass(frozen=True)
class Part:
    """One policy of a mixture: its name in every report, and its weight."""

    name: str
    policy: Any
    weight: Any = 1.0
    """A number or a schedule over env steps; weights need not sum to 1."""


@dataclass(frozen=True)
class Mixture:
    """Draws a policy for each environment at each game (or life), by weights that may change.

    Results are reported by the parts' names. All parts act on the whole batch and each environment
    takes the action of its own: cheap, and free of Python loops over environments.
    """

    parts: tuple[Part, ...]
    scope: str = "game"
    """"game": drawn where an episode opens; "life": also after each lost life."""

    def __post_init__(self):
        names = [part.name for part in self.parts]
        if not names or len(set(names)) != len(names) or len(names) > 255:
            raise ValueError(f"expected 1 to 255 parts with distinct names, got {names}")
        if self.scope not in ("game", "life"):
            raise ValueError(f'expected a mixture scope of "game" or "life", got {self.scope!r}')
        changes = {0}
        for part in self.parts:
            weight = part.weight
            changes |= {weight.steps} if isinstance(weight, Linear) else set()
            changes |= set(weight.boundaries) if isinstance(weight, Piecewise) else set()
        for env_steps in sorted(changes):
            self.weights(env_steps)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(part.name for part in self.parts)

    def weights(self, env_steps: int) -> np.ndarray:
        """(parts,) probabilities after `env_steps`."""
        weights = np.array([value_at(part.weight, env_steps) for part in self.parts])
        if not (weights >= 0).all() or not weights.sum() > 0:
            raise ValueError(
                f"expected weights >= 0 with a sum > 0, got {weights.tolist()} for {self.names} "
                f"at {env_steps} env steps; give some part a positive weight there"
            )
        return weights / weights.sum()

    def initial_state(self, num_envs: int) -> MixtureState:
        parts = tuple(part.policy.initial_state(num_envs) for part in self.parts)
        return MixtureState(np.zeros(num_envs, np.uint8), parts)

    def __call__(self, outputs, state: MixtureState, first, step, context, rng):
        choice = state.choice
        if first.any():
            drawn = rng.choice(len(self.parts), size=len(choice), p=self.weights(context.env_steps))
            choice = np.where(first, drawn, choice).astype(np.uint8)
        results = [
            part.policy(outputs, own, first, step, context, rng)
            for part, own in zip(self.parts, state.parts, strict=True)
        ]
        if len(results) == 1:
            action, log_prob, own = results[0]
            return action, log_prob, MixtureState(choice, (own,))
        env = np.arange(len(choice))
        action = np.stack([result[0] for result in results])[choice, env]
        log_prob = np.stack([result[1] for result in results])[choice, env]
        return action, log_prob, MixtureState(choice, tuple(result[2] for result in results))


def as_mixture(policy) -> Mixture:
    """Any policy as a mixture, so that actors and reports know one kind only."""
    if isinstance(policy, Mixture):
        return policy
    return Mixture((Part(type(policy).__name__, policy),))


def unroll_rng(seed: int, lane: int, sequence: int) -> np.random.Generator:
    """The generator of one unroll, keyed by what is counted anyway: nothing to save or resume."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, lane, sequence])))
