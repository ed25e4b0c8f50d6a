"""Targets and losses of the value-based family: pure functions over tensors of any leading axes.

What is known of the return of each action is `values` (.., A, M), equally likely unless there are
`probabilities` (.., A, M) beside them. `head` says how a model's outputs hold it:

    "q"      one value, its mean             C51  probabilities of K fixed values
    QR, IQN  K quantiles

So one formula serves all of them: a target's values are reward + discount * values, whichever
action (or mixture of actions) they are taken from.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from asyncrl.models.return_heads import C51, midpoints


class Return(NamedTuple):
    """A distribution of returns."""

    values: Tensor  # (.., M)
    probabilities: Tensor | None = None  # (.., M); None: equally likely


# -- what the next state is worth ----------------------------------------------------------------


def return_of(outputs: dict[str, Tensor], head: Any, rescaled: bool = False) -> Return:
    """The return of each action, (.., A, M), by a model's outputs; in true units also where those
    are `rescale`d."""
    probabilities = None
    if isinstance(head, C51):
        probabilities = outputs["logits_of_return"].softmax(-1)
        values = head.atoms(probabilities.device).expand_as(probabilities)
    else:
        values = outputs["q"].unsqueeze(-1) if head == "q" else outputs["quantiles"]
    return Return(unrescale(values) if rescaled else values, probabilities)


def pick(numbers: Tensor, action: Tensor) -> Tensor:
    """(.., M) of (.., A, M) at action (..) int64."""
    index = action[..., None, None].expand(*action.shape, 1, numbers.shape[-1])
    return numbers.gather(-2, index).squeeze(-2)


def greedy_return(
    outputs: dict[str, Tensor], head: Any, q: Tensor, rescaled: bool = False
) -> Return:
    """(.., M) return of the best action by q (.., A): the outputs' own, or for double Q-learning
    those of another net (van Hasselt et al. 2016)."""
    best = q.argmax(-1)
    values, probabilities = return_of(outputs, head, rescaled)
    chosen = None if probabilities is None else pick(probabilities, best)
    return Return(pick(values, best), chosen)


def soft_return(
    outputs: dict[str, Tensor], head: Any, temperature: float, rescaled: bool = False
) -> Return:
    """(.., M) return of the policy softmax(q / temperature), with its entropy as a reward.

    Munchausen's next value (Vieillard et al. 2020). Quantiles, as there, are averaged over actions
    at equal fractions; a C51 return is the mixture itself, M = A * K.
    """
    values, probabilities = return_of(outputs, head, rescaled)
    log_policy = scaled_log_policy(outputs["q"], temperature, rescaled).unsqueeze(-1)
    policy = (log_policy / temperature).exp()
    values = values - log_policy
    if probabilities is None:
        return Return((policy * values).sum(-2))
    return Return(values.flatten(-2), (policy * probabilities).flatten(-2))


def scaled_log_policy(q: Tensor, temperature: float, rescaled: bool = False) -> Tensor:
    """temperature * log softmax(q / temperature), (.., A)."""
    q = unrescale(q) if rescaled else q
    return temperature * torch.log_softmax(q / temperature, -1)


def munchausen_reward(
    q: Tensor, action: Tensor, temperature: float, clip: float, rescaled: bool = False
) -> Tensor:
    """(..) scaled log-probability of the action taken, no less than `clip`: times alpha, a reward
    that Munchausen adds (Vieillard et al. 2020)."""
    log_policy = scaled_log_policy(q, temperature, rescaled)
    return log_policy.gather(-1, action.unsqueeze(-1)).squeeze(-1).clamp(clip, 0)


def rescale(x: Tensor, epsilon: float = 1e-3) -> Tensor:
    """h(x) = sign(x) (sqrt(|x| + 1) - 1) + epsilon x (Pohlen et al. 2018), exact near 0."""
    return x / ((x.abs() + 1).sqrt() + 1) + epsilon * x


def unrescale(y: Tensor, epsilon: float = 1e-3) -> Tensor:
    """The inverse of `rescale`, without cancellation: with z = sqrt(|x| + 1) it solves
    epsilon z^2 + z = |y| + 1 + epsilon and returns sign(y) (z^2 - 1)."""
    a = y.abs() + 1 + epsilon
    z = 2 * a / (1 + (1 + 4 * epsilon * a).sqrt())
    return y * (z + 1) / (1 + epsilon * (z + 1))


def windows(
    reward: Tensor, terminated: Tensor, truncated: Tensor, gamma: float, n: int, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(return, discount, end), all (rows, N), of the windows of up to n steps that begin in the
    first `rows` rows of reward, terminated, truncated (T, N).

    The target of row t is return[t] + discount[t] * value of the observation of row end[t]. A
    window that meets an end or row T stops there; what lies behind may be NaN.
    """
    T, N = reward.shape
    total, discount = torch.zeros_like(reward[:rows]), torch.ones_like(reward[:rows])
    end = torch.arange(rows, device=reward.device).unsqueeze(1).repeat(1, N)
    running = torch.ones(rows, N, dtype=torch.bool, device=reward.device)
    for step in range(min(n, T)):
        count = min(rows, T - step)  # rows whose window reaches this step within row T
        running = running[:count]
        at = slice(step, step + count)
        total[:count] += torch.where(running, gamma**step * reward[at], 0.0)
        end[:count] += running
        discount[:count] *= torch.where(running, gamma * (~terminated[at]).to(reward.dtype), 1.0)
        running = running & ~(terminated[at] | truncated[at])
    return total, discount, end


