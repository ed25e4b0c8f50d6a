"""What an actor costs: a random policy on Breakout against ALE's vector env alone.

    python benchmarks/actor.py

The actor is the real one, in a process of its own, on a real ring that this process drains and
releases; no learner, and the throttle never binds. A random policy needs no net: it is measured so,
and with the launch file's net evaluated at each step, as policies that look at it have it. Alone,
ALE's environments, as many and with as many threads, get random actions by send and recv, as one
group and as the groups of an actor; the one with the greater median counts. All take short turns,
another one first in each repeat, and sleep while another is measured. Counted are rows: the step
that resets a game counts on both sides.
"""

from __future__ import annotations

import multiprocessing
import sys
import time

import gymnasium as gym
import numpy as np
import psutil
import torch
from measure import REPOSITORY, Report, arguments, like_a_run

from asyncrl.actor import Actor, context_fields
from asyncrl.config import resolve
from asyncrl.costs import wire
from asyncrl.envs import make_envs
from asyncrl.policies import Random, as_mixture
from asyncrl.transport.ring import Ring, UnrollReader, Word
from asyncrl.transport.shared_memory import Doorbell, Segment
from asyncrl.transport.weights import WeightsBuffer, WeightsReader, WeightsWriter, weights_fields

SHARES = {"env": Word.TIME_ENV, "net and policy": Word.TIME_INFERENCE, "writing": Word.TIME_WRITE,
          "waiting": Word.TIME_WAIT}  # fmt: skip
CPU = "CPU us / env step"  # of all threads; unlike the rate, untouched by what else is running
PROCESSES = multiprocessing.get_context("fork")


class Seeing(Random):
    """Random play by an actor that takes it for a policy which looks at what the net says."""

    blind = False


class ActorProcess:
    """An actor with its lanes; this process is the one that drains them."""

    def __init__(self, config, spec, model, policy: Random):
        actor = config.actor
        nbytes, slots = Ring.nbytes(spec, actor.slots_per_lane), actor.slots_per_lane
        segments = [Segment.create("lane", nbytes) for _ in range(actor.lanes_per_actor)]
        self.rings = [Ring(segment.buffer, spec, slots) for segment in segments]
        self.readers = [UnrollReader(ring) for ring in self.rings]
        fields = weights_fields(model.state_dict(), context_fields(1))
        segment = Segment.create("weights", WeightsBuffer.nbytes(fields))
        self.weights, self.model = WeightsBuffer(segment.buffer, fields), model
        self.config, self.policy = config, policy
        self.rows_per_unroll = spec.unroll_length * spec.num_envs
        self.bell, self.actor_bell = Doorbell.create(), Doorbell.create()
        child = PROCESSES.Process(target=self._act, daemon=True)
        child.start()
        self.process, writer = psutil.Process(child.pid), WeightsWriter(self.weights)
        for name, tensor in model.state_dict().items():
            np.copyto(writer.back()["model"][name], tensor.numpy())
        writer.publish()

    def _act(self) -> None:
        config = self.config
        torch.set_num_threads(config.actor.num_threads)
        actor = Actor(
            0, config.actor, dict(enumerate(self.rings)), WeightsReader(self.weights), self.model,
            as_mixture(self.policy), lambda: make_envs(config.env, config.actor.envs_per_lane),
            config.seed,
        )  # fmt: skip
        while self.actor_bell.wait_for(actor.may_begin, actor.idle):
            actor.play()
            self.bell.ring()

    def heads(self) -> int:
        return sum(ring.read(Word.HEAD) for ring in self.rings)

    def measure(self, seconds: float) -> dict[str, float]:
        """Rows a second and where the actor's time goes; then the actor sleeps again."""
        words = self.rings[0].words
        self._drain(permit=True)
        self._await_unrolls()  # the first ones wake it up
        rows, times = self.heads(), {name: int(words[word]) for name, word in SHARES.items()}
        begun, cpu = time.monotonic(), self.process.cpu_times()
        last = begun
        while last - begun < seconds:
            self._drain(permit=True)
            self._await_unrolls()
            last, made = time.monotonic(), self.heads() - rows
        made, now = made * self.rows_per_unroll, self.process.cpu_times()
        used = now.user + now.system - cpu.user - cpu.system
        result = {"env steps/s": made / (last - begun), CPU: 1e6 * used / made}
        for name, word in SHARES.items():
            result[f"{name}, %"] = (int(words[word]) - times[name]) / 1e7 / (last - begun)
        while self.heads() < sum(reader.permitted for reader in self.readers):
            self._drain(permit=False)
            self.bell.wait(1)
        self._drain(permit=False)
        return result

    def _await_unrolls(self) -> None:
        if not self.bell.wait(60):
            raise RuntimeError("the actor has made no unroll for a minute")

    def _drain(self, permit: bool) -> None:
        for reader in self.readers:
            while reader.take():
                pass
            reader.release()
            if permit:  # as far as there are slots: no throttle
                reader.permit(reader.taken + self.config.actor.slots_per_lane)
        self.actor_bell.ring()


