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

from asyncrl.algorithms.gradient import Metrics
from asyncrl.env_group import EnvGroup, Step
from asyncrl.logs import EventLog

MAX_SKIPPED = 10  # steps of gradient descent in a row


class Diverged(RuntimeError):
    """Learning has left the finite numbers; what was saved before has not."""


class OutOfMemory(RuntimeError):
    """The GPU is too small for this run: starting it again would not help."""

    exit_status = 2  # of the learner's process


class UpdateGuard:
    """Makes the updates; counts those that were skipped because they were not finite.

    Whether one was skipped is asked of the device by `settle`, for all since the last time at once.
    """

    def __init__(self, model: nn.Module, events: EventLog):
        self.events = events
        self.num_skipped = self.in_a_row = self.whole = 0  # steps, steps, updates
        self._skipped: list[Tensor] = []
        self._parts, self._times_halved = 1, 0
        # A model may hold infinities of its own, in a mask: what is finite must stay so.
        self._finite = [
            name for name, tensor in model.state_dict().items()
            if tensor.is_floating_point() and bool(tensor.isfinite().all())
        ]  # fmt: skip

    def update(self, algorithm, store) -> Metrics:
        """One update. Where the GPU has no memory for it, the store gives back what was drawn, and
        it is made once more in two halves; OutOfMemory where these do not fit either."""
        metrics, error = self._attempt(algorithm, store)
        if not error:
            return metrics
        self._times_halved += 1
        if self._times_halved < 10 or self._times_halved % 1000 == 0:
            text = f"update ran out of GPU memory, tried once more in two halves: {error}"
            self.events.event("memory", text, times=self._times_halved)
        name = "batch_size" if store.streams else "num_unrolls"
        whole, sampled = getattr(store, name), store.limiter.sampled
        try:
            for half in filter(None, (whole - whole // 2, whole // 2)):
                setattr(store, name, half)
                metrics, error = self._attempt(algorithm, store)
                if error:
                    raise OutOfMemory(
                        "expected an update to fit into the GPU's memory, also in two halves, got: "
                        f"{error}; lower --algorithm.batch-size or the number of envs, or keep the "
                        "replay in main memory with --algorithm.replay.device cpu"
                    )
        finally:
            setattr(store, name, whole)
        if store.streams:  # counts each draw as a whole batch
            store.limiter.sampled = sampled + store.limiter.batch_size
        return metrics

    def _attempt(self, algorithm, store) -> tuple[Metrics, str]:
        """An update's metrics, or why the GPU had no memory for it: nothing was drawn then."""
        sampled = store.limiter.sampled
        unrolls = None if store.streams else store.unrolls.copy()
        try:
            metrics = dict(algorithm.update(store))
        except torch.cuda.OutOfMemoryError as error:
            words = str(error).partition("\n")[0] or "CUDA out of memory"
        else:
            self._look_at(metrics)
            return metrics, ""
        # Not above, where the traceback still holds the tensors of the failed update.
        torch.cuda.empty_cache()
        store.limiter.sampled = sampled
        if unrolls is not None:
            store.unrolls = unrolls
        return {}, words

    def _look_at(self, metrics: Metrics) -> None:
        if "loss/skipped" in metrics:  # of one step or of several
            skipped = metrics["loss/skipped"].detach()
            self._skipped.append(skipped.reshape(-1))
            metrics["loss/skipped"] = skipped.max() if skipped.ndim else skipped
        parts = int(metrics.get("loss/parts", 1))
        if parts > self._parts:
            self._parts = parts
            self.events.event("memory", "update ran out of GPU memory: batches are learned from in "
                              f"{parts} parts from now on")  # fmt: skip

    def settle(self) -> None:
        """Count what was skipped; Diverged after ten steps in a row, of two batches at least."""
        if not self._skipped:
            return
        flags, worst = iter(torch.cat(self._skipped).tolist()), 0  # steps of gradient descent
        for update in self._skipped:
            skipped = [next(flags) > 0 for _ in update]
            self.num_skipped += sum(skipped)
            for one in skipped:
                self.in_a_row = self.in_a_row + 1 if one else 0
            self.whole = self.whole + 1 if all(skipped) else 0
            if self.whole > 1:  # one batch, however many steps are made on it, may be bad by chance
                worst = max(worst, self.in_a_row)
        self._skipped.clear()
        if worst >= MAX_SKIPPED:
            raise Diverged(
                f"{worst} updates in a row were not finite and changed nothing; going back "
                "to the newest checkpoint. If this comes again, lower the learning rate"
            )

    def check(self, weights: dict[str, Tensor]) -> None:
        """Diverged if one of the model's state dict is not finite any more. One wait for the
        device."""
        with torch.no_grad():
            sums = [_sum(weights[name]) for name in self._finite]
            finite = torch.stack(sums).isfinite().tolist() if sums else []
        if not all(finite):
            name = self._finite[finite.index(False)]
            raise Diverged(
                f"expected finite weights, got others in {name}; they are neither published nor "
                "saved, going back to the newest checkpoint"
            )


class EnvFailed(Exception):
    """A step of the environments raised, or handed out what it must not."""


def _sum(tensor: Tensor) -> Tensor:
    """In a type that holds what the tensor's own does, and more of what is small."""
    return tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))


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