# -- losses, one for each transition -------------------------------------------------------------


def return_loss(
    outputs: dict[str, Tensor], head: Any, action: Tensor, target: Return, huber: bool
) -> tuple[Tensor, Tensor]:
    """(loss, error), both (..), of the action's return against a fixed target, (.., M).

    The error, without gradient, is what prioritised replay goes by: the TD error of a mean, else
    the loss itself.
    """
    if head == "q":
        chosen = outputs["q"].gather(-1, action.unsqueeze(-1))
        loss = nn.functional.huber_loss if huber else nn.functional.mse_loss
        loss = loss(chosen, target.values, reduction="none")
        return loss.squeeze(-1), (target.values - chosen).detach().squeeze(-1)
    if isinstance(head, C51):
        logits = pick(outputs["logits_of_return"], action)
        loss = categorical_loss(logits, project(*target, head.atoms(logits.device)))
    else:
        quantiles = pick(outputs["quantiles"], action)
        taus = outputs.get("taus", midpoints(quantiles.shape[-1], quantiles.device))
        loss = quantile_loss(quantiles, taus, target.values, huber)
    return loss, loss.detach()


def project(values: Tensor, probabilities: Tensor, atoms: Tensor) -> Tensor:
    """(.., K) probabilities of equally spaced atoms (K,): each value's (.., M) go to its two
    neighbours by nearness, those beyond the ends to the ends. Bellemare et al. 2017, eq. 7."""
    spacing = atoms[1] - atoms[0]
    place = values.clamp(atoms[0], atoms[-1]).unsqueeze(-1)  # (.., M, 1)
    near = (1 - (place - atoms).abs() / spacing).clamp(min=0)
    return (probabilities.unsqueeze(-1) * near).sum(-2)


def categorical_loss(logits: Tensor, target: Tensor) -> Tensor:
    """(..) divergence KL(target, softmax(logits)) of (.., K); its gradient is that of the
    cross-entropy, and it is 0 where nothing is left to learn."""
    cross_entropy = -(target * torch.log_softmax(logits, -1)).sum(-1)
    return cross_entropy + torch.special.xlogy(target, target).sum(-1)


def quantile_loss(quantiles: Tensor, taus: Tensor, target: Tensor, huber: bool) -> Tensor:
    """(..) quantile regression of (.., N) at fractions taus (.., N) on target values (.., M).

    |tau - [error < 0]| times the error's size, or its Huber loss: summed over N, averaged over M.
    Dabney et al. 2018a, eq. 10; 2018b, eq. 3.
    """
    error = target.unsqueeze(-2) - quantiles.unsqueeze(-1)  # (.., N, M)
    size = error.abs()
    if huber:
        size = torch.where(size <= 1, 0.5 * error**2, size - 0.5)
    share = (taus.unsqueeze(-1) - (error.detach() < 0).to(taus.dtype)).abs()
    return (share * size).mean(-1).sum(-1)


def sequence_priority(error: Tensor, learned: Tensor, mix: float = 0.9) -> Tensor:
    """(N,) mix * largest + (1 - mix) * mean of |error| (L, N) over the rows learned (L, N); 0 for
    a sequence without any. Kapturowski et al. 2019 (R2D2)."""
    size = torch.where(learned, error.abs(), 0.0)
    mean = size.sum(0) / learned.sum(0).clamp(min=1)
    return mix * size.max(0).values + (1 - mix) * mean
