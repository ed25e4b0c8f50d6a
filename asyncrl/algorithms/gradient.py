"""One step of gradient descent, made alike by all algorithms: schedule, clipping, guard."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from asyncrl.models.precision import is_large
from asyncrl.schedules import check_range, value_at

OptimizerName = Literal["adam", "rmsprop"]
# What an update says of itself, by name: 0-d tensors and, where working it out costs something,
# functions that give one, called when a row of metrics is written.
Metrics = dict[str, Tensor | Callable[[], Tensor]]
NOT_SKIPPED, SKIPPED = torch.tensor(0.0), torch.tensor(1.0)
LATE = 1e6  # steps, behind which Adam corrects no bias of its moments any more


def frozen_copy(model: nn.Module) -> nn.Module:
    """The same weights, which nothing is learned for."""
    copy = deepcopy(model).requires_grad_(False)
    for module in copy.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()  # or cuDNN copies all weights at each call
    return copy


class GradientStep:
    """An optimizer whose learning rate follows a schedule over env steps.

    The gradient's norm is clipped to `max_grad_norm` (0: as it is). Where it is not finite the step
    is skipped: weights and moments stay as they are. `count` is the number of calls.

    RMSprop is Adam without a mean of gradients or a correction of bias, so it is computed by the
    same fused kernel: one pass over the weights instead of torch.optim.RMSprop's five. Its second
    moments begin at 1, as in TensorFlow and in the RMSpropTFLike that Stable-Baselines3 has for
    A2C. From torch's 0 each weight's first step would be ten learning rates long, however small its
    gradient. `eps` is added to the root, as in torch.

    The parameters of a small net on a CPU become parts of one vector, which norm, clipping and
    optimizer take in a call each: what they do costs less there than being called for each
    parameter. One that has no gradient then counts as having one of 0.
    """

    def __init__(
        self,
        model: nn.Module,
        learning_rate: Any,
        max_grad_norm: float,
        eps: float,
        optimizer: OptimizerName = "adam",
    ):
        self.parameters = list(model.parameters())
        self.vector = None if is_large(model) else _one_vector(self.parameters)
        self.leaves = self.parameters if self.vector is None else [self.vector]
        self.learning_rate, self.max_grad_norm = learning_rate, max_grad_norm
        rate = value_at(learning_rate, 0)
        self.optimizer_name, betas = optimizer, (0.9, 0.999) if optimizer == "adam" else (0.0, 0.99)
        self.optimizer = torch.optim.Adam(self.leaves, rate, betas, eps, fused=True)
        if not any(leaf.is_cuda for leaf in self.leaves):
            # Of any GPU there is it asks at each step what is going on, and so begins to use it:
            # one that does not work would stop a learner on the CPU.
            for name in ("_accelerator", "_cuda"):  # of later and of earlier PyTorch
                setattr(self.optimizer, f"{name}_graph_capture_health_check", lambda: None)
        self._begin_moments()
        self.count = 0
        self.parts = 1  # that batches are learned from in, for want of memory

    def __call__(self, loss: Tensor, env_steps: int) -> dict[str, Tensor]:
        """Descend; returns the gradient's norm and whether it was skipped as 0-d tensors."""
        self._forget()
        loss.backward()
        return self._step(env_steps)

    def on_means(self, means: Callable[[slice], Metrics], valid: Tensor, env_steps: int) -> Metrics:
        """Descend on the "loss" of a batch (T, N); returns its other means too.

        means(columns): means over the valid steps of some columns, the loss with its graph. Where
        the GPU has no memory for the batch, it is tried once more in twice as many parts, and so
        are those to come: the gradient is that of the whole.
        """
        try:
            found = self._backward(means, valid)
        except torch.cuda.OutOfMemoryError:
            if self.parts >= valid.shape[1]:
                raise
            found = None
        if found is None:  # not above, where the traceback still holds the failed one's tensors
            torch.cuda.empty_cache()
            self.parts *= 2
            found = self._backward(means, valid)
        if self.parts > 1:
            found["loss/parts"] = torch.tensor(float(self.parts))
        return found | self._step(env_steps)

    def _backward(self, means: Callable[[slice], Metrics], valid: Tensor) -> Metrics:
        """The whole batch's gradient, and its means, from parts that count by their valid steps."""
        self._forget()
        if self.parts == 1:
            found = means(slice(None))
            found.pop("loss").backward()
            return found
        N, total = valid.shape[1], valid.sum().clamp(min=1)
        size = -(-N // self.parts)
        found: Metrics = {}
        for begin in range(0, N, size):
            columns = slice(begin, begin + size)
            share = valid[:, columns].sum() / total
            for name, value in means(columns).items():
                if name == "loss":
                    value.backward(share)
                else:
                    value = value() if callable(value) else value
                    found[name] = found.get(name, 0.0) + share * value
        return found

    def _forget(self) -> None:
        """The last gradient: `zero_grad` without what it reports to profilers."""
        for parameter in self.parameters:
            parameter.grad = None

    def _step(self, env_steps: int) -> dict[str, Tensor]:
        for group in self.optimizer.param_groups:
            group["lr"] = value_at(self.learning_rate, env_steps)
        gradients = self._gradients()
        one = len(gradients) == 1
        norm = torch.linalg.vector_norm(*gradients) if one else nn.utils.get_total_norm(gradients)
        most = self.max_grad_norm or float("inf")
        if norm.is_cuda:
            # Fused, a step leaves everything as it is where this is 1, without asking the device.
            # On a CPU asking is for free, and this costs an operation more for each parameter.
            skipped = self.optimizer.found_inf = (~torch.isfinite(norm)).float()
            nn.utils.clip_grads_with_norm_(self.leaves, most, norm)
            self.optimizer.step()
        else:
            length = norm.item()
            finite = math.isfinite(length)
            skipped = NOT_SKIPPED if finite else SKIPPED
            if most < length and finite:
                for gradient in gradients:
                    gradient.mul_(most / (length + 1e-6))  # as torch has it
            if finite:
                self.optimizer.step()
        self.count += 1
        return {"loss/grad_norm": norm, "loss/skipped": skipped}

    def _gradients(self) -> list[Tensor]:
        """Of the leaves, where they have one."""
        if self.vector is not None:
            known = (torch.zeros_like(x) if x.grad is None else x.grad for x in self.parameters)
            self.vector.grad = torch.cat([gradient.reshape(-1) for gradient in known])
        return [leaf.grad for leaf in self.leaves if leaf.grad is not None]

    def state_dict(self) -> dict:
        """Nested dict of tensors and numbers."""
        return {"moments": self._moments(), "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        self._begin_moments()
        moments = self._moments()
        for index, saved in state.get("moments", {}).items():
            if "square_avg" in saved:  # of torch.optim.RMSprop, in checkpoints of older revisions
                saved = {"exp_avg_sq": saved["square_avg"]}
            for name, tensor in saved.items():
                its = moments[int(index)][name]
                # Parts of one vector have a step in common; one that had no gradient knows of none.
                its.copy_(torch.maximum(its, tensor.to(its.device)) if name == "step" else tensor)
        self.count = state["count"]

    def _begin_moments(self) -> None:
        """Adam itself would make its own at the first step, but half of them where the GPU has no
        memory for all."""
        step, square = (LATE, 1.0) if self.optimizer_name == "rmsprop" else (0.0, 0.0)
        for leaf in self.leaves:
            self.optimizer.state[leaf] = {
                "step": torch.tensor(step, device=leaf.device),
                "exp_avg": torch.zeros_like(leaf, requires_grad=False),
                "exp_avg_sq": torch.full_like(leaf, square, requires_grad=False),
            }

    def _moments(self) -> dict[int, dict[str, Tensor]]:
        """By index of the parameter; they are the optimizer's own, or parts of these."""
        moments = [self.optimizer.state[leaf] for leaf in self.leaves]
        if self.vector is not None:
            (whole,) = moments
            step = whole["step"]
            parts = (_parts(whole[name], self.parameters) for name in ("exp_avg", "exp_avg_sq"))
            moments = [
                {"step": step, "exp_avg": mean, "exp_avg_sq": square}
                for mean, square in zip(*parts, strict=True)
            ]
        return dict(enumerate(moments))


def _one_vector(parameters: list[nn.Parameter]) -> Tensor | None:
    """What parameters are parts of from now on; None where they cannot be, and on a GPU."""
    fit = all(x.is_contiguous() and x.device.type == "cpu" for x in parameters)
    if not fit or len({parameter.dtype for parameter in parameters}) != 1:
        return None
    vector = torch.cat([parameter.detach().flatten() for parameter in parameters])
    for parameter, part in zip(parameters, _parts(vector, parameters), strict=True):
        parameter.data = part
    return vector.requires_grad_()


def _parts(vector: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Of a vector, views in the parameters' shapes."""
    parts = vector.split([parameter.numel() for parameter in parameters])
    return [part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)]


def check_gradient_settings(learning_rate: Any, max_grad_norm: float, eps: float) -> None:
    """ValueError for what cannot be a learning rate, a norm or an optimizer's epsilon."""
    check_range("learning_rate", learning_rate)
    check_range("max_grad_norm", max_grad_norm)
    check_range("eps of the optimizer", eps, above=True)
