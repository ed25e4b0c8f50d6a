"""Returns against formulas that walk one environment at a time."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch

from asyncrl.algorithms.returns import gae, n_step, n_step_return, td_advantage, vtrace
from tests.streams import Stream, make_spec


class Rows(NamedTuple):
    """What an algorithm gets, in float64 numpy, and what is left out of it."""

    reward: np.ndarray  # (T, B)
    value: np.ndarray  # (T+1, B)
    terminated: np.ndarray
    truncated: np.ndarray
    log_prob: np.ndarray
    behaviour_log_prob: np.ndarray
    valid: np.ndarray

    def tensors(self, dtype=torch.float64) -> list[torch.Tensor]:
        """reward, value, terminated, truncated, log_prob, behaviour_log_prob."""
        arrays = [torch.from_numpy(array.copy()) for array in self[:6]]
        return [array.to(dtype) if array.is_floating_point() else array for array in arrays]


def random_rows(T: int, B: int, seed: int) -> Rows:
    """Ends anywhere, also both kinds at once, one after another and in the last row."""
    rng = np.random.default_rng(seed)
    terminated, truncated = rng.random((T, B)) < 0.2, rng.random((T, B)) < 0.2
    assert (terminated & truncated).any() and terminated[-1].any() and truncated[-1].any()
    return _rows(rng.normal(size=(T, B)), terminated, truncated, np.ones((T, B), bool), rng)


def wire_rows(T: int, B: int, seed: int) -> Rows:
    """As actors send them: reset steps behind ends, lost lives without. Reset steps hold NaN."""
    spec = make_spec(T, B)
    unroll = Stream(spec, 0, seed).unroll(bytearray(spec.layout.nbytes))
    reset, rng = ~unroll.valid, np.random.default_rng(seed)
    reward = unroll.reward.astype(np.float64)
    terminated, truncated = unroll.terminated.copy(), unroll.truncated.copy()
    assert reset.any() and (terminated[:-1] & ~reset[1:]).any() and truncated.any()
    rows = _rows(reward, terminated, truncated, unroll.valid.copy(), rng)
    for array in (rows.reward, rows.log_prob, rows.behaviour_log_prob):
        array[reset] = np.nan
    over = terminated.copy()
    over[:-1] &= reset[1:]
    rows.value[1:][over] = np.nan  # the value of a state that has none
    return rows


def _rows(reward, terminated, truncated, valid, rng) -> Rows:
    T, B = reward.shape
    log_prob, behaviour = rng.normal(-1, 0.7, (2, T, B))
    value = rng.normal(size=(T + 1, B))
    return Rows(reward, value, terminated, truncated, log_prob, behaviour, valid)


STREAMS = [random_rows(20, 40, 0), wire_rows(20, 40, 1), wire_rows(45, 12, 2), wire_rows(2, 40, 3)]


def episodes(rows: Rows):
    """(env, rewards, values, last, t) of each piece of an episode, the rows t[0] .. t[-1] of it.

    `values` are those of its observations, `last` that of the observation behind its last row, or
    0 where the piece was terminated there. Reset steps belong to none.
    """
    T, B = rows.reward.shape
    for env in range(B):
        piece: list[int] = []
        for t in range(T):
            if rows.valid[t, env]:
                piece.append(t)
            ends = rows.terminated[t, env] or rows.truncated[t, env]
            if piece and (ends or t == T - 1):
                last = 0.0 if rows.terminated[t, env] else rows.value[t + 1, env]
                yield env, rows.reward[piece, env], rows.value[piece, env], last, piece
                piece = []


def slow_gae(rows: Rows, gamma: float, lambda_: float) -> np.ndarray:
    """The exponentially weighted mean of advantages by 1, 2, ... steps: eq. 16 of the paper."""
    advantage = np.full(rows.reward.shape, np.nan)
    for env, reward, value, last, piece in episodes(rows):
        behind = [*value[1:], last]  # the value of the observation behind each row
        for i, t in enumerate(piece):
            count = len(piece) - i
            by_steps = [
                sum(gamma**k * reward[i + k] for k in range(n))
                + gamma**n * behind[i + n - 1]
                - value[i]
                for n in range(1, count + 1)
            ]
            weights = [(1 - lambda_) * lambda_ ** (n - 1) for n in range(1, count)]
            weights.append(lambda_ ** (count - 1))  # all longer ones are the same
            advantage[t, env] = np.dot(weights, by_steps)
    return advantage


def slow_vtrace(
    rows: Rows, gamma: float, lambda_: float, clip_rho: float, clip_c: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(value_target, advantage, advantage before its ratio): the sum and products of the paper."""
    target, advantage, plain = (np.full(rows.reward.shape, np.nan) for _ in range(3))
    for env, reward, value, last, piece in episodes(rows):
        ratio = np.exp(rows.log_prob[piece, env] - rows.behaviour_log_prob[piece, env])
        rho, c = np.minimum(ratio, clip_rho), lambda_ * np.minimum(ratio, clip_c)
        behind = [*value[1:], last]
        for i, t in enumerate(piece):
            target[t, env] = value[i] + sum(
                gamma ** (j - i)
                * np.prod(c[i:j])
                * rho[j]
                * (reward[j] + gamma * behind[j] - value[j])
                for j in range(i, len(piece))
            )
        targets_behind = [*target[piece[1:], env], last]
        for i, t in enumerate(piece):
            plain[t, env] = reward[i] + gamma * targets_behind[i] - value[i]
            advantage[t, env] = rho[i] * plain[t, env]
    return target, advantage, plain


