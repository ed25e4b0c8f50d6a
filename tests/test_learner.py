"""Learner and actors in one process, on plain memory: what the throttle does when actors die."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv

from asyncrl.actor import Actor, ActorConfig, context_fields
from asyncrl.algorithms.dqn import DQNConfig
from asyncrl.disk import CheckpointError
from asyncrl.env_config import EnvConfig
from asyncrl.envs import make_envs
from asyncrl.learner import Learner
from asyncrl.learner_config import LearnerConfig
from asyncrl.logs import RunLog, read_events
from asyncrl.models import ModelConfig
from asyncrl.models.layers import noisy_layers
from asyncrl.policies import Random, as_mixture
from asyncrl.stores.replay import ReplayConfig
from asyncrl.transport.ring import Ring
from asyncrl.transport.weights import WeightsBuffer, WeightsReader, WeightsWriter, weights_fields
from asyncrl.types import Spec
from tests.counting_env import CountingEnv

ENV = EnvConfig(lambda num_envs: SyncVectorEnv([CountingEnv] * num_envs))


class Box:
    """A whole run on bytearrays; actors are made, played and forgotten by hand."""

    def __init__(
        self, folder, num_actors: int, tolerance: int = 0, resume: bool = False,
        total_env_steps: int = 10_000, **learner,
    ):  # fmt: skip
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
            WeightsWriter(self.weights), ("Random",), folder, 1, total_env_steps, **learner
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


def run_for(box: Box, updates: int) -> None:
    """Until a run of one actor has made this many updates more; with rows in both logs."""
    actor, before = box.make_actor(0, box.learner.generation + 1), box.learner.updates
    while box.learner.updates < before + updates:
        box.turn([actor])
    box.learner.write_metrics()


def test_no_row_of_metrics_repeats_the_one_before(tmp_path):
    """Its rates would be 0."""
    box, rows = Box(tmp_path, 1), lambda: len((tmp_path / "metrics.jsonl").read_text().split("\n"))
    run_for(box, 2)  # with a row at the end
    before = rows()
    box.learner.finish()
    assert rows() == before
    again = Box(tmp_path, 1, resume=True)
    again.learner.finish()
    assert rows() == before
    again.turn([again.make_actor(0, 1)])
    again.learner.finish()
    assert rows() == before + 1


def test_checkpoints_that_are_gone_are_not_begun_anew(tmp_path):
    """Their logs are all that is left: they stay as they are, and it is said what is missing."""
    box = Box(tmp_path, 1)
    run_for(box, 2)
    box.learner.finish()
    logs = [tmp_path / "metrics.jsonl", tmp_path / "episodes.csv"]
    before = [log.read_bytes() for log in logs]
    segments = sorted((tmp_path / "replay").iterdir())
    (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"got none, but events.log has 'checkpoint_.*saved'"):
        Box(tmp_path, 1, resume=True)
    assert [log.read_bytes() for log in logs] == before and len(before[0]) > 100 < len(before[1])
    assert sorted((tmp_path / "replay").iterdir()) == segments
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "elsewhere").rename(tmp_path / "checkpoints")
    assert Box(tmp_path, 1, resume=True).learner.updates == box.learner.updates


def test_killed_before_its_first_checkpoint_a_run_begins_anew_and_says_so(tmp_path):
    box = Box(tmp_path, 1)
    run_for(box, 2)
    episodes = len((tmp_path / "episodes.csv").read_text().splitlines()) - 1
    assert episodes > 10
    again = Box(tmp_path, 1, resume=True)
    assert again.learner.env_steps == 0
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    (event,) = read_events(tmp_path / "events.log")
    assert event.text == (
        f"no checkpoint was saved yet: 1 rows of metrics.jsonl and {episodes} episodes of the "
        "start before are cut"
    )


def without(part):
    return lambda tensors, state: (
        {name: array for name, array in tensors.items() if part not in name},
        {name: value for name, value in state.items() if part not in name},
    )


def of_another_net(tensors, state):
    name = "algorithm|model|head.value.weight"
    return tensors | {name: np.zeros((3, 3), np.float32)}, state


@pytest.mark.parametrize("change", [
    of_another_net, without("algorithm"), without("logs"), without("store"), without("sequences"),
    lambda tensors, state: (tensors, {"numbers": {}}),
    lambda tensors, state: (tensors, state | {"sequences": [0]}),
    lambda tensors, state: (tensors, state | {"numbers": [1]}),
])  # fmt: skip
def test_a_checkpoint_of_something_else_is_passed_over(change, tmp_path):
    """Its sums are right, and the one before is used; where there is no other, that is refused."""
    box = Box(tmp_path, 1)
    run_for(box, 2)
    box.learner.finish()
    good = box.learner.checkpoints.newest_valid()
    changed = change(dict(good.tensors), good.state)
    wrong = box.learner.checkpoints.save(999_999, *changed, good.segments)
    again = Box(tmp_path, 1, resume=True)
    assert again.learner.updates == box.learner.updates == 2
    for name, tensor in again.learner.model.state_dict().items():
        assert torch.equal(tensor, box.learner.model.state_dict()[name])
    refused = read_events(tmp_path / "events.log")[-1]
    assert refused.text.startswith(f"checkpoint {wrong.name} not used: expected the state of a lea")
    shutil.rmtree(good.path)
    with pytest.raises(CheckpointError, match=r"(?s)expected a valid checkpoint.*put one back"):
        Box(tmp_path, 1, resume=True)


def test_without_any_replay_the_newest_that_fits_is_used(tmp_path):
    box = Box(tmp_path, 1)
    run_for(box, 2)
    box.learner.finish()
    good = box.learner.checkpoints.newest_valid()
    box.learner.checkpoints.save(999_999, good.tensors, {"numbers": {}}, good.segments)
    for segment in (tmp_path / "replay").glob("*.bin"):
        segment.unlink()
    again = Box(tmp_path, 1, resume=True)
    assert again.learner.env_steps == box.learner.env_steps
    assert f"{good.path.name} is used without its replay" in (tmp_path / "events.log").read_text()


def test_a_stop_is_heard_between_updates(tmp_path):
    box = Box(tmp_path, 1)
    run_for(box, 1)
    limiter = box.learner.store.limiter
    limiter.sampled -= 20 * limiter.batch_size
    beats = []
    box.learner.beat = lambda: beats.append(1) or len(beats) > 5
    assert box.learner.learn(20) == 5 and not box.learner.whole
    assert box.learner.store.updates_allowed() >= 15


@pytest.mark.parametrize("env_steps", [800, 1_000])
def test_turns_that_were_cut_short_are_not_saved(env_steps, tmp_path):
    """Not even the last one: what a signal cuts off must be made again by whoever resumes."""
    box = Box(tmp_path, 1)
    learner, actor = box.learner, box.make_actor(0)
    learner.turn_based, learner.total_env_steps = True, 1_000
    learner.config = dataclasses.replace(learner.config, checkpoint_steps=1)
    made = []  # updates before each turn

    def play(condition) -> bool:
        made.append(learner.updates)
        actor.play()
        return True

    learner.beat = lambda: learner.env_steps >= env_steps and learner.updates > made[-1]
    learner.run_in_turns(play)
    assert learner.updates == made[-1] + 1 and learner.store.updates_allowed() == 1
    learner.finish()
    newest = learner.checkpoints.newest_valid()
    assert env_steps - 16 <= newest.number < env_steps
    assert newest.state["updates"] == made[-1]


def finish_in_turns(box: Box) -> dict:
    """The state of the newest checkpoint once the run is at its end, by its own turns."""
    learner, actor = box.learner, box.make_actor(0)
    learner.config = dataclasses.replace(learner.config, checkpoint_steps=320)
    learner.run_in_turns(lambda condition: actor.play() or True)
    learner.finish()
    return learner.checkpoints.newest_valid().state


def test_a_finished_run_in_turns_has_one_end(tmp_path):
    """Begun again there is nothing to do, however it came there: also where its end is lowered to
    a periodic checkpoint of a run that was to go on and was killed."""
    finish_in_turns(Box(tmp_path / "longer", 1, total_env_steps=1_200, turn_based=True))
    *_, periodic, last = sorted((tmp_path / "longer" / "checkpoints").iterdir())
    shutil.rmtree(last)
    end, states = int(periodic.name[-12:]), []
    for name in ("straight", "straight", "straight", "longer"):
        folder = tmp_path / name
        before = {path: path.read_bytes() for path in folder.glob("checkpoints/*/*")}
        box = Box(folder, 1, resume=True, total_env_steps=end, turn_based=True)
        states.append(finish_in_turns(box))
        after = {path: path.read_bytes() for path in folder.glob("checkpoints/*/*")}
        assert not before or after == before
    assert states[0]["env_steps"] == end and states[0]["epoch"] > 1
    for name in set(states[0]) - {"elapsed_seconds", "logs"}:
        assert all(state[name] == states[0][name] for state in states), name


def test_a_stop_while_the_replay_is_read_saves_nothing(tmp_path):
    """And the checkpoint is not to blame: the next start has all of it."""
    box = Box(tmp_path, 1)
    run_for(box, 2)
    box.learner.finish()
    folders = (tmp_path / "checkpoints", tmp_path / "replay")
    files = {path: path.read_bytes() for folder in folders for path in folder.rglob("*.*")}
    logs = [path.read_bytes() for path in (tmp_path / "metrics.jsonl", tmp_path / "episodes.csv")]
    (tmp_path / "events.log").unlink()
    for turn_based in (False, True):
        beats = []
        stopped = Box(
            tmp_path, 1, resume=True, turn_based=turn_based,
            beat=lambda beats=beats: beats.append(1) or len(beats) > 5,
        )  # fmt: skip
        assert len(beats) == 6 and stopped.learner.stopped
        assert stopped.learner.weights.version == 0  # nobody acts by what was half loaded
        stopped.learner.run_async(lambda condition: pytest.fail("nothing is waited for"))
        stopped.learner.run_in_turns(lambda condition: pytest.fail("nothing is played"))
        stopped.learner.finish()
        assert not stopped.learner.checkpoints.rejected
    events = [(event.kind, event.text) for event in read_events(tmp_path / "events.log")]
    text = "stopped while it read its replay: nothing is to be saved"
    assert events == [("learner", text)] * 2
    assert files == {path: path.read_bytes() for folder in folders for path in folder.rglob("*.*")}
    assert logs == [(tmp_path / name).read_bytes() for name in ("metrics.jsonl", "episodes.csv")]
    again = Box(tmp_path, 1, resume=True)
    assert again.learner.updates == box.learner.updates
    assert again.learner.store.unrolls == box.learner.store.unrolls


def test_logs_that_a_power_cut_shortened_are_named_and_the_run_goes_on(tmp_path, monkeypatch):
    synced = []
    sync = RunLog.sync
    monkeypatch.setattr(RunLog, "sync", lambda log: synced.append(log.positions()) or sync(log))
    box = Box(tmp_path, 1)
    run_for(box, 2)
    box.learner.finish()
    positions = box.learner.checkpoints.newest_valid().state["logs"]
    assert synced == [positions]  # in time for the checkpoint that has them
    with open(tmp_path / "episodes.csv", "r+b") as file:
        file.truncate(positions["episodes.csv"] - 1)
    again = Box(tmp_path, 1, resume=True)
    left = (tmp_path / "episodes.csv").read_bytes()
    assert left.endswith(b"\n") and len(left) < positions["episodes.csv"] - 1
    (event,) = [e for e in read_events(tmp_path / "events.log") if e.kind == "warning"]
    assert event.text == (
        f"expected episodes.csv to have {positions['episodes.csv']} bytes, as its checkpoint says, "
        f"got {len(left)}: what it had behind them is lost, the run goes on"
    )
    run_for(again, 2)
    assert (tmp_path / "episodes.csv").read_bytes().startswith(left)
    again.learner.finish()
    Box(tmp_path, 1, resume=True)
    assert sum(e.kind == "warning" for e in read_events(tmp_path / "events.log")) == 1


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
    assert not torch.equal(algorithm.model.state_dict()["head.advantage.last.bias"],
                           before["head.advantage.last.bias"])  # fmt: skip


def test_the_clock_of_schedules_runs_while_the_replay_fills(tmp_path):
    box, late = Box(tmp_path, 1), []
    actor = box.make_actor(0)
    while box.learner.updates == 0:
        box.turn([actor])
        clock = int(box.learner.weights.front()["context"]["env_steps"])
        late.append(box.learner.env_steps - clock)
    assert len(late) > 20 and max(late) <= 0.02 * 400 + 8


class NoisyBox(Box):
    def make_model(self):
        return ModelConfig(hidden=(8,), noisy=True)(*self.spaces)


def test_each_actor_draws_noise_of_its_own_for_each_unroll(tmp_path):
    box, seen = NoisyBox(tmp_path, 2), []

    def noise(model) -> str:
        return str([layer.noise_in.tolist() for layer in noisy_layers(model)])

    actors = [box.make_actor(0), box.make_actor(1)]
    for _ in range(3):
        box.turn(actors)
        seen += [noise(actor.model) for actor in actors]
    assert len({*seen, noise(box.learner.model)}) == 7
    twin = NoisyBox(tmp_path / "twin", 2)
    twin_actor = twin.make_actor(0)
    twin.turn([twin_actor])
    assert noise(twin_actor.model) == seen[0]  # by seed, lane and count: nothing to be resumed


def test_learning_begins_when_a_lane_is_sure_to_hold_a_whole_draw(tmp_path):
    """16 environments of one lane: 200 env steps are 12 rows, too few for sequences of 20."""
    config = DQNConfig(
        sequence_length=20, batch_size=1, replay=ReplayConfig(capacity=4_000, learning_starts=200)
    )
    spec = Spec(8, 16, *Box(tmp_path, 1).spaces, {})
    assert config.limiter(spec, 1).learning_starts == 16 * (20 + 1)
    assert config.limiter(spec, 3).learning_starts == 3 * 16 * (20 + 1)
