"""Returns against formulas that walk one environment at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from asyncrl.algorithms.returns import n_step, n_step_return


def slow_n_step(reward, terminated, truncated, bootstrap, gamma, n) -> np.ndarray:
    """Step by step from each row of each environment, in float64."""
    T, B = reward.shape
    target = np.zeros((T, B))
    for begin, env in np.ndindex(T, B):
        discount = 1.0
        for t in range(begin, min(begin + n, T)):
            target[begin, env] += discount * float(reward[t, env])
            discount *= gamma
            if terminated[t, env]:
                discount = 0.0
            if terminated[t, env] or truncated[t, env]:
                break
        target[begin, env] += discount * float(bootstrap[t + 1, env])
    return target


@pytest.mark.parametrize("n", [1, 2, 5, 30])
@pytest.mark.parametrize("gamma", [0.9, 1.0, 0.0])
def test_n_step_on_random_streams(n, gamma):
    rng = np.random.default_rng(n)
    T, B = 20, 40
    reward, bootstrap = rng.normal(size=(T, B)), rng.normal(size=(T + 1, B))
    terminated, truncated = rng.random((T, B)) < 0.1, rng.random((T, B)) < 0.1
    assert (terminated & truncated).any() and terminated[-1].any() and truncated[-1].any()
    arguments = reward, terminated, truncated, bootstrap
    target = n_step(*(torch.from_numpy(argument) for argument in arguments), gamma, n)
    np.testing.assert_allclose(target, slow_n_step(*arguments, gamma, n), rtol=0, atol=1e-6)
    single = n_step(
        torch.from_numpy(reward).float(), torch.from_numpy(terminated),
        torch.from_numpy(truncated), torch.from_numpy(bootstrap).float(), gamma, n,
    )  # fmt: skip
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single, target, rtol=1e-5, atol=1e-5)


def test_n_step_by_hand():
    """Rewards 1, 2, 4, 8 with gamma 1/2, two steps, values 10 .. 50; row 1 ends."""
    reward, value = (
        torch.tensor([[1.0], [2], [4], [8]]),
        torch.tensor([[10.0], [20], [30], [40], [50]]),
    )
    end, no = torch.tensor([[False], [True], [False], [False]]), torch.zeros(4, 1, dtype=torch.bool)
    # Rows 2 and 3 meet row T: 4 + 8 / 2 + 50 / 4 and 8 + 50 / 2.
    assert n_step(reward, end, no, value, 0.5, 2).flatten().tolist() == [2, 2, 20.5, 33]
    # The value of the true final observation, 30, behind a truncation.
    assert n_step(reward, no, end, value, 0.5, 2).flatten().tolist() == [9.5, 17, 20.5, 33]
    with pytest.raises(ValueError, match=r"bootstrap of shape \(5, 1\), .* got \(4, 1\)"):
        n_step(reward, no, no, value[:4], 0.5, 2)


def test_n_step_return_by_hand():
    """Three windows: whole, cut by a truncation after two steps, terminated at once."""
    reward = torch.tensor([[1.0, 1.0, 3.0], [2.0, 2.0, 0.0], [4.0, 0.0, 0.0]])
    steps, terminated = torch.tensor([3, 2, 1]), torch.tensor([False, False, True])
    returns, discount = n_step_return(reward, steps, terminated, 0.5)
    assert returns.tolist() == [3, 2, 3]
    assert discount.tolist() == [0.125, 0.25, 0]
    returns, discount = n_step_return(reward, steps, terminated, 0.0)
    assert (returns.tolist(), discount.tolist()) == ([1, 1, 3], [0, 0, 0])
