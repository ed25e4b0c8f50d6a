"""Behaviour policies: how actors turn a model's outputs into actions.

    policy.initial_state(B) -> policy_state
    policy(outputs, policy_state, first, step, context, rng) -> (action, log_prob, policy_state)

All arrays are numpy with a leading B, and a policy is vectorised over environments. `first` (B)
says where an episode opens, `step` (B) counts env steps of each episode, `context` is what the
learner publishes beside the weights, `rng` is a counter-based generator made anew for every unroll.
A policy sees no weights, keeps no statistics and knows no process; `log_prob` is that of the action
under the behaviour that really chose it. A policy that refers to others of its mix by name has a
`check(names)`, which refuses names that are never drawn; one that is made of others has them as
`inside`, {name: policy}; one that is `blind` looks at nothing in outputs but their shapes, bounds
and which actions exist: it may be given those of an earlier row. More: switch_policies.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from asyncrl.sampling import epsilon_greedy, mode, preferences, sample, uniform, uniform_in_box
from asyncrl.schedules import check_range, turns, value_at


class Context(NamedTuple):
    """What the learner publishes for policies, and where the acting lane stands."""

    env_steps: int  # the learner's count: the clock of schedules
    lane: int = 0
    num_lanes: int = 1
    # By name in the mix: env steps of each policy's last episodes, up to 64, oldest first.
    recent_lengths: Mapping[str, np.ndarray] = {}


@dataclass(frozen=True)
class Sample:
    """Actions drawn from the model's own distribution, as on-policy algorithms want them."""

    def initial_state(self, num_envs: int) -> Any:
        return ()

    def __call__(self, outputs, state, first, step, context, rng):
        if "logits" not in outputs and "mean" not in outputs:
            raise ValueError(
                f"expected outputs 'logits' or 'mean', got {sorted(outputs)}: this model has no "
                "distribution of its own; use EpsilonGreedy or Softmax with Q-values"
            )
        return *sample(outputs, rng), state


@dataclass(frozen=True)
class Random:
    """Every action equally likely; those of a Box uniformly within its bounds."""

    blind = True

    def initial_state(self, num_envs: int) -> Any:
        return ()

    def __call__(self, outputs, state, first, step, context, rng):
        if "mean" in outputs:
            return *uniform_in_box(outputs, rng), state
        return *uniform(preferences(outputs), rng), state


@dataclass(frozen=True)
class Greedy:
    """The best action by Q-value or logit; in a Box the middle of the distribution.

    There its density is infinite: an importance ratio to it is 0, and no policy learns from it.
    """

    def initial_state(self, num_envs: int) -> Any:
        return ()

    def __call__(self, outputs, state, first, step, context, rng):
        action = mode(outputs)
        certain = np.inf if "mean" in outputs else 0.0
        return action, np.full(len(action), certain, np.float32), state


@dataclass(frozen=True)
class EpsilonGreedy:
    """A random action with probability epsilon, else the best: constant or annealed."""

    epsilon: Any = 0.05
    """From 0 to 1: a number, or a schedule over env steps."""

    def __post_init__(self):
        check_range("epsilon", self.epsilon, most=1)

    def initial_state(self, num_envs: int) -> Any:
        return ()

    def __call__(self, outputs, state, first, step, context, rng):
        epsilon = value_at(self.epsilon, context.env_steps)
        return *epsilon_greedy(preferences(outputs), epsilon, rng), state


@dataclass(frozen=True)
class EpsilonLadder:
    """An epsilon for each environment: base ** (1 + alpha i / (N-1)), Horgan et al. 2018."""

    base: float = 0.4
    alpha: float = 7.0

    def __post_init__(self):
        check_range("base", self.base, most=1)
        check_range("alpha", self.alpha)

    def initial_state(self, num_envs: int) -> Any:
        return ()

    def rungs(self, num_envs: int, context: Context) -> np.ndarray:
        """(B,) epsilons of one lane; i counts the environments of all lanes."""
        index = context.lane * num_envs + np.arange(num_envs)
        last = max(context.num_lanes * num_envs - 1, 1)
        return self.base ** (1 + self.alpha * index / last)

    def __call__(self, outputs, state, first, step, context, rng):
        values = preferences(outputs)
        return *epsilon_greedy(values, self.rungs(len(values), context), rng), state


