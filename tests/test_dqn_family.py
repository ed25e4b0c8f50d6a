"""DQN's switches: sequences by a slow formula, the whole family on an MDP solved by hand."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from asyncrl.algorithms import value_distributions as vd
from asyncrl.algorithms.dqn import DQN, DQNConfig
from asyncrl.models import ModelConfig
from asyncrl.models.layers import noisy_layers
from asyncrl.schedules import Linear
from asyncrl.stores.replay import ReplayConfig
from asyncrl.stores.rollout import RolloutConfig
from asyncrl.stores.sequences import Sequence
from asyncrl.types import Field, tree_map
from tests.test_dqn import CONFIG, SPEC, Store, make_dqn, make_sample, play

CPU = torch.device("cpu")
REPLAY = CONFIG.replay


# -- single transitions --------------------------------------------------------------------------


def test_a_munchausen_update_by_hand():
    """Q of the target net: 1 and 1 here, 2 and 2 behind; temperature 1/10, alpha 1/2.

    Both log-probabilities are log 1/2, so the reward of 1 loses 0.05 log 2 and the next value of 2
    gains 0.1 log 2. The other window ends, with an action whose log-probability is cut off at -1.
    """
    sample = make_sample([[1.0, 0.5]], (0, 1), (0, 2), (1, 1), terminated=[False, True])
    dqn = make_dqn(huber=False, munchausen=0.5, munchausen_temperature=0.1)
    dqn = DQN(dqn.config, type(dqn.model)(3), CPU)
    with torch.no_grad():
        dqn.model.table.copy_(torch.tensor([[0.0, 7], [5, 9], [0, 0]]))  # chooses nothing
        dqn.target.table.copy_(torch.tensor([[1.0, 1], [2, 2], [8, 0]]))
    coin = np.log(2)
    errors = 1 - 0.05 * coin + 0.5 * (2 + 0.1 * coin), 0.5 - 0.5
    metrics = dqn.update(Store(sample))
    assert metrics["loss/q"].item() == pytest.approx((errors[0] ** 2 + errors[1] ** 2) / 2)


def test_a_rescaled_update_by_hand():
    """The next value of h(8) = 2.008 counts as 8: 3 + 8/2 = 7 is learned as h(7)."""
    dqn = make_dqn(huber=False, value_rescaling=True, reward_clip=0.0)
    with torch.no_grad():
        dqn.target.table[1, 0] = 2.008
        dqn.model.table[1] = torch.tensor([1.0, 0.5])
    metrics = dqn.update(Store(make_sample([[3.0]], next_obs=(1,))))
    target = np.sqrt(8) - 1 + 0.007
    assert metrics["loss/q"].item() == pytest.approx(target**2, rel=1e-5)


class Distributed(nn.Module):
    """Numbers for each state and action, as a user's model of a distributional head."""

    frame_stack = 1

    def __init__(self, kind: str, size: int):
        super().__init__()
        self.kind = kind
        self.table = nn.Parameter(torch.randn(3, 2, size))

    def initial_state(self, num_envs: int) -> dict:
        return {}

    def forward(self, obs, first, state):
        numbers = self.table[obs]
        if self.kind == "qr":
            return {"q": numbers.mean(-1), "quantiles": numbers}, state
        q = (numbers.softmax(-1) * torch.linspace(-1, 1, numbers.shape[-1])).sum(-1)
        return {"q": q, "logits_of_return": numbers}, state