class AloneProcess:
    """ALE's vector env and nothing else: `num_groups` of them, taken in turn by send and recv."""

    def __init__(self, config, num_groups: int, num_envs: int):
        self.config, self.num_groups, self.num_envs = config, num_groups, num_envs
        self.pipe, self.theirs = PROCESSES.Pipe()
        PROCESSES.Process(target=self._step, daemon=True).start()

    def _step(self) -> None:
        env = self.config.env.resolved()
        settings = env.kwargs | env.atari | {"num_threads": env.num_threads}
        groups = [gym.make_vec(env.id, self.num_envs, "vector_entry_point", **settings)
                  for _ in range(self.num_groups)]  # fmt: skip
        rng, num_actions = np.random.default_rng(0), int(groups[0].single_action_space.n)
        for group in groups:
            group.reset(seed=1)
        while True:
            seconds, rows = self.theirs.recv(), 0
            begun, cpu = time.monotonic(), time.process_time()
            for group in groups:
                group.send(rng.integers(num_actions, size=self.num_envs))
            while time.monotonic() - begun < seconds:
                for group in groups:
                    group.recv()
                    group.send(rng.integers(num_actions, size=self.num_envs))
                    rows += self.num_envs
            for group in groups:
                group.recv()
                rows += self.num_envs
            used, wall = time.process_time() - cpu, time.monotonic() - begun
            self.theirs.send({"env steps/s": rows / wall, CPU: 1e6 * used / rows})

    def measure(self, seconds: float) -> dict[str, float]:
        self.pipe.send(seconds)
        if not self.pipe.poll(seconds + 60):
            raise RuntimeError("the environments alone have not answered for a minute")
        return self.pipe.recv()


def main() -> None:
    parser = arguments(__doc__, repeats=40)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each measurement")
    parser.add_argument("--launch", default="launch/breakout_dqn.py", help="an Atari launch file")
    options, rest = parser.parse_known_args()  # the rest are options of the launch file
    like_a_run()
    torch.set_num_threads(1)  # no thread pool may exist where a process is forked
    config = resolve(REPOSITORY / options.launch, rest)
    spec, model = wire(config)
    actor = config.actor
    groups, num_envs = actor.lanes_per_actor, actor.envs_per_lane
    kinds = ((1, groups * num_envs), (groups, num_envs))
    alone = {f"alone, {n} x {B} envs": AloneProcess(config, n, B) for n, B in kinds}
    acting = {
        "actor": ActorProcess(config, spec, model, Random()),
        "actor, its net evaluated": ActorProcess(config, spec, model, Seeing()),
    }
    report = Report("actor", options)  # which asks for the GPU: after all forks
    results: dict[str, list[dict]] = {name: [] for name in alone | acting}
    systems = list((alone | acting).items())
    for repeat in range(-1, options.repeats):  # the first time is for warming up
        print(f"repeat {repeat + 1} of {options.repeats}", file=sys.stderr, flush=True)
        for name, system in systems:
            result = system.measure(options.seconds)
            if repeat >= 0:
                results[name].append(result)
        systems.append(systems.pop(0))
    rates = {name: [one["env steps/s"] for one in found] for name, found in results.items()}
    best = max((rates[name] for name in alone), key=np.median)
    ratios = {name: [a / b for a, b in zip(rates[name], best, strict=True)] for name in rates}
    report.table([
        {"Breakout, random actions": name, "/ alone": ratios[name]}
        | {column: [one[column] for one in found] for column in found[0]}
        for name, found in results.items()
    ])  # fmt: skip
    report.goal("actor / environments alone", ratios["actor"], at_least=0.95)
    report.finish()


if __name__ == "__main__":
    main()
