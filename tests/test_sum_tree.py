"""The sum tree against a plain array: sums, draws, frequencies, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from asyncrl.stores.sum_tree import SumTree

SIZES = [1, 2, 7, 64, 1_000, 10_007]


def filled(size: int, seed: int = 0, zeros: float = 0.3) -> tuple[SumTree, np.ndarray]:
    """A tree, and its leaves as float64; a share of them is 0, the others span four decades."""
    rng = np.random.default_rng(seed)
    leaves = (10 ** rng.uniform(-2, 2, size) * (rng.random(size) >= zeros)).astype(np.float32)
    leaves[rng.integers(size)] = 1
    tree = SumTree(size)
    tree.leaves.copy_(torch.from_numpy(leaves))
    tree.refresh(0, size)
    return tree, leaves.astype(np.float64)


def check(tree: SumTree, leaves: np.ndarray) -> None:
    """Every leaf is what it was last set to, and the sum of each block that of its leaves."""
    assert np.array_equal(tree.leaves.numpy(), leaves.astype(np.float32))
    padded = np.zeros(tree.blocks.numel())
    padded[: len(leaves)] = leaves.astype(np.float32)
    sums = padded.reshape(tree.blocks.shape).cumsum(1)[:, -1]
    assert np.array_equal(tree.sums.numpy(), sums)
    assert tree.total() == pytest.approx(leaves.astype(np.float32).sum(dtype=np.float64), rel=1e-12)


def slow_find(leaves: np.ndarray, fraction: float) -> int:
    """The first leaf whose running sum lies above."""
    target, running = fraction * leaves.sum(), 0.0
    for index, leaf in enumerate(leaves):
        running += leaf
        if running > target:
            return index
    raise AssertionError("beyond the sum")


@pytest.mark.parametrize("size", SIZES)
def test_sums_are_exact_under_random_updates(size):
    """Also after ten thousand of them: a block is summed anew, no difference is ever added."""
    tree, leaves = filled(size)
    rng = np.random.default_rng(1)
    for round_ in range(100):
        count = int(rng.integers(1, 100))
        index = rng.integers(size, size=count)
        value = 10 ** rng.uniform(-6, 6, count) * (rng.random(count) < 0.8)
        tree.set(torch.from_numpy(index), torch.from_numpy(value))
        for i, v in zip(index, value.astype(np.float32), strict=True):
            leaves[i] = v  # with duplicates, the last one
        if round_ % 10 == 0:
            begin = int(rng.integers(size))
            end = int(rng.integers(begin, size)) + 1
            leaves[begin:end] = rng.random(end - begin, np.float32)
            tree.leaves[begin:end] = torch.from_numpy(leaves[begin:end])
            tree.refresh(begin, end)
        check(tree, leaves)


@pytest.mark.parametrize("size", SIZES[:-1])
def test_a_fraction_is_found_where_a_slow_walk_finds_it(size):
    tree, leaves = filled(size)
    fractions = np.random.default_rng(2).random(200)
    index, value = tree.find(torch.from_numpy(fractions))
    for i, v, fraction in zip(index.tolist(), value.tolist(), fractions, strict=True):
        assert v == leaves[i] > 0
        if i != (slow := slow_find(leaves, fraction)):  # only where the sums' last bits decide
            near = leaves[: min(i, slow) + 1].sum() / leaves.sum()
            assert fraction == pytest.approx(near, abs=1e-12)


def test_leaves_are_drawn_in_proportion():
    """200,000 draws, chi-square over 700 leaves that are not 0; those of 0 never."""
    tree, leaves = filled(1_000, zeros=0.3)
    leaves = np.clip(leaves, 0, 3)
    tree.set(torch.arange(1_000), torch.from_numpy(leaves))
    generator = torch.Generator().manual_seed(0)
    counts = np.zeros(1_000)
    # One draw a call: draws of one call are stratified, and vary less than independent ones.
    for _ in range(200):
        jitter = torch.rand(1_000, generator=generator, dtype=torch.float64)
        counts += np.bincount(tree.find(jitter)[0], minlength=1_000)
    assert not counts[leaves == 0].any()
    expected = 200_000 * leaves / leaves.sum()
    often = expected >= 5
    chi_square = ((counts - expected)[often] ** 2 / expected[often]).sum()
    degrees = often.sum() - 1
    assert degrees > 500
    assert abs(chi_square - degrees) < 5 * np.sqrt(2 * degrees)


def test_draws_are_stratified():
    """One in each part of the sum: each leaf as often as its share, give or take one at each of
    its two borders."""
    tree, leaves = filled(500)
    counts = np.bincount(tree.sample(10_000, torch.Generator().manual_seed(1))[0], minlength=500)
    assert (abs(counts - 10_000 * leaves / leaves.sum()) < 2 + 1e-6).all()
    mean = np.mean([
        np.bincount(tree.sample(32, torch.Generator().manual_seed(seed))[0], minlength=500)
        for seed in range(3_000)
    ], axis=0)  # fmt: skip
    # At most a variance of the binomial one: 5 of its deviations, for the mean of 3,000.
    share = leaves / leaves.sum()
    assert (abs(mean - 32 * share) <= 5 * np.sqrt(32 * share * (1 - share) / 3_000)).all()


@pytest.mark.parametrize("size", [2, 1_000])
def test_both_ends_are_reached_and_nothing_beyond(size):
    tree = SumTree(size)
    tree.set(torch.tensor([0, size - 1]), torch.tensor([1e-30, 3.0]))
    last = torch.tensor([0.0, 1e-31, 0.5, 1 - 2**-53, 1.0], dtype=torch.float64)
    index, _ = tree.find(last)
    assert index.tolist() == [0, 0, *[size - 1] * 3]
    tree.set(torch.tensor([size - 1]), torch.tensor([0.0]))
    assert tree.find(last)[0].tolist() == [0] * 5


@pytest.mark.parametrize("size", [5, 100])
def test_a_border_belongs_to_what_lies_behind_it_and_never_to_a_zero(size):
    tree = SumTree(size)
    tree.set(torch.tensor([2, 4]), torch.tensor([3.0, 1.0]))
    fraction = torch.tensor([0.0, 0.5, 0.75, 0.9], dtype=torch.float64)
    assert tree.find(fraction)[0].tolist() == [2, 2, 4, 4]


def test_an_empty_tree_finds_a_leaf_of_zero():
    tree = SumTree(10)
    index, value = tree.sample(7, torch.Generator().manual_seed(0))
    assert not value.any() and (index >= 0).all() and (index < 10).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), -1.0, 1e39])
def test_what_is_no_priority_is_refused_and_nothing_else_moves(bad):
    tree, leaves = filled(100)
    index = torch.tensor([3, 4, 5])
    tree.set(index, torch.tensor([2.0, bad, 7.0], dtype=torch.float64))
    leaves[[3, 5]] = 2, 7
    check(tree, leaves)


def test_one_value_of_duplicates_stays():
    tree, leaves = filled(50)
    tree.set(torch.tensor([9, 9, 9, 2]), torch.tensor([1.0, 5.0, 4.0, 6.0]))
    leaves[[9, 2]] = 4, 6
    check(tree, leaves)
    tree.set(torch.tensor([9, 9]), torch.tensor([8.0, float("nan")]))
    assert tree.leaves[9] in (8, 4)
    leaves[9] = tree.leaves[9]
    check(tree, leaves)


def test_refusals_and_memory():
    with pytest.raises(ValueError, match="at least 1 leaf, got 0"):
        SumTree(0)
    for size in SIZES:
        tree = SumTree(size)
        held = tree.blocks.nbytes + tree.sums.nbytes
        assert SumTree.nbytes(size) == held
    assert SumTree.nbytes(1_000_000) < 4_050_000
