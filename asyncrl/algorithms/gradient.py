"""One step of gradient descent, made alike by all algorithms: schedule, clipping, guard."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from asyncrl.schedules import value_at

OptimizerName = Literal["adam", "rmsprop"]


class GradientStep:
    """An optimizer whose learning rate follows a schedule over env steps.

    The gradient's norm is clipped to `max_grad_norm` (0: as it is). Where it is not finite the step
    is skipped: weights and moments stay as they are. `count` is the number of calls.
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
        self.learning_rate, self.max_grad_norm = learning_rate, max_grad_norm
        rate = value_at(learning_rate, 0)
        if optimizer == "adam":
            self.optimizer = torch.optim.Adam(self.parameters, lr=rate, eps=eps, fused=True)
        else:
            self.optimizer = torch.optim.RMSprop(self.parameters, lr=rate, alpha=0.99, eps=eps)
        self.count = 0

    def __call__(self, loss: Tensor, env_steps: int) -> dict[str, Tensor]:
        """Descend; returns the gradient's norm and whether it was skipped as 0-d tensors."""
        for group in self.optimizer.param_groups:
            group["lr"] = value_at(self.learning_rate, env_steps)
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm or float("inf"))
        skipped = (~torch.isfinite(norm)).float()
        if isinstance(self.optimizer, torch.optim.Adam):
            # Fused, it leaves everything as it is where this is 1, without asking the device.
            self.optimizer.found_inf = skipped
            self.optimizer.step()
        elif not skipped:
            self.optimizer.step()
        self.count += 1
        return {"loss/grad_norm": norm, "loss/skipped": skipped}

    def state_dict(self) -> dict:
        """Nested dict of tensors and numbers."""
        return {"moments": self.optimizer.state_dict()["state"], "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        groups = self.optimizer.state_dict()["param_groups"]
        saved = state.get("moments", {})  # nothing before the first step
        moments = {int(index): moment for index, moment in saved.items()}
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.count = state["count"]


def check_gradient_settings(learning_rate: Any, max_grad_norm: float) -> None:
    """ValueError for what cannot be a learning rate or a norm."""
    if min(value_at(learning_rate, 0), max_grad_norm) < 0:
        raise ValueError(
            "expected learning_rate and max_grad_norm of at least 0, got "
            f"{learning_rate} and {max_grad_norm}"
        )
