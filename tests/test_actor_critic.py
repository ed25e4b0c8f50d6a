"""A2C and PPO: their losses and gradients step by step in numpy, and where the two are one."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from asyncrl.algorithms import actor_critic as ac
from asyncrl.algorithms.a2c import A2CConfig, a2c_loss
from asyncrl.algorithms.distributions import entropy, log_prob
from asyncrl.algorithms.gradient import GradientStep
from asyncrl.algorithms.ppo import PPOConfig, ppo_loss, value_loss
from asyncrl.models import ModelConfig
from asyncrl.schedules import Linear
from asyncrl.state import flatten, unflatten
from asyncrl.stores.rollout import Rollout
from asyncrl.types import Spec
from tests.streams import make_spec
from tests.test_on_policy import CPU, Given, weights_of

T, N, A = 6, 8, 3
FORMS = ["clean", "garbage", "nan"]  # what lies in invalid rows


def random_batch(form: str, seed: int = 0):
    """(current, behaviour, advantage, old, value, target, valid), (T, N) float64 numpy."""
    rng = np.random.default_rng(seed)
    current, behaviour = rng.normal(-1, 0.3, (2, T, N))
    advantage, old, value, target = rng.normal(size=(4, T, N))
    valid = rng.random((T, N)) < 0.8
    for array in (current, behaviour, advantage, old, value, target):
        array[~valid] = {"clean": 0.0, "garbage": 1e12, "nan": np.nan}[form]
    return current, behaviour, advantage, old, value, target, valid


def tensors(*arrays, grad: int):
    """As tensors, of which number `grad` learns; the last is what is valid, as a mask."""
    made = [torch.from_numpy(array.copy()) for array in arrays]
    return [*made[:grad], made[grad].requires_grad_(), *made[grad + 1 : -1], ac.Mask(made[-1])]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("clip_rho", [0.9, 1.0, 5.0])
def test_the_loss_of_a2c_step_by_step(form, clip_rho):
    current, behaviour, advantage, *_, valid = random_batch(form)
    loss, gradient = 0.0, np.zeros((T, N))
    for t, env in np.argwhere(valid):
        rho = min(clip_rho, np.exp(current[t, env] - behaviour[t, env]))
        gradient[t, env] = -rho * advantage[t, env] / valid.sum()
        loss += gradient[t, env] * current[t, env]
    given = tensors(current, behaviour, advantage, valid, grad=0)
    got = given[3].mean_of_zeroed(a2c_loss(*given, clip_rho))
    got.backward()
    np.testing.assert_allclose(got.item(), loss, rtol=1e-9)
    np.testing.assert_allclose(given[0].grad, gradient, rtol=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("clip_ratio", [0.1, 0.2])
def test_the_loss_of_ppo_step_by_step(form, clip_ratio):
    current, behaviour, advantage, *_, valid = random_batch(form)
    count, loss, kl, share, gradient = valid.sum(), 0.0, 0.0, 0.0, np.zeros((T, N))
    for t, env in np.argwhere(valid):
        log_ratio, gain = current[t, env] - behaviour[t, env], advantage[t, env]
        ratio = np.exp(log_ratio)
        outside = abs(ratio - 1) > clip_ratio
        clipped = min(max(ratio, 1 - clip_ratio), 1 + clip_ratio)
        loss -= min(ratio * gain, clipped * gain) / count
        if not outside or (ratio > 1) != (gain > 0):
            gradient[t, env] = -ratio * gain / count
        kl += (ratio - 1 - log_ratio) / count
        share += outside / count
    assert 0.1 < share < 0.9 and (gradient[valid] == 0).any()
    given = tensors(current, behaviour, advantage, valid, grad=0)
    got, ratios = ppo_loss(*given, clip_ratio)
    got = given[3].mean_of_zeroed(got)
    got.backward()
    np.testing.assert_allclose(got.item(), loss, rtol=1e-6)
    np.testing.assert_allclose(ac.divergence(ratios, given[3]).item(), kl, rtol=1e-6)
    outside = ac.clipped_share(ratios, given[3], clip_ratio)
    np.testing.assert_allclose(outside.item(), share, rtol=1e-6)
    np.testing.assert_allclose(given[0].grad, gradient, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("clip, scale", [(0.0, 1.0), (0.0, 3.0), (0.3, 1.0), (0.3, 2.0)])
def test_the_loss_of_the_value_step_by_step(form, clip, scale):
    *_, old, value, target, valid = random_batch(form)
    count, loss, gradient = valid.sum(), 0.0, np.zeros((T, N))
    for t, env in np.argwhere(valid):
        v, v_old, goal = value[t, env] / scale, old[t, env] / scale, target[t, env] / scale
        near = v_old + min(max(v - v_old, -clip), clip)
        free = not clip or (v - goal) ** 2 >= (near - goal) ** 2
        loss += 0.5 * ((v if free else near) - goal) ** 2 / count
        if free or near == v:
            gradient[t, env] = (v - goal) / scale / count
    assert clip == 0 or (gradient[valid] == 0).any()
    for scale_given in (scale, torch.tensor(scale)):
        given = tensors(value, old, target, valid, grad=0)
        got = given[3].mean_of_zeroed(value_loss(*given, clip, scale_given))
        got.backward()
        np.testing.assert_allclose(got.item(), loss, rtol=1e-6)
        np.testing.assert_allclose(given[0].grad, gradient, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_means_entropies_and_normalised_advantages(form):
    *_, advantage, _, _, _, valid = random_batch(form)
    given, mask = torch.from_numpy(advantage), ac.Mask(torch.from_numpy(valid))
    assert mask.mean(given).item() == pytest.approx(advantage[valid].mean())
    normal = ac.normalize(given, mask).numpy()[valid]
    expected = (advantage[valid] - advantage[valid].mean()) / advantage[valid].std()
    np.testing.assert_allclose(normal, expected, rtol=1e-7)

    logits = torch.randn(T, N, A, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits[mask.invalid] *= {"clean": 1, "garbage": 1e6, "nan": 1e300}[form]
    logits.requires_grad_()
    spread = mask.mean(entropy({"value": given, "logits": logits}))
    spread.backward()
    p = torch.softmax(logits.detach(), -1).numpy()[valid]
    each = -(p * np.log(p)).sum(-1)
    assert spread.item() == pytest.approx(each.mean())
    slope = -p * (np.log(p) + each[:, None]) / valid.sum()
    np.testing.assert_allclose(logits.grad.numpy()[valid], slope, atol=1e-12)
    assert not logits.grad[mask.invalid].any()


def test_a_batch_valid_as_a_whole_counts_as_one_that_also_has_what_is_not():
    values = torch.randn(T, N, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    more = torch.cat([values, torch.full((1, N), torch.nan)])
    valid = torch.arange(T + 1).unsqueeze(1).expand(T + 1, N) < T
    whole, part = ac.Mask(valid[:T]), ac.Mask(valid)
    assert whole.invalid is None and part.invalid.sum() == N
    assert whole.count == part.count == T * N
    assert torch.equal(part.zero(more)[:T], whole.zero(values)) and not part.zero(more)[T].any()
    torch.testing.assert_close(part.mean(more), whole.mean(values))
    torch.testing.assert_close(ac.normalize(more, part)[:T], ac.normalize(values, whole))


def test_nothing_valid_is_a_loss_of_zero():
    current, behaviour, advantage, old, value, target, _ = random_batch("nan")
    nothing = np.zeros((T, N), bool)
    for loss, given in (
        (lambda *x: a2c_loss(*x, 1.0), (current, behaviour, advantage, nothing)),
        (lambda *x: ppo_loss(*x, 0.2)[0], (current, behaviour, advantage, nothing)),
        (lambda *x: value_loss(*x, 0.2, 1.0), (value, old, target, nothing)),
    ):
        given = tensors(*given, grad=0)
        got = given[-1].mean_of_zeroed(loss(*given))
        got.backward()
        assert got == 0 and not given[0].grad.any()
    same = torch.full((T, N), 3.0)
    assert not ac.normalize(same, ac.Mask(torch.ones(T, N, dtype=torch.bool))).any()


def test_a_step_of_another_policy_counts_by_its_ratio():
    """Acted with probability 1/2, 1/10, 1/5 and 1/2; by the learner's policy 1/4, 2/5, 1/5, 3/5."""
    current = torch.tensor([[0.25, 0.4, 0.2, 0.6]], dtype=torch.float64).log()
    behaviour = torch.tensor([[0.5, 0.1, 0.2, 0.5]], dtype=torch.float64).log()
    advantage, mask = torch.tensor([[1.0, 1, -1, -1]]), ac.Mask(torch.ones(1, 4, dtype=torch.bool))
    ratio = ac.importance_ratio(current, behaviour)
    np.testing.assert_allclose(ratio, [[0.5, 4, 1, 1.2]])
    for clip_rho, rho in ((1.0, [0.5, 1, 1, 1]), (3.0, [0.5, 3, 1, 1.2])):
        learned = current.clone().requires_grad_()
        mask.mean_of_zeroed(a2c_loss(learned, behaviour, advantage, mask, clip_rho)).backward()
        np.testing.assert_allclose(learned.grad, -torch.tensor([rho]) * advantage / 4)
    loss, ratio = ppo_loss(current, behaviour, advantage, mask, 0.3)
    kl, share = ac.divergence(ratio, mask), ac.clipped_share(ratio, mask, 0.3)
    assert mask.mean_of_zeroed(loss).item() == pytest.approx(-(0.5 + 1.3 - 1 - 1.2) / 4)
    assert kl.item() == pytest.approx((-0.5 - np.log(0.5) + 3 - np.log(4) + 0.2 - np.log(1.2)) / 4)
    assert share == 0.5
    impossible = torch.tensor([-torch.inf, 0.0]), torch.tensor([0.0, -torch.inf])
    assert ac.importance_ratio(*impossible).isfinite().all()