def assert_rows_close(actual, expected, valid: np.ndarray, atol: float) -> None:
    """Equal, and finite, wherever a row is one to learn from."""
    assert np.isfinite(expected[valid]).all()
    np.testing.assert_allclose(actual.numpy()[valid], expected[valid], rtol=atol, atol=atol)


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


@pytest.mark.parametrize("n", [1, 3, 100])
def test_n_step_with_reset_steps(n):
    for rows in STREAMS[1:]:
        reward, value, terminated, truncated = rows.tensors()[:4]
        target = n_step(reward, terminated, truncated, value, 0.9, n)
        expected = np.full(reward.shape, np.nan)
        for env, rewards, values, last, piece in episodes(rows):
            behind = [*values[1:], last]
            for i, t in enumerate(piece):
                m = min(n, len(piece) - i)
                expected[t, env] = sum(0.9**k * rewards[i + k] for k in range(m))
                expected[t, env] += 0.9**m * behind[i + m - 1]
        assert_rows_close(target, expected, rows.valid, 1e-9)


def test_n_step_gradients_are_those_of_the_slow_formula():
    """It is linear in rewards and values, so differences of the slow formula are its gradients."""
    rows = random_rows(8, 30, 4)
    reward, value, terminated, truncated = rows.tensors()[:4]
    reward.requires_grad_(), value.requires_grad_()
    weight = torch.from_numpy(np.random.default_rng(5).normal(size=reward.shape))
    (weight * n_step(reward, terminated, truncated, value, 0.9, 3)).sum().backward()

    def slow(reward, value):
        target = slow_n_step(reward, rows.terminated, rows.truncated, value, 0.9, 3)
        return (weight.numpy() * target).sum(0)  # (B,): no environment sees another

    base = slow(rows.reward, rows.value)
    for t in range(9):
        moved = rows.value.copy()
        moved[t] += 1
        np.testing.assert_allclose(value.grad[t], slow(rows.reward, moved) - base, atol=1e-9)
    for t in range(8):
        moved = rows.reward.copy()
        moved[t] += 1
        np.testing.assert_allclose(reward.grad[t], slow(moved, rows.value) - base, atol=1e-9)


def test_n_step_return_by_hand():
    """Three windows: whole, cut by a truncation after two steps, terminated at once."""
    reward = torch.tensor([[1.0, 1.0, 3.0], [2.0, 2.0, 0.0], [4.0, 0.0, 0.0]])
    steps, terminated = torch.tensor([3, 2, 1]), torch.tensor([False, False, True])
    returns, discount = n_step_return(reward, steps, terminated, 0.5)
    assert returns.tolist() == [3, 2, 3]
    assert discount.tolist() == [0.125, 0.25, 0]
    returns, discount = n_step_return(reward, steps, terminated, 0.0)
    assert (returns.tolist(), discount.tolist()) == ([1, 1, 3], [0, 0, 0])


