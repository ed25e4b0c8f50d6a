"""The learner: drain -> store -> update -> publish.

It takes finished unrolls from all lanes into its store, updates while the store's rate limit
allows, publishes weights, and moves the throttle. One object serves all schedules; they differ in
who waits for whom.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
from torch import nn

from asyncrl import metrics
from asyncrl.actor import ActorConfig
from asyncrl.algorithms.gradient import Metrics
from asyncrl.checkpoint import Checkpoints, Loaded
from asyncrl.disk import CheckpointError
from asyncrl.guards import OutOfMemory, UpdateGuard
from asyncrl.learner_config import LearnerConfig
from asyncrl.logs import EventLog, RunLog
from asyncrl.replay_stream import ReplayStream, Stopped
from asyncrl.resume import load_newest, say_what_is_cut, say_what_is_missing
from asyncrl.state import flatten, rng_state, set_rng_state, unflatten
from asyncrl.throttle import Throttle
from asyncrl.transfer import to_host
from asyncrl.transport.ring import Ring, UnrollReader, Word
from asyncrl.transport.weights import WeightsWriter
from asyncrl.types import Spec, Unroll


class Learner:
    """Owns the algorithm, its store, the logs and the checkpoints of a run."""

    def __init__(
        self,
        config: LearnerConfig,
        actors: ActorConfig,
        algorithm,
        model: nn.Module,
        spec: Spec,
        rings: list[Ring],
        weights: WeightsWriter,
        policy_names: tuple[str, ...],
        folder: Path,
        seed: int,
        total_env_steps: int,
        ring_actor: Callable[[int], None] = lambda actor: None,
        turn_based: bool = False,
        read_status: Callable[[], dict] = dict,
        beat: Callable[[], bool] = lambda: False,
    ):
        self.config, self.actors, self.spec = config, actors, spec
        self.algorithm, self.model = algorithm, model
        self.store = algorithm.store(spec, len(rings), seed)
        self.origin = self.store.position()
        self.rings = rings
        self.readers = [UnrollReader(ring) for ring in rings]
        self.throttle = Throttle(actors, spec, self.readers, self.store, ring_actor)
        self.weights = weights
        self.policy_names = policy_names
        self.total_env_steps = total_env_steps
        self.ring_actor = ring_actor
        self.turn_based = turn_based
        self.read_status = read_status
        self.beat = beat  # to be called often; returns whether to stop
        if hasattr(algorithm, "beat"):  # an update of it is many steps
            algorithm.beat = beat

        self.events = EventLog(folder / "events.log")
        self.guard = UpdateGuard(model, self.events)
        self.checkpoints = Checkpoints(folder / "checkpoints", config.keep_checkpoints)
        self.stream = ReplayStream(
            folder / "replay", self.store, spec.layout, self.checkpoints, self.events,
            enabled=config.save_replay and self.store.streams, beat=beat,
        )  # fmt: skip
        self.folder = folder
        self.positions = {"metrics.jsonl": 0, "episodes.csv": 0}  # to which logs are cut back
        self.episodes = metrics.EpisodeStatistics(policy_names)
        self.shares = metrics.TimeShares()
        self.threads = contextlib.nullcontext()  # or `Threads`, which looks at each update
        self.epoch = 0  # of the environments, where they are made anew at checkpoints
        self.generation = 0  # newest seen
        self.elapsed_before = 0.0  # seconds, in earlier starts of this run
        self.metrics: Metrics = {}
        self.lags = metrics.Lags()
        self.whole = True  # nothing cut `learn` short
        self.stopped = False  # before all of the checkpoint was read
        self.saved = 0, 0  # env steps and updates when a save was last tried
        self.rebuilt_before = 0  # environments made anew, in earlier starts of this run

    # -- start and resume ------------------------------------------------------------------------

    def start(self, resume: bool) -> bool:
        """Resume from the newest checkpoint if asked to and there ever was one, then publish.

        Returns whether it resumed. Where it is `stopped` meanwhile, nothing is left to do.
        """
        self.checkpoints.clean()
        try:
            resumed = load_newest(self.checkpoints, self._load, self.events) if resume else None
        except Stopped:
            self.stopped = True
            self.events.event("learner", "stopped while it read its replay: nothing is to be saved")
            return True
        if resumed is None:
            say_what_is_cut(self.folder, self.events)
        self.stream.begin(resumed.segments if resumed else [])
        self.log = RunLog(self.folder, self.positions, self.config.tensorboard)
        say_what_is_missing(self.log, self.positions, self.events)
        now = time.monotonic()
        self.started = self.last_checkpoint = self.last_log = now
        self.saved = self.env_steps, self.updates
        self.logged = self.saved if resumed else None  # in the newest row of metrics
        self.step_rate, self.update_rate = map(metrics.Rate, self.saved)
        self.actor_shares = metrics.ActorShares(self.rings[:: self.actors.lanes_per_actor])
        self.process = psutil.Process()
        self.publish()  # last, because a version says that all before it is done
        if not resumed and self.turn_based:
            self.save()  # what a kill before the first periodic checkpoint falls back to
        return resumed is not None

    def _load(self, loaded: Loaded) -> None:
        state = unflatten(dict(loaded.tensors) | loaded.state["numbers"])
        self.store.restart_at(self.origin)  # whatever an unusable checkpoint may have left in it
        self.stream.restore(loaded.segments)
        self.algorithm.load_state_dict(state["algorithm"])
        self.store.load_state_dict(state["store"])
        set_rng_state(state, self.config.resolved_device())
        counters = loaded.state
        self.positions = counters["logs"]
        self.episodes.load_state_dict(counters["episodes"])
        self.generation = counters["generation"]
        self.elapsed_before = counters["elapsed_seconds"]
        self.guard.num_skipped = counters.get("skipped", 0)
        self.rebuilt_before, rebuilt = counters.get("rebuilt", (0, 0))
        if self.weights.version:  # only the learner died: its actors live on
            self.epoch = int(self.weights.front()["context"]["epoch"])
            if not self.turn_based and counters["epoch"] != self.epoch:  # saved by an earlier start
                self.rebuilt_before = rebuilt
            return
        self.epoch = counters["epoch"] if self.turn_based else self.generation + 1
        self.rebuilt_before = rebuilt
        self.weights.go_on_from(counters["version"])
        for ring, reader, sequence in zip(
            self.rings, self.readers, counters["sequences"], strict=True
        ):
            ring.start_at(sequence)
            reader.taken = sequence

    # -- the four things it does -----------------------------------------------------------------

    @property
    def env_steps(self) -> int:
        return self.store.limiter.inserted

    @property
    def updates(self) -> int:
        return self.algorithm.updates

    def done(self) -> bool:
        return self.stopped or self.env_steps >= self.total_env_steps

    def drain(self) -> int:
        """Take every committed unroll into the store; returns how many there were."""
        with self.shares.time("sync"):
            waiting = [reader.waiting() for reader in self.readers]
            for turn in range(max(waiting)):  # so that what was played first comes first
                for lane, reader in enumerate(self.readers):
                    if turn < waiting[lane]:
                        self._take(lane, *reader.take())
            for lane, reader in enumerate(self.readers):
                if waiting[lane]:
                    reader.release()
                    self.ring_actor(lane // self.actors.lanes_per_actor)
            self.store.expire(self.weights.version)  # the throttle sees the room this makes
        return sum(waiting)

    def _take(self, lane: int, unroll: Unroll, raw: np.ndarray) -> None:
        self.stream.append(raw)
        self.store.insert(lane, unroll)
        header = unroll.header
        self.generation = max(self.generation, int(header.generation))
        self.lags.add(self.weights.version - int(header.version))
        ended = np.nonzero(unroll.episode_length)
        if len(ended[0]) == 0:
            return
        rows, about = [], (f"{time.time():.3f}", self.env_steps, int(header.actor))
        for t, env in zip(*ended, strict=True):
            policy = int(unroll.policy[t, env])
            result = float(unroll.episode_return[t, env]), int(unroll.episode_length[t, env])
            self.episodes.add(policy, *result)
            rows.append((*about, self.policy_names[policy], *result))
        self.log.write_episodes(rows)

    def learn(self, most: int) -> int:
        """Up to `most` updates, as far as the rate limit allows, or until it is to stop; returns
        how many were made. If one does not fit into the GPU's memory what was learned is saved."""
        self.store.expire(self.weights.version)
        count, self.whole = 0, False
        while count < most and self.store.updates_allowed() and not self.beat():
            count += 1
            try:
                with self.shares.time("update"), self.threads:
                    self.metrics = self.guard.update(self.algorithm, self.store)
            except OutOfMemory:
                self.finish()
                raise
            due = self.updates - self.published_updates >= self.config.publish_period
            if due and not self.turn_based:
                self.publish()
                self.store.expire(self.weights.version)
        if self.store.limiter.filling and self.env_steps > 1.02 * self.published_at:
            self.publish()  # the clock of schedules, which runs before the first update too
        self.whole = not self.beat()
        return count

    def publish(self) -> None:
        """Give the current weights, and what schedules need, to whoever acts."""
        with self.shares.time("update"):  # what a GPU still has to do of them
            self.guard.settle()
        with self.shares.time("publish"):
            self.guard.check(weights := self.model.state_dict())
            back = self.weights.back()
            for name, array in to_host(weights).items():
                np.copyto(back["model"][name], array)
            back["context"]["env_steps"][...] = self.env_steps
            back["context"]["epoch"][...] = self.epoch
            self.episodes.write_lengths(back["context"]["recent_lengths"])
            self.weights.publish()
        self.published_updates, self.published_at = self.updates, self.env_steps

    # -- schedules -------------------------------------------------------------------------------

    def run_async(self, wait: Callable[[Callable[[], bool]], bool]) -> None:
        """Overlapped: updates go on while actors act. `wait` sleeps until a condition or a stop."""

        def something_to_do() -> bool:
            # After a second too: rows of metrics go on, and an actor may have been given up.
            late = time.monotonic() > looked + 1.0
            return late or any(reader.waiting() for reader in self.readers)

        while not self.done():
            looked = time.monotonic()
            self.drain()
            self.throttle.move()
            if self.learn(self.config.sync_period) == 0:
                with self.shares.time("wait"):
                    if not wait(something_to_do):
                        return
            elif not wait(lambda: True):
                return
            self._housekeep()

    def run_in_turns(self, play: Callable[[Callable[[], bool]], bool]) -> None:
        """Actors and learner take turns in a fixed order; `play` has every lane make one unroll.

        Nothing here depends on time, so equal seeds give equal weights, bit for bit, on a CPU.
        """

        def all_played() -> bool:
            return all(reader.waiting() for reader in self.readers)

        while not self.done():
            for actor in range(self.actors.num_actors):
                self.throttle.permit(actor)
            with self.shares.time("wait"):
                if not play(all_played):
                    return
            self.drain()
            learned = self.learn(self.store.updates_allowed())
            if not self.whole:
                return  # a resume falls back to the last checkpoint, and makes all of them
            if learned:
                self.publish()
            self._housekeep()

    def _housekeep(self) -> None:
        now = time.monotonic()
        if now - self.last_log >= self.config.log_seconds:
            self.write_metrics()
        if self.turn_based:
            due = self.env_steps - self.saved[0] >= self.config.checkpoint_steps
            if due and not self.done():
                # Environments cannot be saved, so they are made anew here in every run alike:
                # that is what makes a resumed run equal an uninterrupted one.
                self.epoch += 1
                self.save()
                self.publish()
            return
        late = now - self.last_checkpoint >= self.config.checkpoint_seconds
        if late and self.saved != (self.env_steps, self.updates):
            self.save()

    # -- what is kept ----------------------------------------------------------------------------

    def finish(self) -> None:
        """The last row of metrics and, where no turn must be kept, the last checkpoint."""
        if self.stopped:
            return
        if self.logged != (self.env_steps, self.updates):  # else a row that shows all rates as 0
            self.write_metrics()
        new = self.saved != (self.env_steps, self.updates)  # else a finished run was begun again
        if not self.turn_based or (self.done() and self.whole and new):
            self.epoch += self.turn_based  # a longer run will make its environments anew here
            self.save(final=True)
        self.stream.writer.close()

    def save(self, final: bool = False) -> None:
        """Write a checkpoint. A disk that refuses is reported, and training goes on; the last one
        raises CheckpointError instead."""
        begun = time.monotonic()
        with self.shares.time("checkpoint"):
            state = {
                "algorithm": self.algorithm.state_dict(),
                "store": self.store.state_dict(),
                **rng_state(self.config.resolved_device()),
            }
            self.guard.settle()
            self.guard.check(self.model.state_dict())
            tensors, numbers = flatten(state)
            counters = {
                "numbers": numbers,
                "env_steps": self.env_steps,
                "updates": self.updates,
                "epoch": self.epoch,
                "generation": self.generation,
                "version": self.weights.version,
                "skipped": self.guard.num_skipped,
                "rebuilt": (self.rebuilt_before, self.num_rebuilt()),
                "sequences": [reader.taken for reader in self.readers],
                "episodes": self.episodes.state_dict(),
                "elapsed_seconds": self.elapsed_seconds(),
                "logs": self.log.positions(),
            }
            try:
                segments = self.stream.flush(final)
                self.log.sync()
                path = self.checkpoints.save(self.env_steps, tensors, counters, segments)
                self.stream.forget()
            except CheckpointError as error:
                self.events.event("checkpoint", f"not saved: {error}", env_steps=self.env_steps)
                if final:
                    raise
            else:
                text = "; ".join([f"{path.name} saved", *self.checkpoints.leftovers])
                self.events.event(
                    "checkpoint", text, env_steps=self.env_steps,
                    updates=self.updates, seconds=f"{time.monotonic() - begun:.2f}",
                )  # fmt: skip
        self.last_checkpoint = time.monotonic()
        self.saved = self.env_steps, self.updates

    def num_rebuilt(self) -> int:
        return self.rebuilt_before + sum(int(ring.read(Word.REBUILDS)) for ring in self.rings)

    def elapsed_seconds(self) -> float:
        return self.elapsed_before + time.monotonic() - self.started

    def write_metrics(self) -> None:
        """One row: everything a person or a program needs to see how the run is doing."""
        limiter = self.store.limiter
        in_flight = [reader.waiting() for reader in self.readers]
        learner = self.shares.fractions_since_last()
        actor = self.actor_shares.fractions_since_last()
        row = {
            "time": time.time(),
            "elapsed_seconds": self.elapsed_seconds(),
            "env_steps": self.env_steps,
            "total_env_steps": self.total_env_steps,
            "updates": self.updates,
            "updates/skipped": self.guard.num_skipped,
            "envs/rebuilt": self.num_rebuilt(),
            "episodes": self.episodes.num_episodes,
            **self.episodes.summary(),
            "rate/env_steps": self.step_rate.per_second_since_last(self.env_steps),
            "rate/updates": self.update_rate.per_second_since_last(self.updates),
            "ring/fill": float(np.mean(in_flight)) / self.actors.slots_per_lane,
            **self.store.metrics(),
            "limiter/samples_per_insert": limiter.actual(),
            "limiter/target": limiter.samples_per_insert,
            "limiter/waiting": metrics.who_waits(learner.get("wait", 0.0), actor["wait"]),
            **{f"time/learner/{name}": share for name, share in learner.items()},
            **{f"time/actor/{name}": share for name, share in actor.items()},
            **{name: float(x() if callable(x) else x) for name, x in self.metrics.items()},
            **self.lags.summary(),
            **self.read_status(),
            "memory/rss_mb": self.process.memory_info().rss / 1e6,
        }
        row["bottleneck"] = metrics.bottleneck(row)
        with self.shares.time("log"):
            self.log.write(row)
        self.last_log, self.logged = time.monotonic(), (self.env_steps, self.updates)
