"""Models: a torso, a core and a head behind one contract, built in or the user's own.

    model.initial_state(B) -> state
    model(obs (T, B, ...), first (T, B), state) -> (outputs {name: (T, B, ...)}, state)

A model never samples an action and knows nothing of processes. `model.frame_stack` says how many
frames its core stacks; the replay then gathers them at sampling.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from gymnasium import spaces
from torch import Tensor, nn

from asyncrl.models.cores import FrameStack
from asyncrl.models.heads import QHead
from asyncrl.models.torsos import encoder
from asyncrl.types import tree_map


@dataclass(frozen=True)
class ModelConfig:
    """The built-in networks: calling it with an environment's spaces builds one."""

    frame_stack: int = 1
    """Frames stacked, newest last (4 for Atari; 1: none)."""
    features: int = 512
    """Width of the layer behind the convolutions of an image."""
    hidden: tuple[int, ...] = (128, 128)
    """Layers of the MLP that serves observations other than images."""
    dueling: bool = False
    """Split Q into a state value and advantages."""

    def __call__(self, observation_space: spaces.Space, action_space: spaces.Space) -> Network:
        return Network(self, observation_space, action_space)


class Network(nn.Module):
    """Frame stack -> encoder -> Q head."""

    def __init__(
        self, config: ModelConfig, observation_space: spaces.Space, action_space: spaces.Space
    ):
        super().__init__()
        self.frame_stack = config.frame_stack
        self.is_tree = isinstance(observation_space, (spaces.Dict, spaces.Tuple))
        if self.frame_stack < 1 or (self.is_tree and self.frame_stack > 1):
            raise ValueError(
                "expected frame_stack >= 1, and 1 for Dict and Tuple observations, got "
                f"{self.frame_stack} for {type(observation_space).__name__}"
            )
        if not self.is_tree:
            dtype = getattr(torch, str(observation_space.dtype))
            self.stack = FrameStack(self.frame_stack, observation_space.shape, dtype)
        self.encoder = encoder(observation_space, self.frame_stack, config.features, config.hidden)
        self.head = QHead(self.encoder.features, action_space, config.dueling)
        self.to(memory_format=torch.channels_last)

    def initial_state(self, num_envs: int) -> dict[str, Tensor]:
        return {} if self.is_tree else self.stack.initial_state(num_envs)

    def forward(self, obs, first: Tensor, state: dict) -> tuple[dict[str, Tensor], dict]:
        T, B = first.shape
        if not self.is_tree:
            obs, state = self.stack(obs, first, state)
        merged = tree_map(lambda leaf: leaf.flatten(0, 1), obs)
        features = self.encoder(merged)
        with torch.autocast(first.device.type, enabled=False):  # values need more than 8 bits
            outputs = self.head(features.float())
        return {name: output.unflatten(0, (T, B)) for name, output in outputs.items()}, state
