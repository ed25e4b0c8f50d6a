"""What the learner is asked for beside an algorithm: device, threads, periods, what to keep."""

from __future__ import annotations

import os
import shutil
import sysconfig
from dataclasses import dataclass
from typing import Any

import torch

from asyncrl.limits import usable_cores
from asyncrl.models.precision import device_called, is_large


@dataclass(frozen=True)
class LearnerConfig:
    """Where and how often the learner does what it does beside updates."""

    device: str = "auto"
    """"auto": the GPU where there is one."""
    num_threads: int = 0
    """Torch threads for learning. 0: as many as cores or fewer, whatever is fastest as the run goes
    on, or as few as keep up with the actors; a single one for a small model."""
    compile: bool = False
    """Have losses and their gradients compiled by torch.compile. Updates of small nets are faster,
    those of convolutions on a CPU slower; each start spends 10 to 60 s on it. LSTMs stay as they
    are. Needs a C++ compiler and Python's headers."""
    sync_period: int = 1
    """Updates (of whole rollouts, in A2C and PPO) between two syncs of the ring into the store."""
    publish_period: int = 0
    """Updates between two publications of the weights (0: as the algorithm suggests)."""
    log_seconds: float = 5.0
    """Between two rows of metrics."""
    checkpoint_seconds: float = 300.0
    """Between two checkpoints where actors run freely."""
    checkpoint_steps: int = 100_000
    """Env steps between two checkpoints in lockstep and serial, where time must decide nothing."""
    keep_checkpoints: int = 3
    """How many of the newest stay, beside the best by evaluation."""
    save_replay: bool = True
    """Keep the replay on disk too; the two newest checkpoints have theirs."""
    tensorboard: bool = True
    """Write metrics as event files too."""

    def __post_init__(self):
        for name in ("sync_period", "checkpoint_steps", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected learner.{name} >= 1, got {getattr(self, name)}")
        for name in ("log_seconds", "checkpoint_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"expected learner.{name} > 0, got {getattr(self, name)}")
        for name in ("num_threads", "publish_period"):
            if getattr(self, name) < 0:
                raise ValueError(f"expected learner.{name} >= 0, got {getattr(self, name)}")

    def resolved_threads(self, model: torch.nn.Module) -> int:
        """Where layers are small, more threads would only wait for each other; beside a GPU they
        only gather batches."""
        most = 4 if self.resolved_device().type == "cuda" else usable_cores()
        return self.num_threads or (min(most, usable_cores()) if is_large(model) else 1)

    def resolved_device(self) -> torch.device:
        return device_called(self.device)

    def build(self, algorithm: Any, model: torch.nn.Module) -> Any:
        """What learns, on its device, from an algorithm's configuration."""
        built = algorithm.build(model, self.resolved_device())
        if self.compile:
            check_compiler()
            if not hasattr(built, "compile"):
                raise ValueError(
                    f"expected compile() of {type(built).__name__} for learner.compile, got none; "
                    "write it, or leave the option out"
                )
            torch._inductor.config.compile_threads = 1  # or it leaves processes behind
            built.compile()
        return built


def check_compiler() -> None:
    """ValueError where torch.compile would fail at the first update."""
    compiler, headers = os.environ.get("CXX", "g++"), sysconfig.get_paths()["include"]
    missing = "" if shutil.which(compiler) else f"no compiler called {compiler}"
    if not os.path.exists(os.path.join(headers, "Python.h")):
        missing = missing or f"no Python.h in {headers}"
    if missing:
        raise ValueError(
            f"expected a C++ compiler and Python's headers for learner.compile, got {missing}; "
            "install them (apt-get install g++ python3-dev), name a compiler in CXX, or leave the "
            "option out"
        )
