"""What priorities and recurrent states cost: time of a batch, and memory of a full replay.

    python benchmarks/replay.py

Replays of 1,000,000 frames of launch/breakout_dqn.py (noise, 84 x 84) are filled by `insert` and
drawn from: batches of 32 with both stacks of four. Uniform and prioritised draws alternate, on
one replay. The sum tree alone stands beside a binary one in numpy.
Whole updates with an LSTM, with and without writing the target net's states back, alternate too;
reading a batch's states, which is in both, is timed by itself.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from full_replay import FullReplay
from measure import REPOSITORY, Report, arguments, like_a_run

from asyncrl.config import resolve
from asyncrl.costs import wire
from asyncrl.learner import Learner
from asyncrl.models import ModelConfig
from asyncrl.stores.limiter import RateLimiter
from asyncrl.stores.replay import Replay
from asyncrl.stores.sum_tree import SumTree
from asyncrl.types import Spec, tree_map

STACK, BATCH, NUM_LANES, CAPACITY = 4, 32, 2, 1_000_000
LIMIT_GB = 7.7
RECURRENT = {  # launch file: options
    "breakout_ancestor": ["--algorithm.replay.capacity", "20000"],
    "breakout_ancestor, home_lstm": ["--profile", "home_lstm"],
    "masked_cartpole_dqn": [],
}


class BinaryTree:
    """The usual sum tree, all of a batch one level at a time; for comparison."""

    def __init__(self, size: int):
        self.depth = (size - 1).bit_length()
        self.sums = np.zeros(2 << self.depth)

    def set(self, index: np.ndarray, value: np.ndarray) -> None:
        node = index + (1 << self.depth)
        self.sums[node] = value
        for _ in range(self.depth):
            node = np.unique(node // 2)
            self.sums[node] = self.sums[2 * node] + self.sums[2 * node + 1]

    def sample(self, num: int, rng: np.random.Generator) -> np.ndarray:
        target = (np.arange(num) + rng.random(num)) / num * self.sums[1]
        node = np.ones(num, np.int64)
        for _ in range(self.depth):
            left = self.sums[2 * node]
            right = target >= left
            target -= right * left
            node = 2 * node + right
        return node - (1 << self.depth)


def microseconds(kinds: dict, count: int) -> dict[str, float]:
    """The median CPU time of each of the calls, which alternate on one thread and wait for
    nothing: what else runs on the machine counts less than by the clock."""
    times = {name: [] for name in kinds}
    for turn in range(count):
        calls = list(kinds.items())
        for name, call in calls[turn % len(calls) :] + calls[: turn % len(calls)]:
            begun = time.thread_time_ns()
            call()
            times[name].append(time.thread_time_ns() - begun)
    return {name: float(np.median(taken)) / 1e3 for name, taken in times.items()}


def fill(replay: Replay, spec: Spec) -> None:
    """Noise until the capacity is in; an episode ends about every 200 steps."""
    rng, T, B = np.random.default_rng(0), spec.unroll_length, spec.num_envs
    unroll = spec.layout.views(bytearray(spec.layout.nbytes))
    unroll.obs[...] = rng.integers(256, size=unroll.obs.shape, dtype=np.uint8)
    per_unroll = NUM_LANES * T * B
    for sequence in range(1 + replay.capacity // per_unroll):
        unroll.terminated[...] = rng.random((T, B)) < 1 / 200
        unroll.valid[...] = True
        unroll.first[...] = False
        unroll.first[1:] = unroll.terminated
        unroll.header.sequence[...] = sequence
        for lane in range(NUM_LANES):
            unroll.header.generation[...] = lane
            replay.insert(lane, unroll)


def make(spec: Spec, capacity: int, **options) -> Replay:
    limiter = RateLimiter(8.0, BATCH, 0, 0, spec.unroll_length * spec.num_envs * NUM_LANES)
    return Replay(spec, NUM_LANES, capacity, BATCH, limiter, STACK, n_step=3, **options)


def batches(spec: Spec, report: Report, repeats: int, count: int, capacity: int) -> None:
    """A batch of each kind; one full replay serves both, so that they read the same memory."""
    replay = make(spec, capacity, priority_exponent=0.6)
    fill(replay, spec)
    rng = torch.Generator().manual_seed(0)
    prioritised = replay.selection
    errors = torch.randn(BATCH, generator=rng)
    for _ in range(2_000):  # priorities of every size
        replay.update_priorities(replay.sample().index, torch.randn(BATCH, generator=rng))
    uniform = make(spec, NUM_LANES * spec.unroll_length * spec.num_envs).selection
    uniform.circle, uniform.drawable = prioritised.circle, prioritised.drawable
    uniform.generator = prioritised.generator

    def sample(selection):
        replay.selection = selection
        return replay.sample()

    def learn():
        replay.update_priorities(sample(prioritised).index, errors)

    kinds = {
        "uniform": lambda: sample(uniform),
        "prioritised": lambda: sample(prioritised),
        "prioritised, and its priorities written back": learn,
    }
    microseconds(kinds, 200)
    found = [microseconds(kinds, count) for _ in range(repeats)]
    report.table([
        {f"batch of {BATCH} with stacks from {capacity:,} rows": name,
         "us": [row[name] for row in found],
         "x uniform": [row[name] / row["uniform"] for row in found]}
        for name in kinds
    ])  # fmt: skip
    ratio = [row["prioritised"] / row["uniform"] for row in found]
    report.goal("prioritised / uniform batch", ratio, at_most=1.3)
    held = psutil.Process().memory_info().rss / 1e9
    report.note(f"{held:.2f} GB resident with one such replay")


def trees(report: Report, repeats: int, count: int) -> None:
    """The draw and the write-back alone, against a binary tree."""
    rng, torch_rng = np.random.default_rng(0), torch.Generator().manual_seed(0)
    values = rng.random(CAPACITY).astype(np.float32)
    ours, binary = SumTree(CAPACITY), BinaryTree(CAPACITY)
    ours.leaves.copy_(torch.from_numpy(values))
    ours.refresh(0, CAPACITY)
    binary.set(np.arange(CAPACITY), values)
    index = torch.from_numpy(rng.integers(CAPACITY, size=BATCH))
    value = torch.from_numpy(rng.random(BATCH))
    kinds = {
        "two levels": lambda: ours.sample(BATCH, torch_rng),
        "binary": lambda: binary.sample(BATCH, rng),
        "two levels, write": lambda: ours.set(index, value),
        "binary, write": lambda: binary.set(index.numpy(), value.numpy()),
    }
    microseconds(kinds, 50)
    found = [microseconds(kinds, count) for _ in range(repeats)]
    rows = []
    for kind in ("two levels", "binary"):
        write = [row[f"{kind}, write"] for row in found]
        rows.append({"sum tree": kind, "draw 32, us": [row[kind] for row in found],
                     "write 32, us": write})  # fmt: skip
    report.table(rows)


def held(config, report: Report) -> None:
    """What a replay of LSTM agents takes, by `nbytes`."""
    config = dataclasses.replace(config, model=ModelConfig(frame_stack=STACK, lstm=512))
    plain, _ = wire(config)
    rows = []
    for T, S in ((80, 1), (40, 1), (16, 1), (16, 16)):
        spec = dataclasses.replace(plain, unroll_length=T, num_states=S)
        options = dict(priority_exponent=0.6, sequence_length=40, burn_in=40)
        shape = (spec, 16, CAPACITY, STACK, 5)
        rows.append({
            "states of an LSTM of 512": f"{S} in {T} steps" if S > 1 else f"every {T} steps",
            "float16, GB": Replay.nbytes(*shape, **options) / 1e9,
            "float32, GB": Replay.nbytes(*shape, **options, state_dtype="float32") / 1e9,
        })  # fmt: skip
    report.table(rows)
    starts = [row["float16, GB"] for row in rows[:3]]
    report.goal("1,000,000 frames, states at unroll starts", max(starts), at_most=LIMIT_GB,
                unit=" GB")  # fmt: skip


def states(report: Report, repeats: int, count: int) -> None:
    """What stored states add to an update: reading them, and writing the target net's back."""
    rows = []
    for name, options in RECURRENT.items():
        with tempfile.TemporaryDirectory() as folder:
            launch = f"launch/{name.split(',')[0]}.py"
            options = [*options, "--learner.device", "cpu"]  # where CPU time says it all
            learner = FullReplay(Path(folder), launch, False, options)
            learner.fill()
            rows.append(_states(name, learner.learner, repeats, count))
    report.table(rows)
    worst = max(rows, key=lambda row: np.median(row["read and refresh / update"]))
    report.goal("states and refresh / update", worst["read and refresh / update"], at_most=0.1)