@dataclass(frozen=True)
class Softmax:
    """Actions drawn by softmax(values / temperature): the policy itself if outputs are logits."""

    temperature: Any = 1.0
    """A positive number, or a schedule over env steps."""

    def __post_init__(self):
        check_range("temperature", self.temperature, above=True)

    def initial_state(self, num_envs: int) -> Any:
        return ()

    def __call__(self, outputs, state, first, step, context, rng):
        temperature = value_at(self.temperature, context.env_steps)
        return *sample({"logits": preferences(outputs) / temperature}, rng), state


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
        for env_steps in sorted({step for part in self.parts for step in turns(part.weight)}):
            self.weights(env_steps)
        drawn = tuple(
            part.name for part in self.parts
            if any(value_at(part.weight, env_steps) > 0 for env_steps in turns(part.weight))
        )  # fmt: skip
        for part in self.parts:
            getattr(part.policy, "check", lambda names: None)(drawn)
            if self.scope == "life":
                self._check_scope(part)

    def _check_scope(self, part: Part) -> None:
        """A game is booked whole on the part that played its last life, so lengths by policy say
        nothing where parts change within a game."""
        try:
            getattr(part.policy, "check", lambda names: None)(())  # refuses any name it refers to
        except ValueError:
            raise ValueError(
                f'expected a mixture scope of "game" for {part.name}, which looks at lengths by '
                'policy, got "life"; use "game", if need be in an environment whose episodes are '
                "lives"
            ) from None

    def check(self, names: tuple[str, ...]) -> None:
        """ValueError: asked of what is inside another policy."""
        raise ValueError(
            f"expected no Mixture inside another policy, got one of {self.names}; results are by "
            "the parts of one mixture: list all of them there, with their weights multiplied"
        )

    @property
    def blind(self) -> bool:
        return all(_is_blind(part.policy) for part in self.parts)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(part.name for part in self.parts)

    def weights(self, env_steps: int) -> np.ndarray:
        """(parts,) probabilities after `env_steps`."""
        weights = np.array([value_at(part.weight, env_steps) for part in self.parts])
        if not (weights >= 0).all() or not 0 < weights.sum() < np.inf:
            raise ValueError(
                "expected finite weights >= 0 with a sum > 0, got "
                f"{weights.tolist()} for {self.names} at {env_steps} env steps; give some part a "
                "positive weight there"
            )
        return weights / weights.sum()

    def initial_state(self, num_envs: int) -> MixtureState:
        parts = tuple(part.policy.initial_state(num_envs) for part in self.parts)
        return MixtureState(np.zeros(num_envs, np.uint8), parts)

    def __call__(self, outputs, state: MixtureState, first, step, context, rng):
        choice = state.choice
        if np.count_nonzero(first):
            drawn = rng.choice(len(self.parts), size=len(choice), p=self.weights(context.env_steps))
            choice = np.where(first, drawn, choice).astype(np.uint8)
        results = [
            part.policy(outputs, own, first, step, context, rng)
            for part, own in zip(self.parts, state.parts, strict=True)
        ]
        if len(results) == 1:
            action, log_prob, own = results[0]
            states = (own,)
        else:
            env, (actions, log_probs, states) = np.arange(len(choice)), zip(*results, strict=True)
            action = np.stack(actions)[choice, env]
            log_prob = np.stack(log_probs)[choice, env]
        if action.dtype.kind not in "iub" and "mean" not in outputs:  # the wire would cut them
            kinds = [str(result[0].dtype) for result in results]
            raise ValueError(f"expected integers as actions of {self.names}, got {kinds}")
        return action, log_prob, MixtureState(choice, states)


def _is_blind(policy: Any) -> bool:
    """Whether the class that says how it acts says so: one derived from it may look again."""
    acts = next(kind for kind in type(policy).__mro__ if "__call__" in vars(kind))
    return "blind" in vars(acts) and policy.blind


def as_mixture(policy) -> Mixture:
    """Any policy as a mixture, so that actors and reports know one kind only."""
    if isinstance(policy, Mixture):
        return policy
    return Mixture((Part(getattr(policy, "__name__", type(policy).__name__), policy),))


def unroll_rng(seed: int, lane: int, sequence: int) -> np.random.Generator:
    """The generator of one unroll, keyed by what is counted anyway: nothing to save or resume."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, lane, sequence])))
