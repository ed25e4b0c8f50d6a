"""DQN: its loss by a slow formula, an update by hand, its Q values by an MDP solved by hand.

The family's switches are in test_dqn_family, its losses alone in test_value_distributions.
"""

from __future__ import annotations

import itertools
import threading
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from asyncrl.algorithms.dqn import DQN, DQNConfig, dqn_loss
from asyncrl.algorithms.value_distributions import Return, greedy_return
from asyncrl.schedules import Linear
from asyncrl.stores.replay import ReplayConfig, Sample
from asyncrl.types import Spec


class Table(nn.Module):
    """A Q value for each state and action."""

    frame_stack = 1

    def __init__(self, num_states: int = 2, num_actions: int = 2):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(num_states, num_actions))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

    def initial_state(self, num_envs: int) -> dict:
        return {}

    def forward(self, obs, first, state):
        return {"q": self.table[obs]}, state


CONFIG = DQNConfig(
    gamma=0.5, learning_rate=0.1, batch_size=32, target_period=3, precision="float32",
    replay=ReplayConfig(capacity=1000, learning_starts=400, samples_per_insert=64),
)  # fmt: skip


def make_dqn(**changes) -> DQN:
    return DQN(replace(CONFIG, **changes), Table(), torch.device("cpu"))


def make_sample(
    reward, action=(0,), obs=(0,), next_obs=(0,), steps=None, terminated=None
) -> Sample:
    """Transitions of (n, N) rewards."""
    reward = torch.tensor(reward)
    n, N = reward.shape
    first = torch.zeros(1, N, dtype=torch.bool)
    steps = torch.full((N,), n) if steps is None else torch.tensor(steps)
    terminated = first[0] if terminated is None else torch.tensor(terminated)
    return Sample(
        torch.tensor([obs]), first, {}, torch.tensor(action), reward, steps, terminated,
        torch.tensor([next_obs]), first, {}, torch.ones(N), torch.arange(N),
    )  # fmt: skip


class Store:
    """Gives the same sample again and again."""

    device = torch.device("cpu")

    def __init__(self, sample: Sample, env_steps: int = 0):
        self.sample, self.updates_allowed = (lambda: sample), (lambda: 0)
        self.limiter = SimpleNamespace(inserted=env_steps)


@pytest.mark.parametrize("huber", [True, False])
def test_the_loss_and_its_gradient_by_a_slow_formula(huber):
    rng = np.random.default_rng(0)
    N, A = 50, 3
    q, target = rng.normal(size=(N, A)) * 2, rng.normal(size=N)
    action, weight = rng.integers(0, A, N), rng.random(N) * (rng.random(N) < 0.8)
    loss, gradient = 0.0, np.zeros((N, A))
    for i in range(N):
        error = q[i, action[i]] - target[i]
        each = min(0.5 * error**2, abs(error) - 0.5) if abs(error) > 1 else 0.5 * error**2
        slope = max(-1.0, min(1.0, error))
        count = (weight > 0).sum()  # importance weights make a batch's loss smaller, not relative
        loss += weight[i] * (each if huber else error**2) / count
        gradient[i, action[i]] = weight[i] * (slope if huber else 2 * error) / count
    q = torch.from_numpy(q).requires_grad_()
    action, target, weight = map(torch.from_numpy, (action, target, weight))
    got, td_error = dqn_loss({"q": q}, "q", action, Return(target.unsqueeze(1)), weight, huber)
    got.backward()
    np.testing.assert_allclose(got.item(), loss, rtol=1e-12)
    np.testing.assert_allclose(q.grad, gradient, rtol=1e-12)
    chosen = q.detach()[torch.arange(N), action]
    assert torch.equal(td_error, target - chosen) and not td_error.requires_grad


def test_a_batch_of_weight_zero_has_loss_zero():
    q = torch.ones(2, 2, requires_grad=True)
    target, nothing = Return(torch.zeros(2, 1)), torch.zeros(2)
    loss, _ = dqn_loss({"q": q}, "q", torch.tensor([0, 1]), target, nothing, huber=True)
    loss.backward()
    assert loss == 0 and not q.grad.any()