@pytest.mark.parametrize("kind", ["none", "c51", "qr"])
def test_importance_weights_and_priorities(kind):
    """Weights make a loss smaller; what was drawn gets its |TD error|, or its loss, back."""
    torch.manual_seed(0)
    config = replace(
        CONFIG, distribution=kind, num_atoms=5, num_quantiles=4, value_min=-1, value_max=1,
        replay=replace(REPLAY, priority_exponent=0.6),
    )  # fmt: skip
    size = {"none": 0, "c51": 5, "qr": 4}[kind]
    model = Distributed(kind, size) if size else make_dqn().model
    obs, action = (0, 1, 0), (0, 1, 1)
    ends = [True, False, True]
    sample = make_sample([[1.0, -0.5, 0.25]], action, obs, (1, 1, 0), terminated=ends)
    sample = sample._replace(weight=torch.tensor([1.0, 0.25, 0.0]), index=torch.arange(3) + 70)
    dqn, store = DQN(config, model, CPU), Store(sample)
    store.update_priorities = lambda *given: given_back.append(given)
    given_back: list = []
    alone = []  # each transition for itself
    for i in range(3):
        twin = DQN(config, model, CPU)
        part = tree_map(lambda leaf, i=i: leaf[..., [i]], sample)._replace(weight=torch.ones(1))
        one = Store(part)
        one.update_priorities = lambda index, error: alone.append(error)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        alone.append(twin.update(one)["loss/q"])
        model.load_state_dict(before)
    errors, losses = torch.cat(alone[::2]), torch.stack(alone[1::2])
    metrics = dqn.update(store)
    torch.testing.assert_close(metrics["loss/q"], (losses[0] + 0.25 * losses[1]) / 2)
    ((index, got),) = given_back
    assert torch.equal(index, sample.index) and torch.equal(got, errors) and (got >= 0).all()
    if kind != "none":
        torch.testing.assert_close(got, losses)


# -- sequences -----------------------------------------------------------------------------------

T_BURN, LENGTH, N = 3, 5, 4
BOX = spaces.Box(-1, 1, (3,))


class SequenceStore:
    """Gives one batch of sequences and keeps what comes back."""

    device = CPU

    def __init__(self, batch: Sequence, period: int = 4):
        self.sample_sequences = lambda: batch
        self.limiter = SimpleNamespace(inserted=0)
        self.refresh_rows = tuple(range(period, len(batch.reward) + 1, period))
        self.states = self.priorities = None

    def write_states(self, index, states):
        assert self.states is None and index is self.sample_sequences().index
        self.states = states

    def update_priorities(self, index, priority):
        assert self.priorities is None and index is self.sample_sequences().index
        self.priorities = priority


def random_sequences(model: nn.Module, burn_in: int, n: int, last: bool) -> Sequence:
    """With ends, reset steps behind them, weights, and a stored state that is not zero."""
    rng = np.random.default_rng(0)
    T = burn_in + LENGTH + n - 1
    terminated = rng.random((T, N)) < 0.12
    truncated = ~terminated & (rng.random((T, N)) < 0.12)
    first, valid = np.zeros((T + 1, N), bool), np.ones((T, N), bool)
    for t in range(T - 1):  # an end, then a reset step, then the next episode's first
        ended = (terminated | truncated)[t] & valid[t]
        valid[t + 1] = ~ended
        terminated[t + 1] &= ~ended
        truncated[t + 1] &= ~ended
        first[t + 2] = ended
    learn = np.zeros((T, N), bool)
    rows = slice(burn_in + LENGTH - 1 if last else burn_in, burn_in + LENGTH)
    learn[rows] = valid[rows]
    assert (~valid).any() and learn.any() and first.any() and not learn.all()
    state = tree_map(lambda part: torch.rand_like(part) - 0.5, model.initial_state(N))
    obs = torch.from_numpy(rng.uniform(-1, 1, (T + 1, N, 3)).astype(np.float32))
    return Sequence(
        obs, torch.from_numpy(first), state, torch.from_numpy(rng.integers(0, 2, (T, N))),
        torch.from_numpy((rng.normal(size=(T, N)) * valid).astype(np.float32)),
        *map(torch.from_numpy, (terminated, truncated, valid, learn)),
        torch.from_numpy(rng.random(N).astype(np.float32)) + 0.1, ("lane", "row"),
    )  # fmt: skip


def step_by_step(model: nn.Module, batch: Sequence) -> tuple[list[dict], list[dict]]:
    """(outputs of each row, state before each row), one call a row."""
    outputs, states, state = [], [], batch.state
    for t in range(len(batch.first)):
        states.append(state)
        with torch.no_grad():
            out, state = model(batch.obs[t : t + 1], batch.first[t : t + 1], state)
        outputs.append({name: part[0] for name, part in out.items()})
    return outputs, states


