"""Distributions of actions against torch's own, and against numpy in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.distributions import (
    AffineTransform,
    Categorical,
    Independent,
    Normal,
    TanhTransform,
    TransformedDistribution,
)

from asyncrl.algorithms.distributions import entropy, log_prob, unsquash
from asyncrl.policies import Context, Sample

LEADING = [(6,), (4, 6)]  # as in a policy, and as in a loss
LOW, HIGH = torch.tensor([-2.0, 0.0, -1.0]), torch.tensor([2.0, 10.0, 3.0])


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def multi_discrete(leading, counts=(3, 1, 5, 2), dtype=torch.float32):
    """Outputs, the logits of each choice without the absent ones, and actions."""
    parts = [torch.randn(*leading, count, generator=rng(count), dtype=dtype) for count in counts]
    logits = torch.full((*leading, len(counts), max(counts)), -torch.inf, dtype=dtype)
    for i, part in enumerate(parts):
        logits[..., i, : counts[i]] = part
    actions = [torch.randint(count, leading, generator=rng(count)) for count in counts]
    return {"value": torch.zeros(leading), "logits": logits}, parts, torch.stack(actions, -1)


def box(leading, low=LOW, high=HIGH, dtype=torch.float32):
    mean = torch.randn(*leading, *low.shape, generator=rng(0), dtype=dtype)
    log_std = 0.5 * torch.randn(low.shape, generator=rng(1), dtype=dtype)
    constants = {"log_std": log_std, "low": low, "high": high}
    expanded = {name: part.expand_as(mean) for name, part in constants.items()}
    return {"value": torch.zeros(leading), "mean": mean, **expanded}


def squash(u: torch.Tensor, low=LOW, high=HIGH) -> torch.Tensor:
    """What an actor sends of u: float32, within the bounds."""
    action = low.double() + (torch.tanh(u.double()) + 1) / 2 * (high - low).double()
    return torch.clip(action.float(), low, high)


@pytest.mark.parametrize("leading", LEADING)
def test_one_discrete_action(leading):
    logits = 3 * torch.randn(*leading, 5, generator=rng(0))
    outputs = {"value": torch.zeros(leading), "logits": logits}
    action = torch.randint(5, leading, generator=rng(1))
    reference = Categorical(logits=logits)
    torch.testing.assert_close(log_prob(outputs, action), reference.log_prob(action))
    torch.testing.assert_close(entropy(outputs), reference.entropy())

    powers = np.exp(logits.double().numpy())
    probabilities = powers / powers.sum(-1, keepdims=True)
    chosen = np.take_along_axis(probabilities, action.numpy()[..., None], -1)[..., 0]
    np.testing.assert_allclose(log_prob(outputs, action), np.log(chosen), rtol=1e-5, atol=1e-6)
    expected = -(probabilities * np.log(probabilities)).sum(-1)
    np.testing.assert_allclose(entropy(outputs), expected, rtol=1e-5, atol=1e-6)


def test_by_hand():
    """Probabilities 1/4 and 3/4; a fair coin beside three alike; a standard normal at 2."""
    outputs = {"value": torch.zeros(1), "logits": torch.tensor([[0.0, math.log(3)]])}
    assert log_prob(outputs, torch.tensor([1])).item() == pytest.approx(math.log(0.75))
    both = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert entropy(outputs).item() == pytest.approx(both)

    logits = torch.tensor([[[5.0, 5, -torch.inf], [-7, -7, -7]]])
    outputs = {"value": torch.zeros(1), "logits": logits}
    assert log_prob(outputs, torch.tensor([[1, 2]])).item() == pytest.approx(-math.log(6))
    assert entropy(outputs).item() == pytest.approx(math.log(6))

    infinite = torch.full((1, 1), torch.inf)
    outputs = {"value": torch.zeros(1), "mean": torch.zeros(1, 1), "log_std": torch.zeros(1, 1)}
    outputs |= {"low": -infinite, "high": infinite}
    half = 0.5 * math.log(2 * math.pi)
    assert log_prob(outputs, torch.tensor([[2.0]])).item() == pytest.approx(-2 - half)
    assert entropy(outputs).item() == pytest.approx(0.5 + half)


@pytest.mark.parametrize("leading", LEADING)
def test_several_discrete_actions_are_independent_ones(leading):
    outputs, parts, action = multi_discrete(leading)
    each = [Categorical(logits=part) for part in parts]
    expected = sum(part.log_prob(action[..., i]) for i, part in enumerate(each))
    result = log_prob(outputs, action)
    assert result.shape == leading
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(entropy(outputs), sum(part.entropy() for part in each))


def test_absent_categories_have_no_say_in_gradients():
    """They are those of the separate distributions, and exactly 0, not NaN, where absent."""
    outputs, parts, action = multi_discrete((4, 6), dtype=torch.float64)
    outputs["logits"].requires_grad_()
    for part in parts:
        part.requires_grad_()
    each = [Categorical(logits=part) for part in parts]
    (log_prob(outputs, action) + 0.3 * entropy(outputs)).sum().backward()
    loss = sum(part.log_prob(action[..., i]) for i, part in enumerate(each))
    (loss + 0.3 * sum(part.entropy() for part in each)).sum().backward()
    gradient = outputs["logits"].grad
    assert gradient.isfinite().all()
    for i, part in enumerate(parts):
        torch.testing.assert_close(gradient[:, :, i, : part.shape[-1]], part.grad)
    assert not gradient[outputs["logits"].isinf()].any()
    with torch.no_grad():
        absent = torch.tensor([0, 1, 0, 0])  # the second choice has one category only
        assert (log_prob(outputs, absent.expand(4, 6, 4)) == -torch.inf).all()


def test_certainty_has_entropy_0_and_a_finite_gradient():
    logits = torch.tensor([[0.0, -1e4, 0.0], [80.0, -80.0, -torch.inf]], requires_grad=True)
    outputs = {"value": torch.zeros(2), "logits": logits}
    result = entropy(outputs)
    torch.testing.assert_close(result, torch.tensor([math.log(2), 0.0]))
    (result.sum() + log_prob(outputs, torch.tensor([1, 1])).sum()).backward()
    assert logits.grad.isfinite().all()


def test_many_switches_with_actions_as_the_wire_holds_them():
    logits = torch.randn(4, 6, 7, 2, generator=rng(0))
    outputs = {"value": torch.zeros(4, 6), "logits": logits}
    action = torch.randint(2, (4, 6, 7), generator=rng(1), dtype=torch.int8)
    expected = Independent(Categorical(logits=logits), 1).log_prob(action.long())
    torch.testing.assert_close(log_prob(outputs, action), expected)


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("shape", [(), (3,), (2, 2)])
def test_unbounded_actions_are_normal(leading, shape):
    infinite = torch.full(shape, torch.inf)
    outputs = box(leading, -infinite, infinite)
    action = 3 * torch.randn(*leading, *shape, generator=rng(2))
    normal = Independent(Normal(outputs["mean"], outputs["log_std"].exp()), len(shape))
    result = log_prob(outputs, action)
    assert result.shape == leading and result.dtype == torch.float32
    torch.testing.assert_close(result, normal.log_prob(action))
    torch.testing.assert_close(entropy(outputs), normal.entropy())


@pytest.mark.parametrize("leading", LEADING)
def test_bounded_actions_have_the_density_of_their_u(leading):
    outputs = box(leading)
    normal = Independent(Normal(outputs["mean"], outputs["log_std"].exp()), 1)
    torch.manual_seed(3)
    u = normal.sample()
    action = squash(u)
    torch.testing.assert_close(unsquash(action, LOW, HIGH).float(), u, atol=1e-3, rtol=0)
    torch.testing.assert_close(
        log_prob(outputs, action), normal.log_prob(u), atol=5e-3, rtol=1e-3
    )  # the action was rounded to float32
    torch.testing.assert_close(entropy(outputs), normal.entropy())

    wire, mean, log_std, low, high = (
        tensor.double().numpy()
        for tensor in (action, outputs["mean"], outputs["log_std"], LOW, HIGH)
    )
    exact = np.arctanh(2 * (wire - low) / (high - low) - 1)
    terms = (exact - mean) ** 2 / (2 * np.exp(log_std) ** 2) + log_std + np.log(2 * np.pi) / 2
    np.testing.assert_allclose(log_prob(outputs, action), -terms.sum(-1), rtol=1e-5, atol=1e-5)


def test_ratios_are_those_of_the_squashed_distributions():
    """Leaving the Jacobian out changes no ratio of two policies."""
    old, new = box((4, 6), dtype=torch.float64), box((4, 6), dtype=torch.float64)
    new["mean"], new["log_std"] = new["mean"] + 0.3, new["log_std"] - 0.2
    low, high = LOW.double(), HIGH.double()
    transforms = [TanhTransform(), AffineTransform((low + high) / 2, (high - low) / 2)]

    def squashed(outputs):
        normal = Normal(outputs["mean"], outputs["log_std"].exp())
        return Independent(TransformedDistribution(normal, transforms), 1)

    action = squash(torch.randn(4, 6, 3, generator=rng(4), dtype=torch.float64)).double()
    expected = squashed(new).log_prob(action) - squashed(old).log_prob(action)
    ours = log_prob(new, action) - log_prob(old, action)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)


def test_bounds_may_be_finite_here_and_infinite_there():
    low = torch.tensor([-torch.inf, -1.0, 0.0, -torch.inf])
    high = torch.tensor([torch.inf, 1.0, torch.inf, 5.0])
    outputs = box((6,), low, high)
    action = torch.rand(6, 4, generator=rng(5))
    u = action.clone()
    u[:, 1] = torch.atanh(action[:, 1])  # the only one with both
    torch.testing.assert_close(unsquash(action, low, high).float(), u)
    normal = Independent(Normal(outputs["mean"], outputs["log_std"].exp()), 1)
    torch.testing.assert_close(log_prob(outputs, action), normal.log_prob(u))


def test_saturated_actions_stay_finite_with_their_gradients():
    for u in (-50.0, -9.0, 9.0, 50.0):
        action = squash(torch.full((6, 3), u))
        back = unsquash(action, LOW, HIGH)
        expected = math.copysign(math.atanh(1 - 1e-6), u)
        assert back.flatten().tolist() == pytest.approx([expected] * 18)
        outputs = {name: part.clone() for name, part in box((6,)).items()}
        outputs["mean"].requires_grad_(), outputs["log_std"].requires_grad_()
        result = log_prob(outputs, action)
        assert result.isfinite().all()
        (result + entropy(outputs)).sum().backward()
        assert outputs["mean"].grad.isfinite().all() and outputs["mean"].grad.any()
        assert outputs["log_std"].grad.isfinite().all() and outputs["log_std"].grad.any()


def test_gradients_of_a_normal():
    """Of the mean (u - mean) / std^2; of log_std (u - mean)^2 / std^2 - 1, of the entropy 1."""
    outputs = {name: part.double() for name, part in box((4, 6)).items()}
    outputs["mean"].requires_grad_()
    outputs["log_std"] = outputs["log_std"].clone().requires_grad_()
    action = squash(torch.randn(4, 6, 3, generator=rng(6)))
    inputs = outputs["mean"], outputs["log_std"]
    of_mean, of_log_std = torch.autograd.grad(log_prob(outputs, action).sum(), inputs)
    with torch.no_grad():
        distance = unsquash(action, LOW, HIGH) - outputs["mean"]
        variance = outputs["log_std"].exp() ** 2
        torch.testing.assert_close(of_mean, distance / variance)
        torch.testing.assert_close(of_log_std, distance**2 / variance - 1)
    (of_log_std,) = torch.autograd.grad(entropy(outputs).sum(), inputs[1:])
    assert (of_log_std == 1).all()


@pytest.mark.parametrize("kind", ["one", "several", "box", "saturated"])
def test_the_actor_says_the_same_log_prob(kind):
    """Sample's, computed in numpy: where weights have not moved, ratios are 1."""
    B = 500
    if kind == "one":
        outputs = {"value": torch.zeros(B), "logits": 3 * torch.randn(B, 5, generator=rng(7))}
    elif kind == "several":
        outputs = multi_discrete((B,))[0]
    else:
        outputs = box((B,))
        outputs["mean"] = outputs["mean"] * (5 if kind == "saturated" else 1)
    arrays = {name: part.numpy() for name, part in outputs.items()}
    first, step = np.zeros(B, bool), np.zeros(B, np.int64)
    action, acted, _ = Sample()(arrays, (), first, step, Context(0), np.random.default_rng(0))
    learned = log_prob(outputs, torch.from_numpy(action))
    np.testing.assert_allclose(np.exp(learned.numpy() - acted), 1, atol=1e-4)


def test_half_precision_is_widened_first():
    outputs, _, action = multi_discrete((4, 6))
    half = {**outputs, "logits": outputs["logits"].bfloat16()}
    rounded = {**outputs, "logits": outputs["logits"].bfloat16().float()}
    assert log_prob(half, action).dtype == entropy(half).dtype == torch.float32
    assert torch.equal(log_prob(half, action), log_prob(rounded, action))
    assert torch.equal(entropy(half), entropy(rounded))


def test_what_does_not_fit_is_refused_in_words():
    outputs, _, action = multi_discrete((4, 6))
    with pytest.raises(ValueError, match=r"shape \(4, 6, 4\), got \(4, 6\); give"):
        log_prob(outputs, action[..., 0])
    with pytest.raises(ValueError, match=r"shape \(4, 6, 3\), got \(6, 4, 3\); give"):
        log_prob(box((4, 6)), torch.zeros(6, 4, 3))
    for lacking in ({"q": torch.zeros(4, 6, 2)}, {"logits": torch.zeros(4, 6, 2)}):
        with pytest.raises(ValueError, match=r"got \['(q|logits)'\]; use a model with"):
            entropy(lacking)