def test_double_q_chooses_by_the_online_and_values_by_the_target_net():
    online, target = torch.tensor([[1.0, 2], [4, 3]]), torch.tensor([[10.0, 20], [30, 40]])
    assert greedy_return({"q": target}, "q", online).values.tolist() == [[20], [30]]
    assert greedy_return({"q": target}, "q", target).values.tolist() == [[20], [40]]


def test_one_update_by_hand():
    """Q(0, .) = 1, 3 online and 2, 1 in the target net; two windows of two steps and one."""
    sample = make_sample([[3.0, 0.5], [-3.0, 0.0]], (0, 1), (0, 0), (0, 1), [2, 1], [False, True])
    before = sample.reward.clone()
    # Clipped to 1 and -1 the first window's target is 1 - 1/2 + 1/4 of the target net's 1, which
    # the online net chose (double), or of its largest, 2. The second's is 0.5, against Q = 3.
    for changes, target, second in (
        ({}, 0.75, 0.5),
        ({"double": False}, 1.0, 0.5),
        ({"reward_clip": 0.0}, 1.75, 0.5),
        ({"reward_clip": 2.0}, 1.25, 0.5),
        ({"reward_clip": 0.0, "reward_scale": 0.5}, 1.0, 0.25),
        ({"reward_scale": 0.5}, 0.75, 0.25),
    ):
        dqn = make_dqn(n_step=2, huber=False, max_grad_norm=0.1, **({"double": True} | changes))
        with torch.no_grad():
            dqn.model.table[0] = torch.tensor([1.0, 3.0])
            dqn.target.table[0] = torch.tensor([2.0, 1.0])
        metrics = dqn.update(Store(sample))
        one, two = target - 1, second - 3
        assert metrics["loss/q"].item() == pytest.approx((one**2 + two**2) / 2)
        assert metrics["loss/td_error"].item() == pytest.approx((abs(one) + abs(two)) / 2)
        assert metrics["loss/grad_norm"].item() == pytest.approx(np.hypot(one, two))
        mean = dqn.descend.state_dict()["moments"][0]["exp_avg"]  # a tenth of a first gradient
        assert mean.norm().item() == pytest.approx(0.01, rel=1e-4)
        assert all(value.ndim == 0 for value in metrics.values())
        # Adam's first step is the learning rate, whatever the gradient; only what was seen moves.
        moved = dqn.model.table.detach() - torch.tensor([[1.0, 3.0], [0.0, 0.0]])
        want = [[0.1 * np.sign(one), -0.1], [0, 0]]
        np.testing.assert_allclose(moved, want, atol=5e-3)
    assert torch.equal(sample.reward, before)  # the store's rewards stay as they are


def test_the_target_net_moves_at_its_period_only():
    dqn, store = make_dqn(target_period=3), Store(make_sample([[1.0]]))
    for update in range(1, 8):
        before = dqn.target.table.clone()
        dqn.model.count += 1
        dqn.update(store)
        if update % 3:
            assert torch.equal(dqn.target.table, before)
        else:
            assert torch.equal(dqn.target.table, dqn.model.table) and dqn.target.count == update
            assert not torch.equal(dqn.target.table, before)
    assert dqn.updates == 7 and not dqn.target.table.requires_grad


def test_polyak_moves_the_target_net_a_share_each_time():
    dqn, store = make_dqn(target_period=1, polyak=0.25), Store(make_sample([[1.0]]))
    for _ in range(5):
        before = dqn.target.table.clone()
        dqn.update(store)
        want = 0.75 * before + 0.25 * dqn.model.table.detach()
        torch.testing.assert_close(dqn.target.table, want)
        assert torch.equal(dqn.target.mask, dqn.model.mask)  # a share of infinity would be NaN


def test_the_learning_rate_follows_its_schedule_over_env_steps():
    dqn = make_dqn(learning_rate=Linear(0.2, 0.0, 100))
    for env_steps, rate in ((0, 0.2), (50, 0.1), (75, 0.05), (100, 0.0), (999, 0.0)):
        before = dqn.model.table.detach().clone()
        dqn.update(Store(make_sample([[1.0]]), env_steps))
        groups = dqn.descend.optimizer.param_groups
        assert [group["lr"] for group in groups] == pytest.approx([rate])
        assert torch.equal(dqn.model.table, before) == (rate == 0)


