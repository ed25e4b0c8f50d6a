"""Targets and losses of the value-based family by slow loops and by hand; the heads they need."""

from __future__ import annotations

from math import cos, exp, floor, log, pi, sqrt

import numpy as np
import pytest
import torch
from gymnasium import spaces

from asyncrl.algorithms import value_distributions as vd
from asyncrl.algorithms.returns import n_step
from asyncrl.models import ModelConfig
from asyncrl.models.layers import StreamConfig
from asyncrl.models.return_heads import C51, IQN, QR, Streams, midpoints

A, K = 3, 5
ATOMS = C51(K, -2.0, 2.0)
HEADS = {"none": "q", "c51": ATOMS, "qr": QR(K), "iqn": IQN(K, 7)}


def doubles(*shape: int, seed: int = 0, size: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * size


def outputs_of(kind: str, *lead: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """What a model of each kind could put out, (*lead, A[, K]) float64."""
    if kind == "none":
        return {"q": doubles(*lead, A, seed=seed)}
    if kind == "c51":
        logits = doubles(*lead, A, K, seed=seed)
        q = (logits.softmax(-1) * ATOMS.atoms()).sum(-1)
        return {"q": q, "logits_of_return": logits}
    quantiles = doubles(*lead, A, K, seed=seed)
    outputs = {"q": quantiles.mean(-1), "quantiles": quantiles}
    if kind == "iqn":
        outputs["taus"] = torch.sigmoid(doubles(*lead, K, seed=seed + 1))
    return outputs


def slow_return(kind: str, outputs: dict, index: tuple, action: int) -> list[tuple[float, float]]:
    """[(value, probability)] of one action at one place."""
    if kind == "none":
        return [(outputs["q"][index][action].item(), 1.0)]
    if kind == "c51":
        weights = [exp(x) for x in outputs["logits_of_return"][index][action].tolist()]
        return list(zip([-2, -1, 0, 1, 2], [w / sum(weights) for w in weights], strict=True))
    return [(value, 1 / K) for value in outputs["quantiles"][index][action].tolist()]


# -- rescaling -----------------------------------------------------------------------------------


def test_rescaling_by_hand_by_the_papers_formula_and_back():
    by_hand = torch.tensor([0.0, 3.0, -3.0, 8.0, -99.0])
    want = torch.tensor([0.0, 1.003, -1.003, 2.008, -9.099])
    torch.testing.assert_close(vd.rescale(by_hand), want)
    torch.testing.assert_close(vd.unrescale(want), by_hand)

    def h(x: float) -> float:
        return np.sign(x) * (sqrt(abs(x) + 1) - 1) + 1e-3 * x

    def inverse(y: float) -> float:
        root = sqrt(1 + 4e-3 * (abs(y) + 1 + 1e-3))
        return np.sign(y) * (((root - 1) / 2e-3) ** 2 - 1)

    x = torch.logspace(-2, 6, 200, dtype=torch.float64)
    x = torch.cat([-x, x])
    np.testing.assert_allclose(vd.rescale(x), [h(v) for v in x.tolist()], rtol=1e-12)
    np.testing.assert_allclose(vd.unrescale(x), [inverse(v) for v in x.tolist()], rtol=1e-9)


@pytest.mark.parametrize("dtype, exact", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_rescaling_and_its_inverse_are_exact_at_all_sizes(dtype, exact):
    """Also near 0, where the paper's formula loses all digits of float32."""
    x = torch.logspace(-12, 9, 500, dtype=dtype)
    x = torch.cat([-x, x, torch.zeros(1, dtype=dtype)])
    torch.testing.assert_close(vd.unrescale(vd.rescale(x)), x, rtol=exact, atol=0)
    torch.testing.assert_close(vd.rescale(vd.unrescale(x)), x, rtol=exact, atol=0)


# -- n-step windows of sequences -----------------------------------------------------------------


@pytest.mark.parametrize("n, rows", [(1, 12), (3, 10), (3, 12), (20, 12), (5, 4)])
def test_windows_are_n_step_returns_and_reach_no_further_than_an_end(n, rows):
    T, N, gamma = 12, 40, 0.9
    rng = np.random.default_rng(n)
    reward, value = doubles(T, N), doubles(T + 1, N, seed=1)
    terminated = torch.from_numpy(rng.random((T, N)) < 0.15)
    truncated = torch.from_numpy(rng.random((T, N)) < 0.15)
    total, discount, end = vd.windows(reward, terminated, truncated, gamma, n, rows)
    got = total + discount * value.gather(0, end)
    want = n_step(reward, terminated, truncated, value, gamma, n)
    torch.testing.assert_close(got, want[:rows])
    for t in range(rows):
        for i in range(N):
            steps = 0
            while steps < n and t + steps < T:
                steps += 1
                if terminated[t + steps - 1, i] or truncated[t + steps - 1, i]:
                    break
            assert end[t, i] == t + steps
            ends = bool(terminated[t + steps - 1, i])
            assert discount[t, i].item() == pytest.approx(0 if ends else gamma**steps)


def test_what_lies_behind_an_end_changes_nothing_not_even_nan():
    reward = torch.tensor([[1.0], [2], [torch.nan], [torch.nan]])
    truncated = torch.tensor([[False], [True], [False], [False]])
    total, discount, end = vd.windows(reward, truncated & False, truncated, 0.5, 3, 2)
    assert total.tolist() == [[2.0], [2.0]] and end.tolist() == [[2], [2]]
    assert discount.tolist() == [[0.25], [0.5]]


# -- C51 -----------------------------------------------------------------------------------------


def test_projection_by_hand():
    """Between two atoms by nearness, on an atom to it alone, beyond the ends to the ends."""
    values = torch.tensor([[0.25, 1.0, -7.0, 9.0]])
    probabilities = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    got = vd.project(values, probabilities, ATOMS.atoms())
    torch.testing.assert_close(got, torch.tensor([[0.2, 0, 0.3, 0.3 + 0.1, 0.1]]))


def test_projection_by_the_papers_algorithm():
    """Bellemare et al. 2017, algorithm 1: floor and ceiling, one value at a time."""
    values, logits = doubles(6, 4, 9, size=2.0), doubles(6, 4, 9, seed=1)
    probabilities = logits.softmax(-1)
    got = vd.project(values, probabilities, ATOMS.atoms().double())
    want = np.zeros((6, 4, K))
    for i, j, m in np.ndindex(6, 4, 9):
        place = (min(max(values[i, j, m].item(), -2.0), 2.0) + 2.0) / 1.0
        low, p = floor(place), probabilities[i, j, m].item()
        want[i, j, low] += p * (1 - (place - low))
        if place > low:
            want[i, j, low + 1] += p * (place - low)
    np.testing.assert_allclose(got, want, atol=1e-12)
    torch.testing.assert_close(got.sum(-1), torch.ones(6, 4, dtype=torch.float64))
    inside = values.clamp(-2, 2)  # the mean of what is not cut off stays
    mean = (got * ATOMS.atoms()).sum(-1)
    torch.testing.assert_close(mean, (inside * probabilities).sum(-1))


def test_categorical_loss_is_a_divergence_with_the_gradient_of_the_cross_entropy():
    logits = doubles(7, K).requires_grad_()
    target = doubles(7, K, seed=1).softmax(-1)
    target[0], target[1] = logits.detach()[0].softmax(-1), torch.tensor([0.0, 0, 1, 0, 0])
    loss = vd.categorical_loss(logits, target)
    for i in range(7):
        p = [exp(x) for x in logits[i].tolist()]
        p = [x / sum(p) for x in p]
        want = sum(q * log(q / x) for q, x in zip(target[i].tolist(), p, strict=True) if q > 0)
        assert loss[i].item() == pytest.approx(want, abs=1e-12)
    assert loss[0].item() == pytest.approx(0, abs=1e-12) and (loss[1:] > 0).all()
    loss.sum().backward()
    torch.testing.assert_close(logits.grad, logits.detach().softmax(-1) - target)


# -- quantiles -----------------------------------------------------------------------------------


def test_quantile_loss_by_hand():
    """One quantile of 1 at fraction 1/4 against 3 and 1/2: errors 2 and -1/2."""
    quantiles, taus = torch.tensor([[1.0]]), torch.tensor([[0.25]])
    target = torch.tensor([[3.0, 0.5]])
    got = vd.quantile_loss(quantiles, taus, target, huber=True)
    torch.testing.assert_close(got, torch.tensor([(0.25 * 1.5 + 0.75 * 0.125) / 2]))
    got = vd.quantile_loss(quantiles, taus, target, huber=False)
    torch.testing.assert_close(got, torch.tensor([(0.25 * 2 + 0.75 * 0.5) / 2]))


@pytest.mark.parametrize("huber", [True, False])
def test_quantile_loss_and_its_gradient_by_slow_loops(huber):
    N, M = 4, 6
    quantiles, target = doubles(3, 2, N).requires_grad_(), doubles(3, 2, M, seed=1, size=2.0)
    taus = torch.rand(3, 2, N, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    want, gradient = np.zeros((3, 2)), np.zeros((3, 2, N))
    for i, j in np.ndindex(3, 2):
        for n, m in np.ndindex(N, M):
            error = (target[i, j, m] - quantiles[i, j, n]).item()
            share = abs(taus[i, j, n].item() - (error < 0))
            small = huber and abs(error) <= 1
            size = 0.5 * error**2 if small else abs(error) - (0.5 if huber else 0)
            want[i, j] += share * size / M
            gradient[i, j, n] -= share * (error if small else np.sign(error)) / M
    loss = vd.quantile_loss(quantiles, taus, target, huber)
    loss.sum().backward()
    np.testing.assert_allclose(loss.detach(), want, rtol=1e-12)
    np.testing.assert_allclose(quantiles.grad, gradient, rtol=1e-12)


def test_what_minimises_the_quantile_loss_are_the_quantiles():
    samples = torch.arange(100, dtype=torch.float64)
    taus = midpoints(4).double()
    quantiles = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([quantiles], lr=50.0)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 50.0 * (1 - step / 400)
        optimizer.zero_grad()
        vd.quantile_loss(quantiles, taus, samples, huber=False).backward()
        optimizer.step()
    np.testing.assert_allclose(quantiles.detach(), [12, 37, 62, 87], atol=1)


# -- what the next state is worth ----------------------------------------------------------------


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("rescaled", [False, True])
def test_the_greedy_return_is_that_of_the_action_another_net_prefers(kind, rescaled):
    target, chooser = outputs_of(kind, 2, 4), doubles(2, 4, A, seed=9)
    got = vd.greedy_return(target, HEADS[kind], chooser, rescaled)
    for index in np.ndindex(2, 4):
        want = slow_return(kind, target, index, int(chooser[index].argmax()))
        values = torch.tensor([value for value, _ in want], dtype=torch.float64)
        values = vd.unrescale(values) if rescaled else values
        torch.testing.assert_close(got.values[index].double(), values)
        if kind == "c51":
            np.testing.assert_allclose(got.probabilities[index], [p for _, p in want])


@pytest.mark.parametrize("kind", HEADS)
def test_the_soft_return_by_slow_loops(kind):
    """sum over a of pi(a) (Z(a) - tau log pi(a)): quantiles at equal fractions, else a mixture."""
    temperature, outputs = 0.3, outputs_of(kind, 2, 4)
    got = vd.soft_return(outputs, HEADS[kind], temperature)
    for index in np.ndindex(2, 4):
        weights = [exp(q / temperature) for q in outputs["q"][index].tolist()]
        policy = [w / sum(weights) for w in weights]
        parts = [
            [(v - temperature * log(policy[a]), policy[a] * p) for v, p in
             slow_return(kind, outputs, index, a)] for a in range(A)
        ]  # fmt: skip
        if kind == "c51":
            flat = [pair for part in parts for pair in part]
            np.testing.assert_allclose(got.values[index], [v for v, _ in flat], rtol=1e-6)
            np.testing.assert_allclose(got.probabilities[index], [p for _, p in flat], rtol=1e-6)
            assert got.probabilities[index].sum().item() == pytest.approx(1)
        else:
            count = len(parts[0])
            mixed = [sum(policy[a] * parts[a][k][0] for a in range(A)) for k in range(count)]
            np.testing.assert_allclose(got.values[index], mixed, rtol=1e-12)


def test_munchausen_by_hand_and_by_the_papers_formula():
    """Two equal actions: log(1/2) each; a hopeless one is cut off; a certain one costs nothing."""
    q = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 9.0], [0.0, 9.0]])
    action = torch.tensor([0, 1, 0, 1])
    got = vd.munchausen_reward(q, action, 0.03, -1.0)
    torch.testing.assert_close(got, torch.tensor([0.03 * log(0.5), 0.03 * log(0.5), -1, 0]))
    # Equal values of 1 and the entropy of a coin.
    soft = vd.soft_return({"q": q[:1]}, "q", 0.03)
    torch.testing.assert_close(soft.values, torch.tensor([[1 + 0.03 * log(2)]]))

    q, action = doubles(50, A), torch.randint(0, A, (50,))
    got = vd.munchausen_reward(q, action, 0.4, -0.5)
    for i in range(50):
        values = q[i].tolist()
        v = max(values)  # their stable form: q - v - tau log sum exp((q - v) / tau)
        total = sum(exp((x - v) / 0.4) for x in values)
        want = values[action[i]] - v - 0.4 * log(total)
        assert got[i].item() == pytest.approx(min(0, max(want, -0.5)))


def test_a_cold_soft_return_is_the_greedy_one():
    outputs = outputs_of("qr", 30)
    cold = vd.soft_return(outputs, QR(K), 1e-5)
    greedy = vd.greedy_return(outputs, QR(K), outputs["q"])
    torch.testing.assert_close(cold.values, greedy.values)


def test_the_soft_return_of_rescaled_outputs_is_that_of_their_true_values():
    q = doubles(30, A, size=5.0)
    want = vd.soft_return({"q": q}, "q", 0.5)
    got = vd.soft_return({"q": vd.rescale(q)}, "q", 0.5, rescaled=True)
    torch.testing.assert_close(got.values, want.values)
    action = torch.zeros(30, dtype=torch.int64)
    torch.testing.assert_close(
        vd.munchausen_reward(vd.rescale(q), action, 0.5, -9.0, rescaled=True),
        vd.munchausen_reward(q, action, 0.5, -9.0),
    )


@pytest.mark.parametrize("kind", HEADS)
def test_the_loss_looks_at_the_action_taken_alone(kind):
    """Over (L, N), and its error is the TD error of a mean, else the loss itself."""
    outputs, action = outputs_of(kind, 3, 4), torch.randint(0, A, (3, 4))
    last = max(outputs, key=lambda name: outputs[name].ndim)  # "q" alone, or what makes it up
    outputs[last].requires_grad_()
    values = doubles(3, 4, 1 if kind == "none" else K, seed=3)
    probabilities = values.softmax(-1) if kind == "c51" else None
    loss, error = vd.return_loss(
        outputs, HEADS[kind], action, vd.Return(values, probabilities), huber=True
    )
    assert loss.shape == error.shape == (3, 4) and not error.requires_grad
    for index in np.ndindex(3, 4):
        a = int(action[index])
        if kind == "none":
            want = (values[index][0] - outputs["q"][index][a]).item()
            assert error[index].item() == pytest.approx(want)
            assert loss[index].item() == pytest.approx(
                0.5 * want**2 if abs(want) <= 1 else abs(want) - 0.5
            )
            continue
        assert error[index] == loss[index]
        if kind == "c51":
            target = vd.project(values[index], probabilities[index], ATOMS.atoms().double())
            want = vd.categorical_loss(outputs["logits_of_return"][index][a], target)
        else:
            taus = outputs["taus"][index] if kind == "iqn" else torch.arange(0.1, 1, 0.2)
            want = vd.quantile_loss(outputs["quantiles"][index][a], taus, values[index], True)
        assert loss[index].item() == pytest.approx(want.item())
    loss.sum().backward()
    moved = outputs[last].grad.flatten(3).abs().sum(-1) if kind != "none" else outputs["q"].grad
    assert ((moved != 0) == (torch.arange(A) == action.unsqueeze(-1))).all()


def test_the_priority_of_a_sequence_by_hand():
    """0.9 of the largest and 0.1 of the mean error of what was learned from."""
    error = torch.tensor([[1.0, 5.0, 7.0], [-3.0, 1.0, 7.0], [9.0, 2.0, 7.0]])
    learned = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 1, 0]], dtype=torch.bool)
    got = vd.sequence_priority(error, learned)
    torch.testing.assert_close(got, torch.tensor([2.7 + 0.2, 4.5 + 0.8 / 3, 0.0]))


