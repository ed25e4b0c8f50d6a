"""Actors and a learner of A2C or PPO in one process: what acted is what is learned from."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv
from torch import nn

from asyncrl.actor import Actor, ActorConfig, context_fields
from asyncrl.algorithms import actor_critic as ac
from asyncrl.algorithms.a2c import A2CConfig
from asyncrl.algorithms.ppo import PPOConfig
from asyncrl.config import Config
from asyncrl.env_config import EnvConfig
from asyncrl.envs import make_envs
from asyncrl.guards import OutOfMemory
from asyncrl.learner import Learner
from asyncrl.learner_config import LearnerConfig
from asyncrl.logs import read_events
from asyncrl.models import ModelConfig
from asyncrl.models.contract import state_fields
from asyncrl.policies import EpsilonGreedy, Mixture, Part, Softmax, as_mixture
from asyncrl.state import flatten
from asyncrl.stores.rollout import Rollout, RolloutConfig
from asyncrl.transport.ring import Ring, Word
from asyncrl.transport.weights import WeightsBuffer, WeightsReader, WeightsWriter, weights_fields
from tests.test_guards import limit_memory

CPU = torch.device("cpu")


class Walk(gym.Env):
    """A walk pushed by the actions; episodes end by both kinds of end, some after one step."""

    def __init__(self, action_space: spaces.Space):
        self.observation_space = spaces.Box(-10, 10, (2,))
        self.action_space = action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.np_random.normal(size=2).astype(np.float32)
        return self.position, {}

    def step(self, action):
        assert self.action_space.contains(action), action
        noise = self.np_random.normal(size=2)
        push = np.clip(np.mean(action), -1, 1)
        position = np.clip(0.9 * self.position + push + noise, -10, 10)
        self.position = position.astype(np.float32)
        end = self.np_random.random()
        return self.position, float(self.position.sum()), end < 0.1, 0.1 <= end < 0.2, {}


class Count(gym.Env):
    """Shows (episode, step) and pays 10 * episode + step; of 1 to 4 steps, half truncated."""

    observation_space, action_space = spaces.Box(0, 1e6, (2,)), spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        self.episode, self.count = (0 if seed is not None else self.episode + 1), 0
        return np.array([self.episode, 0], np.float32), {}

    def step(self, action):
        self.count += 1
        ended, terminates = self.count == 1 + self.episode % 4, self.episode % 2 == 0
        obs = np.array([self.episode, self.count], np.float32)
        reward = 10.0 * self.episode + self.count
        return obs, reward, ended and terminates, ended and not terminates, {}


def envs_of(make) -> EnvConfig:
    return EnvConfig(lambda num_envs: SyncVectorEnv([make] * num_envs))


DISCRETE = spaces.Discrete(4, start=3)
ACTIONS = {
    "discrete": DISCRETE,
    "multi_discrete": spaces.MultiDiscrete([3, 2, 4]),
    "box": spaces.Box(np.float32([-2, -np.inf]), np.float32([1, np.inf])),
}
MODELS = {
    "mlp": {},
    "stack": {"frame_stack": 3},
    "lstm": {"lstm": 6},
    "lstm_and_stack": {"lstm": 6, "frame_stack": 3},
}
WAITING = RolloutConfig(ahead=0)  # actors wait, so what is learned from was acted by these weights
ALGORITHMS = {
    "a2c": A2CConfig(precision="float32", learning_rate=3e-3, rollout=WAITING),
    "ppo": PPOConfig(
        precision="float32",
        learning_rate=3e-3,
        rollout=WAITING,
        epochs=2,
        num_minibatches=2,
        values_by="actor",
    ),
}


def network(**changes) -> ModelConfig:
    return ModelConfig(hidden=(8,), head="actor_critic", activation="tanh", **changes)


class Box:
    """A whole run on bytearrays, of one lane or more with two environments each."""

    def __init__(
        self, folder, algorithm, model=None, env=None, policy=None, resume=False, seed=1,
        num_actors=1, **actors,
    ):  # fmt: skip
        settings = {"envs_per_lane": 2, "unroll_length": 5, "precision": "float32"} | actors
        self.config = ActorConfig(num_actors=num_actors, **settings)
        self.env = env or envs_of(lambda: Walk(DISCRETE))
        self.policy = as_mixture(policy or algorithm.policy())
        self.model_config, self.seed = model or network(), seed
        envs = make_envs(self.env, 1)
        self.spaces = envs.observation_space, envs.action_space
        model = self.make_model()
        state = state_fields(model, algorithm.head, *self.spaces)
        config = Config(self.env, algorithm=algorithm, actor=self.config)
        self.spec = config.spec(*self.spaces, state)
        slots = self.config.slots_per_lane
        fields = weights_fields(model.state_dict(), context_fields(len(self.policy.names)))
        self.rings = [
            Ring(bytearray(Ring.nbytes(self.spec, slots)), self.spec, slots)
            for _ in range(self.config.num_lanes)
        ]
        self.weights = WeightsBuffer(bytearray(WeightsBuffer.nbytes(fields)), fields)
        self.learner = Learner(
            LearnerConfig(tensorboard=False), self.config, algorithm.build(model, CPU), model,
            self.spec, self.rings, WeightsWriter(self.weights), self.policy.names, folder,
            seed=1, total_env_steps=1_000_000,
        )  # fmt: skip
        self.store, self.algorithm = self.learner.store, self.learner.algorithm
        self.learner.start(resume=resume)
        self.actors = [self.make_actor(index) for index in range(num_actors)]

    def make_model(self) -> nn.Module:
        """Policies far from uniform, so that what is forgotten shows."""
        torch.manual_seed(self.seed)
        model = self.model_config(*self.spaces)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.startswith("head.policy.layer.weight"):
                    parameter.mul_(100)
        return model

    def make_actor(self, index: int, generation: int = 0) -> Actor:
        lanes = self.config.lanes_per_actor
        rings = {lane: self.rings[lane] for lane in range(index * lanes, (index + 1) * lanes)}
        return Actor(
            index, self.config, rings, WeightsReader(self.weights), self.make_model(),
            self.policy, lambda: make_envs(self.env, self.config.envs_per_lane), 1, generation,
        )  # fmt: skip

    def collect(self) -> None:
        """Let every actor play what it may."""
        self.learner.throttle.move()
        for actor in self.actors:
            while actor.may_begin():
                actor.play()
        self.learner.drain()

    def turn(self) -> None:
        self.collect()
        self.learner.learn(1)

    def next_rollout(self) -> Rollout:
        """What the next update learns from; it stays in the queue."""
        return deepcopy(self.store).sample(CPU)


class Given:
    """In place of a store: gives the same rollout again and again."""

    def __init__(self, rollout: Rollout, inserted: int = 0):
        self.sample = lambda device: rollout
        self.limiter = type("Limiter", (), {"inserted": inserted})
        self.uses = []
        self.used = self.uses.append


def weights_of(algorithm) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in algorithm.model.state_dict().items()}


# -- what acted ----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("space", ACTIONS)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_learner_finds_the_log_probabilities_and_values_sent(name, space, model, tmp_path):
    """Over unrolls and updates: memories carried, cut at resets, and actions there and back."""
    env = envs_of(lambda: Walk(ACTIONS[space]))
    box = Box(tmp_path, ALGORITHMS[name], network(**MODELS[model]), env)
    forgot, resets, crossed = 0.0, 0, 0
    for turn in range(6):
        box.collect()
        rollout = box.next_rollout()
        assert rollout.action.shape[:2] == (5, 4)
        resets += int((~rollout.valid).sum())
        crossed += int((~rollout.first[0]).sum())
        for rows in (1, 13, 1000):
            value, log_prob = ac.evaluate(box.algorithm.teams.forward, rollout, rows)
            assert value.shape == (6, 4)
            torch.testing.assert_close(log_prob, rollout.log_prob, rtol=0, atol=1e-5)
            if name == "ppo":
                torch.testing.assert_close(value, rollout.value, rtol=0, atol=1e-5)
        assert len(rollout.value) == 6 * (name == "ppo")
        if turn:
            zeros = {name: torch.zeros_like(part) for name, part in rollout.state.items()}
            forgetful = rollout._replace(state=zeros)
            _, without = ac.evaluate(box.algorithm.teams.forward, forgetful, 1000)
            difference = (without - rollout.log_prob).abs()
            forgot = max(forgot, float(difference.max()))
            assert (difference * (rollout.first[:5].cumsum(0) > 0)).max() < 1e-5
        before = weights_of(box.algorithm)
        assert box.learner.learn(1) == 1 and box.store.lags == [0, 0]
        after = box.algorithm.model.state_dict()
        assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())
        assert box.learner.metrics["loss/skipped"] == 0
    assert resets > 5 and crossed > 8
    assert forgot > 1e-3 if MODELS[model] else forgot < 1e-5


def test_a_normaliser_moves_only_between_rollouts(tmp_path):
    """Statistics reach the actors with the weights they belong to."""
    model = network(normalize_obs=True, normalize_returns=True)
    for name, algorithm in ALGORITHMS.items():
        box = Box(tmp_path / name, algorithm, model)
        seen = 0
        for _ in range(4):
            box.collect()
            rollout = box.next_rollout()
            _, log_prob = ac.evaluate(box.algorithm.teams.forward, rollout, 1000)
            torch.testing.assert_close(log_prob, rollout.log_prob, rtol=0, atol=1e-5)
            box.learner.learn(1)
            seen += int(rollout.valid.sum())
            state = box.algorithm.model.state_dict()
            assert state["obs_normalizer.count"] == seen
            assert state["head.value.statistics.count"] == seen


def test_a_mixture_sends_the_log_probability_of_who_really_acted(tmp_path):
    mixture = Mixture(
        (Part("warm", Softmax(2.0)), Part("cold", Softmax(0.5)), Part("eps", EpsilonGreedy(0.3)))
    )
    box = Box(tmp_path, ALGORITHMS["ppo"], network(lstm=6), policy=mixture)
    acted = {0: 0, 1: 0, 2: 0}
    for _ in range(12):
        box.collect()
        rollout = box.next_rollout()
        policy = torch.from_numpy(np.concatenate([u.policy for u in box.store.unrolls], 1))
        with torch.no_grad():
            outputs, _ = box.algorithm.model(rollout.obs, rollout.first, rollout.state)
        logits = outputs["logits"][:-1].double()
        random = torch.full(logits.shape, 0.3 / 4, dtype=torch.float64)
        random.scatter_(-1, logits.argmax(-1, keepdim=True), 0.7 + 0.3 / 4)
        warm, cold = (logits / 2).log_softmax(-1), (logits * 2).log_softmax(-1)
        action = rollout.action.unsqueeze(-1)
        parts = [part.gather(-1, action) for part in (warm, cold, random.log())]
        expected = torch.cat(parts, -1).gather(-1, policy.long().unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(rollout.log_prob.double(), expected, rtol=0, atol=1e-5)
        for index in acted:
            acted[index] += int((policy == index).sum())
        box.learner.learn(1)
        assert box.learner.metrics["loss/skipped"] == 0
    assert min(acted.values()) > 20


# -- what is learned from ------------------------------------------------------------------------


class ByHand(nn.Module):
    """V(episode, step) = 100 * episode + step + bias, and a coin for a policy."""

    def __init__(self, observation_space, action_space):
        super().__init__()
        self.bias, self.logits = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(2))

    def initial_state(self, num_envs):
        return {}

    def forward(self, obs, first, state):
        value = 100 * obs[..., 0] + obs[..., 1] + self.bias
        return {"value": value, "logits": self.logits.expand(*value.shape, 2)}, state


def test_what_is_truncated_bootstraps_from_its_true_final_observation(tmp_path):
    gamma = 0.5
    box = Box(tmp_path, ALGORITHMS["a2c"], ByHand, envs_of(Count), unroll_length=4)
    truncated = at_the_seam = 0
    for _ in range(6):
        box.collect()
        rollout = box.next_rollout()
        value, log_prob = ac.evaluate(box.algorithm.teams.forward, rollout, 1000)
        bias = box.algorithm.model.bias.item()
        rest = rollout, value, log_prob, gamma
        for one_step in (
            ac.targets("n_step", *rest, 0.0, 1, 0.0),
            ac.targets("gae", *rest, 0.0, 9, 0.0),
            ac.targets("vtrace", *rest, 0.0, 9, 0.0),
        ):
            for t, env in rollout.valid.nonzero().tolist():
                episode, step = rollout.obs[t, env].tolist()
                ended = step + 1 == 1 + episode % 4
                terminated = ended and episode % 2 == 0
                assert rollout.terminated[t, env] == terminated
                assert rollout.truncated[t, env] == (ended and not terminated)
                target = 10 * episode + step + 1
                if not terminated:  # the observation that the step led to, whatever came after it
                    target += gamma * (100 * episode + step + 1 + bias)
                assert one_step.value[t, env].item() == pytest.approx(target, rel=1e-5)
                if ended:  # V-trace looks further, but not over an end
                    advantage = target - (100 * episode + step + bias)
                    assert one_step.advantage[t, env].item() == pytest.approx(advantage, abs=1e-3)
        truncated += int(rollout.truncated.sum())
        at_the_seam += int(rollout.truncated[-1].sum())
        box.learner.learn(1)
    assert truncated > 10 and at_the_seam > 0


@pytest.mark.parametrize("estimator", ["gae", "n_step", "vtrace"])
@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("model", ["mlp", "lstm_and_stack"])
def test_reset_steps_are_never_learned_from(model, name, estimator, tmp_path):
    """Whatever they hold, and whatever is seen behind a termination, the same is learned."""
    config = replace(
        ALGORITHMS[name], estimator=estimator, entropy_coef=0.1, normalize_advantage=True,
        **{"values_by": "learner"} if (name, estimator) == ("ppo", "vtrace") else {},
    )  # fmt: skip
    options = {"normalize_obs": True, "normalize_returns": True, **MODELS[model]}
    box = Box(tmp_path, config, network(**options))
    for _ in range(2):
        box.turn()
    box.collect()
    clean = box.next_rollout()
    reset = ~clean.valid
    assert reset.any()
    garbage = clean._replace(
        action=torch.where(reset, 3 - clean.action, clean.action),
        log_prob=torch.where(reset, torch.nan, clean.log_prob),
        reward=torch.where(reset, torch.nan, clean.reward),
    )
    if model == "mlp":  # a memory sees the true final observation too
        unseen = torch.cat([torch.zeros(1, 4, dtype=torch.bool), clean.terminated])
        garbage = garbage._replace(obs=torch.where(unseen.unsqueeze(-1), 1e3, clean.obs))
    algorithms = [deepcopy(box.algorithm) for _ in range(2)]
    for algorithm, rollout in zip(algorithms, (clean, garbage), strict=True):
        algorithm.generator = torch.Generator().manual_seed(0)
        algorithm.descend = type(algorithm.descend)(algorithm.model, 0.01, 0.5, 1e-5)
        for _ in range(3):
            assert not algorithm.update(Given(rollout))["loss/skipped"].any()
    before = box.algorithm.model.state_dict()
    one, other = (algorithm.model.state_dict() for algorithm in algorithms)
    assert any(not torch.equal(one[key], tensor) for key, tensor in before.items())
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key]), key


# -- what is kept --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_resumed_learner_is_the_one_that_stopped(name, tmp_path):
    """LSTM, PopArt, normaliser, moments, shuffles and the queue: all go on bit for bit."""
    config = replace(ALGORITHMS[name], rollout=RolloutConfig(ahead=2))
    model = network(lstm=6, frame_stack=2, normalize_obs=True, normalize_returns=True)
    box = Box(tmp_path, config, model)
    for _ in range(5):
        box.turn()
    box.learner.finish()
    again = Box(tmp_path, config, model, seed=2, resume=True)
    assert again.learner.updates == box.learner.updates > 0
    assert again.learner.env_steps == box.learner.env_steps > 0
    assert len(again.store.unrolls) == len(box.store.unrolls) == 4
    rollout = box.next_rollout()
    for _ in range(3):
        states = [flatten(b.algorithm.state_dict()) for b in (box, again)]
        assert states[0][0].keys() == states[1][0].keys() and states[0][1] == states[1][1]
        for key, array in states[0][0].items():
            np.testing.assert_array_equal(array, states[1][0][key], err_msg=key)
        outputs = [ac.evaluate(b.algorithm.teams.forward, rollout, 1000) for b in (box, again)]
        assert torch.equal(outputs[0][0], outputs[1][0])
        assert torch.equal(outputs[0][1], outputs[1][1])
        assert box.learner.learn(1) == again.learner.learn(1)
        # The same weights were published once more at the start.
        assert [lag + 1 for lag in box.store.lags] == again.store.lags
    assert box.learner.learn(1) == again.learner.learn(1) == 0


def test_a_run_goes_on_after_a_resume(tmp_path):
    """Versions go on, so old and new unrolls are told apart; lanes begin anew."""
    config = replace(ALGORITHMS["ppo"], rollout=RolloutConfig(ahead=2))
    box = Box(tmp_path, config, network(lstm=6))
    for _ in range(5):
        box.turn()
    version, updates = box.learner.weights.version, box.learner.updates
    box.learner.finish()
    again = Box(tmp_path, config, network(lstm=6), resume=True)
    assert again.learner.weights.version == version + 1
    for _ in range(6):
        again.turn()
        assert 0 <= min(again.store.lags) <= max(again.store.lags) <= 3
        assert again.learner.metrics["loss/skipped"] == 0
    assert again.learner.updates == updates + 6 * 4
    assert again.store.dropped == 0


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_a_stop_is_heard_between_minibatches(steps, tmp_path):
    """The rest of the rollout is left out as behind `target_kl`, and what is saved goes on."""
    config = replace(ALGORITHMS["ppo"], epochs=4, num_minibatches=2)
    box = Box(tmp_path, config)
    box.turn()
    assert box.learner.whole and box.learner.updates == 8
    beats, sampled = [], box.store.limiter.sampled

    def beat() -> bool:
        beats.append(box.learner.updates)
        return len(beats) > steps  # the first is that of `learn`

    box.learner.beat = box.algorithm.beat = beat
    box.turn()
    assert beats[: steps + 1] == list(range(8, 9 + steps)) and not box.learner.whole
    assert box.learner.updates == 8 + steps
    assert box.store.limiter.sampled == sampled + round(steps / 2 * box.store.drawn)
    box.learner.finish()
    again = Box(tmp_path, config, seed=2, resume=True)
    assert again.learner.updates == 8 + steps
    for name, tensor in weights_of(box.algorithm).items():
        assert torch.equal(tensor, weights_of(again.algorithm)[name])
    again.turn()
    assert again.learner.updates == 16 + steps


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_rollout_that_does_not_fit_into_gpu_memory_is_not_lost(name, tmp_path):
    """PPO cuts its minibatches, A2C, whose batch is the rollout, learns from it in two halves."""
    box = Box(tmp_path, ALGORITHMS[name], num_actors=2)  # a rollout has 4 unrolls of 2
    box.turn()
    box.collect()
    expected = {"a2c": 2, "ppo": 4}[name]
    updates, inserted = box.learner.updates, box.store.limiter.inserted
    gpu = limit_memory(box.learner.model, {"a2c": 4, "ppo": 10}[name])
    assert box.learner.learn(1) == 1
    assert box.learner.updates == updates + expected
    assert gpu.failures == 1 and not box.store.unrolls
    assert box.store.limiter.sampled == box.store.limiter.samples_per_insert * inserted
    assert [event.kind for event in read_events(tmp_path / "events.log")] == ["memory"]
    box.collect()
    unrolls, updates, gpu.most = list(box.store.unrolls), box.learner.updates, 1
    assert len(unrolls) >= 4
    with pytest.raises(OutOfMemory):
        box.learner.learn(1)
    assert list(box.store.unrolls) == unrolls and box.store.num_unrolls == 4
    again = Box(tmp_path, ALGORITHMS[name], num_actors=2, resume=True)
    assert again.learner.updates == updates
    assert len(again.store.unrolls) == len(unrolls)


def test_counts_of_what_went_wrong_survive_a_resume(tmp_path):
    box = Box(tmp_path, PPOConfig(num_minibatches=1))
    box.turn()
    box.learner.guard.num_skipped = 3
    box.rings[0].words[Word.REBUILDS] = 2
    box.learner.finish()
    again = Box(tmp_path, PPOConfig(num_minibatches=1), resume=True)
    assert again.learner.guard.num_skipped == 3
    assert again.learner.num_rebuilt() == 2
    again.rings[0].words[Word.REBUILDS] = 1
    again.turn()
    again.learner.save()
    again.learner.start(resume=True)  # it died alone: the ring still has its count
    assert again.learner.num_rebuilt() == 3
    third = Box(tmp_path, PPOConfig(num_minibatches=1), resume=True)
    third.learner.rebuilt_before = 0  # it dies alone before it has saved anything:
    third.learner.start(resume=True)
    assert third.learner.num_rebuilt() == 3