SPEC = Spec(10, 4, spaces.Discrete(2), spaces.Discrete(2), {})


def play(state: np.ndarray, ended: np.ndarray, first: np.ndarray, rng, sequence: int, spec=SPEC):
    """One unroll of a random policy in the MDP of the test below, by the rules of the wire."""
    unroll = spec.layout.views(np.zeros(spec.layout.nbytes, np.uint8))
    unroll.header.sequence[...] = sequence
    for t in range(SPEC.unroll_length):
        action = rng.integers(0, 2, SPEC.num_envs)
        unroll.obs[t], unroll.first[t], unroll.action[t], unroll.valid[t] = (
            state,
            first,
            action,
            ~ended,
        )
        unroll.reward[t] = np.array([[0, 1], [2, 4]])[state, action] * ~ended
        unroll.terminated[t] = ~ended & (state == 1) & (action == 1)
        unroll.truncated[t] = ~ended & ~unroll.terminated[t] & (rng.random(SPEC.num_envs) < 0.2)
        # A terminated state looks like state 0: its value must not count all the same.
        first = ended.copy()
        state[:] = np.where(ended, rng.integers(0, 2, SPEC.num_envs), (state == 0) & (action == 1))
        ended[:] = unroll.terminated[t] | unroll.truncated[t]
    unroll.obs[-1], unroll.first[-1] = state, first
    return unroll, first


def unrolls(count: int):
    """So many of them, that join on."""
    rng, B = np.random.default_rng(0), SPEC.num_envs
    state, ended, first = rng.integers(0, 2, B), np.zeros(B, bool), np.ones(B, bool)
    for sequence in range(count):
        unroll, first = play(state, ended, first, rng, sequence)
        yield unroll


@pytest.mark.parametrize("double", [False, True])
def test_q_of_an_mdp_solved_by_hand(double):
    """State 0: stay for 0, or go to 1 for 1. State 1: go back for 2, or end for 4. gamma = 1/2.

    V(1) = max(2 + V(0) / 2, 4) and V(0) = max(V(0) / 2, 1 + V(1) / 2), so V(1) = 4 and V(0) = 3.
    Episodes are also cut at random, which must change nothing.
    """
    dqn = make_dqn(
        double=double, reward_clip=0.0, target_period=20, learning_rate=Linear(0.4, 0.0, 650)
    )
    store = dqn.store(SPEC, 1, seed=0)
    for unroll in itertools.takewhile(lambda _: store.limiter.inserted < 600, unrolls(100)):
        store.insert(0, unroll)
        for _ in range(store.updates_allowed()):
            dqn.update(store)
    assert dqn.updates >= 400
    np.testing.assert_allclose(dqn.model.table.detach(), [[1.5, 3], [3.5, 4]], atol=0.002)


@pytest.mark.parametrize("changes", [{}, {"double": True}, {"munchausen": 0.9}], ids=str)
def test_two_teams_make_the_same_updates(changes):
    threads = torch.get_num_threads()
    dqn, twin = make_dqn(**changes), make_dqn(**changes)
    twin.teams.use(2)
    assert twin.teams.count == 2
    rng = torch.Generator().manual_seed(0)
    for _ in range(9):
        numbers = [torch.randint(0, 2, (8,), generator=rng).tolist() for _ in range(3)]
        store = Store(make_sample(torch.randn((1, 8), generator=rng).tolist(), *numbers))
        assert dqn.update(store) == twin.update(store)
        assert torch.equal(dqn.model.table, twin.model.table)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("changes", [{}, {"double": True}, {"munchausen": 0.9}], ids=str)