def _states(name: str, learner: Learner, repeats: int, count: int) -> dict:
    """One row of the table."""
    algorithm, store = learner.algorithm, learner.store
    algorithm.teams.use(1)  # what other threads take would not be counted
    lane, number, env = store.sample_sequences().index

    def read() -> None:
        place = store.states.entries.flat(lane, number)
        tree_map(lambda column: column[place, env].float(), store.states.columns)

    def update(refreshes: bool) -> None:
        algorithm.refreshes = refreshes
        algorithm.update(store)

    kinds = {
        "read": read,
        "plain": lambda: update(False),
        "refreshing": lambda: update(True),
    }
    microseconds(kinds, 5)
    found = [microseconds(kinds, count) for _ in range(repeats)]
    return {
        "update of": name,
        "us": [row["refreshing"] for row in found],
        "states read, us": [row["read"] for row in found],
        "written back, us": [row["refreshing"] - row["plain"] for row in found],
        "read and refresh / update": [
            (row["read"] + row["refreshing"] - row["plain"]) / row["refreshing"] for row in found
        ],
    }


def main() -> None:
    parser = arguments(__doc__, repeats=5)
    parser.add_argument("--batches", type=int, default=400, help="of each kind, a repeat")
    parser.add_argument("--updates", type=int, default=30, help="of each kind, a repeat")
    parser.add_argument("--capacity", type=int, default=CAPACITY, help="of the replay")
    options = parser.parse_args()
    like_a_run()
    torch.set_num_threads(1)
    config = resolve(REPOSITORY / "launch" / "breakout_dqn.py", [])
    report = Report("replay", options)
    held(config, report)
    trees(report, options.repeats, options.batches)
    states(report, options.repeats, options.updates)
    spec, _ = wire(config)
    batches(spec, report, options.repeats, options.batches, options.capacity)
    report.finish()


if __name__ == "__main__":
    main()