def test_the_variance_explained_is_numpys():
    rng = np.random.default_rng(0)
    target, valid = rng.normal(5, 2, (T, N)), rng.random((T, N)) < 0.8
    for noise in (0.0, 0.5, 4.0):
        value = target + noise * rng.normal(size=(T, N)) + 7
        expected = 1 - np.var((target - value)[valid]) / np.var(target[valid])
        given = value.copy()
        given[~valid] = np.nan
        mask = ac.Mask(torch.from_numpy(valid))
        got = ac.explained_variance(*map(torch.from_numpy, (given, target)), mask)
        assert got.item() == pytest.approx(expected, abs=1e-9)


# -- whole updates -------------------------------------------------------------------------------


class Plain(nn.Module):
    """A linear policy and value of observations (.., 4)."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.policy, self.value = nn.Linear(4, A), nn.Linear(4, 1)

    def forward(self, obs, first, state):
        return {"value": self.value(obs).squeeze(-1), "logits": self.policy(obs)}, state


def random_rollout(rng: np.random.Generator, model=None) -> Rollout:
    """Ends of both kinds and reset steps behind them; acted by `model`, or by a uniform policy."""
    obs = torch.from_numpy(rng.normal(size=(T + 1, N, 4))).float()
    first = np.zeros((T + 1, N), bool)
    terminated, truncated, valid = (np.zeros((T, N), bool) for _ in range(3))
    ended = rng.random(N) < 0.2
    for t in range(T):
        valid[t], first[t + 1] = ~ended, ended
        end = rng.random(N)
        terminated[t], truncated[t] = valid[t] & (end < 0.15), valid[t] & (end > 0.85)
        ended = terminated[t] | truncated[t]
    reward = np.where(valid, rng.normal(size=(T, N)), 0).astype(np.float32)
    action = torch.from_numpy(rng.integers(0, A, (T, N)))
    acted = torch.full((T, N), -np.log(A))
    if model is not None:
        with torch.no_grad():
            outputs, _ = model(obs[:T], None, {})
        acted = log_prob(outputs, action)
    ends = map(torch.from_numpy, (reward, terminated, truncated, valid))
    return Rollout(obs, torch.from_numpy(first), action, acted, *ends, {})


A2C = A2CConfig(precision="float32", learning_rate=0.01)
PPO = PPOConfig(precision="float32", learning_rate=0.01)


def called(metrics: dict) -> dict:
    """With what is worked out when a row is written."""
    return {name: value() if callable(value) else value for name, value in metrics.items()}


def built(config, seed: int = 0, spec: Spec | None = None):
    algorithm = config.build(Plain(seed), CPU)
    algorithm.store(spec or make_spec(T, N), 1, 0)
    return algorithm


@pytest.mark.parametrize(
    "minibatch_of, optimizer", [("steps", "adam"), ("sequences", "rmsprop"), ("steps", "rmsprop")]
)
def test_a2c_is_ppo_with_one_epoch_of_one_minibatch(optimizer, minibatch_of):
    shared = dict(
        lambda_=1.0, normalize_advantage=False, optimizer=optimizer, entropy_coef=0.02,
        max_grad_norm=0.5, learning_rate=1e-3, precision="float32",
    )  # fmt: skip
    ppo = PPOConfig(
        epochs=1, num_minibatches=1, clip_value=0.0, minibatch_of=minibatch_of, **shared
    )
    one, other = built(A2CConfig(**shared)), built(ppo)
    rng, before = np.random.default_rng(0), weights_of(one)
    for _ in range(100):
        given = Given(random_rollout(rng, one.model))
        metrics = called(one.update(given)), called(other.update(given))
        for name in ("loss/value", "loss/entropy", "loss/grad_norm", "loss/explained_variance"):
            torch.testing.assert_close(metrics[0][name], metrics[1][name], atol=1e-4, rtol=1e-4)
    assert one.updates == other.updates == 100
    for name, tensor in one.model.state_dict().items():
        torch.testing.assert_close(tensor, other.model.state_dict()[name], rtol=0, atol=1e-5)
        assert (tensor - before[name]).abs().max() > 1e-3


@pytest.mark.parametrize("changes", [{}, {"clip_value": 0.1}, {"estimator": "n_step"}])
def test_values_that_actors_sent_are_what_advantages_are_made_of(changes):
    """Those of the learner's own teach what its own pass does, and others something else."""
    config = replace(PPO, **changes)
    one, other, wrong = built(config), built(config), built(config)
    rollout = random_rollout(np.random.default_rng(0))
    value, _ = ac.evaluate(one.teams.forward, rollout, 1000)
    one.update(Given(rollout))
    other.update(Given(rollout._replace(value=value)))
    wrong.update(Given(rollout._replace(value=value + torch.arange(T + 1).unsqueeze(1))))
    for name, tensor in one.model.state_dict().items():
        torch.testing.assert_close(tensor, other.model.state_dict()[name], rtol=0, atol=1e-6)
        assert not torch.allclose(tensor, wrong.model.state_dict()[name], atol=1e-4)