def test_a_batch_drawn_ahead_is_learned_from_as_if_it_had_been_drawn_in_its_turn(changes):
    """The target net moves after every third update: what it made of a batch before is no use."""
    threads = torch.get_num_threads()
    dqn, twin = make_dqn(**changes), make_dqn(**changes)
    twin.teams.use(2)
    stores, size = (dqn.store(SPEC, 1, seed=0), twin.store(SPEC, 1, seed=0)), CONFIG.batch_size
    ahead = []
    for unroll in unrolls(14):
        for store in stores:
            store.insert(0, unroll)
        while stores[0].updates_allowed():
            dqn.update(stores[0])
            twin.update(stores[1])
            assert torch.equal(dqn.model.table, twin.model.table)
            ahead.append((stores[1].limiter.sampled - stores[0].limiter.sampled) // size)
        assert not ahead or ahead[-1] == 0  # none waits for the next unroll, nor is there one more
    assert ahead[:9] == [1, 1, 0, 1, 1, 0, 1, 1, 0]
    torch.set_num_threads(threads)


class Seen(Table):
    """Knows the threads that have called it."""

    def __init__(self, pure: bool):
        super().__init__()
        self.pure, self.threads = pure, set()

    def forward(self, obs, first, state):
        self.threads.add(threading.get_ident())
        return super().forward(obs, first, state)


@pytest.mark.parametrize("pure", [False, True])
def test_only_a_pure_model_is_called_by_two_threads_at_once(pure):
    before = torch.get_num_threads()
    dqn = DQN(replace(CONFIG, double=True), Seen(pure), torch.device("cpu"))
    dqn.teams.use(2)
    store = dqn.store(SPEC, 1, seed=0)
    for unroll in unrolls(14):
        store.insert(0, unroll)
    for _ in range(6):
        dqn.update(store)
    here = threading.get_ident()
    assert len(dqn.model.threads) == 1 + pure and here in dqn.model.threads
    assert len(dqn.target.threads) == 1 and here not in dqn.target.threads
    torch.set_num_threads(before)


def test_what_runs_without_gradient_keeps_no_weights_that_it_casts():
    """Older PyTorch keeps them for all threads, and a gradient would end at them."""
    seen = set()

    class Seeing(Table):
        def forward(self, obs, first, state):
            seen.add((torch.is_grad_enabled(), torch.is_autocast_cache_enabled()))
            return super().forward(obs, first, state)

    config = replace(CONFIG, precision="bfloat16", double=True)
    DQN(config, Seeing(), torch.device("cpu")).update(Store(make_sample([[1.0]])))
    assert seen == {(True, True), (False, False)}


def test_nothing_is_drawn_ahead_that_depends_on_the_update_before():
    def may(**changes) -> bool:
        dqn = make_dqn(**changes)
        dqn.teams.count, dqn.noisy = 2, noisy
        return dqn._may_look_ahead(SimpleNamespace(updates_allowed=lambda: 9))

    noisy = []
    assert may()
    assert not may(sequence_length=4)
    assert not may(replay=replace(CONFIG.replay, priority_exponent=0.5))
    assert not may(target_period=1)
    noisy = [nn.Identity()]
    assert not may()


def test_a_restored_dqn_goes_on_bit_by_bit():
    rng = torch.Generator().manual_seed(0)
    shape = (1, 8)

    def stores():
        for _ in range(9):
            numbers = [torch.randint(0, 2, shape[1:], generator=rng).tolist() for _ in range(3)]
            yield Store(make_sample(torch.randn(shape, generator=rng).tolist(), *numbers))

    batches = list(stores())
    dqn, twin = make_dqn(target_period=4), make_dqn(target_period=4)
    for batch in batches[:5]:
        dqn.update(batch)
    saved = deepcopy(dqn.state_dict())
    # As a checkpoint keeps it: keys are texts.
    saved["optimizer"] = {str(index): moments for index, moments in saved["optimizer"].items()}
    twin.load_state_dict(saved)
    assert twin.updates == 5 and not torch.equal(twin.model.table, twin.target.table)
    for batch in batches[5:]:
        ours, theirs = dqn.update(batch), twin.update(batch)
        assert ours == theirs
        assert torch.equal(dqn.model.table, twin.model.table)
        assert torch.equal(dqn.target.table, twin.target.table)


def test_refusals():
    with pytest.raises(ValueError, match=r"gamma <= 1, .* got 1.5, 1.0 and 1"):
        DQNConfig(gamma=1.5)
    for changes in ({"polyak": 0.0}, {"n_step": 0}, {"gamma": -0.1}):
        with pytest.raises(
            ValueError, match="expected 0 <= gamma <= 1, 0 < polyak <= 1 and n_step"
        ):
            DQNConfig(**changes)
    with pytest.raises(ValueError, match="at least one batch of 32, got 31"):
        DQNConfig(replay=ReplayConfig(learning_starts=31))