CASES = {
    "plain": {},
    "n-step": {"n_step": 3},
    "burn-in, last": {"burn_in": T_BURN, "loss_on": "last", "n_step": 2},
    "R2D2": {"burn_in": T_BURN, "n_step": 3, "value_rescaling": True, "reward_clip": 0.0},
    "c51": {"burn_in": T_BURN, "n_step": 2, "distribution": "c51", "num_atoms": 7},
    "qr, not double": {"n_step": 2, "distribution": "qr", "num_quantiles": 6, "double": False},
    "Munchausen": {"burn_in": T_BURN, "munchausen": 0.9, "munchausen_temperature": 0.3},
    "c51, Munchausen": {"munchausen": 0.9, "munchausen_temperature": 0.3, "distribution": "c51"},
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_the_loss_of_sequences_by_a_slow_formula(case, threads):
    """Each row stepped and each window summed by itself; then priorities, refreshed states and the
    burn-in of both nets from the stored state."""
    torch.manual_seed(0)
    frames = 2 if case == "R2D2" else 1
    config = replace(
        CONFIG, sequence_length=LENGTH, value_min=-3.0, value_max=3.0,
        replay=replace(REPLAY, priority_exponent=0.9), **CASES[case],
    )  # fmt: skip
    model_config = ModelConfig(frames, hidden=(8,), lstm=6, head=config.head)
    model, other = (model_config(BOX, spaces.Discrete(2)) for _ in range(2))
    for net in (model, other):
        for parameter in net.head.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape)
    dqn = DQN(config, model, CPU)
    dqn.target.load_state_dict(other.state_dict())
    dqn.refreshes = True
    dqn.teams.use(threads)
    last = config.loss_on == "last"
    batch = random_sequences(model, config.burn_in, config.n_step, last)
    online, _ = step_by_step(model, batch)
    target, states = step_by_step(other, batch)

    gamma, n, T = config.gamma, config.n_step, len(batch.reward)
    reward = batch.reward.clamp(-1, 1) if config.reward_clip else batch.reward
    total, count, errors = 0.0, 0, [[] for _ in range(N)]
    for t, i in zip(*np.nonzero(batch.learn.numpy()), strict=True):
        returns, discount, steps = 0.0, 1.0, 0
        while steps < n:
            returns += discount * reward[t + steps, i].item()
            discount *= gamma
            steps += 1
            if batch.terminated[t + steps - 1, i] or batch.truncated[t + steps - 1, i]:
                break
        assert t + steps <= T
        discount *= not batch.terminated[t + steps - 1, i]
        rescaled, temperature = config.value_rescaling, config.munchausen_temperature
        following = {name: part[i] for name, part in target[t + steps].items()}
        if config.munchausen:
            log_policy = torch.log_softmax(target[t]["q"][i] / temperature, 0)
            bonus = temperature * log_policy[batch.action[t, i]].item()
            returns += 0.9 * max(bonus, -1.0)
            values = vd.soft_return(following, config.head, temperature)
        else:
            chooser = online if config.double else target
            values = vd.greedy_return(following, config.head, chooser[t + steps]["q"][i], rescaled)
        goal = returns + discount * values.values
        goal = values._replace(values=vd.rescale(goal) if rescaled else goal)
        here = {name: part[i] for name, part in online[t].items()}
        loss, error = vd.return_loss(here, config.head, batch.action[t, i], goal, True)
        total, count = total + batch.weight[i].item() * loss.item(), count + 1
        errors[i].append(abs(error.item()))

    store = SequenceStore(batch)
    metrics = dqn.update(store)
    assert metrics["loss/q"].item() == pytest.approx(total / count, rel=1e-4)
    want = [0.9 * max(each) + 0.1 * np.mean(each) if each else 0.0 for each in errors]
    np.testing.assert_allclose(store.priorities, want, rtol=1e-3, atol=1e-6)
    assert set(store.states) == {"h", "c"}  # frames lie in the replay anyway
    for k, row in enumerate(store.refresh_rows):
        for name in "hc":
            torch.testing.assert_close(store.states[name][k], states[row][name])
    assert len(store.states["h"]) == len(store.refresh_rows) > 0


