"""`asyncrl bench`: how fast a launch file will be on a machine, and how to share the machine out.

What the algorithm sees stays as it is: the number of environments in all, the length of unrolls.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from asyncrl.children import CHILD_ENVIRONMENT
from asyncrl.costs import (
    WORTH_IT,
    Cost,
    Forecast,
    brief,
    forecast,
    reshaped,
    small_replay,
    threads_of_learner,
    time_actor,
    time_learner,
    wire,
)
from asyncrl.foreign import leave
from asyncrl.limits import processor_share, usable_cores
from asyncrl.metrics import counted, percent
from asyncrl.plan import in_words, prepare
from asyncrl.program import program
from asyncrl.threads import halves

TRIAL_SECONDS = 50.0  # for other ways to share out the environments


@dataclass(frozen=True)
class Shape:
    """How a run's environments and processors are shared out."""

    num_actors: int
    lanes_per_actor: int
    envs_per_lane: int
    num_threads: int  # of the learner
    actor_device: str = "cpu"
    learner_device: str = "cpu"

    def __str__(self) -> str:
        groups = f"{counted(self.lanes_per_actor, 'group')} of {counted(self.envs_per_lane, 'env')}"
        actors = f"{counted(self.num_actors, 'actor')} with {groups} on {self.actor_device}"
        threads = counted(self.num_threads, "thread")
        return f"{actors}, {threads} for learning on {self.learner_device}"

    def options(self, own: Shape) -> str:
        """What to add to the command where it is not as in `own`; a number of threads that is not
        asked for is tried anew as a run goes on."""
        pairs = {
            "actor.num-actors": (self.num_actors, own.num_actors),
            "actor.lanes-per-actor": (self.lanes_per_actor, own.lanes_per_actor),
            "actor.envs-per-lane": (self.envs_per_lane, own.envs_per_lane),
            "learner.num-threads": (self.num_threads, own.num_threads),
            "actor.device": (self.actor_device, own.actor_device),
            "learner.device": (self.learner_device, own.learner_device),
        }
        return " ".join(f"--{name} {new}" for name, (new, old) in pairs.items() if new != old)


def choose(forecasts: dict[Shape, Forecast], as_it_is: Shape) -> Shape:
    """The fastest; for a gain of 3 % or less what it is now, or fewer processes and threads."""
    best = max(found.rate for found in forecasts.values())
    near = [shape for shape, found in forecasts.items() if found.rate * WORTH_IT >= best]

    def effort(shape: Shape) -> tuple:
        return shape.num_actors + shape.num_threads, -forecasts[shape].rate

    return as_it_is if as_it_is in near else min(near, key=effort)


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


def bench(launch_file: Path, options: list[str]) -> None:
    """Measure, and say what to expect and how to share this machine out."""
    import torch

    from asyncrl.config import resolve
    from asyncrl.models.precision import device_called, is_large

    load = os.getloadavg()[0]
    plan = prepare(launch_file, options, launch_file)  # refuses what cannot work
    config, cores = small_replay(resolve(launch_file, options)), usable_cores()
    own = dataclasses.replace(config.actor, num_actors=plan.num_actors)
    own = dataclasses.replace(own, device=str(device_called(own.device)))
    config = dataclasses.replace(config, actor=own)
    torch.set_flush_denormal(True)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{launch_file.name} on {cores} cores, {gpu}\n", flush=True)
    if load + cores > os.cpu_count() + 0.5:
        print(f"note: {load:.1f} cores were busy before; what follows may be too slow by that\n")

    print(f"{'one actor alone':<40}{'env steps/s':>12}{'cores busy':>12}")
    acting: dict[tuple[int, int, str], Cost] = {}

    def play(config, *way: int | str) -> list[bytearray]:
        lanes, envs, device = way
        shaped = reshaped(config, 1, lanes, envs)
        shaped = dataclasses.replace(shaped, actor=dataclasses.replace(shaped.actor, device=device))
        acting[way], unrolls = time_actor(shaped)
        _line(f"{counted(lanes, 'group')} of {counted(envs, 'env')}, on {device}", acting[way])
        return unrolls

    begun, left_out = time.monotonic(), set()
    unrolls = play(config, own.lanes_per_actor, own.envs_per_lane, own.device)
    shared_out = list(divisions(config, cores))
    for device in devices(own.device):
        for way in dict.fromkeys((lanes, envs, device) for _, lanes, envs in shared_out):
            if way not in acting and time.monotonic() - begun > TRIAL_SECONDS:
                left_out.add(way)
            elif way not in acting:
                play(brief(config), *way)
    if left_out:
        print(f"  {len(left_out)} more are left out, for time")
    print(f"{'learner alone':<40}{'env steps/s':>12}{'cores busy':>12}")
    learning: dict[tuple[int, str], Cost] = {}
    model = wire(config)[1]
    own_learner = threads_of_learner(config, model), str(config.learner.resolved_device())
    for device in devices(own_learner[1])[: 1 if is_large(model) else 2]:  # a GPU's work is known
        more = halves(cores) if device == "cpu" and config.schedule != "serial" else [1]
        for threads in sorted({1, own_learner[0], *more}):
            learner = dataclasses.replace(config.learner, device=device)
            there = dataclasses.replace(config, learner=learner)
            learning[threads, device] = time_learner(there, unrolls, threads)
            _line(f"{counted(threads, 'thread')}, on {device}", learning[threads, device])

    forecasts = {
        Shape(actors, lanes, envs, threads, acts, learns): forecast(
            actors, acting[lanes, envs, acts], cost, processor_share(), config.schedule
        )
        for actors, lanes, envs in shared_out
        for acts in devices(own.device)
        if (lanes, envs, acts) in acting
        for (threads, learns), cost in learning.items()
    }
    threads, device = own_learner
    as_it_is = Shape(
        own.num_actors, own.lanes_per_actor, own.envs_per_lane, threads, own.device, device
    )
    best = choose(forecasts, as_it_is)
    print()
    for what, shape in (("as it is", as_it_is), ("best here", best)):
        rate, bottleneck = forecasts[shape]
        print(f"{what:<10}about {rate:,.0f} env steps/s: {shape}; what limits it: {bottleneck}")
    if best != as_it_is:
        print(f"{'options':<10}{best.options(as_it_is)}")


def devices(own: str) -> list[str]:
    """Where it could be computed: first the device that is configured."""
    import torch

    other = "cpu" if own != "cpu" else "cuda"
    return [own, other] if torch.cuda.is_available() else [own]


def _line(what: str, cost: Cost) -> None:
    parts = ", ".join(f"{name} {percent(share)}" for name, share in cost.parts.items())
    rate, busy = 1 / cost.wall, cost.cpu / cost.wall
    print(f"  {what:<38}{rate:>12,.0f}{busy:>12.1f}  {parts}", flush=True)


def main(launch_file: Path, options: list[str]) -> int:
    """In a process with the environment of a run's; exit status 0 or 2."""
    if any(name not in os.environ for name in CHILD_ENVIRONMENT):  # read before Python starts
        command = program("asyncrl.bench", str(launch_file), *options)
        os.execve(sys.executable, command, CHILD_ENVIRONMENT | os.environ)
    return in_words(launch_file, lambda: bench(launch_file, options))


if __name__ == "__main__":
    leave(main(Path(sys.argv[1]), sys.argv[2:]))