# -- heads ---------------------------------------------------------------------------------------

BOX = spaces.Box(-1, 1, (6,))


def build(head, **changes):
    torch.manual_seed(0)
    config = ModelConfig(hidden=(16,), head=head, **changes)
    return config(BOX, spaces.Discrete(A))


@pytest.mark.parametrize("kind", ["c51", "qr", "iqn"])
@pytest.mark.parametrize("options", [{}, {"dueling": True}, {"noisy": True, "lstm": 8}], ids=str)
def test_what_a_distributional_head_puts_out(kind, options):
    head, T, N = HEADS[kind], 4, 3
    model = build(head, **options)
    obs = torch.rand(T, N, 6) * 2 - 1
    first = torch.zeros(T, N, dtype=torch.bool)
    outputs, _ = model(obs, first, model.initial_state(N))
    shapes = {name: tuple(part.shape) for name, part in outputs.items()}
    assert shapes == {name: (T, N, *shape) for name, shape in head.outputs(A).items()}
    if kind == "c51":
        want = (outputs["logits_of_return"].softmax(-1) * torch.arange(-2.0, 3)).sum(-1)
    else:
        want = outputs["quantiles"].mean(-1)
    torch.testing.assert_close(outputs["q"], want)
    assert (outputs["q"].std((0, 1)) > 0).all()  # the observation matters, for each action
    model(obs, first, model.initial_state(N))[0]["q"][..., 0].sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_dueling_splits_every_number_of_a_distribution():
    torch.manual_seed(0)
    streams, features = Streams(StreamConfig(8, 6), A, K, dueling=True), torch.randn(20, 8)
    numbers = streams(features)
    assert numbers.shape == (20, A, K)
    torch.testing.assert_close(numbers.mean(1), streams.value(features))
    advantage = streams.advantage(features).unflatten(1, (A, K))
    torch.testing.assert_close(numbers[:, 0] - numbers[:, 1], advantage[:, 0] - advantage[:, 1])