class Remembering(nn.Module):
    """An LSTM over learned vectors of what is seen, to tell which rows teach."""

    frame_stack = 1

    def __init__(self, size: int):
        super().__init__()
        self.seen = nn.Embedding(size, 4)
        self.lstm, self.q = nn.LSTM(4, 5), nn.Linear(5, 2)

    def initial_state(self, num_envs: int) -> dict:
        return {"memory": (torch.zeros(num_envs, 5), torch.zeros(num_envs, 5))}

    def forward(self, obs, first, state):
        memory = tuple(part.unsqueeze(0) for part in state["memory"])
        features, memory = self.lstm(self.seen(obs), memory)
        memory = tuple(part.squeeze(0) for part in memory)
        return {"q": self.q(features)}, {"memory": memory}


@pytest.mark.parametrize("loss_on", ["all", "last"])
@pytest.mark.parametrize("n", [1, 3])
def test_burn_in_gets_no_gradient_and_the_rows_behind_it_do(loss_on, n):
    """Each row shows something of its own; a user's model with a nested memory."""
    torch.manual_seed(0)
    T = T_BURN + LENGTH + n - 1
    config = replace(
        CONFIG, sequence_length=LENGTH, burn_in=T_BURN, n_step=n, loss_on=loss_on, double=True
    )
    dqn = DQN(config, Remembering(T + 1), CPU)
    no = torch.zeros(T, N, dtype=torch.bool)
    learn = no.clone()
    learn[T_BURN + (LENGTH - 1) * (loss_on == "last") : T_BURN + LENGTH] = True
    batch = Sequence(
        torch.arange(T + 1).unsqueeze(1).expand(T + 1, N), torch.cat([no, no[:1]]),
        dqn.model.initial_state(N), torch.zeros(T, N, dtype=torch.int64), torch.ones(T, N), no, no,
        ~no, learn, torch.ones(N), (),
    )  # fmt: skip
    store = SequenceStore(batch)
    before = dqn.model.seen.weight.detach().clone()
    dqn.update(store)
    gradient = dqn.model.seen.weight.grad.abs().sum(1) > 0
    assert gradient.tolist() == [T_BURN <= t < T_BURN + LENGTH for t in range(T + 1)]
    moved = (dqn.model.seen.weight != before).any(1)
    assert torch.equal(moved, gradient) and store.states is None and store.priorities is None
    # The burn-in does matter: from another memory other values come.
    twins = [DQN(config, deepcopy(dqn.model), CPU) for _ in range(2)]
    begins = (torch.arange(T + 1) < T_BURN).unsqueeze(1)
    other = batch._replace(obs=torch.where(begins, batch.obs.flip(0), batch.obs))
    means = [
        twin.update(SequenceStore(given))["loss/q_mean"]
        for twin, given in zip(twins, (batch, other), strict=True)
    ]
    assert means[0] != means[1]


# -- the whole family ----------------------------------------------------------------------------

OPTIMAL = np.array([[1.5, 3], [3.5, 4]])  # of the MDP in test_dqn
SEQUENCES = {"sequence_length": 4, "batch_size": 16, "num_states": 5}
MUNCHAUSEN = {"munchausen": 0.9, "munchausen_temperature": 0.2}
FAMILY = {
    "c51": ({"distribution": "c51", "value_min": -1.0, "value_max": 6.0, "num_atoms": 15}, {}),
    "qr": ({"distribution": "qr", "num_quantiles": 16}, {}),
    "iqn": ({"distribution": "iqn"}, {"dueling": True}),
    "rescaled": ({"value_rescaling": True}, {}),
    "noisy": ({}, {"noisy": True, "dueling": True}),
    "prioritised": ({"replay": {"priority_exponent": 0.6}}, {}),
    "sequences": (SEQUENCES, {}),
    "recurrent": (SEQUENCES | {"burn_in": 2, "replay": {"priority_exponent": 0.9}}, {"lstm": 16}),
    "munchausen": (MUNCHAUSEN, {}),
    "iqn, munchausen": (MUNCHAUSEN | {"distribution": "iqn"}, {}),
}  # fmt: skip


