"""A learner as a run has it, and noise to fill its replay with; for other benchmarks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from measure import REPOSITORY

from asyncrl.actor import context_fields
from asyncrl.config import resolve
from asyncrl.costs import wire
from asyncrl.learner import Learner
from asyncrl.policies import as_mixture
from asyncrl.transport.ring import Ring
from asyncrl.transport.shared_memory import Segment
from asyncrl.transport.weights import WeightsBuffer, WeightsWriter, weights_fields


class FullReplay:
    """`learner`, not yet started, of a launch file and its options; `insert` gives it unrolls of
    noise, in which no episode ends, by the way that unrolls from actors take."""

    def __init__(self, folder: Path, launch: str, save_replay: bool, options: Sequence[str] = ()):
        config = resolve(REPOSITORY / launch, list(options))
        torch.set_flush_denormal(True)
        spec, model = wire(config)
        self.lanes, slots = config.actor.num_lanes, config.actor.slots_per_lane
        self.segments = [
            Segment.create("lane", Ring.nbytes(spec, slots)) for _ in range(self.lanes)
        ]
        names = as_mixture(config.policy).names
        fields = weights_fields(model.state_dict(), context_fields(len(names)))
        self.weights = Segment.create("weights", WeightsBuffer.nbytes(fields))
        self.learner = Learner(
            dataclasses.replace(config.learner, save_replay=save_replay),
            config.actor,
            config.learner.build(config.algorithm, model),
            model,
            spec,
            [Ring(segment.buffer, spec, slots) for segment in self.segments],
            WeightsWriter(WeightsBuffer(self.weights.buffer, fields)),
            names,
            folder,
            config.seed,
            config.total_env_steps,
        )
        self.learner.algorithm.teams.use(config.learner.resolved_threads(model))
        self.env_steps = spec.unroll_length * spec.num_envs  # of an unroll
        self.sequence, self.unrolls = 0, []
        rng = np.random.default_rng(0)
        for _ in range(2):
            raw = rng.integers(256, size=spec.layout.nbytes, dtype=np.uint8)
            unroll = spec.layout.views(raw)
            for flag in (unroll.first, unroll.terminated, unroll.truncated):
                flag[...] = False
            unroll.valid[...] = True
            for leaf in (unroll.reward, unroll.action, unroll.policy):
                leaf[...] = 0
            unroll.episode_length[...] = 0
            for number in unroll.header:
                number[...] = 0
            self.unrolls.append((unroll, raw))

    def insert(self) -> None:
        """An unroll more on each lane."""
        for lane in range(self.lanes):
            unroll, raw = self.unrolls[(self.sequence + lane) % len(self.unrolls)]
            unroll.header.lane[...], unroll.header.sequence[...] = lane, self.sequence
            self.learner._take(lane, unroll, raw)
        self.sequence += 1

    def fill(self) -> None:
        """Until the oldest rows have been overwritten."""
        store = self.learner.store
        while store.limiter.inserted < 1.02 * store.capacity:
            self.insert()