def test_fractions_are_drawn_in_training_one_of_each_part_and_fixed_in_evaluation():
    model, features = build(IQN(8, 5)).head, torch.rand(400, 16)
    taus = model(features)["taus"]
    assert ((taus * 8).floor() == torch.arange(8)).all()
    within = taus * 8 - torch.arange(8)
    assert abs(within.mean().item() - 0.5) < 0.02 and abs(within.var().item() - 1 / 12) < 0.005
    assert not torch.equal(model(features)["taus"], taus)
    model.eval()
    state = torch.get_rng_state()
    outputs = model(features)
    assert torch.equal(torch.get_rng_state(), state)  # who acts draws nothing
    torch.testing.assert_close(outputs["taus"][7], torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]))
    assert outputs["quantiles"].shape == (400, A, 5)


def test_an_implicit_quantile_by_a_slow_formula():
    """psi(x) times phi(tau), 64 cosines of pi i tau; a layer, then Q (Dabney et al. 2018b)."""
    head, features = build(IQN(4, 3), dueling=True).head.eval(), torch.rand(2, 16)
    outputs = head(features)
    for n in range(2):
        for k, tau in enumerate((1 / 6, 0.5, 5 / 6)):
            waves = torch.tensor([cos(pi * i * tau) for i in range(64)])
            mixed = features[n] * torch.relu(head.embedding(waves))
            advantage, value = (
                stream.last(torch.relu(stream.hidden[0](mixed)))
                for stream in (head.streams.advantage, head.streams.value)
            )
            want = value + advantage - advantage.mean()
            torch.testing.assert_close(outputs["quantiles"][n, :, k], want, rtol=1e-4, atol=1e-6)
