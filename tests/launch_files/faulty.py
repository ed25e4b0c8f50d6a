"""The recorder's run, with environments and updates that fail as $FAULT says.

FAULT is JSON, one fault or a list of them: "kind", and where and when: "actor" its index, "step"
from this env step or update of a process on, "once" a file that is made at the first time and
excludes another, "chance" 0 to 1.
Each actor process counts its env steps in $STEPS/ACTOR-GENERATION, a byte each.
"""

import ctypes
import dataclasses
import json
import os
import random
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import recorder
import torch

from asyncrl import EnvConfig

FAULTS = json.loads(os.environ.get("FAULT", "[]"))
FAULTS = FAULTS if isinstance(FAULTS, list) else [FAULTS]
ROLE, INDEX, *_ = *sys.argv[1:3], "", ""
STEPS = None
if ROLE == "actor" and "STEPS" in os.environ:
    path = Path(os.environ["STEPS"]) / f"{INDEX}-{sys.argv[5]}"
    STEPS = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))
BATCHES = (lambda obs: obs[:, :2], lambda obs: obs.astype(np.float64))


def is_due(*kinds: str, step: int = 0) -> bool:
    """Whether a fault of one of these kinds is to happen here and now."""
    return any(_is_due(fault, step) for fault in FAULTS if fault.get("kind") in kinds)


def _is_due(fault: dict, step: int) -> bool:
    if step < fault.get("step", 0) or random.random() >= fault.get("chance", 1):
        return False
    if ROLE == "actor" and fault.get("actor", int(INDEX)) != int(INDEX):
        return False
    if "once" in fault:
        try:
            os.close(os.open(fault["once"], os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
    return True


class Faulty(recorder.Moments):
    steps = 0  # of all environments of this process

    def __init__(self):
        super().__init__()
        if ROLE == "actor" and is_due("make"):
            raise RuntimeError("the cartridge is missing")

    def step(self, action):
        if ROLE != "actor":
            return super().step(action)
        Faulty.steps += 1
        if STEPS is not None:
            os.write(STEPS, b".")
        late = Faulty.steps
        if is_due("raise", step=late):
            raise RuntimeError("the cartridge caught fire")
        if is_due("segv", step=late):
            ctypes.string_at(0)
        if is_due("abort", step=late):
            os.abort()
        if is_due("exit", step=late):
            os._exit(0)
        if is_due("sleep", step=late):
            time.sleep(600)
        while is_due("spin", step=late):
            while True:
                pass
        obs, reward, *rest = super().step(action)
        if is_due("bad-data", step=late):
            if late % 2:
                obs = obs + np.float32(random.choice(NOT_FINITE))
            else:
                reward = random.choice(NOT_FINITE)
        if is_due("huge", step=late):
            reward = 1e30
        return obs, reward, *rest


class FaultyDQN(recorder.RecordingDQN):
    def store(self, spec, num_lanes, seed):
        if "RECORD" in os.environ:
            return super().store(spec, num_lanes, seed)
        return super(recorder.RecordingDQN, self).store(spec, num_lanes, seed)

    poisoned = 0  # updates still to come

    def update(self, store):
        if is_due("nan-batches", step=self.updates):
            self.poisoned = 12
        if self.poisoned:
            self.poisoned -= 1
            store.reward.fill_(float("nan"))
        if is_due("nan-weights", step=self.updates):
            with torch.no_grad():
                next(iter(self.model.parameters())).fill_(float("nan"))
        if is_due("gpu-memory", step=self.updates):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return super().update(store)


class FaultyConfig(recorder.RecordingConfig):
    def build(self, model, device):
        return FaultyDQN(self, model, device)


class Vector(gym.vector.SyncVectorEnv):
    """Where wrong shapes and dtypes come in: it would mend those of its environments."""

    def step(self, actions):
        obs, *rest = super().step(actions)
        if ROLE == "actor" and is_due("bad-data", step=Faulty.steps):
            obs = random.choice(BATCHES)(obs)
        return obs, *rest


def make(num_envs):
    return Vector([Faulty] * num_envs)


before = recorder.config.algorithm
fields = {field.name: getattr(before, field.name) for field in dataclasses.fields(before)}
config = dataclasses.replace(recorder.config, env=EnvConfig(make), algorithm=FaultyConfig(**fields))