@pytest.mark.parametrize("gamma, lambda_", [(0.9, 0.8), (0.99, 1.0), (0.9, 0.0), (1.0, 0.95)])
def test_gae_on_random_streams(gamma, lambda_):
    for rows in STREAMS:
        expected = slow_gae(rows, gamma, lambda_)
        for dtype, atol in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
            advantage = gae(*rows.tensors(dtype)[:4], gamma, lambda_)
            assert advantage.dtype == dtype
            assert_rows_close(advantage, expected, rows.valid, atol)


@pytest.mark.parametrize(
    "gamma, lambda_, clip_rho, clip_c",
    [(0.9, 1, 1, 1), (0.99, 0.9, 2, 0.7), (0.9, 0.0, 1, 1), (1.0, 0.5, 0.8, 1.5)],
)
def test_vtrace_on_random_streams(gamma, lambda_, clip_rho, clip_c):
    for rows in STREAMS:
        target, advantage, plain = slow_vtrace(rows, gamma, lambda_, clip_rho, clip_c)
        for dtype, atol in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
            reward, value, terminated, truncated, *log_probs = rows.tensors(dtype)
            ours = vtrace(
                *log_probs, reward, value, terminated, truncated, gamma, lambda_, clip_rho, clip_c
            )
            assert ours[0].dtype == ours[1].dtype == dtype
            assert_rows_close(ours[0], target, rows.valid, atol)
            assert_rows_close(ours[1], advantage, rows.valid, atol)
            without = td_advantage(reward, ours[0], value, terminated, truncated, gamma)
            assert_rows_close(without, plain, rows.valid, atol)


def test_what_gae_and_vtrace_become_at_the_ends_of_their_scales():
    for rows in STREAMS:
        reward, value, terminated, truncated, _, behaviour = rows.tensors()
        ends, valid, gamma = (terminated, truncated), rows.valid, 0.9
        full = n_step(reward, *ends, value, gamma, 1000).numpy()
        one_step = n_step(reward, *ends, value, gamma, 1).numpy()
        before = value[:-1].numpy()
        assert_rows_close(gae(reward, value, *ends, gamma, 1.0), full - before, valid, 1e-9)
        assert_rows_close(gae(reward, value, *ends, gamma, 0.0), one_step - before, valid, 1e-9)

        def on_policy(lambda_, behaviour=behaviour, rest=(reward, value, *ends, gamma)):
            return vtrace(behaviour, behaviour, *rest, lambda_)

        target, advantage = on_policy(1.0)
        assert_rows_close(target, full, valid, 1e-9)
        assert_rows_close(advantage, full - before, valid, 1e-9)
        assert_rows_close(on_policy(0.0)[0], one_step, valid, 1e-9)
        some = gae(reward, value, *ends, gamma, 0.7).numpy()
        assert_rows_close(on_policy(0.7)[0], before + some, valid, 1e-9)


def test_what_lies_behind_an_end_changes_nothing_before_it():
    """Bit for bit: rows 0 to 2 of an episode that ends at row 2, row 3 being the reset step."""
    rows = random_rows(8, 30, 6)
    terminated, truncated = (torch.zeros(8, 30, dtype=torch.bool) for _ in range(2))
    terminated[2, :15], truncated[2, 15:] = True, True
    reward, value, _, _, log_prob, behaviour = rows.tensors(torch.float32)

    def everything():
        rest = reward, value, terminated, truncated, 0.9
        target, advantage = vtrace(log_prob, behaviour, *rest, 0.9)
        results = target, advantage, gae(*rest, 0.9), td_advantage(reward, target, *rest[1:])
        results = *results, n_step(reward, terminated, truncated, value, 0.9, 5)
        return [result[:3].clone() for result in results]

    clean = everything()
    for garbage in (1e30, torch.inf, torch.nan):
        for array in (reward, log_prob, behaviour):
            array[3:] = garbage
        value[3, :15], value[4:] = garbage, garbage  # a truncated one uses its value[3]
        for before, after in zip(clean, everything(), strict=True):
            assert before.isfinite().all() and torch.equal(before, after)


def column(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers).unsqueeze(1)


NO, ROW_1 = column(False, False, False), column(False, True, False)
REWARD, VALUE = column(1.0, 2, 4), column(10.0, 20, 30, 40)


