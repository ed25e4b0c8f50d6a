"""What a built-in network is made of, in one launch file's words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from gymnasium import spaces

from asyncrl.models.layers import ACTIVATIONS
from asyncrl.models.torsos import IMAGE_TORSOS

if TYPE_CHECKING:
    from asyncrl.models import Network

HEADS = ("auto", "q", "actor_critic")
TORSOS = ("auto", *IMAGE_TORSOS)


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
    """Split Q into a state value and advantages; each has a last hidden layer of its own, which
    behind an LSTM, or an MLP of one layer, is one more."""
    head: Literal["auto", "q", "actor_critic"] = "auto"
    """q: a value for each action. actor_critic: a policy and a value of the state. auto: what the
    algorithm learns, q where there is none to ask."""
    lstm: int = 0
    """Size of an LSTM between torso and head (0: none)."""
    activation: Literal["relu", "tanh"] = "relu"
    """Of the MLP."""
    shared: bool = True
    """One torso for policy and value; else one each."""
    normalize_obs: bool = False
    """Scale observations by their running mean and variance (not images)."""
    normalize_returns: bool = False
    """Learn values in units of the returns' running mean and deviation (PopArt)."""
    initial_log_std: float = 0.0
    """Of continuous actions, before they are squashed into their bounds."""
    noisy: bool = False
    """Noise in the weights of the Q head and of the layer before it, learned, explores (noisy
    nets); evaluations go without it. Before an LSTM there is none: it would be remembered."""
    torso: Literal["auto", "nature", "small", "impala"] = "auto"
    """For images. nature: three convolutions, small: one, impala: a residual network of 15. auto:
    nature from 36 x 36 pixels on, else small."""
    torso_width: int = 1
    """Channels of the torso impala, as a multiple of 16, 32 and 32."""
    torso_pool: int = 0
    """Side to which the torso impala max-pools its last map (0: as it is)."""
    spectral_norm: bool = False
    """Residual convolutions of the torso impala divided by their spectral norm."""

    def __post_init__(self):
        known = self.head in HEADS or hasattr(self.head, "outputs")
        if not known or self.activation not in ACTIVATIONS or self.lstm < 0:
            raise ValueError(
                f"expected head of {HEADS}, activation of {tuple(ACTIVATIONS)} and lstm >= 0, got "
                f"{self.head!r}, {self.activation!r} and {self.lstm}"
            )
        if min((self.features, *self.hidden)) < 1:
            raise ValueError(
                f"expected features and hidden of at least 1, got {self.features} and {self.hidden}"
            )
        if self.lstm and not self.shared:
            raise ValueError(
                f"expected shared=True with an LSTM, got shared=False and lstm={self.lstm}; "
                "policy and value share one memory"
            )
        if self.torso not in TORSOS or self.torso_width < 1 or self.torso_pool < 0:
            raise ValueError(
                f"expected torso of {TORSOS}, torso_width >= 1 and torso_pool >= 0, got "
                f"{self.torso!r}, {self.torso_width} and {self.torso_pool}"
            )
        if self.torso != "impala" and (self.torso_width, self.torso_pool, self.spectral_norm) != (
            1, 0, False,
        ):  # fmt: skip
            raise ValueError(
                "expected torso_width, torso_pool and spectral_norm only with torso='impala', got "
                f"{self.torso_width}, {self.torso_pool} and {self.spectral_norm} with "
                f"{self.torso!r}"
            )
        if (self.noisy or self.dueling) and self.head == "actor_critic":
            raise ValueError(
                "expected noisy=True and dueling=True with a Q head only, got "
                f"noisy={self.noisy} and dueling={self.dueling} with head='actor_critic'; its "
                "policy is drawn from and needs no noise, and its value is a stream of its own"
            )

    def __call__(self, observation_space: spaces.Space, action_space: spaces.Space) -> Network:
        from asyncrl.models import Network

        return Network(self, observation_space, action_space)
