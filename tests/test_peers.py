"""Returns, losses and distributions beside other libraries' of the same name, where installed.

    pip install -e '.[test,peers]'
    pytest tests/test_peers.py

Each library's comparisons are skipped where it is missing. Tests of the other files hold the same
functions to slow formulas of their own and need none of this.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from asyncrl.algorithms import value_distributions as vd
from asyncrl.algorithms.distributions import entropy, log_prob
from asyncrl.algorithms.returns import gae, n_step, td_advantage, vtrace
from asyncrl.models.return_heads import C51, IQN, QR
from tests.test_distributions import HIGH, LOW, box, multi_discrete, rng, squash
from tests.test_returns import Rows, random_rows, wire_rows

GAMMA, LAMBDA = 0.95, 0.8


@pytest.fixture(params=["random", "wire"])
def rows(request) -> Rows:
    """The streams of test_returns, with large numbers for NaN: others multiply by 0."""
    if request.param == "random":
        return random_rows(20, 40, 10)
    return Rows(*(np.nan_to_num(array, nan=50.0) for array in wire_rows(20, 40, 11)))


def assert_same(ours: torch.Tensor, theirs, rows: Rows) -> None:
    theirs = np.asarray(theirs).reshape(ours.shape)
    np.testing.assert_allclose(ours.numpy()[rows.valid], theirs[rows.valid], rtol=1e-5, atol=1e-5)


# -- RLax: one environment at a time; its lambda is a vector, 0 cuts a trace ---------------------


@pytest.fixture
def rlax():
    return pytest.importorskip("rlax")


def over_envs(function, *arrays):
    """`function` of float32 columns (T,), one environment after another, results as (T, B)."""
    B = arrays[0].shape[1]
    columns = [function(*(np.float32(array[:, env]) for array in arrays)) for env in range(B)]
    return np.stack(columns, 1)


def discounts(rows: Rows) -> np.ndarray:
    return GAMMA * (1.0 - rows.terminated)


def test_rlax_gae(rlax, rows):
    def theirs(reward, discount, lambda_, value):
        return rlax.truncated_generalized_advantage_estimation(reward, discount, lambda_, value)

    lambdas = LAMBDA * (1.0 - rows.truncated)
    expected = over_envs(theirs, rows.reward, discounts(rows), lambdas, rows.value)
    assert_same(gae(*rows.tensors()[:4], GAMMA, LAMBDA), expected, rows)


@pytest.mark.parametrize("n", [1, 3, 50])
def test_rlax_n_step(rlax, rows, n):
    def theirs(reward, discount, following, lambda_):
        return rlax.n_step_bootstrapped_returns(reward, discount, following, n, lambda_)

    lambdas = 1.0 - rows.truncated
    expected = over_envs(theirs, rows.reward, discounts(rows), rows.value[1:], lambdas)
    reward, value, terminated, truncated = rows.tensors()[:4]
    assert_same(n_step(reward, terminated, truncated, value, GAMMA, n), expected, rows)


@pytest.mark.parametrize("lambda_", [1.0, LAMBDA])
def test_rlax_vtrace(rlax, rows, lambda_):
    """Its c is clipped at 1. With lambda below 1 it mixes values into the advantage; the paper and
    asyncrl do not, so targets only are compared there."""

    def theirs(value, following, reward, discount, rho, lambda_):
        result = rlax.vtrace_td_error_and_advantage(
            value, following, reward, discount, rho, lambda_,
            clip_rho_threshold=1.3, clip_pg_rho_threshold=1.3,
        )  # fmt: skip
        return np.stack([result.errors, result.pg_advantage, result.q_estimate - value], -1)

    rho = np.exp(rows.log_prob - rows.behaviour_log_prob)
    lambdas = lambda_ * (1.0 - rows.truncated)
    errors, advantage, plain = np.moveaxis(
        over_envs(
            theirs, rows.value[:-1], rows.value[1:], rows.reward, discounts(rows), rho, lambdas
        ),
        -1,
        0,
    )
    reward, value, terminated, truncated, *log_probs = rows.tensors()
    rest = reward, value, terminated, truncated, GAMMA
    target, ours = vtrace(*log_probs, *rest, lambda_, clip_rho=1.3)
    assert_same(target, rows.value[:-1] + errors, rows)
    if lambda_ == 1:
        assert_same(ours, advantage, rows)
        assert_same(td_advantage(reward, target, *rest[1:]), plain, rows)


def test_rlax_value_rescaling(rlax):
    """Its inverse, in float32, has lost some digits of small numbers."""
    x = torch.cat([-torch.logspace(-2, 5, 50), torch.logspace(-2, 5, 50)])
    theirs = rlax.signed_hyperbolic(x.numpy()), rlax.signed_parabolic(x.numpy())
    np.testing.assert_allclose(vd.rescale(x), theirs[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(vd.unrescale(x), theirs[1], rtol=3e-4, atol=3e-4)


ACTIONS, ATOMS = 4, C51(11, -3.0, 3.0)


def transitions(N: int = 12):
    """(action, reward, discount, chooser (N, A)): some end, some go beyond the atoms."""
    generator = rng(20)
    action = torch.randint(0, ACTIONS, (N,), generator=generator)
    reward = torch.randn(N, generator=generator) * 2
    discount = 0.9 * (torch.rand(N, generator=generator) < 0.8).float()
    return action, reward, discount, torch.randn(N, ACTIONS, generator=generator)


def td_loss(head, outputs, following, q, action, reward, discount, huber=True) -> np.ndarray:
    """(N,) losses of ours of double Q-learning."""
    behind = vd.greedy_return(following, head, q)
    values = reward.unsqueeze(1) + discount.unsqueeze(1) * behind.values
    return vd.return_loss(outputs, head, action, behind._replace(values=values), huber)[0].numpy()


def test_rlax_categorical_double_q_learning(rlax):
    """Ours is less the entropy of the target, which has no gradient."""
    action, reward, discount, q = transitions()
    logits, following = torch.randn(2, len(action), ACTIONS, ATOMS.num_atoms, generator=rng(21))
    ours = td_loss(
        ATOMS, {"logits_of_return": logits}, {"logits_of_return": following}, q, action, reward,
        discount,
    )  # fmt: skip
    atoms = ATOMS.atoms().numpy()
    for i in range(len(action)):
        theirs = rlax.categorical_double_q_learning(
            atoms, logits[i].numpy(), int(action[i]), float(reward[i]), float(discount[i]), atoms,
            following[i].numpy(), q[i].numpy(),
        )  # fmt: skip
        target = rlax.categorical_l2_project(
            float(reward[i]) + float(discount[i]) * atoms,
            following[i, int(q[i].argmax())].softmax(-1).numpy(), atoms,
        )  # fmt: skip
        target = np.asarray(target, np.float64)
        kept = target[target > 0]
        assert ours[i] == pytest.approx(float(theirs) + (kept * np.log(kept)).sum(), abs=2e-5)


@pytest.mark.parametrize("head", [QR(8), IQN(8, 5)], ids=str)
@pytest.mark.parametrize("huber", [True, False])
def test_rlax_quantile_q_learning(rlax, head, huber):
    action, reward, discount, _ = transitions()
    quantiles, following, chooser = torch.randn(3, len(action), ACTIONS, 8, generator=rng(22))
    outputs = {"quantiles": quantiles}
    taus = ((torch.arange(8) + 0.5) / 8).expand(len(action), 8)
    if isinstance(head, IQN):
        outputs["taus"] = taus = torch.rand(len(action), 8, generator=rng(23))
    ours = td_loss(
        head, outputs, {"quantiles": following}, chooser.mean(-1), action, reward, discount, huber
    )
    for i in range(len(action)):
        theirs = rlax.quantile_q_learning(
            quantiles[i].T.numpy(), taus[i].numpy(), int(action[i]), float(reward[i]),
            float(discount[i]), chooser[i].T.numpy(), following[i].T.numpy(), float(huber),
        )  # fmt: skip
        assert ours[i] == pytest.approx(float(theirs), rel=1e-5)


# -- TorchRL: (B, T, 1), both kinds of end ------------------------------------------------------


@pytest.fixture
def functional():
    return pytest.importorskip("torchrl.objectives.value.functional")


def batch_major(*arrays: torch.Tensor) -> list[torch.Tensor]:
    return [array.T.unsqueeze(-1) for array in arrays]


def test_torchrl_gae(functional, rows):
    reward, value, terminated, truncated = rows.tensors()[:4]
    cut = terminated | truncated
    advantage, target = functional.generalized_advantage_estimate(
        GAMMA, LAMBDA, *batch_major(value[:-1], value[1:], reward, cut, terminated)
    )
    ours = gae(reward, value, terminated, truncated, GAMMA, LAMBDA)
    assert_same(ours, advantage.squeeze(-1).T, rows)
    assert_same(ours + value[:-1], target.squeeze(-1).T, rows)


def test_torchrl_vtrace(functional, rows):
    reward, value, terminated, truncated, *log_probs = rows.tensors()
    cut = terminated | truncated
    advantage, target = functional.vtrace_advantage_estimate(
        GAMMA,
        *batch_major(*log_probs, value[:-1], value[1:], reward, cut, terminated),
        rho_thresh=1.3,
        c_thresh=0.9,
    )
    ours = vtrace(*log_probs, reward, value, terminated, truncated, GAMMA, 1.0, 1.3, 0.9)
    assert_same(ours[0], target.squeeze(-1).T, rows)
    assert_same(ours[1], advantage.squeeze(-1).T, rows)


def test_torchrl_squashed_normal():
    """The ratio of two policies, that of the densities of the actions themselves."""
    modules = pytest.importorskip("torchrl.modules")
    old, new = box((4, 6)), box((4, 6))
    new["mean"], new["log_std"] = new["mean"] + 0.3, new["log_std"] - 0.2
    action = squash(torch.randn(4, 6, 3, generator=rng(8)))

    def theirs(outputs):
        scale = outputs["log_std"].exp()
        return modules.TanhNormal(outputs["mean"], scale, low=LOW, high=HIGH).log_prob(action)

    expected = theirs(new) - theirs(old)
    ours = log_prob(new, action) - log_prob(old, action)
    torch.testing.assert_close(ours, expected, atol=1e-3, rtol=1e-3)


# -- Stable-Baselines3: no reset steps; the value behind a truncation is added to the reward ------


def test_sb3_gae(rows):
    buffers = pytest.importorskip("stable_baselines3.common.buffers")
    from gymnasium import spaces

    expected = np.full(rows.reward.shape, np.nan)
    for env in range(rows.reward.shape[1]):
        kept = np.flatnonzero(rows.valid[:, env])
        terminated, truncated = rows.terminated[kept, env], rows.truncated[kept, env]
        added = GAMMA * rows.value[kept + 1, env] * (truncated & ~terminated)
        buffer = buffers.RolloutBuffer(
            len(kept), spaces.Box(0, 1), spaces.Discrete(2), "cpu", LAMBDA, GAMMA, n_envs=1
        )
        buffer.rewards[:, 0] = rows.reward[kept, env] + added
        buffer.values[:, 0] = rows.value[kept, env]
        buffer.episode_starts[1:, 0] = (terminated | truncated)[:-1]
        last = torch.tensor([rows.value[kept[-1] + 1, env]])
        buffer.compute_returns_and_advantage(last, (terminated | truncated)[-1:])
        expected[kept, env] = buffer.advantages[:, 0]
    assert_same(gae(*rows.tensors()[:4], GAMMA, LAMBDA), expected, rows)


def test_sb3_distributions():
    distributions = pytest.importorskip("stable_baselines3.common.distributions")
    counts = (3, 1, 5, 2)
    outputs, parts, action = multi_discrete((6,), counts)
    theirs = distributions.MultiCategoricalDistribution(list(counts))
    theirs.proba_distribution(torch.cat(parts, -1))
    torch.testing.assert_close(log_prob(outputs, action), theirs.log_prob(action))
    torch.testing.assert_close(entropy(outputs), theirs.entropy())

    infinite = torch.full((3,), torch.inf)
    outputs = box((6,), -infinite, infinite)
    action = torch.randn(6, 3, generator=rng(9))
    theirs = distributions.DiagGaussianDistribution(3)
    theirs.proba_distribution(outputs["mean"], outputs["log_std"])
    torch.testing.assert_close(log_prob(outputs, action), theirs.log_prob(action))
    torch.testing.assert_close(entropy(outputs), theirs.entropy())
