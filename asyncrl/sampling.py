"""From a model's outputs to actions and their log-probabilities, in numpy, for whoever acts.

Discrete: {"q" or "logits": (B, A)} -> integers (B,). MultiDiscrete, MultiBinary: "logits" of
(B, D, A), -inf where one of the D has fewer than A -> (B, D). Box: {"mean", "log_std", "low",
"high"}, each (B, *action) -> float32 (B, *action): u is drawn from Normal(mean, exp(log_std));
tanh takes it into the box where both bounds are finite, elsewhere it is the action. Its log_prob
is the density of u alone, at the u that leads to the float32 action: learners compute the same
(algorithms/distributions.py).
"""

from __future__ import annotations

import math

import numpy as np


def preferences(outputs: dict) -> np.ndarray:
    """(B, A) or (B, D, A) numbers whose largest is the greedy action: Q-values, else logits."""
    if "q" in outputs or "logits" in outputs:
        return outputs["q"] if "q" in outputs else outputs["logits"]
    raise ValueError(
        f"expected outputs 'q' or 'logits' of discrete actions, got {sorted(outputs)}; use Sample, "
        "Greedy or Random where actions are those of a Box"
    )


def draw(outputs: dict, rng: np.random.Generator) -> np.ndarray:
    """Actions from the model's own distribution."""
    if "mean" in outputs:
        mean, log_std = outputs["mean"], outputs["log_std"]
        return _squash(mean + np.exp(log_std) * rng.standard_normal(mean.shape), outputs)
    # Gumbel's trick: the arg max of logits plus this noise is a draw from their softmax.
    return (outputs["logits"] + rng.gumbel(size=outputs["logits"].shape)).argmax(-1)


def mode(outputs: dict) -> np.ndarray:
    """The likeliest actions (of u where they are continuous), or the best by Q-value."""
    if "mean" in outputs:
        return _squash(outputs["mean"], outputs)
    return preferences(outputs).argmax(-1)


def log_prob(outputs: dict, action: np.ndarray) -> np.ndarray:
    """(B,) float32 of actions under the model's own distribution."""
    if "mean" in outputs:
        bounded, low, high = _box(outputs)
        u = np.where(bounded, np.arctanh(_place(action, low, high)), action).astype(np.float32)
        scaled = (u - outputs["mean"]) * np.exp(-outputs["log_std"])
        log_probs = -0.5 * scaled**2 - outputs["log_std"] - 0.5 * math.log(2 * math.pi)
        return _total(log_probs).astype(np.float32)
    logits = outputs["logits"]
    shifted = logits - logits.max(-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_probs, action[..., None], -1)
    return _total(chosen).astype(np.float32)


def sample(outputs: dict, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(action, log_prob) from the model's own distribution; ValueError where it is none."""
    action = draw(outputs, rng)
    log_probs = log_prob(outputs, action)
    if not np.isfinite(log_probs).all():
        raise ValueError(
            f"expected actions of finite log-probability, got {log_probs.tolist()}: the model's "
            "outputs are not finite, or it is certain beyond float32; look at its losses"
        )
    return action, log_probs


def epsilon_greedy(
    values: np.ndarray, epsilon: np.ndarray | float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(action, log_prob): random with probability epsilon, a number or (B,), else the best.

    values: (B, A), or (B, D, A) for vectors of actions, which are random as a whole. No action
    whose value is -inf is ever taken at random.
    """
    exists, greedy = values != -np.inf, values.argmax(-1)
    random = np.where(exists, rng.random(values.shape), -1).argmax(-1)
    explores = rng.random(len(values)) < epsilon
    explores = explores if greedy.ndim == 1 else explores[:, None]
    action = np.where(explores, random, greedy)
    is_greedy = (action == greedy).reshape(len(values), -1).all(1)
    with np.errstate(divide="ignore"):
        log_probs = np.log(epsilon) - _total(np.log(exists.sum(-1)))  # drawn at random
        either = np.logaddexp(log_probs, np.log1p(-np.asarray(epsilon)))
    return action, np.where(is_greedy, either, log_probs).astype(np.float32)


def uniform(values: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(action, log_prob): every action (B) or (B, D) whose value is not -inf alike."""
    if np.count_nonzero(values == -np.inf):
        return epsilon_greedy(values, 1.0, rng)
    *shape, num_actions = values.shape
    log_prob = -math.prod(shape[1:]) * math.log(num_actions)
    action = (num_actions * rng.random(shape)).astype(np.int64)  # a third of rng.integers' cost
    return action, np.full(shape[0], log_prob, np.float32)


def uniform_in_box(outputs: dict, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(action, log_prob): everywhere in the box alike; the density is, as always, that of u."""
    bounded, low, high = _box(outputs)
    if not bounded.all():
        raise ValueError(
            "expected a Box action space with finite bounds, got infinite ones, and nothing is "
            "uniform between those; bound the actions in the environment, or use Sample"
        )
    action = _into_box(rng.uniform(-1, 1, low.shape), low, high)
    x = _place(action, low, high)
    # x = tanh(u) has density 1/2, so u has 1/2 dx/du = (1 - x^2) / 2.
    return action, _total(np.log((1 - x) * (1 + x) / 2)).astype(np.float32)


def _box(outputs: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where both bounds are finite, and the bounds in float64: -1 and 1 elsewhere."""
    low, high = (np.asarray(outputs[name], np.float64) for name in ("low", "high"))
    bounded = np.isfinite(low) & np.isfinite(high)
    return bounded, np.where(bounded, low, -1.0), np.where(bounded, high, 1.0)


def _into_box(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return np.clip(low + (x + 1) / 2 * (high - low), low, high).astype(np.float32)


def _place(action: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Actions as x = tanh(u), from -1 to 1 but never quite; float64, for atanh magnifies errors."""
    return np.clip(2 * (action - low) / (high - low) - 1, -1 + 1e-6, 1 - 1e-6)


def _squash(u: np.ndarray, outputs: dict) -> np.ndarray:
    bounded, low, high = _box(outputs)
    return np.where(bounded, _into_box(np.tanh(u), low, high), u.astype(np.float32))


def _total(log_probs: np.ndarray) -> np.ndarray:
    """(B,) sums over what belongs to one action."""
    return log_probs.reshape(len(log_probs), -1).sum(1)
