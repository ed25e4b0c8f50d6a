"""What keeps a run from learning nonsense: updates that are not finite, memory that runs out,
environments that fail.

`UpdateGuard` stands between the learner and its algorithm, `GuardedEnvs` between an actor and its
environments. Both only tell; the learner's process ends and is resumed from its newest checkpoint,
the actor makes its environments anew.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from asyncrl.env_group import EnvGroup, Step
from asyncrl.logs import EventLog

MAX_SKIPPED = 10  # updates in a row


class Diverged(RuntimeError):
    """Learning has left the finite numbers; what was saved before has not."""


class UpdateGuard:
    """Makes the updates; counts those that were skipped because they were not finite.

    Whether one was skipped is asked of the device by `settle`, for all since the last time at once.
    """

    def __init__(self, model: nn.Module, events: EventLog):
        self.model, self.events = model, events
        self.num_skipped = self.in_a_row = 0
        self._skipped: list[Tensor] = []
        self._retries = False  # the last update ran out of memory
        # A model may hold infinities of its own, in a mask: what is finite must stay so.
        self._finite = [
            name for name, tensor in model.state_dict().items()
            if tensor.is_floating_point() and bool(tensor.isfinite().all())
        ]  # fmt: skip

    def update(self, algorithm, store) -> dict[str, Tensor]:
        """One update; {} where the GPU had no memory for it, and the next one tries again."""
        try:
            metrics = algorithm.update(store)
        except torch.cuda.OutOfMemoryError as error:
            if self._retries:
                raise RuntimeError(
                    "expected an update to fit into the GPU's memory, also at a second try, got: "
                    f"{error}; lower --algorithm.batch-size or the number of envs, or keep the "
                    "replay in main memory with --algorithm.replay.device cpu"
                ) from error
            words = str(error).splitlines()[0]
        else:
            self._retries = False
            if "loss/skipped" in metrics:
                self._skipped.append(metrics["loss/skipped"].detach())
            return metrics
        # Not above, where the traceback still holds the tensors of the failed update.
        self._retries = True
        torch.cuda.empty_cache()
        self.events.event("memory", f"update ran out of GPU memory, tried once more: {words}")
        return {}

    def settle(self) -> None:
        """Count what was skipped; Diverged after ten in a row."""
        if not self._skipped:
            return
        most = 0  # in a row
        for skipped in torch.stack(self._skipped).tolist():
            self.num_skipped += skipped > 0
            self.in_a_row = self.in_a_row + 1 if skipped else 0
            most = max(most, self.in_a_row)
        self._skipped.clear()
        if most >= MAX_SKIPPED:
            raise Diverged(
                f"{most} updates in a row were not finite and changed nothing; going back "
                "to the newest checkpoint. If this comes again, lower the learning rate"
            )

    def check(self) -> None:
        """Diverged if a weight is not finite any more. One wait for the device."""
        weights = self.model.state_dict()
        with torch.no_grad():
            sums = [weights[name].sum(dtype=torch.float32) for name in self._finite]
        finite = torch.stack(sums).isfinite() if sums else torch.ones(1, dtype=torch.bool)
        if not finite.all():
            name = self._finite[finite.tolist().index(False)]
            raise Diverged(
                f"expected finite weights, got others in {name}; they are neither published nor "
                "saved, going back to the newest checkpoint"
            )


class EnvFailed(Exception):
    """A step of the environments raised, or handed out what it must not."""


class GuardedEnvs:
    """An `EnvGroup` whose failed steps can be told from an actor's own errors.

    Where they cannot even be made or reset, that comes through as it is.
    """

    def __init__(self, envs: EnvGroup):
        self._envs, self.num_envs = envs, envs.num_envs
        self.reset, self.close = envs.reset, envs.close

    def send(self, action: np.ndarray) -> None:
        self._try(self._envs.send, action)

    def recv(self) -> Step:
        return self._try(self._envs.recv)

    def _try(self, call: Callable, *arguments):
        try:
            return call(*arguments)
        except Exception as error:
            raise EnvFailed(f"{type(error).__name__}: {error}") from error
