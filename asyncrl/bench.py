"""`asyncrl bench`: how fast a launch file will be on a machine, and how to share the machine out.

The parts are timed alone: an actor that plays unrolls, and the learner that takes them in and makes
the updates they allow. How fast they are together follows from that, for any number of actors and
threads: whoever is slowest decides, or all processors are busy. What the algorithm sees stays as it
is: the number of environments in all, and the length of unrolls.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from asyncrl.children import CHILD_ENVIRONMENT
from asyncrl.limits import usable_cores
from asyncrl.plan import EXIT_REFUSED

PLAY_SECONDS, LEARN_SECONDS = 3.0, 4.0  # of each measurement
WORTH_IT = 1.03  # times the rate, before another process or thread is asked for


class Cost(NamedTuple):
    """Seconds an env step, of one part alone."""

    wall: float
    cpu: float  # of all its threads


@dataclass(frozen=True)
class Shape:
    """How a run's environments and processors are shared out."""

    num_actors: int
    lanes_per_actor: int
    envs_per_lane: int
    num_threads: int  # of the learner

    def __str__(self) -> str:
        groups = f"{_count(self.lanes_per_actor, 'group')} of {_count(self.envs_per_lane, 'env')}"
        threads = _count(self.num_threads, "thread")
        return f"{_count(self.num_actors, 'actor')} with {groups}, {threads} for learning"

    @property
    def options(self) -> str:
        return (
            f"--actor.num-actors {self.num_actors} --actor.lanes-per-actor {self.lanes_per_actor} "
            f"--actor.envs-per-lane {self.envs_per_lane} --learner.num-threads {self.num_threads}"
        )


class Forecast(NamedTuple):
    """Env steps a second, and what keeps them from being more."""

    rate: float
    bottleneck: str


def forecast(
    num_actors: int, acting: Cost, learning: Cost, cores: float, overlap: bool = True
) -> Forecast:
    """What so many actors and a learner come to together, `acting` being that of one actor.

    Overlapped, the slowest of them decides, or the processors that all of them share; in turns
    their times add up.
    """
    together = max(acting.wall / num_actors, acting.cpu / cores)
    if not overlap:
        return Forecast(1 / (together + learning.wall), "turns: acting and learning add up")
    seconds = {
        "the actors": acting.wall / num_actors,
        "the learner": learning.wall,
        "the processors, which are all busy": (acting.cpu + learning.cpu) / cores,
    }
    slowest = max(seconds, key=seconds.__getitem__)
    return Forecast(1 / seconds[slowest], slowest)


def choose(forecasts: dict[Shape, Forecast], as_it_is: Shape) -> Shape:
    """The fastest; for a gain of 3 % or less what it is now, or fewer processes and threads."""
    best = max(found.rate for found in forecasts.values())
    near = [shape for shape, found in forecasts.items() if found.rate * WORTH_IT >= best]

    def effort(shape: Shape) -> tuple:
        return shape.num_actors + shape.num_threads, -forecasts[shape].rate

    return as_it_is if as_it_is in near else min(near, key=effort)


# -- measuring -----------------------------------------------------------------------------------


def time_actor(config) -> tuple[Cost, list[bytearray]]:
    """What one actor costs alone, and a few unrolls that it has made, in turn of its lanes."""
    import torch

    from asyncrl.actor import Actor, context_fields
    from asyncrl.envs import make_envs
    from asyncrl.policies import as_mixture
    from asyncrl.transport.ring import Ring, UnrollReader
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
    play()  # makes the environments
    begun, cpu, count = time.perf_counter(), time.process_time(), 0
    while count < 2 or time.perf_counter() - begun < PLAY_SECONDS:
        play()
        count += 1
    env_steps = count * len(rings) * spec.unroll_length * spec.num_envs
    cost = Cost(
        (time.perf_counter() - begun) / env_steps, (time.process_time() - cpu) / env_steps
    )
    player.close()
    return cost, unrolls


