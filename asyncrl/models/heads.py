"""Heads: from features to what a policy acts on and an algorithm learns from, by name."""

from __future__ import annotations

from gymnasium import spaces
from torch import Tensor, nn

from asyncrl.models.torsos import scale


class QHead(nn.Module):
    """{"q": (N, A)}: the value of each discrete action; dueling splits it (Wang et al. 2016)."""

    def __init__(self, features: int, action_space: spaces.Space, dueling: bool):
        super().__init__()
        if not isinstance(action_space, spaces.Discrete):
            raise ValueError(
                f"expected a Discrete action space for a Q head, got {action_space}; "
                "value-based algorithms serve discrete actions only"
            )
        self.advantage = scale(nn.Linear(features, int(action_space.n)), 0.01)
        self.value = scale(nn.Linear(features, 1), 1.0) if dueling else None

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        q = self.advantage(features)
        if self.value is not None:
            q = self.value(features) + q - q.mean(1, keepdim=True)
        return {"q": q}
