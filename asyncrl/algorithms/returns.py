"""Returns and advantages: pure functions, time-major, shared by all algorithms."""

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
    one with the value of its true final observation, bootstrap[t+1]. Sutton and Barto 2018, ch. 7.
    """
    T = len(reward)
    if bootstrap.shape != (T + 1, *reward.shape[1:]):
        raise ValueError(
            f"expected bootstrap of shape {(T + 1, *reward.shape[1:])}, one row more than reward, "
            f"got {tuple(bootstrap.shape)}"
        )
    alive = (~terminated).to(bootstrap.dtype)
    cut = terminated | truncated
    one_step = reward + gamma * alive * bootstrap[1:]
    target = one_step
    for _ in range(n - 1):
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