def munchausen_values(temperature: float = 0.2, alpha: float = 0.9) -> np.ndarray:
    """(2, 2) fixed point of Munchausen value iteration in the MDP."""
    q = np.zeros((2, 2))
    for _ in range(200):
        shifted = q - q.max(1, keepdims=True)
        total = np.log(np.exp(shifted / temperature).sum(1, keepdims=True))
        log_policy = shifted - temperature * total
        soft = (np.exp(log_policy / temperature) * (q - log_policy)).sum(1)
        reward = np.array([[0.0, 1], [2, 4]]) + alpha * log_policy.clip(-1, 0)
        q = reward + 0.5 * np.array([[soft[0], soft[1]], [soft[0], 0]])
    return q


@pytest.mark.parametrize("member", FAMILY)
def test_every_member_finds_the_values_of_an_mdp(member):
    """Through its real replay, from a random policy's unrolls; 600 env steps."""
    changes, model_changes = FAMILY[member]
    changes = dict(changes)
    length = changes.get("sequence_length", 1)
    replay = replace(REPLAY, samples_per_insert=24 * length, **changes.pop("replay", {}))
    config = replace(
        CONFIG, reward_clip=0.0, target_period=15, replay=replay,
        learning_rate=Linear(0.02, 0.001, 650), **changes,
    )  # fmt: skip
    torch.manual_seed(1)
    model_config = ModelConfig(hidden=(32,), head=config.head, **model_changes)
    model = model_config(SPEC.observation_space, SPEC.action_space)
    state = tree_map(lambda part: Field(tuple(part.shape[1:]), "float32"), model.initial_state(1))
    spec = replace(SPEC, state=state, num_states=config.num_states)
    dqn = DQN(config, model, CPU)
    store = dqn.store(spec, 1, seed=0)
    rng, B = np.random.default_rng(0), SPEC.num_envs
    now, ended, first = rng.integers(0, 2, B), np.zeros(B, bool), np.ones(B, bool)
    sequence, lane_state = 0, model.initial_state(B)
    while store.limiter.inserted < 600:
        unroll, first = play(now, ended, first, rng, sequence, spec)
        if state:  # what an actor would have sent
            for s in range(spec.num_states):
                for name, part in lane_state.items():
                    unroll.state[name][s] = part.numpy()
                rows = slice(2 * s, 2 * s + 2)
                obs, opens = (torch.from_numpy(part[rows].copy()) for part in unroll[:2])
                with torch.no_grad():
                    _, lane_state = model(obs, opens, lane_state)
        store.insert(0, unroll)
        sequence += 1
        for _ in range(store.updates_allowed()):
            metrics = dqn.update(store)
    assert dqn.updates > 130 and metrics["loss/skipped"] == 0
    one, drawn = torch.ones(1, 2, dtype=torch.bool), []
    for _ in range(200 if member == "noisy" else 1):  # what it learns is right on average
        for layer in noisy_layers(model):
            layer.redraw()
        with torch.no_grad():
            outputs, _ = model.eval()(torch.tensor([[0, 1]]), one, model.initial_state(2))
        drawn.append(outputs["q"][0])
    q = torch.stack(drawn).mean(0)
    q = vd.unrescale(q) if config.value_rescaling else q
    want = munchausen_values() if config.munchausen else OPTIMAL
    np.testing.assert_allclose(q, want, atol=0.25)
    assert not config.munchausen or abs(want - OPTIMAL).max() > 0.5


# -- noise ---------------------------------------------------------------------------------------


def noisy_dqn(seed: int = 0) -> DQN:
    torch.manual_seed(seed)
    config = replace(CONFIG, distribution="iqn", num_tau=4, target_period=4)
    model = ModelConfig(hidden=(8,), noisy=True, dueling=True, head=config.head)
    return DQN(config, model(SPEC.observation_space, SPEC.action_space), CPU)


def test_both_nets_draw_noise_of_their_own_before_every_update():
    dqn, store = noisy_dqn(), Store(make_sample([[1.0, 0.5]], (0, 1), (0, 1), (1, 0)))
    layers = noisy_layers(dqn.model), noisy_layers(dqn.target)
    assert len(layers[0]) == 4  # two of each stream
    seen = []
    for _ in range(9):
        dqn.update(store)
        for one, other in zip(*layers, strict=True):
            moved = dqn.updates % 4 == 0  # its copy is as fresh as the weights beside it
            assert torch.equal(one.noise_in, other.noise_in) == moved
            assert not torch.equal(one.noise_out, seen[-1]) if seen else True
        seen.append(layers[0][-1].noise_out.clone())
    assert set(dqn.model.state_dict()) >= {
        f"head.streams.value.hidden.0.noise_{side}" for side in ("in", "out")
    }