def time_learner(config, unrolls: list[bytearray], num_threads: int) -> Cost:
    """What the learner costs alone: taking unrolls in, and the updates they allow."""
    import torch

    spec, model = wire(config)
    algorithm = config.algorithm.build(model, config.learner.resolved_device())
    num_lanes = config.actor.num_lanes
    store = algorithm.store(spec, num_lanes, config.seed)
    torch.set_num_threads(num_threads)
    rounds, spent = 0, [0.0, 0.0]

    def insert_round() -> None:
        """An unroll of every lane, with numbers that join on."""
        nonlocal rounds
        for lane in range(num_lanes):
            unroll = spec.layout.views(unrolls[(rounds * num_lanes + lane) % len(unrolls)])
            unroll.header.lane[...], unroll.header.sequence[...] = lane, rounds
            store.insert(lane, unroll)
        rounds += 1

    def clock() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    while rounds < 4:
        insert_round()
    if hasattr(store.limiter, "starts_at"):  # what a replay waits for before it learns
        store.limiter.starts_at = float(store.limiter.inserted)
    begun, allowed, inserted = clock(), store.updates_allowed(), store.limiter.inserted
    while store.updates_allowed() < allowed + 2:
        insert_round()
    spent = [after - before for before, after in zip(begun, clock(), strict=True)]
    inserted = store.limiter.inserted - inserted
    per_update = inserted / (store.updates_allowed() - allowed)
    algorithm.update(store)
    begun, count = clock(), 0
    while not count or (store.updates_allowed() and clock()[0] - begun[0] < LEARN_SECONDS):
        algorithm.update(store)
        count += 1
    _synchronise(config)
    updating = [after - before for before, after in zip(begun, clock(), strict=True)]
    wall, cpu = (
        taking / inserted + update / count / per_update
        for taking, update in zip(spent, updating, strict=True)
    )
    return Cost(wall, cpu)


def _synchronise(config) -> None:
    import torch

    if config.learner.resolved_device().type == "cuda":
        torch.cuda.synchronize()


def wire(config):
    """(spec, model) of a configuration, as a run makes them."""
    from asyncrl.envs import make_envs
    from asyncrl.models.contract import state_fields
    from asyncrl.types import Spec

    envs = make_envs(config.env, 1)
    spaces = envs.observation_space, envs.action_space
    envs.close()
    model = config.model(*spaces)
    state = state_fields(model, config.algorithm.head, *spaces)
    num_states = getattr(config.algorithm, "num_states", 1)
    actor = config.actor
    return Spec(actor.unroll_length, actor.envs_per_lane, *spaces, state, num_states), model


# -- choosing ------------------------------------------------------------------------------------


def reshaped(config, num_actors: int, lanes: int, envs: int):
    """`config` with its environments shared out like that."""
    actor = dataclasses.replace(
        config.actor, num_actors=num_actors, lanes_per_actor=lanes, envs_per_lane=envs
    )
    return dataclasses.replace(config, actor=actor)


def divisions(config, cores: int) -> Iterable[tuple[int, int, int]]:
    """(actors, groups, envs) that come to as many environments as the configuration has."""
    actor = config.actor
    total = actor.num_lanes * actor.envs_per_lane
    own = (actor.num_actors, actor.lanes_per_actor, actor.envs_per_lane)
    found = {own}
    fixed = getattr(getattr(config.algorithm, "rollout", None), "num_unrolls", 0)
    num_actors = {1, 2, 4, 8, 16, 32, actor.num_actors}
    for actors in sorted(n for n in num_actors if n <= max(1, cores)):
        for lanes in {1, 2, actor.lanes_per_actor}:
            envs, rest = divmod(total, actors * lanes)
            if rest == 0 and (not fixed or envs == actor.envs_per_lane):
                found.add((actors, lanes, envs))
    return sorted(found)


def small_replay(config):
    """`config` with a replay of some 100,000 env steps: as fast, and no matter of memory."""
    replay = getattr(config.algorithm, "replay", None)
    if replay is None:
        return config
    capacity = min(replay.capacity, max(100_000, 2 * replay.learning_starts))
    replay = dataclasses.replace(replay, capacity=capacity)
    algorithm = dataclasses.replace(config.algorithm, replay=replay)
    return dataclasses.replace(config, algorithm=algorithm)


