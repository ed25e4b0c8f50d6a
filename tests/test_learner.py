"""Learner and actors in one process, on plain memory: what the throttle does when actors die."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv

from asyncrl.actor import Actor, ActorConfig, context_fields
from asyncrl.algorithms.dqn import DQNConfig
from asyncrl.env_config import EnvConfig
from asyncrl.envs import make_envs
from asyncrl.learner import Learner
from asyncrl.learner_config import LearnerConfig
from asyncrl.models import ModelConfig
from asyncrl.policies import Random, as_mixture
from asyncrl.stores.replay import ReplayConfig
from asyncrl.transport.ring import Ring
from asyncrl.transport.weights import WeightsBuffer, WeightsReader, WeightsWriter, weights_fields
from asyncrl.types import Spec
from tests.counting_env import CountingEnv

ENV = EnvConfig(lambda num_envs: SyncVectorEnv([CountingEnv] * num_envs))


class Box:
    """A whole run on bytearrays; actors are made, played and forgotten by hand."""

    def __init__(self, folder, num_actors: int, tolerance: int = 0, resume: bool = False):
        self.config = ActorConfig(num_actors=num_actors, envs_per_lane=2, unroll_length=4)
        envs = make_envs(ENV, 1)
        self.spaces = envs.observation_space, envs.action_space
        self.spec = Spec(4, 2, *self.spaces, {})
        lane_nbytes = Ring.nbytes(self.spec, self.config.slots_per_lane)
        self.rings = [
            Ring(bytearray(lane_nbytes), self.spec, self.config.slots_per_lane)
            for _ in range(self.config.num_lanes)
        ]
        torch.manual_seed(1)
        model = self.make_model()
        fields = weights_fields(model.state_dict(), context_fields(1))
        self.weights = WeightsBuffer(bytearray(WeightsBuffer.nbytes(fields)), fields)
        replay = ReplayConfig(
            capacity=2_000, samples_per_insert=1, learning_starts=400, tolerance=tolerance
        )
        algorithm = DQNConfig(replay=replay, batch_size=8).build(model, torch.device("cpu"))
        self.learner = Learner(
            LearnerConfig(tensorboard=False), self.config, algorithm, model, self.spec, self.rings,
            WeightsWriter(self.weights), ("Random",), folder, seed=1, total_env_steps=10_000,
        )  # fmt: skip
        self.learner.start(resume=resume)

    def make_model(self):
        return ModelConfig(hidden=(8,))(*self.spaces)

    def make_actor(self, index: int, generation: int = 0) -> Actor:
        rings = {lane: self.rings[lane] for lane in (2 * index, 2 * index + 1)}
        return Actor(
            index, self.config, rings, WeightsReader(self.weights), self.make_model(),
            as_mixture(Random()), lambda: make_envs(ENV, 2), 1, generation,
        )  # fmt: skip

    def turn(self, actors: list[Actor]) -> None:
        self.learner.throttle.move()
        for actor in actors:
            if actor.may_begin():
                actor.play()
        self.learner.drain()
        self.learner.learn(1)


@pytest.mark.parametrize("num_actors, alive", [(2, 1), (3, 1), (8, 4)])
@pytest.mark.parametrize("tolerance", ["default", "least"])
def test_actors_that_never_play_do_not_hold_back_the_others(num_actors, alive, tolerance, tmp_path):
    least = 16 * num_actors + 8
    box = Box(tmp_path, num_actors, least if tolerance == "least" else 0)
    actors = [box.make_actor(index) for index in range(alive)]
    for _ in range(400):
        box.turn(actors)
    assert box.learner.env_steps > 1_000
    assert box.learner.updates > 50


@pytest.mark.parametrize("tolerance", [0, 24])
def test_an_actor_that_dies_between_the_commits_of_its_lanes_goes_on(tolerance, tmp_path):
    box = Box(tmp_path, 1, tolerance)
    for generation in range(6):
        actor = box.make_actor(0, generation)
        for _ in range(5):
            box.turn([actor])
        commit = actor.lanes[1].writer.commit
        actor.lanes[1].writer.commit = lambda: (_ for _ in ()).throw(SystemExit("killed"))
        with pytest.raises(SystemExit):
            for _ in range(50):
                box.turn([actor])
        assert commit is not None
    heads = [ring.read(0) for ring in box.rings]
    assert heads[0] != heads[1]
    actor = box.make_actor(0, 9)
    before = box.learner.env_steps
    for _ in range(400):
        box.turn([actor])
    assert box.learner.env_steps > before + 1_000
    assert box.rings[0].read(0) == box.rings[1].read(0)


def test_stopped_in_warm_up_and_resumed(tmp_path):
    box = Box(tmp_path, 1)
    actor = box.make_actor(0)
    for _ in range(5):
        box.turn([actor])
    assert box.learner.updates == 0 < box.learner.env_steps
    box.learner.finish()
    again = Box(tmp_path, 1, resume=True)
    assert again.learner.env_steps == box.learner.env_steps
    actor = again.make_actor(0)
    for _ in range(100):
        again.turn([actor])
    assert again.learner.updates > 0


def test_recent_lengths_are_published_also_after_a_resume(tmp_path):
    """Counted in the unrolls themselves; a resumed learner publishes what its checkpoint knows."""
    box = Box(tmp_path, 1)
    actor, lengths = box.make_actor(0), []
    take = box.learner._take

    def taken(lane, unroll, raw):
        lengths.extend(unroll.episode_length[unroll.episode_length > 0].tolist())
        take(lane, unroll, raw)

    box.learner._take = taken
    for _ in range(40):
        box.turn([actor])
    box.learner.publish()
    actor._pull()
    (row,) = box.learner.weights.front()["context"]["recent_lengths"].tolist()
    assert row == lengths[-64:] and len(lengths) > 64
    assert actor.recent_lengths["Random"].tolist() == row
    box.learner.finish()
    again = Box(tmp_path, 1, resume=True)
    assert again.learner.weights.front()["context"]["recent_lengths"].tolist() == [row]


def test_resumed_without_a_replay_it_is_filled_first(tmp_path):
    """All segments are gone: the nets are kept, said, and learning waits for new data."""
    box = Box(tmp_path, 1)
    actor = box.make_actor(0)
    for _ in range(100):
        box.turn([actor])
    assert box.learner.updates > 0
    box.learner.finish()
    for segment in (tmp_path / "replay").glob("*.bin"):
        segment.unlink()
    again = Box(tmp_path, 1, resume=True)
    assert again.learner.env_steps == box.learner.env_steps
    assert again.learner.updates == box.learner.updates
    for name, tensor in again.learner.model.state_dict().items():
        assert torch.equal(tensor, box.learner.model.state_dict()[name])
    assert "without its replay" in (tmp_path / "events.log").read_text()
    actor = again.make_actor(0)
    begun, updates = again.learner.env_steps, again.learner.updates
    while again.learner.env_steps < begun + 400:
        assert again.learner.updates == updates
        again.turn([actor])
    for _ in range(20):
        again.turn([actor])
    assert again.learner.updates > updates


def test_no_usable_checkpoint_is_said_and_nothing_is_begun_anew(tmp_path):
    box = Box(tmp_path, 1)
    box.learner.finish()
    (path,) = (tmp_path / "checkpoints").glob("checkpoint_*/state.json")
    path.write_text("{}")
    with pytest.raises(Exception, match="expected a valid checkpoint, got"):
        Box(tmp_path, 1, resume=True)
    assert (tmp_path / "metrics.jsonl").stat().st_size > 0


def test_a_bad_gradient_changes_nothing(tmp_path):
    box = Box(tmp_path, 1)
    actor = box.make_actor(0)
    while box.learner.updates < 3:
        box.turn([actor])
    store, algorithm = box.learner.store, box.learner.algorithm
    before = {name: tensor.clone() for name, tensor in algorithm.model.state_dict().items()}
    good = store.obs.clone()
    store.obs.fill_(np.nan)
    assert algorithm.update(store)["loss/skipped"] == 1
    for name, tensor in algorithm.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    store.obs.copy_(good)
    assert algorithm.update(store)["loss/skipped"] == 0
    assert not torch.equal(algorithm.model.state_dict()["head.advantage.bias"],
                           before["head.advantage.bias"])  # fmt: skip
