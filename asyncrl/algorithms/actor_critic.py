"""What A2C and PPO share: advantages of a rollout and the parts of their losses.

All losses are means over valid steps at fixed shapes: a reset step has weight 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from asyncrl.algorithms.distributions import entropy, log_prob
from asyncrl.algorithms.gradient import Metrics
from asyncrl.algorithms.returns import gae, n_step, td_advantage, vtrace
from asyncrl.schedules import check_range
from asyncrl.stores.rollout import Rollout, RolloutConfig
from asyncrl.types import tree_map

Estimator = Literal["gae", "n_step", "vtrace"]


class Targets(NamedTuple):
    """What one update learns towards, all (T, N) and without gradient."""

    advantage: Tensor
    value: Tensor


def targets(
    estimator: Estimator,
    rollout: Rollout,
    value: Tensor,
    current_log_prob: Tensor | None,
    gamma: float,
    lambda_: float,
    n: int,
    reward_clip: float,
    clip_rho: float = 1.0,
) -> Targets:
    """Advantages and value targets of a rollout.

    value: (T+1, N) of every observation; current_log_prob: (T, N) of the actions by the policy that
    learns, needed by V-trace alone. The advantage of V-trace comes without its importance ratio:
    the policy's loss has one.
    """
    reward = rollout.reward
    if reward_clip:
        reward = reward.clamp(-reward_clip, reward_clip)
    ends = rollout.terminated, rollout.truncated
    if estimator == "gae":
        advantage = gae(reward, value, *ends, gamma, lambda_)
        return Targets(advantage, advantage + value[:-1])
    if estimator == "n_step":
        target = n_step(reward, *ends, value, gamma, n)
        return Targets(target - value[:-1], target)
    target, _ = vtrace(
        current_log_prob, rollout.log_prob, reward, value, *ends, gamma, lambda_, clip_rho
    )
    return Targets(td_advantage(reward, target, value, *ends, gamma), target)


class Mask:
    """Which steps of a batch are valid, and means over those; what is not valid may even be nan.

    Counted once for all parts of a loss.
    """

    def __init__(self, valid: Tensor):
        # Most batches are valid as a whole, and on a CPU it costs next to nothing to know it.
        may_ask = valid.device.type == "cpu" and not torch.compiler.is_compiling()
        if may_ask and valid.all():
            self.invalid, self.count = None, max(1, valid.numel())
        else:
            self.invalid, self.count = ~valid, valid.sum().clamp(min=1)

    def zero(self, values: Tensor) -> Tensor:
        """0 where not valid. Constants of a loss need it: nan times a gradient of 0 is nan."""
        return values if self.invalid is None else values.masked_fill(self.invalid, 0.0)

    def mean(self, values: Tensor) -> Tensor:
        return self.zero(values).sum() / self.count

    def mean_of_zeroed(self, values: Tensor) -> Tensor:
        """The mean of what is 0 where it is not valid."""
        return values.sum() / self.count


def importance_ratio(current: Tensor, behaviour: Tensor) -> Tensor:
    """pi / mu of actions from their log-probabilities, finite also for an impossible action."""
    return (current - behaviour).clamp(-20, 20).exp()


def divergence(ratio: Tensor, mask: Mask) -> Tensor:
    """Approximate KL of whoever acted from the policy that learns: the mean of (r - 1) - log r
    (Schulman 2020)."""
    return mask.mean(ratio - 1 - ratio.log())


def clipped_share(ratio: Tensor, mask: Mask, clip_ratio: float) -> Tensor:
    """Of valid steps, those whose ratio is more than `clip_ratio` away from 1."""
    return mask.mean(((ratio - 1).abs() > clip_ratio).float())


def normalize(advantage: Tensor, mask: Mask) -> Tensor:
    """Mean 0 and standard deviation 1 over valid steps."""
    if mask.invalid is None:  # half the operations, which a tiny net's step notices
        variance, mean = torch.var_mean(advantage, correction=0)
        return (advantage - mean) / (variance.sqrt() + 1e-8)
    centred = advantage - mask.mean(advantage)
    return centred / (mask.mean(centred.square()).sqrt() + 1e-8)


def explained_variance(value: Tensor, target: Tensor, mask: Mask) -> Tensor:
    """1 - Var(target - value) / Var(target) over valid steps: 1 is a perfect critic."""
    error = target - value
    error_variance = mask.mean((error - mask.mean(error)).square())
    return 1 - error_variance / mask.mean((target - mask.mean(target)).square()).clamp(min=1e-8)


class Losses(NamedTuple):
    """Of a batch: the loss, with its graph, and what it is made of, of each step (T, N)."""

    loss: Tensor
    policy: Tensor  # 0 where not valid, as is the next
    value: Tensor
    ratio: Tensor  # importance ratio
    outputs: dict[str, Tensor]  # (T, N, ...) of the model

    def means(self, mask: Mask) -> Metrics:
        """Over valid steps, for reports."""
        return {
            "loss/policy": partial(mask.mean_of_zeroed, self.policy),
            "loss/value": partial(mask.mean_of_zeroed, self.value),
            "loss/entropy": lambda: mask.mean(entropy(self.outputs)),
        }


def losses_of(
    policy: Tensor,
    value: Tensor,
    ratio: Tensor,
    outputs: dict[str, Tensor],
    mask: Mask,
    value_coef: float,
    entropy_coef: float,
) -> Losses:
    """From each step's policy loss and value loss, both 0 where not valid, importance ratio, and
    the model's outputs, for their entropy: one mean for all of them."""
    loss = policy + value_coef * value
    if entropy_coef:
        loss = loss - entropy_coef * mask.zero(entropy(outputs))
    known = {name: output.detach() for name, output in outputs.items()}
    parts = policy.detach(), value.detach(), ratio.detach(), known
    return Losses(mask.mean_of_zeroed(loss), *parts)


