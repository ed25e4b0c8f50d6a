"""Draws in proportion to priority: a sum tree of two levels."""

from __future__ import annotations

from math import ceil, sqrt

import torch
from torch import Tensor


class SumTree:
    """`size` numbers >= 0 and their sums; draws an index in proportion to its number.

    Two levels, blocks of leaves and the sum of each block: to find a number reads all block sums
    and one block, in two calls that a GPU or a vector unit does at once, where a binary tree walks
    20 dependent steps for a million leaves. Leaves are float32, sums float64, and a block that
    changed is summed anew, so no error ever accumulates; sums are taken one by one from the left,
    hence equal leaves have equal sums, bit for bit. Schaul et al. 2016, appendix B.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu"):
        if size < 1:
            raise ValueError(f"expected a sum tree of at least 1 leaf, got {size}")
        self.size, self.width = size, ceil(sqrt(size) / 4)  # a batch reads many blocks
        num_blocks = -(-size // self.width)
        self.blocks = torch.zeros((num_blocks, self.width), device=device)
        self.sums = torch.zeros(num_blocks, dtype=torch.float64, device=device)

    @staticmethod
    def nbytes(size: int) -> int:
        """Memory of a tree of `size` leaves, in bytes."""
        width = ceil(sqrt(size) / 4)
        return -(-size // width) * (4 * width + 8)

    @property
    def leaves(self) -> Tensor:
        """(size,) a view of the numbers; call `refresh` behind a change."""
        return self.blocks.view(-1)[: self.size]

    def total(self) -> Tensor:
        """0-d float64: the sum of all numbers."""
        return self.sums.cumsum(0)[-1]

    def refresh(self, begin: int, end: int) -> None:
        """Sum leaves [begin, end) anew, which were written through `leaves`."""
        touched = slice(begin // self.width, (end - 1) // self.width + 1)
        self.sums[touched] = _ends(self.blocks[touched])[:, -1]

    def set(self, index: Tensor, value: Tensor) -> None:
        """Write value (n,) to the leaves index (n,) int64.

        A value that is negative or not finite is refused: its leaf keeps what it holds. Where an
        index comes twice, one of its values stays (on a CPU the last).
        """
        value = value.to(self.blocks.dtype)
        good = (value >= 0) & (value < torch.inf)
        leaves = self.blocks.view(-1)
        leaves.index_copy_(0, index, torch.where(good, value, leaves.index_select(0, index)))
        block = index // self.width
        self.sums.index_copy_(0, block, _ends(self.blocks.index_select(0, block))[:, -1])

    def find(self, fraction: Tensor) -> tuple[Tensor, Tensor]:
        """(index, value), both (n,): where the running sum of the leaves passes `fraction` (n,)
        float64, in [0, 1), of the total. A leaf of 0 is never found unless all are 0."""
        block_ends = self.sums.cumsum(0)
        target = _below(fraction * block_ends[-1], block_ends[-1])
        block = torch.searchsorted(block_ends, target, right=True).clamp_(max=len(self.sums) - 1)
        before = (block_ends - self.sums).index_select(0, block)
        leaf_ends = _ends(self.blocks.index_select(0, block))  # (n, width)
        target = _below((target - before).clamp_(min=0), leaf_ends[:, -1]).unsqueeze(1)
        leaf = torch.searchsorted(leaf_ends, target, right=True).clamp_(max=self.width - 1)
        index = (block * self.width + leaf.squeeze(1)).clamp_(max=self.size - 1)
        return index, self.blocks.view(-1).index_select(0, index)

    def sample(self, num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(index, value), both (num,): one draw from each num-th part of the total (stratified)."""
        device = self.sums.device
        parts = torch.arange(num, device=device, dtype=torch.float64)
        jitter = torch.rand(num, generator=generator, device=device, dtype=torch.float64)
        return self.find((parts + jitter) / num)


def _ends(blocks: Tensor) -> Tensor:
    """(n, width) float64: running sums along each block."""
    return blocks.cumsum(1, dtype=torch.float64)


def _below(target: Tensor, end: Tensor) -> Tensor:
    """`target`, or the largest number below `end` where rounding brought it up there."""
    return torch.minimum(target, torch.nextafter(end, torch.zeros_like(end)))
