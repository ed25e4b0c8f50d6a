"""Models: a torso, a core and a head behind one contract, built in or the user's own.

    model.initial_state(B) -> state
    model(obs (T, B, ...), first (T, B), state) -> (outputs {name: (T, B, ...)}, state)
    model.advance(obs, first, state) -> state      as above but for less; need not be there
    model.prepare(obs, first, state) -> (obs, state)  of one row (1, B, ...), as far as no weights
                                                   matter; need not be there, and may be None

A model never samples an action and knows nothing of processes. `model.frame_stack` says how many
frames its core stacks; the replay then gathers them at sampling. What outputs there are:

    "q" (A)                           the value of each action, perhaps beside what is known of its
                                      distribution; see `return_heads`
    "value" ()                        of the state, beside one of:
    "logits" (A) or (D, A)            of D choices, -inf where one has fewer than A categories
    "mean", "log_std", "low", "high"  each of the action's shape; see `heads.Gaussian`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from gymnasium import spaces
from torch import Tensor, nn

from asyncrl.models.config import ModelConfig
from asyncrl.models.cores import FrameStack
from asyncrl.models.heads import ActorCriticHead, QHead
from asyncrl.models.layers import SpectralConv2d, StreamConfig
from asyncrl.models.lstm import LSTM
from asyncrl.models.normalizers import ObservationNormalizer
from asyncrl.models.precision import without_autocast
from asyncrl.models.torsos import encoder, has_image
from asyncrl.types import Tree, tree_map


class Network(nn.Module):
    """Frame stack -> normaliser -> torso -> LSTM -> head; what is not asked for is not there."""

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
        normalizes = config.normalize_obs
        self.obs_normalizer = ObservationNormalizer(observation_space) if normalizes else None

        # Whether the last layer is the head's: of each of its streams, behind an LSTM one more.
        own_layer = config.dueling or getattr(config.head, "own_layer", False)
        if config.torso != "auto" and not has_image(observation_space):
            raise ValueError(
                f"expected an image for the torso {config.torso}, got {observation_space}; other "
                "observations are served by `hidden`"
            )

        def torso() -> nn.Module:
            last = not own_layer or config.lstm > 0
            noisy = config.noisy and not own_layer and not config.lstm  # or it would be remembered
            its = replace(config, noisy=noisy)
            built = encoder(observation_space, self.frame_stack, its, last)
            return built.to(memory_format=torch.channels_last)

        self.encoder = torso()
        self.value_encoder = None if config.shared else torso()
        self.lstm = LSTM(self.encoder.features, config.lstm) if config.lstm else None
        self.normalizes_returns = config.normalize_returns
        features = config.lstm or self.encoder.features
        if config.head == "actor_critic":
            self.head = ActorCriticHead(
                features, action_space, config.normalize_returns, config.initial_log_std
            )
        elif config.normalize_obs or config.normalize_returns or not config.shared:
            raise ValueError(
                "expected normalize_obs, normalize_returns and shared=False only with "
                f'head="actor_critic", got them with head={config.head!r}; value-based algorithms '
                "make no use of them"
            )
        else:
            width = self.encoder.width if own_layer else 0
            activation = "relu" if has_image(observation_space) else config.activation
            stream = StreamConfig(features, width, activation, config.noisy)
            build = QHead if config.head in ("auto", "q") else config.head.build
            self.head = build(stream, action_space, config.dueling)

        images = not self.is_tree and len(observation_space.shape) == 2
        stacks_images = images and self.frame_stack > 1 and not config.lstm
        self.prepare = self.stack.prepare if stacks_images else None
        # Two threads may be in it at once: its forward pass changes nothing in it.
        self.pure = not any(isinstance(layer, SpectralConv2d) for layer in self.modules())

    def initial_state(self, num_envs: int) -> dict[str, Tensor]:
        cores = [] if self.is_tree else [self.stack]
        cores += [self.lstm] if self.lstm else []
        return {name: x for core in cores for name, x in core.initial_state(num_envs).items()}

    def forward(self, obs: Tree, first: Tensor, state: dict) -> tuple[dict[str, Tensor], dict]:
        outputs, after, _ = self.states(obs, first, state, ())
        return outputs, after

    def advance(self, obs: Tree, first: Tensor, state: dict) -> dict:
        """The state behind rows (T, B, ...): that of `forward`, for less where it is frames."""
        if self.lstm is not None or self.is_tree:
            return self(obs, first, state)[1]
        return self.stack.advance(obs, first, state)

    def states(
        self, obs: Tree, first: Tensor, state: dict, rows: Sequence[int]
    ) -> tuple[dict[str, Tensor], dict, list[dict]]:
        """`forward`, and the LSTM's states before `rows`."""
        T, B = first.shape
        after, states = state, []
        if not self.is_tree:
            obs, after = self.stack(obs, first, state)
        if self.obs_normalizer is not None:
            obs = self.obs_normalizer(obs)
        merged = tree_map(lambda leaf: leaf.flatten(0, 1), obs)
        torsos = [self.encoder, self.value_encoder] if self.value_encoder else [self.encoder]
        features = [torso(merged) for torso in torsos]
        if self.lstm is not None:
            with without_autocast(first.device.type):  # what is kept needs 24 bits
                before = features[0].float().unflatten(0, (T, B))
                behind, states = self.lstm.states(before, first, state, [*rows, T])
            features, after = [behind.flatten(0, 1)], after | states[-1]
        outputs = self.head(*features)
        outputs = {name: part.view(T, B, *part.shape[1:]) for name, part in outputs.items()}
        return outputs, after, states[:-1]

    # -- normalisers: an algorithm moves them, once for each rollout -----------------------------

    def update_statistics(self, obs: Tree, valid: Tensor) -> None:
        """Take obs (T, B, ...) into the running statistics where valid (T, B)."""
        if self.obs_normalizer is not None:
            self.obs_normalizer.update(obs, valid)

    def renormalize(self, value_target: Tensor, valid: Tensor) -> None:
        """Take value_target (T, B), in true units, into the returns' scale where valid (T, B);
        the model's outputs stay what they are."""
        if self.normalizes_returns:
            self.head.value.renormalize(value_target, valid)

    @property
    def return_scale(self) -> Tensor | float:
        """What losses divide errors of the value by."""
        return self.head.value.scale.float() if self.normalizes_returns else 1.0