def test_minibatches_are_all_steps_once_an_epoch():
    algorithm = built(replace(PPO, epochs=3, num_minibatches=4))
    rollout, seen = random_rollout(np.random.default_rng(0)), []
    step = algorithm._step

    def spy(inputs, *rest):
        seen.append(inputs[0])
        return step(inputs, *rest)

    algorithm._step = spy
    algorithm.update(Given(rollout))
    assert algorithm.updates == len(seen) == 12 and all(len(part[0]) == T * N // 4 for part in seen)
    orders = [torch.cat(seen[i : i + 4], 1)[0] for i in (0, 4, 8)]
    every = rollout.obs[:T].flatten(0, 1)
    for order in orders:
        assert sorted(order.tolist()) == sorted(every.tolist())
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[1], orders[2])


def test_passes_stop_behind_the_step_that_went_too_far():
    config = replace(PPO, epochs=5, num_minibatches=2, learning_rate=0.05)
    rollout, measured = random_rollout(np.random.default_rng(0)), []
    algorithm = built(config)
    rollout = rollout._replace(log_prob=ac.evaluate(algorithm.teams.forward, rollout, 1000)[1])
    step = algorithm._step
    algorithm._step = lambda *x: measured.append(step(*x)) or measured[-1]
    algorithm.update(Given(rollout))
    kls = [float(metrics["loss/kl"]()) for metrics in measured]
    assert len(kls) == 10 and abs(kls[0]) < 1e-6
    target = 0.5 * max(kls)
    steps = next(i for i, kl in enumerate(kls) if kl > target) + 1
    assert 1 < steps < 10
    stopped = built(replace(config, target_kl=target))
    given = Given(rollout)
    metrics = stopped.update(given)
    assert given.uses == [steps / 2]  # minibatches over minibatches a pass
    assert stopped.updates == steps and float(metrics["loss/kl"]()) == pytest.approx(kls[steps - 1])
    assert metrics["loss/explained_variance"]().isfinite()
    stopped.update(Given(rollout))
    assert stopped.updates > steps  # the next rollout is begun
    in_parts = built(replace(config, target_kl=target))
    in_parts.descend.parts = 2  # as where memory has run out
    in_parts.update(Given(rollout))
    assert in_parts.updates == steps