def best_num_actors(config) -> int:
    """What `--actor.num-actors auto` stands for: as few as keep up, lanes being as configured."""
    cores = usable_cores()
    lanes, envs = config.actor.lanes_per_actor, config.actor.envs_per_lane
    one = small_replay(reshaped(config, 1, lanes, envs))
    acting, unrolls = time_actor(one)
    threads = config.learner.num_threads or cores
    learning = time_learner(one, unrolls, threads)
    overlap = config.schedule == "async"
    rates = [forecast(n, acting, learning, cores, overlap).rate for n in range(1, cores + 1)]
    return next(n for n, rate in enumerate(rates, 1) if rate * WORTH_IT >= max(rates))


def bench(launch_file: Path, options: list[str]) -> None:
    """Measure, and say what to expect and how to share this machine out."""
    import torch

    from asyncrl.config import resolve
    from asyncrl.plan import prepare
    from asyncrl.run import threads_for

    plan = prepare(launch_file, options, launch_file)  # refuses what cannot work
    config, cores = small_replay(resolve(launch_file, options)), usable_cores()
    own = dataclasses.replace(config.actor, num_actors=plan.num_actors)
    config = dataclasses.replace(config, actor=own)
    device, overlap = config.learner.resolved_device(), config.schedule == "async"
    torch.set_flush_denormal(True)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{launch_file.name} on {cores} cores, {gpu}\n", flush=True)
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"note: others keep {load:.1f} cores busy; what follows is too slow by that\n")

    print(f"{'one actor alone':<40}{'env steps/s':>12}{'cores busy':>12}")
    acting: dict[tuple[int, int], Cost] = {}
    for _, lanes, envs in divisions(config, cores):
        if (lanes, envs) not in acting:
            cost, made = time_actor(reshaped(config, 1, lanes, envs))
            acting[lanes, envs] = cost
            _line(f"{_count(lanes, 'group')} of {_count(envs, 'env')}, on {own.device}", cost)
        if (lanes, envs) == (own.lanes_per_actor, own.envs_per_lane):
            unrolls = made
    print(f"{'learner alone':<40}{'env steps/s':>12}{'cores busy':>12}")
    learning: dict[int, Cost] = {}
    own_threads = config.learner.num_threads or threads_for(wire(config)[1])
    for threads in sorted({1, own_threads, cores if device.type == "cpu" else 1}):
        learning[threads] = time_learner(config, unrolls, threads)
        _line(f"{_count(threads, 'thread')}, on {device}", learning[threads])

    forecasts = {
        Shape(actors, lanes, envs, threads): forecast(
            actors, acting[lanes, envs], learning[threads], cores, overlap
        )
        for actors, lanes, envs in divisions(config, cores)
        for threads in learning
    }
    as_it_is = Shape(own.num_actors, own.lanes_per_actor, own.envs_per_lane, own_threads)
    best = choose(forecasts, as_it_is)
    print()
    for what, shape in (("as it is", as_it_is), ("best here", best)):
        rate, bottleneck = forecasts[shape]
        print(f"{what:<10}about {rate:,.0f} env steps/s: {shape}; what limits it: {bottleneck}")
    if best != as_it_is:
        print(f"{'options':<10}{best.options}")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _line(what: str, cost: Cost) -> None:
    print(f"  {what:<38}{1 / cost.wall:>12,.0f}{cost.cpu / cost.wall:>12.1f}", flush=True)


def main(launch_file: Path, options: list[str]) -> int:
    """In a process with the environment of a run's; exit status 0 or 2."""
    if any(name not in os.environ for name in CHILD_ENVIRONMENT):  # read before Python starts
        command = [sys.executable, "-m", "asyncrl.bench", str(launch_file), *options]
        os.execve(sys.executable, command, CHILD_ENVIRONMENT | os.environ)
    from asyncrl.config import ConfigError

    try:
        bench(launch_file, options)
    except (ConfigError, ValueError) as error:
        print(f"asyncrl: {error}", file=sys.stderr)
        return EXIT_REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
