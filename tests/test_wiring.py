"""What stands between the parts: settings that reach whom they are for, numbers told to others.

The parts themselves are tested by slow formulas elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from asyncrl.actor import Actor
from asyncrl.algorithms.a2c import A2CConfig
from asyncrl.algorithms.dqn import DQN, DQNConfig
from asyncrl.algorithms.ppo import PPOConfig
from asyncrl.algorithms.returns import gae, n_step, td_advantage, vtrace
from asyncrl.env_group import EnvGroup
from asyncrl.envs import seed_for
from asyncrl.guards import Diverged
from asyncrl.logs import read_episodes
from asyncrl.models import ModelConfig
from asyncrl.models.contract import state_fields
from asyncrl.policies import Greedy, Mixture, Part, Random
from asyncrl.schedules import Linear
from asyncrl.stores.replay import Replay, ReplayConfig
from asyncrl.stores.rollout import Rollout, RolloutConfig, RolloutQueue
from asyncrl.stores.sequences import SequenceShape
from asyncrl.types import Spec, tree_leaves
from tests.streams import make_spec
from tests.test_actor_critic import N, Plain, T, random_rollout
from tests.test_on_policy import CPU, Box, Given, network

# -- DQN and its replay --------------------------------------------------------------------------

IMPORTANCE = Linear(0.3, 1.0, 500)
REPLAY = ReplayConfig(
    capacity=300, samples_per_insert=5.0, learning_starts=90, tolerance=111, device="cpu",
    priority_exponent=0.7, importance_exponent=IMPORTANCE, state_dtype="float32",
)  # fmt: skip
TRANSITIONS = DQNConfig(n_step=3, batch_size=6, precision="float32", replay=REPLAY)
SEQUENCES = replace(TRANSITIONS, sequence_length=4, burn_in=2, loss_on="last", num_states=8)
NUM_LANES = 2


def make_dqn(config: DQNConfig) -> tuple[DQN, Replay]:
    """A learner of random episodes with two stacked frames and, for sequences, an LSTM; its replay
    holds as much as it takes to learn."""
    torch.manual_seed(0)
    box, actions = spaces.Box(-1, 1, (3,)), spaces.Discrete(2)
    lstm = 4 if config.sequence_length else 0
    model = ModelConfig(frame_stack=2, hidden=(8,), lstm=lstm, head=config.head)(box, actions)
    state = state_fields(model, config.head, box, actions)
    spec = Spec(8, 3, box, actions, state, config.num_states)
    dqn = config.build(model, CPU)
    assert isinstance(dqn, DQN)
    store, rng, sequence = dqn.store(spec, NUM_LANES, seed=5), np.random.default_rng(0), 0
    while store.limiter.inserted < 250:
        for lane in range(NUM_LANES):
            unroll = spec.layout.views(bytearray(spec.layout.nbytes))
            for leaf in (unroll.obs, unroll.reward, *tree_leaves(unroll.state)):
                leaf[...] = rng.uniform(-1, 1, leaf.shape)
            unroll.action[...] = rng.integers(0, 2, unroll.action.shape)
            unroll.valid[...] = True
            unroll.header.sequence[...] = sequence
            store.insert(lane, unroll)
        sequence += 1
    return dqn, store


@pytest.mark.parametrize("config", [TRANSITIONS, SEQUENCES], ids=["transitions", "sequences"])
def test_the_replay_of_a_dqn_is_as_its_switches_say(config):
    dqn, store = make_dqn(config)
    transitions = 6 * (config.sequence_length or 1)
    got = (store.capacity, store.batch_size, store.frame_stack, store.n_step, store.seed)
    assert got == (300, 6, 2, 3, 5) and store.num_lanes == NUM_LANES
    assert store.generator.initial_seed() == 5 and store.device == CPU
    assert store.selection.priority_exponent == 0.7
    assert store.selection.importance_exponent is IMPORTANCE
    limiter = store.limiter
    got = limiter.samples_per_insert, limiter.batch_size, limiter.learning_starts
    assert got == (5, transitions, 90) and limiter.tolerance == 111
    shape = (4, 2, 3, "float32") if config.sequence_length else (0, 0, 3, "float32")
    held = Replay.nbytes(store.spec, NUM_LANES, 300, 2, 3, 0.7, shape[0], shape[1], shape[3])
    assert config.store_nbytes(dqn.model, store.spec, NUM_LANES) == held

    before = store.selection.priority.clone()
    sample = store.sample_sequences() if config.sequence_length else store.sample()
    if config.sequence_length:
        assert store.states.shape == SequenceShape(4, 2, 3, True, "float32")
        assert {leaf.dtype for leaf in tree_leaves(store.states.columns)} == {torch.float32}
        assert sample.reward.shape == (2 + 4 + 3 - 1, 6)
        assert sample.learn.any(1).nonzero().flatten().tolist() == [2 + 4 - 1]
        states = [leaf.clone() for leaf in tree_leaves(store.states.columns)]
    else:
        assert sample.reward.shape == (3, 6) and sample.steps.tolist() == [3] * 6
        assert not dqn.refreshes
    drawn = []
    update_priorities = store.update_priorities
    store.update_priorities = lambda *given: drawn.append(given) or update_priorities(*given)
    assert store.updates_allowed() and dqn.update(store)["loss/skipped"] == 0
    moved = (store.selection.priority != before).nonzero()
    ((index, error),) = drawn
    place = store.selection.circle.flat(index.lane, index.number), index.env
    torch.testing.assert_close(store.selection.priority[place], (error + 1e-6) ** 0.7)
    assert 0 < len(moved) <= 6 and len(error) == 6
    exponent = IMPORTANCE.at(limiter.inserted)
    later = store.sample_sequences() if config.sequence_length else store.sample()
    place = store.selection.circle.flat(later.index.lane, later.index.number), later.index.env
    priority = store.selection.priority[place]
    torch.testing.assert_close(later.weight, (priority.min() / priority) ** exponent)
    if config.sequence_length:  # an update of the target net's pass wrote new ones
        assert dqn.refreshes
        for old, new in zip(states, tree_leaves(store.states.columns), strict=True):
            assert not torch.equal(old, new) and new.isfinite().all()


def test_the_other_way_round_nothing_is_refreshed_or_prioritised():
    uniform = replace(REPLAY, priority_exponent=0.0, refresh_states=False, state_dtype="float16")
    dqn, store = make_dqn(replace(SEQUENCES, replay=uniform, loss_on="all"))
    states = [leaf.clone() for leaf in tree_leaves(store.states.columns)]
    assert {leaf.dtype for leaf in states} == {torch.float16}
    assert store.selection.tree is None and not dqn.refreshes
    sample = store.sample_sequences()
    assert sample.learn.any(1).nonzero().flatten().tolist() == [2, 3, 4, 5]
    assert dqn.update(store)["loss/skipped"] == 0
    assert (store.sample_sequences().weight == 1).all()
    for old, new in zip(states, tree_leaves(store.states.columns), strict=True):
        assert torch.equal(old, new)


# -- A2C and PPO ---------------------------------------------------------------------------------

A2C = A2CConfig(precision="float32", learning_rate=0.01, optimizer_eps=0.01)
PPO = PPOConfig(
    precision="float32", learning_rate=0.01, optimizer_eps=0.01, epochs=2, num_minibatches=1
)
CHANGES = {
    "gamma": {"gamma": 0.6},
    "lambda": {"lambda_": 0.3},
    "n-step": {"estimator": "n_step", "n_step": 2},
    "V-trace": {"estimator": "vtrace", "lambda_": 0.5},
    "normalised": {"normalize_advantage": True},
    "not normalised": {"normalize_advantage": False},
    "reward clipped": {"reward_clip": 0.3},
    "value": {"value_coef": 2.0},
    "entropy": {"entropy_coef": 0.3},
    "rate": {"learning_rate": 0.03},
    "adam": {"optimizer": "adam"},
    "rmsprop": {"optimizer": "rmsprop"},
    "eps": {"optimizer_eps": 0.2},
    "gradient not clipped": {"max_grad_norm": 0.0},
    "gradient clipped": {"max_grad_norm": 0.02},
    "scale": {},  # the model's
}
CASES = [(A2C, name, change) for name, change in CHANGES.items() if name != "rmsprop"]
CASES += [(PPO, name, change) for name, change in CHANGES.items() if name != "adam"]
CASES += [
    (A2C, "rho", {"clip_rho": 0.7}),
    (A2C, "large rho", {"clip_rho": 1.6}),
    (PPO, "ratio", {"clip_ratio": 0.05}),
    (PPO, "value clipped", {"clip_value": 0.005}),
    (PPO, "epochs", {"epochs": 4}),
]
CASES = [case for case in CASES if replace(case[0], **case[2]) != case[0] or case[1] == "scale"]


def updated(config, model: nn.Module, rollout: Rollout) -> list[torch.Tensor]:
    """Parameters and their last gradient, as one vector, after an update by the algorithm."""
    algorithm = config.build(model, CPU)
    algorithm.store(make_spec(T, N), 1, 0)
    assert not algorithm.update(Given(rollout))["loss/skipped"].any()
    (whole,) = algorithm.descend.leaves
    return [*(p.detach().clone() for p in model.parameters()), whole.grad]


def by_the_formulas(config, model: nn.Module, rollout: Rollout) -> list[torch.Tensor]:
    """The same by the formulas of the papers, for one minibatch."""
    is_ppo, parameters = isinstance(config, PPOConfig), list(model.parameters())
    rate, eps = config.learning_rate, config.optimizer_eps
    if config.optimizer == "adam":
        optimizer = torch.optim.Adam(parameters, rate, eps=eps)
    else:
        optimizer = torch.optim.RMSprop(parameters, rate, alpha=0.99, eps=eps)
        for parameter in parameters:
            moment = {"step": torch.tensor(0.0), "square_avg": torch.ones_like(parameter)}
            optimizer.state[parameter] = moment
    most = config.reward_clip or torch.inf
    reward, ends = rollout.reward.clamp(-most, most), (rollout.terminated, rollout.truncated)
    scale, valid = getattr(model, "return_scale", 1.0), rollout.valid

    def outputs():
        made, _ = model(rollout.obs, rollout.first, {})
        chances = torch.distributions.Categorical(logits=made["logits"][:T])
        return made["value"], chances.log_prob(rollout.action), chances.entropy()

    with torch.no_grad():
        old, log_prob, _ = outputs()
    if config.estimator == "gae":
        advantage = gae(reward, old, *ends, config.gamma, config.lambda_)
        goal = advantage + old[:T]
    elif config.estimator == "n_step":
        goal = n_step(reward, *ends, old, config.gamma, config.n_step)
        advantage = goal - old[:T]
    else:
        acted = log_prob, rollout.log_prob
        goal, _ = vtrace(*acted, reward, old, *ends, config.gamma, config.lambda_)
        advantage = td_advantage(reward, goal, old, *ends, config.gamma)
    advantage = advantage / scale
    if config.normalize_advantage:
        counted = advantage[valid]
        advantage = (advantage - counted.mean()) / counted.std(unbiased=False)
    for _ in range(config.epochs if is_ppo else 1):
        value, log_prob, entropy = outputs()
        value, ratio = value[:T], (log_prob - rollout.log_prob).exp()
        error = ((value - goal) / scale) ** 2
        if is_ppo:
            low, high = 1 - config.clip_ratio, 1 + config.clip_ratio
            gain = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
        else:
            gain = ratio.detach().clamp(max=config.clip_rho) * advantage * log_prob
        if is_ppo and config.clip_value:
            move = config.clip_value * scale
            near = old[:T] + (value - old[:T]).clamp(-move, move)
            error = torch.maximum(error, ((near - goal) / scale) ** 2)
        loss = -gain + config.value_coef * error / 2 - config.entropy_coef * entropy
        optimizer.zero_grad()
        loss[valid].mean().backward()
        norm = torch.cat([p.grad.flatten() for p in parameters]).norm()
        if config.max_grad_norm:
            for parameter in parameters:
                parameter.grad *= min(1.0, config.max_grad_norm / norm)
        optimizer.step()
    gradient = torch.cat([p.grad.flatten() for p in parameters])
    return [*(p.detach() for p in parameters), gradient]


def difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    "config, name, change", CASES, ids=[f"{type(c).__name__}-{name}" for c, name, _ in CASES]
)
def test_every_number_of_an_update_counts(config, name, change):
    """Whole updates on what a uniform policy did; each change makes a difference, the right one."""
    rollout = random_rollout(np.random.default_rng(0))
    rollout = rollout._replace(obs=2 * rollout.obs)  # ratios far from 1
    models = [Plain() for _ in range(3)]
    changed = replace(config, **change)
    if name == "scale":
        for model in models[1:]:
            model.return_scale = torch.tensor(3.0)
    plain = updated(config, models[0], rollout)
    got = updated(changed, models[1], rollout)
    want = by_the_formulas(changed, models[2], rollout)
    assert difference(got, want) < 1e-5
    assert difference(got, plain) > 1e-4


def test_an_on_policy_store_is_as_its_algorithm_says():
    rollout = RolloutConfig(num_unrolls=3, ahead=2, max_lag=5)
    config = PPOConfig(rollout=rollout, epochs=7, minibatch_of="sequences", num_minibatches=3)
    spec = make_spec(frame_stack=2)
    for algorithm, uses in ((config.build(Plain(), CPU), 7), (replace(A2C, rollout=rollout), 1)):
        made = algorithm if uses == 7 else algorithm.build(Plain(), CPU)
        queue = made.store(spec, 4, 11)
        assert isinstance(queue, RolloutQueue) and queue.config is rollout
        assert queue.limiter.samples_per_insert == uses
        # As many as are held, one rollout made of them and its copy on the device.
        want = (queue.capacity + 2 * queue.num_unrolls) * spec.layout.nbytes
        assert made.config.store_nbytes(None, spec, 4) == want > 15 * 3 * 5 * 4
        assert queue.capacity == 9
    ppo = config.build(Plain(), CPU)
    ppo.store(spec, 4, 11)
    assert ppo.generator.initial_seed() == 11 and ppo.of_sequences
    lanes = RolloutQueue.nbytes(RolloutConfig(ahead=0), spec, 4)
    assert lanes == 3 * 4 * spec.layout.nbytes


# -- what the learner tells ----------------------------------------------------------------------


def test_what_the_learner_tells_is_what_came_in(tmp_path):
    """Clock, policy of each episode, lags and drops, counted again in the unrolls themselves."""
    mixture = Mixture((Part("one", Greedy()), Part("other", Random(), 2.0)))
    config = A2CConfig(precision="float32", rollout=RolloutConfig(num_unrolls=1, ahead=4))
    box = Box(tmp_path, config, policy=mixture)
    learner, actor = box.learner, box.actors[0]
    episodes, lags, clocks, take = [], [], [], learner._take

    def taken(lane, unroll, raw):
        for t, env in zip(*np.nonzero(unroll.episode_length), strict=True):
            length, result = unroll.episode_length[t, env], unroll.episode_return[t, env]
            episodes.append((mixture.names[unroll.policy[t, env]], int(length), float(result)))
        lags.append(learner.weights.version - int(unroll.header.version))
        clocks.append(int(unroll.header.env_steps))
        take(lane, unroll, raw)

    learner._take, published = taken, {0}
    for turn in range(30):
        learner.throttle.move()
        while actor.may_begin():
            actor.play()
        for _ in range(turn % 3):  # before what these weights did is looked at
            learner.publish()
        learner.drain()
        learner.learn(2)
        learner.publish()
        published.add(learner.env_steps)
        assert int(learner.weights.front()["context"]["env_steps"]) == learner.env_steps
        if turn == 20:
            want = {"lag/min": min(lags), "lag/mean": np.mean(lags), "lag/max": max(lags)}
            assert learner.lags.summary() == pytest.approx(want)
            assert want["lag/min"] == 0 and want["lag/max"] == 2
    actor._pull()
    assert actor.env_steps == learner.env_steps
    assert set(clocks) <= published and len(set(clocks)) > 10
    told = read_episodes(tmp_path)
    names, lengths, returns = zip(*episodes, strict=True)
    assert told["policy"].tolist() == list(names) and {"one", "other"} == set(names)
    assert told["length"].tolist() == list(lengths)
    assert told["return"] == pytest.approx(list(returns), rel=1e-5)
    summary = learner.episodes.summary()
    for name in mixture.names:
        own = [length for policy, length, _ in episodes if policy == name]
        assert summary[f"episode/length/{name}"] == pytest.approx(np.mean(own[-100:]))
    dropped = learner.store.dropped
    learner.store.expire(learner.weights.version + 1_000)
    assert learner.store.metrics()["rollout/dropped"] == learner.store.dropped > dropped


def test_what_is_not_finite_is_not_published(tmp_path):
    box = Box(tmp_path, A2C)
    learner = box.learner
    with torch.no_grad():
        next(iter(learner.model.parameters())).view(-1)[0] = torch.nan
    version = learner.weights.version
    with pytest.raises(Diverged, match="neither published nor"):
        learner.publish()
    assert learner.weights.version == version
    assert all(np.isfinite(part).all() for part in learner.weights.front()["model"].values())


# -- what the actor hands on ---------------------------------------------------------------------


@dataclass(frozen=True)
class Watching:
    """Acts at random, counts its calls in its state, and keeps what it is told."""

    seen: list = field(default_factory=list)

    def initial_state(self, num_envs: int) -> np.ndarray:
        return np.zeros(num_envs, int)

    def __call__(self, outputs, state, first, step, context, rng):
        key = rng.bit_generator.seed_seq.entropy
        self.seen.append((context, first.copy(), step.copy(), state.copy(), key))
        log_prob = np.full(len(first), -np.log(4), np.float32)
        return rng.integers(4, size=len(first)), log_prob, state + 1


def test_a_new_start_of_a_lane_has_a_seed_and_empty_memories_of_its_own(tmp_path):
    """Environments by (seed, lane, generation), randomness by (seed, lane, unroll); LSTM, counts
    of steps and what policies remember begin anew, in a new actor and in one that goes on."""
    policy, seeds = Watching(), []
    box = Box(tmp_path, replace(A2C, rollout=RolloutConfig(ahead=0)), network(lstm=6),
              policy=policy, num_actors=2)  # fmt: skip
    make = box.make_actor(0).lanes[0].make_envs

    def seeded() -> EnvGroup:
        envs = make()
        reset = envs.reset
        envs.reset = lambda seed: seeds.append(seed) or reset(seed)
        return envs

    def begin(actor: Actor, generation: int) -> None:
        for lane in actor.lanes:
            lane.make_envs = seeded
        seeds.clear(), policy.seen.clear()
        sequences = [lane.writer.sequence for lane in actor.lanes]
        actor.play()
        lanes = [lane.index for lane in actor.lanes]
        assert seeds == [seed_for(1, lane, generation) for lane in lanes]
        for number, (lane, sequence) in enumerate(zip(lanes, sequences, strict=True)):
            seen = policy.seen[number :: len(lanes)]
            assert len(seen) == 5
            for t, (context, first, step, state, key) in enumerate(seen):
                assert key == [1, lane, sequence]
                assert (context.lane, context.num_lanes) == (lane, 4)
                assert context.env_steps == box.learner.env_steps
                assert (state == t).all() and ((step == 0) | (step > 0) & ~first).all()
            assert seen[0][1].all() and not seen[0][2].any()
            unroll = actor.lanes[number].ring.slots[sequence % 4]
            assert int(unroll.header.generation) == generation
            assert unroll.first[0].all() and not any(part.any() for part in unroll.state.values())
            assert any(part.any() for part in tree_leaves(actor.lanes[number].state))

    def let_play() -> None:
        box.learner.drain()
        box.learner.learn(1)
        box.learner.throttle.move()

    box.learner.throttle.move()
    for actor in box.actors:
        begin(actor, 0)
    for _ in range(3):
        let_play()
        for actor in box.actors:
            actor.play()
    let_play()
    box.learner.epoch += 2  # the same actors, where environments are made anew
    box.learner.publish()
    for actor in box.actors:
        assert all(lane.step.any() for lane in actor.lanes)
        begin(actor, 2)
    let_play()
    begin(box.make_actor(0, generation=1), 3)
    all_seeds = {seed_for(1, lane, generation) for lane in range(4) for generation in range(4)}
    assert len(all_seeds) == 16


def watched(make: Callable[[], EnvGroup], lane: int, calls: list) -> EnvGroup:
    """Environments that tell when they are set going and when they are waited for."""
    envs = make()
    send, recv = envs.send, envs.recv
    envs.send = lambda action: calls.append(("send", lane)) or send(action)
    envs.recv = lambda: calls.append(("recv", lane)) or recv()
    return envs


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_the_groups_of_an_actor_take_turns(lanes, tmp_path):
    """Each is set going before the other is waited for, so that envs and net overlap: between
    unrolls too, of which the throttle permits two here."""
    box = Box(tmp_path, A2C, lanes_per_actor=lanes, unroll_length=3)
    (actor,), calls = box.actors, []
    for lane in actor.lanes:
        lane.make_envs = partial(watched, lane.make_envs, lane.index, calls)
    box.learner.throttle.move()
    actor.play()
    want = [("send", lane) for lane in range(lanes)]
    for _ in range(2):
        want += [(call, lane) for lane in range(lanes) for call in ("recv", "send")]
    ends = [(call, lane) for lane in range(lanes) for call in ("recv", "send")]
    assert calls == want + ends[:-1]
