"""What the shared memory costs: the ring against plain copies of the same bytes, and the weights.

    python benchmarks/transport.py

An unroll of launch/breakout_dqn.py goes from private memory into a slot, field by field, and out of
it into private memory. `plain` makes the same two copies, whole, with numpy and nothing else; in
two processes both sides copy at once and nobody waits for the other. Ring and plain alternate.
"""

from __future__ import annotations

import multiprocessing
import time

import numpy as np
import torch
from measure import REPOSITORY, Report, arguments, like_a_run, median

from asyncrl.config import resolve
from asyncrl.costs import wire
from asyncrl.models.precision import computes_in_bfloat16
from asyncrl.transport.ring import Ring, UnrollReader, UnrollWriter
from asyncrl.transport.shared_memory import Doorbell, Segment
from asyncrl.transport.weights import WeightsBuffer, WeightsReader, WeightsWriter, weights_fields
from asyncrl.types import tree_leaves, tree_map

NUM_BUFFERS = 8  # private unrolls on each side, taken in turn, so that both sides touch real memory


def answer(pipe) -> float:
    """What the other process sends; where it has died the pipe itself would never tell."""
    if not pipe.poll(60):
        raise RuntimeError("the other process has not answered for a minute")
    return pipe.recv()


class Bench:
    """A ring in shared memory with private unrolls on both sides."""

    def __init__(self, spec, num_slots: int):
        nbytes, rng = spec.layout.nbytes, np.random.default_rng(0)
        segment = Segment.create("bench", Ring.nbytes(spec, num_slots))
        self.ring = Ring(segment.buffer, spec, num_slots)
        self.bell, self.free_bell = Doorbell.create(), Doorbell.create()
        self.raw = [rng.integers(256, size=nbytes, dtype=np.uint8) for _ in range(NUM_BUFFERS)]
        self.sources = [spec.layout.views(raw) for raw in self.raw]
        self.copies = [np.zeros(nbytes, np.uint8) for _ in range(NUM_BUFFERS)]
        self.leaves = {id(it): tree_leaves(it) for it in [*self.ring.slots, *self.sources]}
        self.writer, self.reader = UnrollWriter(self.ring), UnrollReader(self.ring)
        self.reader.permit(1 << 62)

    def fill(self, slot, source) -> None:
        """Whole fields in place."""
        for to, values in zip(self.leaves[id(slot)], self.leaves[id(source)], strict=True):
            np.copyto(to, values)

    def fill_in_steps(self, slot, source) -> None:
        """The same bytes in as many small pieces as an actor writes."""
        tree_map(np.copyto, slot[-2:], source[-2:])  # state and header have no rows
        for t in range(len(slot.first)):
            for to, values in zip(slot[:-2], source[:-2], strict=True):
                to[t : t + 1] = values[t : t + 1]

    def ring_in_one(self, count: int, fill) -> float:
        """Seconds for `count` unrolls through the ring in this process."""
        begun = time.perf_counter()
        for i in range(count):
            fill(self.writer.reserve(), self.sources[i % NUM_BUFFERS])
            self.writer.commit()
            _, raw = self.reader.take()
            np.copyto(self.copies[i % NUM_BUFFERS], raw)
            self.reader.release()
        return time.perf_counter() - begun

    def plain_in_one(self, count: int) -> float:
        raw, begun = self.ring.raw, time.perf_counter()
        for i in range(count):
            np.copyto(raw[i % len(raw)], self.raw[i % NUM_BUFFERS])
            np.copyto(self.copies[i % NUM_BUFFERS], raw[i % len(raw)])
        return time.perf_counter() - begun

    def consume(self, pipe) -> None:
        """The other process: takes orders (how, how many) and answers when it is done."""
        raw = self.ring.raw
        for how, count in iter(pipe.recv, None):
            self.reader = UnrollReader(self.ring)  # from where the other process left off
            for i in range(count):
                if how == "ring":
                    self.bell.wait_for(self.reader.waiting, lambda: False)
                    _, taken = self.reader.take()
                    np.copyto(self.copies[i % NUM_BUFFERS], taken)
                    self.reader.release()
                    self.free_bell.ring()
                else:
                    np.copyto(self.copies[i % NUM_BUFFERS], raw[i % len(raw)])
            pipe.send(time.perf_counter())  # one clock for all processes

    def in_two(self, pipe, how: str, count: int) -> float:
        """Seconds until both sides have moved `count` unrolls."""
        raw, begun = self.ring.raw, time.perf_counter()
        pipe.send((how, count))
        for i in range(count):
            if how == "ring":
                self._await_room()
                self.fill(self.writer.reserve(), self.sources[i % NUM_BUFFERS])
                self.writer.commit()
                self.bell.ring()
            else:
                np.copyto(raw[i % len(raw)], self.raw[i % NUM_BUFFERS])
        return max(time.perf_counter(), answer(pipe)) - begun

    def _await_room(self) -> None:
        deadline = time.monotonic() + 60
        if not self.free_bell.wait_for(self.writer.may_begin, lambda: time.monotonic() > deadline):
            raise RuntimeError("the other process has taken no unroll for a minute")

    def hand_over_us(self, count: int) -> list[float]:
        """Microseconds of `count` pairs of reserve and commit."""
        times = []
        for _ in range(count):
            begun = time.perf_counter_ns()
            self.writer.reserve()
            self.writer.commit()
            times.append((time.perf_counter_ns() - begun) / 1e3)
            self.reader.take()
            self.reader.release()
        return times