def test_schedules_follow_env_steps():
    half = Linear(0.4, 0.0, 100)
    for config in (A2C, PPO):
        for inserted, rate in ((0, 0.4), (50, 0.2), (100, 0.0), (1000, 0.0)):
            algorithm = built(replace(config, learning_rate=half))
            before = weights_of(algorithm)
            algorithm.update(Given(random_rollout(np.random.default_rng(0)), inserted))
            (group,) = algorithm.descend.optimizer.param_groups
            assert group["lr"] == pytest.approx(rate)
            assert rate or all(torch.equal(before[k], v) for k, v in weights_of(algorithm).items())
        # Where nothing else teaches the gradient is that of the entropy, times its coefficient.
        quiet = dict(value_coef=0.0, entropy_coef=half, learning_rate=0.0, max_grad_norm=0.0)
        rollout = random_rollout(np.random.default_rng(0))
        norms = []
        for inserted in (0, 50, 100):
            algorithm = built(replace(config, normalize_advantage=False, **quiet))
            for parameter in algorithm.model.value.parameters():  # no advantages
                nn.init.zeros_(parameter)
            given = Given(rollout._replace(reward=torch.zeros(T, N)), inserted)
            norms.append(float(algorithm.update(given)["loss/grad_norm"]))
        assert norms[0] > 1e-3 and norms[2] == 0
        assert norms[1] == pytest.approx(norms[0] / 2)


