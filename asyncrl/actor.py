"""The actor: env + model + policy -> lane.

An actor owns a few lanes, each a group of environments with a ring of its own. It steps one group
while the net evaluates the other: `send` starts a group's environments, and by the time `recv` asks
for them the net has been through the next group. Between unrolls it pulls the newest weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from asyncrl.env_group import EnvGroup
from asyncrl.envs import seed_for
from asyncrl.models.layers import noisy_layers
from asyncrl.models.precision import Precision, computes_in_bfloat16, device_called
from asyncrl.policies import Context, Mixture, unroll_rng
from asyncrl.policy_contract import check_log_probs
from asyncrl.priority import threads_give_way
from asyncrl.transport.ring import Ring, UnrollWriter, Word
from asyncrl.transport.weights import WeightsReader
from asyncrl.types import Field, Tree, Unroll, tree_map

FIRST_STEP_NANOSECONDS = 110_000_000_000  # beside the time that every step has


def context_fields(num_policies: int) -> dict[str, Field]:
    """What travels beside the weights."""
    return {
        "env_steps": Field((), "int64"),  # the learner's count: the clock of schedules
        "epoch": Field((), "int64"),  # grows when all environments are to be made anew
        "recent_lengths": Field((num_policies, 64), "int32"),  # of episodes; 0: none yet
    }


@dataclass(frozen=True)
class ActorConfig:
    """How many environments act, and in what pieces their steps travel."""

    num_actors: int | Literal["auto"] = 1
    """Actor processes; auto: as many as it takes to keep up with the learner here, found out by
    some seconds of measuring (see `asyncrl bench`) as a run begins, and kept when it is resumed."""
    lanes_per_actor: int = 2
    """Groups of environments taken in turn: one steps while the net evaluates the other."""
    envs_per_lane: int = 8
    """Environments in a group."""
    unroll_length: int = 16
    """Env steps of each environment in one unroll."""
    slots_per_lane: int = 4
    """Unrolls a lane can hold before the actor waits."""
    device: str = "cpu"
    """Where the net acts; auto: on the GPU where there is one."""
    precision: Precision = "auto"
    """Of the acting copy of the weights. auto: bfloat16 where the hardware multiplies it."""
    num_threads: int = 1
    """Torch threads for acting."""
    nice: int = 0
    """Priority given away to the learner and to whatever else runs, 0 to 19. On a machine of its
    own, with few cores, DQN is faster with 19; a learner that waits for rollouts is not."""

    def __post_init__(self):
        counts = ("num_actors", "lanes_per_actor", "envs_per_lane", "unroll_length", "num_threads")
        for name in (*counts, "slots_per_lane"):
            if getattr(self, name) != "auto" and getattr(self, name) < 1:
                raise ValueError(f"expected actor.{name} >= 1, got {getattr(self, name)}")
        if not 0 <= self.nice <= 19:
            raise ValueError(f"expected actor.nice from 0 to 19, got {self.nice}")

    @property
    def num_lanes(self) -> int:
        return self.num_actors * self.lanes_per_actor


class LaneState:
    """One group of environments and where it stands between two unrolls."""

    def __init__(self, index: int, ring: Ring, make_envs: Callable[[], EnvGroup]):
        self.index, self.ring = index, ring
        self.writer = UnrollWriter(ring)
        self.make_envs = make_envs
        self.envs: EnvGroup | None = None
        self.unroll: Unroll | None = None  # the one that is being played, in its slot
        self.outputs: dict[str, np.ndarray] | None = None  # of the newest row that was evaluated

    def restart(
        self, seed: int, generation: int, model: nn.Module, policy: Mixture, device
    ) -> None:
        """New environments, seeded by (seed, lane, generation), and empty memories."""
        if self.envs is not None:
            self.envs.close()
        with threads_give_way():
            self.envs = self.make_envs()
        self.generation = generation
        num_envs = self.envs.num_envs
        self.obs = self.envs.reset(seed_for(seed, self.index, generation))
        self.first = np.ones(num_envs, bool)
        self.new_life = np.ones(num_envs, bool)  # also where a life was lost and the game goes on
        self.step = np.zeros(num_envs, np.int64)  # env steps of each running episode
        self.state = tree_map(lambda part: part.to(device), model.initial_state(num_envs))
        self.policy_state = policy.initial_state(num_envs)


class Actor:
    """Plays unrolls on its lanes. `play` never blocks on anything but the environments."""

    def __init__(
        self,
        index: int,
        config: ActorConfig,
        rings: dict[int, Ring],  # by lane index
        weights: WeightsReader,
        model: nn.Module,
        policy: Mixture,
        make_envs: Callable[[], EnvGroup],
        seed: int,
        generation: int = 0,
    ):
        self.index, self.config, self.weights = index, config, weights
        self.device = device_called(config.device)
        self.model = model.to(self.device).eval()
        self.bfloat16 = computes_in_bfloat16(config.precision, self.device, self.model)
        self.noisy = noisy_layers(self.model)
        # Random play needs the model's memory at the end of an unroll, and what it makes of a row
        # only once, for what actions there are.
        each_row = any(ring.spec.num_states > 1 or ring.spec.values for ring in rings.values())
        self.blind = policy.blind and not each_row and hasattr(model, "advance")
        self.policy, self.seed, self.generation = policy, seed, generation
        self.lanes = [LaneState(lane, ring, make_envs) for lane, ring in rings.items()]
        self.fresh: set[int] = set()  # lanes whose environments have not made their first step
        self.words = self.lanes[0].ring.words  # where it says how it is
        self._mark = time.monotonic_ns()

    def due(self) -> list[LaneState]:
        """The lanes to play next: all, or first those that a death of this actor left behind."""
        behind = min(lane.writer.sequence for lane in self.lanes)
        return [lane for lane in self.lanes if lane.writer.sequence == behind]

    def may_begin(self) -> bool:
        """Whether every lane that is due has begun its next unroll or may begin it."""
        return all(lane.unroll is not None or lane.writer.may_begin() for lane in self.due())

    def play(self) -> None:
        """One unroll of each due lane; a step of one overlaps the net's turn with the next.

        So it goes on between unrolls: all lanes but the last begin the next one here if they may.
        """
        self._spend(Word.TIME_WAIT)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            self._play(self.due())

    def _play(self, lanes: list[LaneState]) -> None:
        for lane in lanes:
            if lane.unroll is None:
                self._begin(lane, pull=lane is lanes[0])
        for t in range(1, self.config.unroll_length):
            for lane in lanes:
                self._finish(lane, lane.unroll, t - 1)
                self._act(lane, lane.unroll, t)
        goes_on = lanes == self.lanes  # else some of them are behind
        for lane in lanes:
            self._end(lane)
            goes_on = goes_on and lane is not lanes[-1] and lane.writer.may_begin()
            if goes_on:
                self._begin(lane, pull=lane is lanes[0])

    def idle(self) -> None:
        """To be called now and then while there is nothing to play."""
        self._spend(Word.TIME_WAIT)
        self.beat()

    def close(self) -> None:
        for lane in self.lanes:
            if lane.envs is not None:
                lane.envs.close()

    # -- one unroll ------------------------------------------------------------------------------

    def _pull(self) -> None:
        pulled = self.weights.pull()
        if pulled is None:
            return
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                tensor.copy_(torch.from_numpy(pulled["model"][name]))
        torch.clear_autocast_cache()  # of what was converted before
        self.env_steps = int(pulled["context"]["env_steps"])
        self.epoch = int(pulled["context"]["epoch"])
        lengths = zip(self.policy.names, pulled["context"]["recent_lengths"], strict=True)
        self.recent_lengths = {name: row[row > 0] for name, row in lengths}

    def _begin(self, lane: LaneState, pull: bool) -> None:
        """Reserve the slot of a lane's next unroll, fill in all that is known and act on row 0.

        The first lane of a round pulls weights, for all: the others have acted on their last rows.
        """
        if pull:
            self._pull()
            self._spend(Word.TIME_PULL)
        generation = self.generation + self.epoch
        if lane.envs is None or lane.generation != generation:
            self.fresh.add(lane.index)
            self.beat()
            lane.restart(self.seed, generation, self.model, self.policy, self.device)
            self._spend(Word.TIME_ENV)
        unroll = lane.writer.reserve()
        if unroll is None:
            raise RuntimeError(f"lane {lane.index} may not begin; expected may_begin() to hold")
        header = (
            lane.writer.sequence, lane.index, self.index, lane.generation,
            self.weights.version, self.env_steps,
        )  # fmt: skip
        for word, value in zip(unroll.header, header, strict=True):
            word[...] = value
        self._observe(lane, unroll, 0)
        lane.rng = unroll_rng(self.seed, lane.index, lane.writer.sequence)
        where = lane.index, self.config.num_lanes
        lane.context = Context(self.env_steps, *where, self.recent_lengths)
        if pull:
            self._redraw(lane)
        lane.unroll = unroll
        self._act(lane, unroll, 0)

    def _end(self, lane: LaneState) -> None:
        """Finish the last row of a lane's unroll and hand it to the learner."""
        unroll, lane.unroll, T = lane.unroll, None, self.config.unroll_length
        self._finish(lane, unroll, T - 1)
        if len(unroll.value):
            state = tree_map(torch.clone, lane.state)
            self._evaluate(lane, unroll, T)
            lane.state = state  # row T is the next unroll's row 0
            self._spend(Word.TIME_INFERENCE)
        if self.blind:
            self._advance(lane, unroll)
        check_log_probs(unroll.log_prob, unroll.policy, self.policy.names)
        lane.writer.commit()

    def _redraw(self, lane: LaneState) -> None:
        """Noise of one's own for noisy layers, in place of the learner's that came with them."""
        if self.noisy:
            seed = int(lane.rng.integers(2**63))
            generator = torch.Generator(self.device).manual_seed(seed)
            for layer in self.noisy:
                layer.redraw(generator)

    def _observe(self, lane: LaneState, unroll: Unroll, t: int) -> None:
        tree_map(lambda rows, part: np.copyto(rows[t], part), unroll.obs, lane.obs)
        unroll.first[t] = lane.first
        self._spend(Word.TIME_WRITE)

    def _act(self, lane: LaneState, unroll: Unroll, t: int) -> None:
        """Evaluate row t, choose its actions, and set the environments going."""
        s, between = divmod(t * lane.ring.spec.num_states, self.config.unroll_length)
        if not between:  # a state to be stored; the slot has room for one stack of frames only
            for_this = tree_map(lambda rows: rows[s : s + 1], unroll.state)
            tree_map(lambda row, part: np.copyto(row, part.cpu().numpy()), for_this, lane.state)
        if not self.blind:
            self._evaluate(lane, unroll, t)
        elif lane.outputs is None:
            state = tree_map(torch.clone, lane.state)
            self._evaluate(lane, unroll, t)
            lane.state = state  # rows are made up for at the end
        opens = lane.first if self.policy.scope == "game" else lane.new_life
        action, log_prob, lane.policy_state = self.policy(
            lane.outputs, lane.policy_state, opens, lane.step, lane.context, lane.rng
        )
        unroll.action[t] = action
        unroll.log_prob[t] = log_prob
        unroll.policy[t] = lane.policy_state.choice
        self._spend(Word.TIME_INFERENCE)
        self.beat()
        lane.envs.send(unroll.action[t])
        self._spend(Word.TIME_ENV)

    def _evaluate(self, lane: LaneState, unroll: Unroll, t: int) -> None:
        """What the model makes of row t, and its state behind it."""
        obs, first = self._rows(unroll, slice(t, t + 1))
        with torch.no_grad():  # in inference mode autocast would convert all weights at each row
            outputs, lane.state = self.model(obs, first, lane.state)
            lane.outputs = {
                name: part[0].to("cpu", torch.float32).numpy() for name, part in outputs.items()
            }
        if len(unroll.value):
            unroll.value[t] = lane.outputs["value"]

    def _advance(self, lane: LaneState, unroll: Unroll) -> None:
        """The model's state behind all rows, of which it has seen none."""
        with torch.no_grad():
            rows = self._rows(unroll, slice(0, len(unroll.action)))
            lane.state = self.model.advance(*rows, lane.state)
        self._spend(Word.TIME_INFERENCE)

    def _rows(self, unroll: Unroll, rows: slice) -> tuple[Tree, torch.Tensor]:
        """(obs, first) of some rows, where the model computes."""
        return tree_map(
            lambda part: torch.as_tensor(part[rows], device=self.device),
            (unroll.obs, unroll.first),
        )

    def _finish(self, lane: LaneState, unroll: Unroll, t: int) -> None:
        """Write what the actions of row t caused, and the observation of row t+1."""
        step = lane.envs.recv()
        self.fresh.discard(lane.index)
        self.beat()
        self._spend(Word.TIME_ENV)
        unroll.reward[t] = step.reward
        unroll.terminated[t] = step.terminated
        unroll.truncated[t] = step.truncated
        unroll.valid[t] = step.valid
        unroll.episode_return[t] = step.episode_return
        unroll.episode_length[t] = step.episode_length
        lane.obs, lane.first = step.obs, step.first
        lane.new_life = step.first | step.terminated
        lane.step = np.where(step.first, 0, lane.step + 1)
        self._observe(lane, unroll, t + 1)

    # -- what the learner can see ----------------------------------------------------------------

    def beat(self) -> None:
        """Say that this actor is alive, and will be for some time without saying so while
        environments are made and make their first step."""
        now = time.monotonic_ns() + bool(self.fresh) * FIRST_STEP_NANOSECONDS
        self.words[Word.BEAT] = now

    def _spend(self, word: Word) -> None:
        """Book the time since the last call."""
        now = time.monotonic_ns()
        self.words[word] += now - self._mark
        self._mark = now