def pull_weights(buffer: WeightsBuffer, model, pipe) -> None:
    """The acting process: pulls when told to, and loads its own copy of the net."""
    reader = WeightsReader(buffer)
    if computes_in_bfloat16("auto", torch.device("cpu"), model):
        model.to(torch.bfloat16)
    while pipe.recv():
        begun = time.perf_counter()
        pulled = reader.pull()
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(torch.from_numpy(pulled["model"][name]))
        pipe.send(1e3 * (time.perf_counter() - begun))


def weights_ms(model, count: int, processes) -> tuple[list[float], list[float]]:
    """Milliseconds to publish here, and to pull and load in another process."""
    fields = weights_fields(model.state_dict(), {})
    buffer = WeightsBuffer(Segment.create("w", WeightsBuffer.nbytes(fields)).buffer, fields)
    writer, (ours, theirs) = WeightsWriter(buffer), processes.Pipe()
    processes.Process(target=pull_weights, args=(buffer, model, theirs), daemon=True).start()
    times = []
    for _ in range(count + 4):
        begun, back = time.perf_counter(), writer.back()
        for name, tensor in model.state_dict().items():
            np.copyto(back["model"][name], tensor.detach().cpu().numpy())
        writer.publish()
        published = 1e3 * (time.perf_counter() - begun)
        ours.send(True)
        times.append((published, answer(ours)))
    publish, pull = zip(*times[4:], strict=True)  # the first ones touch new memory
    return list(publish), list(pull)


def main() -> None:
    parser = arguments(__doc__, repeats=9)
    parser.add_argument("--unrolls", type=int, default=1000, help="a repeat")
    options = parser.parse_args()
    like_a_run()
    torch.set_num_threads(1)  # no thread pool may exist where a process is forked
    config = resolve(REPOSITORY / "launch" / "breakout_dqn.py", [])
    (spec, model), report = wire(config), Report("transport", options)
    bench, count = Bench(spec, config.actor.slots_per_lane), options.unrolls
    processes = multiprocessing.get_context("fork")
    pipe, theirs = processes.Pipe()
    processes.Process(target=bench.consume, args=(theirs,), daemon=True).start()
    kinds = {  # name: (ring, plain), each returning seconds
        "one process": (lambda n: bench.ring_in_one(n, bench.fill), bench.plain_in_one),
        "two processes":
            (lambda n: bench.in_two(pipe, "ring", n), lambda n: bench.in_two(pipe, "plain", n)),
        "one process, step by step":
            (lambda n: bench.ring_in_one(n, bench.fill_in_steps), bench.plain_in_one),
    }  # fmt: skip
    nbytes, rows = spec.layout.nbytes, []
    for kind, (ring, plain) in kinds.items():
        ring(NUM_BUFFERS), plain(NUM_BUFFERS)
        pairs = [(ring(count), plain(count)) for _ in range(options.repeats)]
        rows.append({
            f"unrolls of {nbytes / 1e6:.2f} MB": kind,
            "ring GB/s": [count * nbytes / through / 1e9 for through, _ in pairs],
            "plain GB/s": [count * nbytes / copied / 1e9 for _, copied in pairs],
            "ring / plain": [copied / through for through, copied in pairs],
        })  # fmt: skip
        bench.reader.taken = bench.writer.sequence
    report.table(rows)
    hand_over = bench.hand_over_us(20_000)
    publish, pull = weights_ms(model, 10 * options.repeats, processes)
    millions = f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f}M float32"
    report.table([
        {"what": name, "median": median(values), "99 %": float(np.percentile(values, 99))}
        for name, values in (("reserve + commit, us", hand_over),
                             (f"publish {millions} parameters, ms", publish),
                             ("pull them and load the acting net, ms", pull))
    ])  # fmt: skip
    for row, kind in zip(rows[:2], kinds, strict=False):
        report.goal(f"ring / plain copies, {kind}", row["ring / plain"], at_least=0.8)
    report.goal("reserve + commit", hand_over, at_most=50, unit=" us")
    report.goal("publish", publish, at_most=5, unit=" ms")
    report.goal("pull and load", pull, at_most=5, unit=" ms")
    report.finish()


if __name__ == "__main__":
    main()