@pytest.mark.parametrize("config", [A2C, PPO], ids=["a2c", "ppo"])
@pytest.mark.parametrize("normalize_advantage", [True, False])
def test_with_popart_the_step_does_not_depend_on_the_size_of_rewards(normalize_advantage, config):
    """Neither the policy's nor the value's, once the statistics fit."""
    rollout, norms = random_rollout(np.random.default_rng(0)), {}
    for value_coef in (0.0, 0.5):
        config = replace(
            config, normalize_advantage=normalize_advantage, value_coef=value_coef,
            max_grad_norm=0.0, entropy_coef=0.0, learning_rate=0.0,
        )  # fmt: skip
        for size in (1.0, 100.0):
            torch.manual_seed(0)
            network = ModelConfig(hidden=(8,), head="actor_critic", normalize_returns=True)
            model = network(spaces.Box(-np.inf, np.inf, (4,)), spaces.Discrete(A))
            statistics = model.head.value.statistics
            statistics.mean.fill_(0.3 * size), statistics.variance.fill_((2 * size) ** 2)
            statistics.count.fill_(1e6)
            algorithm = config.build(model, CPU)
            algorithm.store(make_spec(T, N), 1, 0)
            given = Given(rollout._replace(reward=size * rollout.reward))
            norms[value_coef, size] = algorithm.update(given)["loss/grad_norm"]
        torch.testing.assert_close(norms[value_coef, 1.0], norms[value_coef, 100.0])
    assert norms[0.0, 1.0] > 1e-3 and norms[0.5, 1.0] != norms[0.0, 1.0]


def test_the_clip_of_ppo_follows_env_steps():
    algorithm = built(replace(PPO, clip_ratio=Linear(0.2, 0.0, 100), learning_rate=0.0))
    rollout = random_rollout(np.random.default_rng(0))
    current = ac.evaluate(algorithm.teams.forward, rollout, 1000)[1]
    rollout = rollout._replace(log_prob=current - np.log(1.15))
    shares = [float(algorithm.update(Given(rollout, at))["loss/clipped"]()) for at in (0, 20, 30)]
    assert shares == [0, 0, 1]  # clipped at 0.2, 0.16 and 0.14


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
@pytest.mark.parametrize("config", [A2C, PPO], ids=["a2c", "ppo"])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("when", [0, 2])
def test_a_loss_that_is_not_finite_changes_nothing(when, bad, config, optimizer):
    config = replace(config, optimizer=optimizer)
    one, other = built(config), built(config)
    rng = np.random.default_rng(0)
    for _ in range(when):
        given = Given(random_rollout(rng))
        one.update(given), other.update(given)
    rollout = random_rollout(rng)
    t, env = rollout.valid.nonzero()[-1]
    reward = rollout.reward.clone()
    reward[t, env] = bad
    if isinstance(config, PPOConfig):  # one minibatch, so that every step meets it
        one.config = replace(config, num_minibatches=1)
    before = deepcopy(one.state_dict())
    assert one.update(Given(rollout._replace(reward=reward)))["loss/skipped"].all()
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, before["model"][name])
    for index, moments in before["optimizer"]["moments"].items():
        for name, moment in moments.items():
            assert torch.equal(moment, one.descend.state_dict()["moments"][index][name])
    one.config = config
    if isinstance(config, PPOConfig):
        one.generator.set_state(other.generator.get_state())
    given = Given(random_rollout(rng))
    for algorithm in (one, other):
        assert not algorithm.update(given)["loss/skipped"].any()
    for name, tensor in one.model.state_dict().items():  # as if it had never been
        assert torch.equal(tensor, other.model.state_dict()[name])
        assert not torch.equal(tensor, before["model"][name])


