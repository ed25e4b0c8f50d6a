"""Sequences: every draw against the slow bookkeeping of the stream it came from."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv

from asyncrl.actor import Actor, ActorConfig, context_fields
from asyncrl.env_config import EnvConfig
from asyncrl.envs import make_envs
from asyncrl.models import ModelConfig
from asyncrl.models.contract import state_fields
from asyncrl.policies import Random, as_mixture
from asyncrl.stores.limiter import RateLimiter
from asyncrl.stores.replay import Replay
from asyncrl.transport.ring import Ring, UnrollReader
from asyncrl.transport.weights import WeightsBuffer, WeightsReader, WeightsWriter, weights_fields
from asyncrl.types import Spec, tree_leaves, tree_map
from tests.streams import Stream, make_spec

VARIANTS = {
    "one state an unroll": dict(num_states=1, frame_stack=1, length=7, burn_in=4, n_step=3),
    "a stack too": dict(num_states=1, frame_stack=4, length=3, burn_in=5, n_step=1),
    "two states": dict(num_states=2, frame_stack=3, length=5, burn_in=0, n_step=2),
    "a state each step": dict(num_states=6, frame_stack=4, length=2, burn_in=3, n_step=3),
    "the last step": dict(num_states=6, frame_stack=1, length=4, burn_in=2, n_step=2, last=True),
    "no memory": dict(num_states=3, frame_stack=3, length=4, burn_in=0, n_step=1, memory=False),
    "shorter than an unroll": dict(num_states=3, frame_stack=1, length=1, burn_in=0, n_step=1),
}


class Lanes:
    """Streams with restarts and lost unrolls, the replay of them, and what it must hold."""

    def __init__(self, variant: str, num_lanes: int = 2, capacity: int = 400, **options):
        about = dict(last=False, memory=True) | VARIANTS[variant]
        self.length, self.burn_in, self.n_step = (about[n] for n in ("length", "burn_in", "n_step"))
        self.last, self.memory = about["last"], about["memory"]
        self.T = self.burn_in + self.length + self.n_step - 1
        self.spec = make_spec(6, 3, about["frame_stack"], about["num_states"], about["memory"])
        self.period = 6 // about["num_states"]
        stack = about["frame_stack"]
        self.streams = [Stream(self.spec, lane, 3, stack) for lane in range(num_lanes)]
        self.cuts: list[set[int]] = [set() for _ in self.streams]  # last moments before a seam
        self.unrolls: list[list[tuple]] = [[] for _ in self.streams]  # (moment, inserted before)
        self.inserted, self.capacity = 0, capacity
        self.rng = np.random.default_rng(0)
        self.options = dict(
            frame_stack=stack, n_step=self.n_step, sequence_length=self.length,
            burn_in=self.burn_in, loss_on="last" if self.last else "all",
        ) | options  # fmt: skip
        self.replay = self.make_replay()
        self.log: list[tuple] = []

    def make_replay(self) -> Replay:
        limiter = RateLimiter(1.0, 32 * self.length, 0, 0, 18 * len(self.streams))
        return Replay(self.spec, len(self.streams), self.capacity, 32, limiter, **self.options)

    def round(self, trouble: float = 0.1) -> None:
        """An unroll of each lane, some of them after a restart or behind one that was lost."""
        for lane, stream in enumerate(self.streams):
            event = self.rng.random()
            buffer = np.zeros(self.spec.layout.nbytes, np.uint8)
            if stream.rows and event < 2 * trouble:
                self.cuts[lane].add(stream.moment - 1)
                if event < trouble:
                    stream.restart()
                else:
                    stream.unroll(buffer)
            self.unrolls[lane].append((stream.moment, self.inserted))
            unroll = stream.unroll(buffer)
            self.log.append((lane, buffer, self.replay.position()))
            self.inserted += self.replay.insert(lane, unroll)

    def walk(self, lane: int, moment: int, env: int) -> list[dict]:
        """The rows 0 to T of a sequence, as far as the next seam."""
        rows = []
        for at in range(moment, moment + self.T + 1):
            row = self.streams[lane].rows[at]
            if moment < at and at - 1 in self.cuts[lane]:  # this is only what the cut row led to
                rows.append({name: row[name][env] for name in ("obs", "first")})
                break
            rows.append({name: values[env] for name, values in row.items()})
        return rows

    def learned(self, lane: int, moment: int, env: int) -> list[bool]:
        """(T,) which rows the loss is taken on."""
        learn = [False] * self.T
        begin = self.burn_in + (self.length - 1 if self.last else 0)
        for t in range(begin, self.burn_in + self.length):
            cut = any(moment + before in self.cuts[lane] for before in range(t))
            row = self.streams[lane].rows[moment + t] if not cut else {}
            learn[t] = bool("valid" in row and row["valid"][env])
        return learn

    def check(self) -> set[int]:
        """Compare one batch with the streams; returns the first observations drawn."""
        sequence = self.replay.sample_sequences()
        assert sequence.weight.all()
        drawn = sequence.obs[0].tolist()
        for i, number in enumerate(drawn):
            lane, moment, env = number // 1_000_000, number % 1_000_000 // 10, number % 10
            rows = self.walk(lane, moment, env)
            count = len(rows)
            assert sequence.obs[:count, i].tolist() == [row["obs"] for row in rows]
            assert sequence.first[:count, i].tolist() == [row["first"] for row in rows]
            whole = [row for row in rows if "valid" in row]
            valid = [row["valid"] for row in whole] + [False] * (self.T - len(whole))
            assert sequence.valid[:, i].tolist() == valid[: self.T]
            assert sequence.learn[:, i].tolist() == self.learned(lane, moment, env)
            for t, row in enumerate(whole[: self.T]):
                cut = moment + t in self.cuts[lane] and not row["terminated"]
                assert sequence.terminated[t, i] == row["terminated"]
                assert sequence.truncated[t, i] == (row["truncated"] or cut)
                assert sequence.reward[t, i] == row["reward"]
                assert sequence.action[t, i] == row["action"]
            if self.replay.frame_stack > 1:
                stack = self.streams[lane].stack(moment, env)
                assert sequence.state["frames"][i].tolist() == stack[:-1]
            if self.memory:
                want = self.streams[lane].memory_of(moment)
                got = sequence.state["memory"]
                assert got["where"].dtype == torch.float32
                assert got["where"][i].tolist() == want["where"][env].tolist()
                assert got["moment"][0][i] == moment
        return set(drawn)

    def drawable(self) -> set[int]:
        """First observations of all sequences that may be drawn, by looking at each."""
        found = set()
        for lane, stream in enumerate(self.streams):
            rows: list[int | None] = []  # moments as they lie in the lane; None: context, padding
            for begin, _ in self.unrolls[lane]:
                if rows and rows[-1] == begin and begin - 1 not in self.cuts[lane]:
                    rows.pop()  # row T, which row 0 overwrites
                else:
                    rows += [None] * (self.replay.frame_stack - 1)
                    rows += [None] * (-len(rows) % self.period)
                rows += range(begin, begin + 7)
            assert len(rows) == self.replay.lanes[lane].end
            oldest = len(rows) - self.replay.rows
            for begin, inserted in self.unrolls[lane]:
                if self.inserted - inserted > self.capacity:
                    continue
                for moment in range(begin, begin + 6, self.period):
                    if moment + self.T > stream.moment and not any(
                        moment + t in self.cuts[lane] for t in range(self.T)
                    ):
                        continue  # not all of it is there
                    place = rows.index(moment)
                    for env in range(self.spec.num_envs):
                        reach = place
                        for _ in range(self.replay.frame_stack - 1):
                            at = rows[reach]
                            reach -= at is None or not stream.rows[at]["first"][env]
                        if reach >= oldest and any(self.learned(lane, moment, env)):
                            found.add(int(stream.obs_of(moment)[env]))
        return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_sequence_is_what_the_stream_held(variant):
    """Across ends, lost lives, wrap-around of the lane, restarts and lost unrolls."""
    lanes = Lanes(variant)
    num_drawn = 0
    for round_ in range(60):
        lanes.round()
        if round_ > 6:
            num_drawn += len(lanes.check())
    assert num_drawn > 600
    assert lanes.replay.lanes[0].end > 2 * lanes.replay.rows
    assert lanes.replay.limiter.sampled == 53 * 32 * lanes.length


@pytest.mark.parametrize("exponent", [0.0, 0.6])
@pytest.mark.parametrize("variant", VARIANTS)
def test_exactly_the_drawable_sequences_are_drawn(variant, exponent):
    """Each equally often, while all have one priority."""
    lanes = Lanes(variant, capacity=300, priority_exponent=exponent)
    for trouble in (0.15, 0.15, 0.0):
        for _ in range(11):
            lanes.round(trouble)
        want, counts, num_draws = lanes.drawable(), {}, 300 * 32
        for _ in range(300):
            sequence = lanes.replay.sample_sequences()
            assert (sequence.weight == 1).all()
            for number in sequence.obs[0].tolist():
                counts[number] = counts.get(number, 0) + 1
        assert set(counts) == want
        mean = num_draws / len(want)
        chi_square = sum((count - mean) ** 2 / mean for count in counts.values())
        degrees = len(want) - 1
        limit = degrees + 5 * np.sqrt(2 * degrees)
        assert chi_square < limit  # stratified draws vary less than independent ones
        assert exponent or chi_square > degrees - 5 * np.sqrt(2 * degrees)


def test_n_step_targets_across_ends_and_seams():
    """By the pure function, on whole sequences, against a walk through the stream."""
    from asyncrl.algorithms.returns import n_step

    gamma, lanes = 0.9, Lanes("one state an unroll")
    num_learned = 0
    for round_ in range(40):
        lanes.round()
        if round_ < 5:
            continue
        s = lanes.replay.sample_sequences()
        value = (s.obs % 1_000).double()
        target = n_step(s.reward.double(), s.terminated, s.truncated, value, gamma, 3)
        for t, i in s.learn.nonzero().tolist():
            number = int(s.obs[t, i])
            lane, moment, env = number // 1_000_000, number % 1_000_000 // 10, number % 10
            want, discount = 0.0, 1.0
            for at in range(moment, moment + 3):
                row = lanes.streams[lane].rows[at]
                want += discount * float(row["reward"][env])
                discount *= gamma
                if row["terminated"][env]:
                    discount = 0.0
                if row["terminated"][env] or row["truncated"][env] or at in lanes.cuts[lane]:
                    break
            want += discount * (int(lanes.streams[lane].obs_of(at + 1)[env]) % 1_000)
            assert target[t, i] == pytest.approx(want, abs=1e-9)
            num_learned += 1
    assert num_learned > 3_000


# -- write-backs -----------------------------------------------------------------------------------


def named(lanes: Lanes, sequence, marks: int) -> dict:
    """A state for each refresh row of each sequence that tells them apart."""
    R, N = len(lanes.replay.refresh_rows), len(sequence.weight)
    number = torch.arange(R * N).view(R, N) + marks
    state = {"memory": {"where": torch.stack([number, -number], 2).float(), "moment": (number,)}}
    return state | ({"frames": sequence.state["frames"]} if "frames" in sequence.state else {})


@pytest.mark.parametrize("variant", ["one state an unroll", "two states", "a state each step"])
def test_refreshed_states_are_drawn_where_they_were_written(variant):
    """Not behind a seam, not into rows that have come in since, the others untouched."""
    lanes = Lanes(variant, state_dtype="float32")
    for _ in range(12):
        lanes.round()
    for round_ in range(30):
        sequence = lanes.replay.sample_sequences()
        assert lanes.replay.refresh_rows == tuple(range(lanes.period, lanes.T + 1, lanes.period))
        state = named(lanes, sequence, 10_000 * round_)
        late = round_ % 3 == 0
        if late:  # some of what was drawn is overwritten in the meantime
            for _ in range(int(lanes.rng.integers(1, 30))):
                lanes.round()
        before = tree_map(torch.clone, lanes.replay.states.columns)["memory"]["moment"][0]
        lanes.replay.write_states(sequence.index, state)
        after = lanes.replay.states.columns["memory"]["moment"][0]
        written = {}  # (lane, moment of the stream, env) -> the states that may stand there
        for i, number in enumerate(sequence.obs[0].tolist()):
            lane, moment, env = number // 1_000_000, number % 1_000_000 // 10, number % 10
            for j, t in enumerate(lanes.replay.refresh_rows):
                # Before the row behind a cut there is a state, before later ones none.
                cut = any(moment + earlier in lanes.cuts[lane] for earlier in range(t - 1))
                entry = int(sequence.index.number[i]) + t // lanes.period
                end = lanes.replay.lanes[lane].end
                gone = int(sequence.index.number[i]) * lanes.period < end - lanes.replay.rows
                if not cut and not gone:
                    mark = int(state["memory"]["moment"][0][j, i])
                    written.setdefault((lane, entry, env), []).append(mark)
        circle = lanes.replay.states.entries
        expected = {}
        for (lane, entry, env), marks in written.items():
            flat = int(circle.flat(lane, torch.tensor(entry)))
            assert after[flat, env] == marks[-1] or after[flat, env] in marks
            expected[flat, env] = True
        for flat, env in (before != after).nonzero().tolist():
            assert (flat, env) in expected
        assert written or late
        where = lanes.replay.states.columns["memory"]["where"]
        for flat, env in expected:
            assert where[flat, env].tolist() == [after[flat, env], -after[flat, env]]
        lanes.round()


def test_states_that_are_not_finite_change_nothing():
    lanes = Lanes("a state each step")
    for _ in range(12):
        lanes.round()
    sequence = lanes.replay.sample_sequences()
    state = named(lanes, sequence, 0)
    state["memory"]["where"][:, ::2, 0] = float("nan")
    state["memory"]["where"][:, 1::4, 1] = float("inf")
    state["memory"]["where"][:, 3::4] = 1e6  # finite, and beyond half precision
    columns = lanes.replay.states.columns["memory"]
    lanes.replay.write_states(sequence.index, state)
    assert columns["where"].dtype == torch.float16
    assert columns["where"].isfinite().all()
    assert (columns["where"] == 65_504).any()
    marks = set(columns["moment"][0].flatten().tolist())
    bad = state["memory"]["moment"][0][:, [0, 1, 2]].flatten().tolist()
    assert not marks & {mark for mark in bad if mark > 300}


def test_refreshed_states_and_priorities_survive_a_checkpoint():
    """Unrolls inserted again, then what was saved: the same draws follow, bit for bit."""
    lanes = Lanes("two states", priority_exponent=0.6)
    rng = np.random.default_rng(5)

    def learn(replay: Replay, seed: int) -> list:
        sequence = replay.sample_sequences()
        error = np.random.default_rng(seed).normal(size=32).astype(np.float32)
        replay.update_priorities(sequence.index, torch.from_numpy(error))
        replay.write_states(sequence.index, named(lanes, sequence, seed))
        return tree_leaves(sequence)

    for round_ in range(60):
        lanes.round()
        if round_ > 3:
            learn(lanes.replay, round_)
    kept = lanes.log[-len(lanes.replay.unrolls) - int(rng.integers(0, 5)) :]
    assert len(kept) < len(lanes.log)
    twin = lanes.make_replay()
    twin.restart_at(kept[0][2])
    for lane, buffer, _ in kept:
        twin.insert(lane, lanes.spec.layout.views(buffer))
    twin.load_state_dict(tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x,
                                  lanes.replay.state_dict()))  # fmt: skip
    for round_ in range(30):
        leaves = [learn(replay, 100 + round_) for replay in (lanes.replay, twin)]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*leaves, strict=True))
        begun = len(lanes.log)
        lanes.round()
        for lane, buffer, _ in lanes.log[begun:]:
            twin.insert(lane, lanes.spec.layout.views(buffer))


def test_a_checkpoint_without_its_unrolls_leaves_nothing_to_draw():
    lanes = Lanes("two states", priority_exponent=0.6)
    for _ in range(20):
        lanes.round()
    sequence = lanes.replay.sample_sequences()
    lanes.replay.update_priorities(sequence.index, torch.full((32,), 9.0))
    lanes.replay.write_states(sequence.index, named(lanes, sequence, 7))
    saved = lanes.replay.state_dict()
    lanes.options["sequence_length"] += 4  # rows lie elsewhere: what was saved of them is no use
    for replay in (lanes.make_replay(), lanes.make_replay()):
        replay.load_state_dict(saved)
        assert not replay.selection.tree.total()
        assert not replay.sample_sequences().weight.any()


# -- against the actor -----------------------------------------------------------------------------


class Noise(gym.Env):
    """Observations nobody can foretell, episodes of about a dozen steps that end both ways."""

    observation_space, action_space = gym.spaces.Box(-9, 9, (5,)), gym.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.normal(size=5).clip(-9, 9).astype(np.float32), {}

    def step(self, action):
        obs, end = self.np_random.normal(size=5).clip(-9, 9), self.np_random.random()
        return obs.astype(np.float32), 1.0, end < 0.05, 0.05 < end < 0.1, {}


class Recorded(torch.nn.Module):
    """A model that remembers what it has answered."""

    def __init__(self, model):
        super().__init__()
        self.model, self.answers = model, []

    def state_dict(self, *args, **options):
        return self.model.state_dict(*args, **options)

    def initial_state(self, num_envs):
        return self.model.initial_state(num_envs)

    def forward(self, obs, first, state):
        outputs, state = self.model(obs, first, state)
        self.answers.append(outputs["q"].clone())
        return outputs, state


@pytest.mark.parametrize("frame_stack", [1, 3])
@pytest.mark.parametrize("num_states", [1, 2, 8])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("float16", 2e-3)])
def test_a_replayed_sequence_is_the_actors_own_pass(dtype, tolerance, num_states, frame_stack):
    """Q of an LSTM from its stored state, over ends of episodes and unrolls, while weights stay."""
    T, B, rounds = 8, 2, 12
    env = EnvConfig(lambda num_envs: SyncVectorEnv([Noise] * num_envs))
    envs = make_envs(env, 1)
    spaces = envs.observation_space, envs.action_space
    torch.manual_seed(3)
    model = ModelConfig(hidden=(16,), lstm=12, frame_stack=frame_stack)(*spaces).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # so that what it remembers matters
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
    spec = Spec(T, B, *spaces, state_fields(model, "q", *spaces), num_states)
    config = ActorConfig(
        lanes_per_actor=2, envs_per_lane=B, unroll_length=T, slots_per_lane=rounds,
        precision="float32",
    )  # fmt: skip
    rings = {lane: Ring(bytearray(Ring.nbytes(spec, rounds)), spec, rounds) for lane in range(2)}
    fields = weights_fields(model.state_dict(), context_fields(1))
    buffer = WeightsBuffer(bytearray(WeightsBuffer.nbytes(fields)), fields)
    weights = WeightsWriter(buffer)
    back = weights.back()
    for name, tensor in model.state_dict().items():
        np.copyto(back["model"][name], tensor.numpy())
    weights.publish()
    recorded = Recorded(model)
    actor = Actor(
        0, config, rings, WeightsReader(buffer), recorded, as_mixture(Random()),
        lambda: make_envs(env, B), 1,
    )  # fmt: skip
    limiter = RateLimiter(1.0, 64 * 7, 0, 0, 2 * T * B)
    replay = Replay(
        spec, 2, 10_000, 64, limiter, frame_stack, 2, sequence_length=7, burn_in=5,
        state_dtype=dtype,
    )  # fmt: skip
    readers = [UnrollReader(ring) for ring in rings.values()]
    for reader in readers:
        reader.permit(rounds)
    for _ in range(rounds):
        actor.play()
        for lane, reader in enumerate(readers):
            replay.insert(lane, reader.take()[0])
    answers = torch.cat(recorded.answers).unflatten(0, (-1, 2))  # (rows, lanes, B, A)
    assert len(answers) == rounds * T
    begun = replay.unrolls[0][1]  # behind the context rows of a stack
    sequence, differences, spread = replay.sample_sequences(), [], []
    states = tree_leaves(sequence.state)
    with torch.no_grad():
        q = model(sequence.obs, sequence.first, sequence.state)[0]["q"]
        forgetful = {n: torch.zeros_like(s) if n in "hc" else s for n, s in sequence.state.items()}
        blank = model(sequence.obs, sequence.first, forgetful)[0]["q"]
    drawn = zip(*(part.tolist() for part in sequence.index), strict=True)
    for i, (lane, number, one) in enumerate(drawn):
        row = number * (T // num_states) - begun  # of all that the actor has seen
        want = answers[row : row + replay.window + 1, lane, one]
        differences.append((q[: len(want), i] - want).abs().max())
        spread.append((blank[: len(want), i] - want).abs().max())
        assert len(want) >= replay.window
    assert {str(column.dtype) for column in replay.states.columns.values()} == {f"torch.{dtype}"}
    assert all(state.dtype == torch.float32 for state in states)
    assert max(differences) <= tolerance
    assert max(spread) > 10 * tolerance  # the state is what does it
    assert sequence.first[1:].any() and not sequence.valid.all()
    assert len(set(sequence.index.number.tolist())) > 5


def test_memory_is_what_nbytes_says():
    for variant in VARIANTS:
        for exponent in (0.0, 0.6):
            lanes = Lanes(variant, priority_exponent=exponent)
            replay, options = lanes.replay, dict(lanes.options)
            del options["loss_on"]
            columns = [
                replay.obs, replay.action, replay.reward, replay.first, replay.terminated,
                replay.truncated, replay.valid, replay.selection.drawable, replay.states.seam,
                *tree_leaves(replay.states.columns),
            ]  # fmt: skip
            if exponent:
                columns += [replay.selection.tree.blocks, replay.selection.tree.sums]
            held = sum(column.numel() * column.element_size() for column in columns)
            assert Replay.nbytes(lanes.spec, 2, lanes.capacity, **options) == held


def test_a_capacity_that_holds_no_whole_sequence_is_refused():
    """Else everything would expire before all of it is there."""
    with pytest.raises(ValueError, match=r"3 unrolls of every lane, 108 env .* got 107: .* 13"):
        Lanes("one state an unroll", capacity=107)
    lanes = Lanes("one state an unroll", capacity=108)
    drawn = 0
    for _ in range(12):
        lanes.round(trouble=0.0)
        drawn += bool(lanes.replay.selection.drawable.any())
    assert drawn > 3