@pytest.mark.parametrize(
    "terminated, truncated, expected",
    [
        (NO, NO, [-0.125, -4.5, -6]),  # TD errors 1, -3, -6, each with a quarter of the next
        (ROW_1, NO, [-3.5, -18, -6]),  # 2 - 20
        (NO, ROW_1, [0.25, -3, -6]),  # 2 + 30 / 2 - 20
        (ROW_1, ROW_1, [-3.5, -18, -6]),
    ],
)
def test_gae_by_hand(terminated, truncated, expected):
    """gamma = lambda = 1/2."""
    assert gae(REWARD, VALUE, terminated, truncated, 0.5, 0.5).flatten().tolist() == expected


@pytest.mark.parametrize(
    "terminated, truncated, clip_rho, target, advantage",
    [
        (NO, NO, 1, [9.5, 17, 24], [-0.5, -3, -6]),
        (NO, NO, 2, [10.5, 17, 24], [-1, -3, -6]),  # row 0: 2 * 1 + 1/2 * 1 * (17 - 20)
        (NO, ROW_1, 1, [10.25, 18.5, 24], [0.25, -1.5, -6]),
        (ROW_1, NO, 1, [6.5, 11, 24], [-3.5, -9, -6]),
    ],
)
def test_vtrace_by_hand(terminated, truncated, clip_rho, target, advantage):
    """Ratios 2, 1/2, 1; gamma = 1/2."""
    ratio, behaviour = column(2.0, 0.5, 1), column(-1.0, -2, -3)
    rest = REWARD, VALUE, terminated, truncated, 0.5
    results = vtrace(ratio.log() + behaviour, behaviour, *rest, clip_rho=clip_rho)
    torch.testing.assert_close(results[0].flatten(), torch.tensor(target, dtype=torch.float32))
    torch.testing.assert_close(results[1].flatten(), torch.tensor(advantage, dtype=torch.float32))


def test_td_advantage_by_hand():
    """Targets 100, 200, 300 are bootstrapped from, but not over a truncation nor at the end."""
    target, rest = column(100.0, 200, 300), (VALUE, NO, NO, 0.5)
    assert td_advantage(REWARD, target, *rest).flatten().tolist() == [91, 132, -6]
    rest = VALUE, NO, ROW_1, 0.5
    assert td_advantage(REWARD, target, *rest).flatten().tolist() == [91, -3, -6]
    rest = VALUE, ROW_1, ROW_1, 0.5
    assert td_advantage(REWARD, target, *rest).flatten().tolist() == [91, -18, -6]


def test_advantages_and_targets_are_constants_and_inputs_stay_as_they_are():
    arguments = random_rows(8, 30, 7).tensors()
    reward, value, terminated, truncated, log_prob, behaviour = arguments
    for tensor in (reward, value, log_prob, behaviour):
        tensor.requires_grad_()
    copies = [tensor.detach().clone() for tensor in arguments]
    rest = reward, value, terminated, truncated, 0.9
    target, advantage = vtrace(log_prob, behaviour, *rest)
    results = target, advantage, gae(*rest, 0.9), td_advantage(reward, target, *rest[1:])
    assert not any(result.requires_grad for result in results)
    for tensor, copy in zip(arguments, copies, strict=True):
        assert torch.equal(tensor, copy)


def test_a_ratio_too_large_for_its_dtype_is_clipped():
    log_prob, behaviour = column(0.0, 0, 0), column(-200.0, -200, -200)
    rest = REWARD, VALUE, NO, NO, 0.5
    for large, one in zip(
        vtrace(log_prob, behaviour, *rest), vtrace(log_prob, log_prob, *rest), strict=True
    ):
        assert torch.equal(large, one)


def test_values_without_their_last_row_are_refused():
    words = r"value of shape \(4, 1\), .* got \(3, 1\); give"
    with pytest.raises(ValueError, match=words):
        gae(REWARD, VALUE[:3], NO, NO, 0.5, 0.5)
    with pytest.raises(ValueError, match=words):
        vtrace(REWARD, REWARD, REWARD, VALUE[:3], NO, NO, 0.5)
    with pytest.raises(ValueError, match=words):
        td_advantage(REWARD, REWARD, VALUE[:3], NO, NO, 0.5)