@pytest.mark.parametrize("restored", [False, True])
def test_the_first_steps_of_rmsprop_by_hand(restored):
    """From moments of 1, so too behind a checkpoint without any; a checkpoint's own are kept."""
    gradient, weight = torch.tensor([0.0, 0.1, -1.0, 10.0]), nn.Parameter(torch.zeros(4))
    state = {"count": 0}
    for moments in ([0.99, 0.9901, 1.0, 1.99], [0.9801, 0.980299, 1.0, 2.9701]):
        descend = GradientStep(nn.ParameterList([weight]), 0.01, 0.0, 1e-3, "rmsprop")
        if restored or state["count"]:
            descend.load_state_dict(state)
        before = weight.detach().clone()
        descend((weight * gradient).sum(), 0)
        want = -0.01 * gradient / (torch.tensor(moments).sqrt() + 1e-3)
        torch.testing.assert_close(weight.detach() - before, want)
        state = descend.state_dict()


def test_moments_that_torch_had_kept_for_rmsprop_go_on():
    weight, twin = (nn.Parameter(torch.zeros(4)) for _ in range(2))
    theirs = torch.optim.RMSprop([weight], 0.01, alpha=0.99, eps=1e-3)

    def descend_by_torch(*gradient: float) -> None:
        weight.grad = torch.tensor(gradient)
        theirs.step()

    descend_by_torch(1.0, -2.0, 0.0, 3.0)
    ours = GradientStep(nn.ParameterList([twin]), 0.01, 0.0, 1e-3, "rmsprop")
    with torch.no_grad():
        twin.copy_(weight)
    ours.load_state_dict({"moments": {"0": theirs.state[weight]}, "count": 1})
    descend_by_torch(3.0, 1.0, 2.0, 0.0)
    ours((twin * weight.grad).sum(), 0)
    torch.testing.assert_close(twin, weight)


