"""Two computations at a time on a CPU: two networks, or one network on two halves of a batch.

Threads that share out every layer wait for the slowest at the end of each, and start anew wherever
an actor has taken a processor from one of them. Two teams that each go all the way wait once.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from asyncrl.types import Tree, tree_map

A, B = TypeVar("A"), TypeVar("B")


class Teams:
    """A model's two teams of threads, or a single one: on a GPU, and until `use` grants threads."""

    def __init__(self, model: nn.Module, device: torch.device):
        self.model, self.count = model, 1
        self.most = 2 if device.type == "cpu" else 1

    def use(self, threads: int) -> None:
        """From now on this thread computes with half of so many, and a second one with the rest;
        with all of them where there is one team at `most`."""
        self.count = min(self.most, max(1, threads))
        torch.set_num_threads(max(1, threads // self.count))

    def both(self, first: Callable[[], A], second: Callable[[], B]) -> tuple[A, B]:
        """(first(), second()), at the same time where there are two teams.

        The second begins without the modes of torch that belong to a thread, autocast for one. What
        either raises is raised when both have ended.
        """
        if self.count == 1:
            return first(), second()
        pending = _helper(os.getpid()).submit(_with_threads, torch.get_num_threads(), second)
        try:
            found = first()
        finally:
            wait([pending])
        return found, pending.result()

    def forward(self, obs: Tree, first: Tensor, state: Tree) -> dict[str, Tensor]:
        """The model's outputs {name: (T, N, ...)}, by half of the environments a team.

        The gradient goes through in halves too. Only a model that says of itself that it is `pure`
        is shared: its forward pass changes nothing in it.
        """
        N = first.shape[1]
        if self.count == 1 or N == 1 or not getattr(self.model, "pure", False):
            return self.model(obs, first, state)[0]
        dtype, grad = torch.get_autocast_dtype("cpu"), torch.is_grad_enabled()
        autocast = torch.is_autocast_enabled("cpu")

        def half(envs: slice) -> dict[str, Tensor]:
            its = tree_map(lambda leaf: leaf[:, envs], obs), first[:, envs]
            with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype, enabled=autocast):
                return self.model(*its, tree_map(lambda leaf: leaf[envs], state))[0]

        pair = self.both(lambda: half(slice(N // 2)), lambda: half(slice(N // 2, N)))
        names = list(pair[0])
        halves = [[outputs[name] for name in names] for outputs in pair]
        if grad:
            anchor = torch.zeros((), requires_grad=True)
            joined = _Joined.apply(anchor, self, *halves)
        else:
            joined = [torch.cat(parts, 1) for parts in zip(*halves, strict=True)]
        return dict(zip(names, joined, strict=True))


class _Joined(torch.autograd.Function):
    """Two lists of tensors (T, N / 2, ...) side by side, whose gradients two teams work out."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, teams: Teams, *halves: list[Tensor]):
        ctx.teams, ctx.halves = teams, halves
        ctx.set_materialize_grads(False)
        pairs = zip(*halves, strict=True)
        return tuple(torch.cat([part.detach() for part in pair], 1) for pair in pairs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None):
        def half(parts: list[Tensor], envs: slice) -> None:
            known = [
                (part, grad[:, envs])
                for part, grad in zip(parts, grads, strict=True)
                if grad is not None and part.requires_grad
            ]
            torch.autograd.backward(*zip(*known, strict=True))

        left, right = ctx.halves
        middle = left[0].shape[1]
        ctx.teams.both(lambda: half(left, slice(middle)), lambda: half(right, slice(middle, None)))
        return None, None, None, None


@functools.cache
def _helper(pid: int) -> ThreadPoolExecutor:
    """The second team's thread in this process: a fork has none."""
    return ThreadPoolExecutor(1, "second_team")


def _with_threads(number: int, function: Callable[[], A]) -> A:
    torch.set_num_threads(number)  # of the thread that calls it
    return function()
