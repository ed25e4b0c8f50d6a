"""The ideal of a task, for benchmarks/throughput.py: its parts alone, perfectly overlapped.

    python benchmarks/peer_ideal.py RESULT_FILE LAUNCH_FILE [OPTION VALUE ...]

Env steps with random actions, evaluating the net and updates, each timed by itself in this process,
as a launch file and options of asyncrl shape them. Nothing is faster than updates one after the
other, nor than all cores busy with these three and nothing else. Updates are taken on all threads,
on half of them and so on down to one, whichever allows most.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from measure import like_a_run

from asyncrl.config import resolve
from asyncrl.costs import Cost, forecast, small_replay, time_actor, time_learner, wire
from asyncrl.limits import processor_share, usable_cores
from asyncrl.models.precision import computes_in_bfloat16, device_called
from asyncrl.threads import halves
from asyncrl.types import tree_map

SECONDS = 3.0  # of each measurement


def timed(play: Callable[[], object], env_steps: int) -> Cost:
    """What `play` costs, which makes so many env steps or what belongs to them."""
    for _ in range(10):
        play()
    wall, cpu, count = time.perf_counter(), time.process_time(), 0
    while count < 10 or time.perf_counter() - wall < SECONDS:
        play()
        count += 1
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Cost(wall / count / env_steps, cpu / count / env_steps)


def time_envs(config) -> Cost:
    """One group of environments, without anything of asyncrl."""
    B, env = config.actor.envs_per_lane, config.env
    how, kwargs = "sync", env.kwargs | env.atari
    if env.is_ale:
        threads = env.num_threads or min(B, usable_cores())
        how, kwargs = "vector_entry_point", kwargs | {"num_threads": threads}
    envs = gym.make_vec(env.id, B, how, **kwargs)
    envs.reset(seed=config.seed)
    action = np.random.default_rng(0).integers(envs.single_action_space.n, size=(1000, B))
    turn = iter(range(10**12))
    cost = timed(lambda: envs.step(action[next(turn) % len(action)]), B)
    envs.close()
    return cost


def time_inference(config, unroll: bytearray) -> Cost:
    """The net on what one group of environments shows."""
    spec, model = wire(config)
    device, B = device_called(config.actor.device), config.actor.envs_per_lane
    model.to(device)
    views = spec.layout.views(unroll)
    state = tree_map(lambda part: part.to(device), model.initial_state(B))
    obs = tree_map(lambda part: torch.from_numpy(part[:1].copy()).to(device), views.obs)
    first = torch.zeros((1, B), dtype=torch.bool, device=device)
    bfloat16 = computes_in_bfloat16(config.actor.precision, device, model)
    torch.set_num_threads(config.actor.num_threads)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        return timed(lambda: [out.cpu() for out in model(obs, first, state)[0].values()], B)


def main() -> None:
    like_a_run()
    path, launch, *options = sys.argv[1:]
    torch.set_flush_denormal(True)
    config, cores = small_replay(resolve(Path(launch), options)), usable_cores()
    _, unrolls = time_actor(config)
    stepping, inference = time_envs(config), time_inference(config, unrolls[0])
    acting = Cost(stepping.wall + inference.wall, stepping.cpu + inference.cpu)
    found = []
    for threads in halves(cores):
        learning = time_learner(config, unrolls, threads, publishes=False)
        found.append((forecast(cores, acting, learning, processor_share()), learning))
    (rate, bottleneck), learning = max(found, key=lambda pair: pair[0].rate)
    parts = {"stepping": stepping, "the net": inference, "learning": learning}
    times = ", ".join(f"{name} {1e3 * cost.cpu:.3g}" for name, cost in parts.items())
    row = {"env steps/s": rate, "limit": f"ms of CPU an env step: {times}; slowest: {bottleneck}"}
    Path(path).write_text(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
