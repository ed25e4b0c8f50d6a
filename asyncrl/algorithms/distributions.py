"""Distributions over actions, as a model's outputs describe them: pure functions in torch.

The keys of `outputs` say which distribution it is; "value" (..,), which every actor-critic gives,
says which axes lead, (T, B) or (B,):

    Discrete                    "logits" (.., A)                        action (..,)
    MultiDiscrete, MultiBinary  "logits" (.., D, A), absent ones -inf   action (.., D)
    Box                         "mean", "log_std", "low", "high", all (.., *shape) as the action

Integers are indices, from 0. A Box action stands for u ~ Normal(mean, exp(log_std)): where both
bounds are finite it is low + (tanh(u) + 1) / 2 * (high - low), else u itself. Its log-probability
is the density of u alone: the Jacobian of the squashing does not depend on the policy, so it
cancels in every ratio and in every gradient.
"""

from __future__ import annotations

from math import log, pi

import torch
from torch import Tensor


def log_prob(outputs: dict[str, Tensor], action: Tensor) -> Tensor:
    """(..,) log-probability of whole actions, as they are stored; float32 or wider.

    Discrete actions may be of any integer dtype. ValueError for outputs without a distribution and
    for actions of another shape.
    """
    if _is_box(outputs):
        mean, log_std = _wide(outputs["mean"]), _wide(outputs["log_std"])
        _check_shape(action, mean.shape)
        u = unsquash(action, outputs["low"], outputs["high"]).to(mean.dtype)
        scaled = (u - mean) * torch.exp(-log_std)
        return _sum(-0.5 * scaled**2 - log_std - 0.5 * log(2 * pi), outputs)
    log_probs = _log_probs(outputs)
    _check_shape(action, log_probs.shape[:-1])
    return _sum(log_probs.gather(-1, action.long().unsqueeze(-1)), outputs)


def entropy(outputs: dict[str, Tensor]) -> Tensor:
    """(..,) entropy in nats of whole actions: of u for a Box, else of the categories."""
    if _is_box(outputs):
        return _sum(_wide(outputs["log_std"]) + 0.5 * log(2 * pi) + 0.5, outputs)
    log_probs = _log_probs(outputs)
    # An absent category adds 0 * -inf: a finite stand-in keeps value and gradient at 0.
    present = log_probs.masked_fill(log_probs == -torch.inf, 0)
    return _sum(-log_probs.exp() * present, outputs)


def _log_probs(outputs: dict[str, Tensor]) -> Tensor:
    return torch.log_softmax(_wide(outputs["logits"]), -1)


def unsquash(action: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The u of Box actions, float64 and always finite; action, low, high: (.., *shape).

    Actors do the same in numpy. atanh magnifies rounding so much near a bound that both need
    float64 to agree.
    """
    bounded = torch.isfinite(low) & torch.isfinite(high)
    action = action.double()
    low = torch.where(bounded, low, -1).double()
    high = torch.where(bounded, high, 1).double()
    x = (2 * (action - low) / (high - low) - 1).clamp(-1 + 1e-6, 1 - 1e-6)
    return torch.where(bounded, torch.atanh(x), action)


def _is_box(outputs: dict[str, Tensor]) -> bool:
    if "value" not in outputs or not outputs.keys() & {"mean", "logits"}:
        raise ValueError(
            'expected outputs "value" and "logits", or "value", "mean", "log_std", "low" and '
            f'"high", got {sorted(outputs)}; use a model with an actor-critic head'
        )
    return "mean" in outputs


def _check_shape(action: Tensor, expected: torch.Size) -> None:
    if action.shape != expected:
        raise ValueError(
            f"expected actions of shape {tuple(expected)}, got {tuple(action.shape)}; give "
            "actions of the space that the model was built for"
        )


def _wide(tensor: Tensor) -> Tensor:
    """At least float32: in bfloat16 a ratio of probabilities would be off by percents."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _sum(terms: Tensor, outputs: dict[str, Tensor]) -> Tensor:
    """(..,): the sum over all axes behind the leading ones."""
    return terms.reshape(*outputs["value"].shape, -1).sum(-1)
