"""Returns and advantages: pure functions, time-major, shared by all algorithms.

Row t holds the reward and the ends that the action on observation t caused. `value` has one row
more, the value of every observation: behind an end, value[t+1] is that of its true final one. The
discount is gamma, or 0 where row t is terminated; nothing looks past a row that is terminated or
truncated. So a reset step behind an end, whatever it holds (also NaN), changes no row before it;
its own row means nothing and is left to the loss's mask.
"""

from __future__ import annotations

import torch
from torch import Tensor


def n_step(
    reward: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    bootstrap: Tensor,
    gamma: float,
    n: int,
) -> Tensor:
    """n-step targets (T, B): sum of up to n discounted rewards and the value behind them.

    reward, terminated, truncated: (T, B); bootstrap: (T+1, B), the value of each observation.
    A window that meets an end or row T stops there: a terminated one without a value, a truncated
    one with the value of its true final observation, bootstrap[t+1]. Carries the gradients of
    reward and bootstrap. Sutton and Barto 2018, ch. 7.
    """
    T = len(reward)
    _check_rows("bootstrap", bootstrap, reward)
    cut = terminated | truncated
    one_step = reward + gamma * bootstrap[1:].masked_fill(terminated, 0)
    target = one_step
    for _ in range(min(n, T) - 1):
        further = torch.cat([target[1:], bootstrap[T:]])  # from row T on there is only its value
        target = torch.where(cut, one_step, reward + gamma * further)
    return target


def n_step_return(
    reward: Tensor, steps: Tensor, terminated: Tensor, gamma: float
) -> tuple[Tensor, Tensor]:
    """(return, discount), both (N,), of windows that a replay has already cut at their ends.

    reward: (n, N), zero behind an end; steps: (N,), how many count; terminated: (N,). The target of
    a window is `return + discount * value of the observation after those steps`.
    """
    powers = gamma ** torch.arange(len(reward), device=reward.device, dtype=reward.dtype)
    return powers @ reward, gamma**steps * (~terminated).to(reward.dtype)


@torch.no_grad()
def gae(
    reward: Tensor,
    value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    lambda_: float,
) -> Tensor:
    """Advantages (T, B): TD errors, those of later rows weighted by (gamma * lambda_) a row.

    reward, terminated, truncated: (T, B); value: (T+1, B). A constant to the loss; the matching
    target of the value is `gae(...) + value[:-1]`. Schulman et al. 2016.
    """
    _check_rows("value", value, reward)
    cut = terminated | truncated
    td_error = reward + gamma * value[1:].masked_fill(terminated, 0) - value[:-1]
    return _trace(td_error, torch.full_like(td_error, gamma * lambda_), cut)


@torch.no_grad()
def vtrace(
    log_prob: Tensor,
    behaviour_log_prob: Tensor,
    reward: Tensor,
    value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    lambda_: float = 1.0,
    clip_rho: float = 1.0,
    clip_c: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(value_target, advantage), both (T, B), corrected for actions that another policy chose.

    log_prob, of the policy that learns, behaviour_log_prob, of the one that acted, reward,
    terminated, truncated: (T, B); value: (T+1, B). With rho = exp(log_prob - behaviour_log_prob),
    a TD error weighs min(clip_rho, rho) and is carried back by lambda_ * min(clip_c, rho) a row;
    the advantage is min(clip_rho, rho) * td_advantage(...). On-policy, value_target is
    gae(...) + value[:-1]. Constants to the loss. Espeholt et al. 2018, eq. 1 and section 4.2.
    """
    _check_rows("value", value, reward)
    rho = (log_prob - behaviour_log_prob).exp()
    clipped = rho.clamp(max=clip_rho)
    cut = terminated | truncated
    td_error = reward + gamma * value[1:].masked_fill(terminated, 0) - value[:-1]
    decay = gamma * lambda_ * rho.clamp(max=clip_c)
    value_target = value[:-1] + _trace(clipped * td_error, decay, cut)
    return value_target, clipped * td_advantage(
        reward, value_target, value, terminated, truncated, gamma
    )


@torch.no_grad()
def td_advantage(
    reward: Tensor,
    value_target: Tensor,
    value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
) -> Tensor:
    """(T, B): reward + gamma * next - value[t], the advantage of V-trace before its ratio.

    reward, value_target, terminated, truncated: (T, B); value: (T+1, B). `next` is
    value_target[t+1]; value[t+1] where row t is truncated or the last one; 0 where it is
    terminated. A constant to the loss. Espeholt et al. 2018, section 4.2.
    """
    _check_rows("value", value, reward)
    following = torch.cat([value_target[1:], value[-1:]])
    following = torch.where(truncated, value[1:], following).masked_fill(terminated, 0)
    return reward + gamma * following - value[:-1]


def _trace(error: Tensor, decay: Tensor, cut: Tensor) -> Tensor:
    """x (T, B) in place of `error`: x[t] = error[t] + decay[t] * x[t+1], but error[t] where cut.

    What lies behind a cut may be NaN.
    """
    rows, decays, cuts = error.unbind(), decay.to(error.dtype).unbind(), cut.unbind()
    for t in range(len(rows) - 2, -1, -1):
        rows[t].addcmul_(decays[t], rows[t + 1].masked_fill(cuts[t], 0))
    return error


def _check_rows(name: str, value: Tensor, reward: Tensor) -> None:
    expected = (len(reward) + 1, *reward.shape[1:])
    if value.shape != expected:
        raise ValueError(
            f"expected {name} of shape {expected}, one row more than reward, got "
            f"{tuple(value.shape)}; give the value of the observation behind the last row too"
        )
