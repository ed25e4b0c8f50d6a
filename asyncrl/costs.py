"""What acting and learning cost, timed alone, and what they come to together.

An actor plays unrolls; a learner takes them in and makes the updates they allow. For any number of
actors and threads the slowest decides, or all processors are busy. `asyncrl bench` tells it,
`--actor.num-actors auto` uses it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping
from typing import NamedTuple

import psutil

from asyncrl.limits import processor_share, usable_cores

PLAY_SECONDS, LEARN_SECONDS = 3.0, 4.0  # of each measurement
WORTH_IT = 1.03  # times the rate, before another process or thread is asked for


class Cost(NamedTuple):
    """Seconds an env step, of one part alone."""

    wall: float
    cpu: float  # of all its threads
    parts: Mapping[str, float] = {}  # shares of the time, by what it went to
    gpu: float = 0.0  # while it used one or waited for it: processes take turns on it


class Forecast(NamedTuple):
    """Env steps a second, and what keeps them from being more."""

    rate: float
    bottleneck: str


def forecast(
    num_actors: int, acting: Cost, learning: Cost, cores: float, schedule: str = "async"
) -> Forecast:
    """What so many actors and a learner come to together, `acting` being that of one actor.

    Overlapped, the slowest of them decides, or the processors or the GPU that all of them share; in
    turns their times add up, in one process those of the actors too.
    """
    if schedule != "async":
        together = max(acting.wall / num_actors, acting.cpu / cores, acting.gpu)
        together = acting.wall if schedule == "serial" else together
        return Forecast(1 / (together + learning.wall), "turns: acting and learning add up")
    seconds = {
        "the actors": acting.wall / num_actors,
        "the learner": learning.wall,
        "the processors, which are all busy": (acting.cpu + learning.cpu) / cores,
        "the GPU, for which all wait": acting.gpu + learning.gpu,
    }
    slowest = max(seconds, key=seconds.__getitem__)
    return Forecast(1 / seconds[slowest], slowest)


def best_num_actors(config) -> int:
    """What `--actor.num-actors auto` stands for: as few as keep up, lanes being as configured."""
    lanes, envs = config.actor.lanes_per_actor, config.actor.envs_per_lane
    small, most = small_replay(config), usable_cores()
    one = reshaped(small, 1, lanes, envs)
    acting, unrolls = time_actor(one)
    threads = threads_of_learner(config, wire(one)[1])
    few = many = time_learner(one, unrolls, threads)
    rollout = getattr(config.algorithm, "rollout", None)
    if most > 1 and rollout is not None and not rollout.num_unrolls:  # it grows with the lanes
        many = time_learner(reshaped(small, most, lanes, envs), unrolls, threads)

    def rate(actors: int) -> float:
        share = (1 - 1 / actors) / (1 - 1 / most) if most > 1 else 0  # overhead falls as 1 / n
        wall, cpu = (a + share * (b - a) for a, b in zip(few[:2], many[:2], strict=True))
        learning = Cost(wall, cpu, gpu=wall if few.gpu else 0.0)
        return forecast(actors, acting, learning, processor_share(), config.schedule).rate

    rates = [rate(actors) for actors in range(1, most + 1)]
    return next(n for n, rate in enumerate(rates, 1) if rate * WORTH_IT >= max(rates))


def threads_of_learner(config, model) -> int:
    """How many a run begins with; in turns one, unless it is told otherwise."""
    if config.schedule == "async":
        return config.learner.resolved_threads(model)
    return 1 if config.schedule == "serial" else config.learner.num_threads or 1


def reshaped(config, num_actors: int, lanes: int, envs: int):
    """`config` with its environments shared out like that."""
    actor = dataclasses.replace(
        config.actor, num_actors=num_actors, lanes_per_actor=lanes, envs_per_lane=envs
    )
    return dataclasses.replace(config, actor=actor)


def brief(config):
    """`config` with unrolls of 16 steps or less: as fast, and sooner measured."""
    length = config.actor.unroll_length
    if length <= 16 or getattr(config.algorithm, "num_states", 1) > 1:
        return config
    return dataclasses.replace(config, actor=dataclasses.replace(config.actor, unroll_length=16))


def small_replay(config):
    """`config` with a replay of some 100,000 env steps: as fast, and no matter of memory."""
    replay = getattr(config.algorithm, "replay", None)
    if replay is None:
        return config
    capacity = min(replay.capacity, max(100_000, 2 * replay.learning_starts))
    replay = dataclasses.replace(replay, capacity=capacity)
    algorithm = dataclasses.replace(config.algorithm, replay=replay)
    return dataclasses.replace(config, algorithm=algorithm)


# -- measuring -----------------------------------------------------------------------------------


class Clock(NamedTuple):
    """Seconds by the clock, and of processors."""

    wall: float
    cpu: float

    def since(self, other: Clock) -> Clock:
        return Clock(self.wall - other.wall, self.cpu - other.cpu)

    def plus(self, other: Clock) -> Clock:
        return Clock(self.wall + other.wall, self.cpu + other.cpu)

    def over(self, number: float) -> Clock:
        return Clock(self.wall / number, self.cpu / number)


def clock() -> Clock:
    return Clock(time.perf_counter(), time.process_time())


def cpu_of_children() -> float:
    """Processor seconds of all processes that this one has started, of environments perhaps."""
    seconds = 0.0
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            seconds += sum(child.cpu_times()[:2])
    return seconds


def time_actor(config) -> tuple[Cost, list[bytearray]]:
    """What one actor costs alone, and a few unrolls that it has made, in turn of its lanes."""
    import torch

    from asyncrl.actor import Actor, context_fields
    from asyncrl.envs import make_envs
    from asyncrl.policies import as_mixture
    from asyncrl.transport.ring import Ring, UnrollReader, Word
    from asyncrl.transport.weights import (
        WeightsBuffer,
        WeightsReader,
        WeightsWriter,
        weights_fields,
    )

    actor, (spec, model) = config.actor, wire(config)
    rings = [Ring(bytearray(Ring.nbytes(spec, 2)), spec, 2) for _ in range(actor.lanes_per_actor)]
    readers, mixture = [UnrollReader(ring) for ring in rings], as_mixture(config.policy)
    fields = weights_fields(model.state_dict(), context_fields(len(mixture.names)))
    weights = WeightsBuffer(bytearray(WeightsBuffer.nbytes(fields)), fields)
    writer = WeightsWriter(weights)
    for name, tensor in model.state_dict().items():
        writer.back()["model"][name][...] = tensor.cpu().numpy()
    writer.publish()
    player = Actor(
        0, actor, dict(enumerate(rings)), WeightsReader(weights), model, mixture,
        lambda: make_envs(config.env, actor.envs_per_lane), config.seed,
    )  # fmt: skip
    unrolls: list[bytearray] = []

    def play() -> None:
        for reader in readers:
            reader.permit(reader.taken + 1)
        player.play()
        for reader in readers:
            _, raw = reader.take()
            if len(unrolls) < 8 * len(readers):
                unrolls.append(bytearray(raw))
            reader.release()

    torch.set_num_threads(actor.num_threads)
    words = {
        "env": Word.TIME_ENV, "inference": Word.TIME_INFERENCE, "writing": Word.TIME_WRITE,
        "weights": Word.TIME_PULL,
    }  # fmt: skip
    play()  # makes the environments
    before = {name: int(rings[0].read(word)) for name, word in words.items()}
    others, begun, count = cpu_of_children(), clock(), 0
    while count < 2 or clock().wall - begun.wall < PLAY_SECONDS:
        play()
        count += 1
    wall, cpu = clock().since(begun)
    cpu += cpu_of_children() - others
    env_steps = count * len(rings) * spec.unroll_length * spec.num_envs
    parts = {name: (int(rings[0].read(word)) - before[name]) / 1e9 / wall
             for name, word in words.items()}  # fmt: skip
    gpu = 0.0 if player.device.type == "cpu" else parts["inference"] * wall / env_steps
    cost = Cost(wall / env_steps, cpu / env_steps, parts, gpu)
    player.close()
    return cost, unrolls


def time_learner(
    config, unrolls: list[bytearray], num_threads: int, publishes: bool = True
) -> Cost:
    """What the learner costs alone: taking unrolls in, the updates they allow, and weights that
    leave it for main memory as often as it publishes them."""
    import torch

    from asyncrl.transfer import to_host

    spec, model = wire(config)
    device = config.learner.resolved_device()
    torch.backends.cudnn.benchmark = device.type == "cuda" and config.schedule == "async"
    algorithm = config.learner.build(config.algorithm, model)
    num_lanes = config.actor.num_lanes
    store = algorithm.store(spec, num_lanes, config.seed)
    algorithm.teams.use(num_threads)
    rounds = 0

    def insert_round() -> None:
        """An unroll of every lane, with numbers that join on."""
        nonlocal rounds
        for lane in range(num_lanes):
            unroll = spec.layout.views(unrolls[(rounds * num_lanes + lane) % len(unrolls)])
            unroll.header.lane[...], unroll.header.sequence[...] = lane, rounds
            store.insert(lane, unroll)
        rounds += 1

    def learn(seconds: float) -> tuple[Clock, Clock]:
        """Time of a round of inserts and time of an update, which take turns."""
        begun, before, count, taking = clock(), rounds, 0, Clock(0.0, 0.0)
        published = algorithm.updates
        while count < 2 or clock().wall - begun.wall < seconds:
            at = clock()
            while not store.updates_allowed() or rounds == before:
                insert_round()
            taking = taking.plus(clock().since(at))
            algorithm.update(store)
            count += 1
            if publishes and algorithm.updates - published >= config.learner.publish_period:
                published = algorithm.updates
                for weights in to_host(model.state_dict()).values():
                    weights.copy()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        updating = clock().since(begun).since(taking)
        return taking.over(rounds - before), updating.over(count)

    while rounds < 4:
        insert_round()
    if hasattr(store.limiter, "starts_at"):  # what a replay waits for before it learns
        store.limiter.starts_at = float(store.limiter.inserted)
    learn(0.2 * LEARN_SECONDS)  # what is touched, chosen and compiled at a first time
    taking, updating = learn(LEARN_SECONDS)
    per_round = store.limiter.inserted / rounds  # env steps
    if hasattr(store, "num_unrolls"):
        per_update = store.num_unrolls * per_round / num_lanes
    else:
        per_update = store.limiter.batch_size / store.limiter.samples_per_insert
    taking, updating = taking.over(per_round), updating.over(per_update)
    wall, cpu = taking.plus(updating)
    parts = {"sync": taking.wall / wall, "update": updating.wall / wall}
    return Cost(wall, cpu, parts, 0.0 if device.type == "cpu" else wall)


def wire(config):
    """(spec, model) of a configuration, as a run makes them."""
    from asyncrl.envs import make_envs
    from asyncrl.models.contract import state_fields

    envs = make_envs(config.env, 1)
    spaces = envs.observation_space, envs.action_space
    envs.close()
    model = config.model(*spaces)
    state = state_fields(model, config.algorithm.head, *spaces)
    return config.spec(*spaces, state), model