@pytest.mark.parametrize("minibatch_of", ["steps", "sequences"])
def test_minibatches_that_are_cut_for_want_of_memory_teach_the_same(minibatch_of):
    """The stand-in's memory ends in the middle of an epoch, twice."""
    config = replace(PPO, minibatch_of=minibatch_of, num_minibatches=2, clip_value=0.2,
                     learning_rate=1e-3)  # fmt: skip
    one, other = built(config), built(config)
    rollout, rng = random_rollout(np.random.default_rng(0)), one.generator.get_state()
    columns = (N if minibatch_of == "sequences" else T * N) // 2
    room = iter([columns] * 3 + [columns // 2] * 5)
    seen = []

    def look(module, inputs):
        width = inputs[1].shape[1]
        if torch.is_grad_enabled():
            seen.append(width)
            if width > next(room, columns // 4):
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    one.model.register_forward_pre_hook(look)
    for _ in range(3):
        metrics = called(one.update(Given(rollout))), called(other.update(Given(rollout)))
        assert metrics[0].keys() == metrics[1].keys() | {"loss/parts"}
        for name, value in metrics[1].items():
            torch.testing.assert_close(metrics[0][name], value, rtol=1e-4, atol=1e-5)
    assert one.updates == other.updates == 24
    assert metrics[0]["loss/parts"] == one.descend.parts == 4
    assert sorted(set(seen)) == sorted({columns, columns // 2, columns // 4})
    assert seen.count(columns) == 4 and not torch.equal(one.generator.get_state(), rng)
    for name, tensor in one.model.state_dict().items():
        torch.testing.assert_close(tensor, other.model.state_dict()[name], rtol=0, atol=1e-5)


def test_on_policy_v_trace_is_the_full_return():
    """Also GAE with lambda 1, and n-step targets with n beyond the rollout."""
    model = Plain()
    for seed in range(5):
        rollout = random_rollout(np.random.default_rng(seed), model)
        value, current = ac.evaluate(lambda *inputs: model(*inputs)[0], rollout, 1000)
        torch.testing.assert_close(current, rollout.log_prob, atol=1e-6, rtol=0)
        for reward_clip in (0.0, 0.5):
            rest = rollout, value, current, 0.9
            full = ac.targets("vtrace", *rest, 1.0, 1, reward_clip)
            for other in (
                ac.targets("n_step", *rest, 0.3, 100, reward_clip),
                ac.targets("gae", *rest, 1.0, 1, reward_clip),
            ):
                for one, two in zip(full, other, strict=True):
                    close = torch.isclose(one, two, atol=1e-5)
                    assert close[rollout.valid].all()
            clipped = rollout._replace(reward=rollout.reward.clamp(-0.5, 0.5))
            again = ac.targets("vtrace", clipped, *rest[1:], 1.0, 1, 0.0)
            assert torch.equal(again.value, full.value) == (reward_clip == 0.5)


def test_off_policy_v_trace_leaves_the_ratio_to_the_loss():
    rollout = random_rollout(np.random.default_rng(0))
    current = rollout.log_prob + 0.7 * torch.randn(T, N, generator=torch.Generator().manual_seed(0))
    value = torch.randn(T + 1, N, generator=torch.Generator().manual_seed(1))
    target = ac.targets("vtrace", rollout, value, current, 0.9, 1.0, 1, 0.0)
    for t, env in rollout.valid.nonzero().tolist():
        last = t == T - 1 or bool(rollout.truncated[t, env])
        following = (value if last else target.value)[t + 1, env]
        following = 0.0 if rollout.terminated[t, env] else following
        advantage = rollout.reward[t, env] + 0.9 * following - value[t, env]
        torch.testing.assert_close(target.advantage[t, env], advantage)


def test_settings_that_cannot_be_are_refused():
    for config in (A2CConfig, PPOConfig):
        for wrong in (
            {"gamma": 1.1}, {"lambda_": -0.1}, {"n_step": 0}, {"value_coef": -1.0},
            {"entropy_coef": Linear(-0.1, 0, 5)}, {"reward_clip": -1.0}, {"learning_rate": -1e-3},
            {"max_grad_norm": -1.0},
        ):  # fmt: skip
            with pytest.raises(ValueError, match="expected"):
                config(**wrong)
    for wrong in ({"epochs": 0}, {"num_minibatches": 0}, {"clip_ratio": -0.1}, {"target_kl": -1.0}):
        with pytest.raises(ValueError, match="expected"):
            PPOConfig(**wrong)
    with pytest.raises(ValueError, match="expected values_by learner for vtrace, got actor"):
        PPOConfig(estimator="vtrace", values_by="actor")
    with pytest.raises(ValueError, match="expected clip_rho above 0"):
        A2CConfig(clip_rho=-1.0)
    A2CConfig(clip_rho=0.5)
    with pytest.raises(ValueError, match="expected clip_rho of at least 1 for vtrace"):
        A2CConfig(clip_rho=0.5, estimator="vtrace")


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_moments_that_were_saved_in_another_order_of_memory_go_on_alike(optimizer):
    """A convolution's weights are channels last; a checkpoint holds all numbers in one order."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            convolution = nn.Conv2d(3, 8, 3)
            self.convolution = convolution.to(memory_format=torch.channels_last)
            self.scale = nn.Parameter(torch.tensor(1.0))

    torch.manual_seed(0)
    one = Net()
    batches = torch.randn(6, 4, 3, 8, 8)

    def descend(net: Net, step: GradientStep, batches: torch.Tensor) -> None:
        for batch in batches:
            step((net.convolution(batch) * net.scale).square().mean(), 0)

    first = GradientStep(one, 1e-2, 0.5, 1e-8, optimizer)
    descend(one, first, batches[:3])
    twin = deepcopy(one)
    second = GradientStep(twin, 1e-2, 0.5, 1e-8, optimizer)
    arrays, numbers = flatten(first.state_dict())
    second.load_state_dict(unflatten(arrays | numbers))
    descend(one, first, batches[3:])
    descend(twin, second, batches[3:])
    for mine, theirs in zip(one.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_step_on_the_cpu_asks_no_gpu(monkeypatch):
    """One that is there but does not work would stop a learner that has fallen back to the CPU."""

    def broken(*args, **kwargs):
        raise RuntimeError("CUDA driver initialization failed")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", broken)
    layer = nn.Linear(2, 1)
    before = layer.weight.detach().clone()
    GradientStep(layer, 1e-2, 0.0, 1e-8)(layer(torch.ones(1, 2)).sum(), 0)
    assert not torch.equal(layer.weight, before)