def test_a_restored_noisy_iqn_goes_on_bit_by_bit():
    """Noise and fractions come from torch's generator, which checkpoints keep."""
    store = Store(make_sample([[1.0, 0.5]], (0, 1), (0, 1), (1, 0)))
    dqn, twin = noisy_dqn(), noisy_dqn(seed=5)
    torch.manual_seed(1)
    for _ in range(5):
        dqn.update(store)
    saved = {
        "model": tree_map(torch.clone, dict(dqn.model.state_dict())),
        "target": tree_map(torch.clone, dict(dqn.target.state_dict())),
        "optimizer": tree_map(
            lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf,
            dqn.descend.state_dict(),
        ),
    }
    generator = torch.get_rng_state()
    ours = [dqn.update(store)["loss/q"] for _ in range(6)]
    twin.load_state_dict(saved)
    torch.set_rng_state(generator)
    assert ours == [twin.update(store)["loss/q"] for _ in range(6)]
    for name, tensor in dqn.model.state_dict().items():
        assert torch.equal(tensor, twin.model.state_dict()[name])


# -- refusals ------------------------------------------------------------------------------------


def test_refusals_of_settings():
    for changes, words in (
        ({"distribution": "c50"}, r"distribution of \('none', 'c51', 'qr', 'iqn'\), got 'c50'"),
        ({"num_atoms": 1}, "num_atoms >= 2 and finite value_min < value_max, got 1"),
        ({"value_min": 3.0, "value_max": 3.0}, "got 51, 3.0 and 3.0"),
        ({"num_quantiles": 0}, "at least 1, got 0, 8 and 32"),
        ({"num_tau": 0}, "at least 1, got 64, 0 and 32"),
        ({"munchausen": 1.5}, "0 <= munchausen <= 1"),
        ({"munchausen_temperature": 0.0}, "munchausen_temperature > 0"),
        ({"munchausen_clip": 1.0}, "munchausen_clip <= 0"),
        ({"sequence_length": -1}, "sequence_length >= 0"),
        ({"num_states": 0, "sequence_length": 5}, "num_states >= 1, got 5, 0 and 0"),
        ({"loss_on": "first", "sequence_length": 5}, "loss_on of .* got 'first'"),
        ({"burn_in": 4}, "sequence_length of at least 1 with burn_in.* got 0"),
        ({"loss_on": "last"}, "sequence_length of at least 1"),
        ({"num_states": 2}, "sequence_length of at least 1"),
        ({"replay": RolloutConfig()}, "a ReplayConfig, got RolloutConfig"),
    ):
        with pytest.raises(ValueError, match=words):
            DQNConfig(**changes)
    with pytest.raises(ValueError, match="at least one batch of 320, got 200"):
        DQNConfig(sequence_length=10, replay=ReplayConfig(learning_starts=200))


def test_refusals_of_what_does_not_fit_together():
    memory = replace(SPEC, state={"h": Field((4,), "float32")})
    with pytest.raises(ValueError, match="sequence_length of at least 1 for a model with a mem"):
        make_dqn().store(memory, 1, 0)
    nested = replace(SPEC, state=(Field((4,), "float32"), {"more": Field((), "float32")}))
    with pytest.raises(ValueError, match="sequence_length of at least 1 for a model with a mem"):
        make_dqn().store(nested, 1, 0)
    with pytest.raises(ValueError, match=r"burn_in=0 for a model without a memory, got 2"):
        make_dqn(sequence_length=4, burn_in=2, batch_size=4).store(SPEC, 1, 0)
    # 1,000 env steps over 2 lanes of 4 are 12 whole unrolls of 10 steps.
    fits = make_dqn(sequence_length=100, burn_in=18, n_step=3, batch_size=1)
    assert fits.config.store_nbytes(fits.model, memory, 2) > 0
    too_long = make_dqn(sequence_length=100, burn_in=19, n_step=3, batch_size=1)
    with pytest.raises(ValueError, match=r"at least 13 unrolls of every lane.* looks 121 rows"):
        too_long.store(memory, 2, 0)