def evaluate(
    forward: Callable[..., dict[str, Tensor]], rollout: Rollout, rows: int
) -> tuple[Tensor, Tensor]:
    """(value (T+1, N), log_prob (T, N)) of a rollout, without gradient.

    forward(obs, first, state) gives a model's outputs. About `rows` observations at a time go
    through it, whole sequences always.
    """
    T, N = rollout.action.shape[:2]
    columns = max(1, rows // T)
    values, log_probs = [], []
    with torch.no_grad():
        for begin in range(0, N, columns):
            envs = slice(begin, begin + columns)
            obs = tree_map(lambda leaf: leaf[:, envs], rollout.obs)  # noqa: B023
            state = tree_map(lambda leaf: leaf[envs], rollout.state)  # noqa: B023
            outputs = forward(obs, rollout.first[:, envs], state)
            values.append(outputs["value"])
            acted = {name: output[:T] for name, output in outputs.items()}
            log_probs.append(log_prob(acted, rollout.action[:, envs]))
    return torch.cat(values, 1), torch.cat(log_probs, 1)


def return_scale(model: nn.Module) -> Tensor | float:
    """What advantages and errors of the value are divided by (Hessel et al. 2019): 1 unless the
    model normalises returns."""
    return getattr(model, "return_scale", 1.0)


def renormalize(model: nn.Module, value_target: Tensor, valid: Tensor) -> None:
    """Let a model that normalises returns see value targets (T, N)."""
    if hasattr(model, "renormalize"):
        model.renormalize(value_target, valid)


def update_statistics(model: nn.Module, rollout: Rollout) -> None:
    """Let a model that normalises observations see a rollout that it has learned from.

    Afterwards, not before: acting and learning on one rollout use the same statistics.
    """
    if hasattr(model, "update_statistics"):
        T = len(rollout.action)
        model.update_statistics(tree_map(lambda leaf: leaf[:T], rollout.obs), rollout.valid)


def check_settings(
    rollout: RolloutConfig, gamma: float, lambda_: float, n_step: int, **at_least_0: Any
) -> None:
    """ValueError for a store or numbers that cannot be."""
    if not isinstance(rollout, RolloutConfig):
        raise ValueError(
            f"expected a RolloutConfig for rollout, got {type(rollout).__name__}: on-policy "
            "algorithms learn from each unroll once, in order; a replay, uniform or prioritised, "
            "is DQNConfig's"
        )
    if not (0 <= gamma <= 1 and 0 <= lambda_ <= 1 and n_step >= 1):
        raise ValueError(
            "expected 0 <= gamma <= 1, 0 <= lambda_ <= 1 and n_step >= 1, got "
            f"{gamma}, {lambda_} and {n_step}"
        )
    for name, value in at_least_0.items():
        check_range(name, value)
