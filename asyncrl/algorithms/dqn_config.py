"""The switches of the value-based family, and what they refuse."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from asyncrl.algorithms.gradient import check_gradient_settings
from asyncrl.models.precision import Precision
from asyncrl.models.return_heads import C51, IQN, QR
from asyncrl.policies import EpsilonGreedy
from asyncrl.schedules import check_range
from asyncrl.stores.limiter import RateLimiter
from asyncrl.stores.replay import Replay, ReplayConfig
from asyncrl.stores.replay_config import fits_on_gpu
from asyncrl.types import Spec

if TYPE_CHECKING:
    from asyncrl.algorithms.dqn import DQN

DISTRIBUTIONS = ("none", "c51", "qr", "iqn")


@dataclass(frozen=True)
class DQNConfig:
    """Q-learning; the switches make its family."""

    gamma: float = 0.99
    """Discount an env step."""
    n_step: int = 1
    """Rewards in a target before it bootstraps."""
    double: bool = True
    """Choose the next action by the online net, value it by the target net. Munchausen chooses
    none."""
    huber: bool = True
    """Linear loss for TD errors above 1, half their square below; else squared, with gradients
    twice as large (none), or linear everywhere (qr, iqn)."""
    reward_scale: float = 1.0
    """What rewards are multiplied by before they are clipped; reported returns are as they were."""
    reward_clip: float = 1.0
    """Clip rewards to [-reward_clip, reward_clip] (0: as they are)."""
    batch_size: int = 32
    """Transitions of an update, or sequences."""
    learning_rate: Any = 1e-4
    """A number, or a schedule over env steps."""
    adam_eps: float = 1.5e-4
    max_grad_norm: float = 10.0
    """Clip the gradient's norm (0: as it is)."""
    target_period: int = 2_000
    """Updates between copies to the target net (hard), or 1 with a small `polyak`."""
    polyak: float = 1.0
    """Share of the online net that enters the target net at each copy; 1 is a hard copy."""
    precision: Precision = "auto"
    """What the network computes in while learning; weights stay float32. auto: bfloat16 where the
    hardware multiplies it."""
    distribution: Literal["none", "c51", "qr", "iqn"] = "none"
    """What is learned of the return. none: its mean. c51: probabilities of fixed values. qr: fixed
    quantiles. iqn: any quantile."""
    num_atoms: int = 51
    """c51: values of the return, from value_min to value_max (both rescaled with
    value_rescaling)."""
    value_min: float = -10.0
    value_max: float = 10.0
    num_quantiles: int = 64
    """qr: quantiles of the return."""
    num_tau: int = 8
    """iqn: fractions drawn for the loss, for predictions and for targets."""
    num_acting_tau: int = 32
    """iqn: quantiles whose mean is acted on."""
    munchausen: float = 0.0
    """Share of the policy's scaled log-probability that is added to the reward at the first step
    of a window, together with its entropy behind the last (0: none; 0.9 usual)."""
    munchausen_temperature: float = 0.03
    """Of the policy softmax(q / temperature)."""
    munchausen_clip: float = -1.0
    """Least value of the scaled log-probability."""
    value_rescaling: bool = False
    """Learn h(return) with h(x) = sign(x) (sqrt(|x| + 1) - 1) + x / 1000; with reward_clip=0 it
    stands in for clipping."""
    sequence_length: int = 0
    """Steps learned from in one sample, in order, with the model's memory (0: single transitions;
    recurrent models need it)."""
    burn_in: int = 0
    """Steps before those that only warm up a recurrent model's memory."""
    loss_on: Literal["all", "last"] = "all"
    """Which steps of a sequence are learned from."""
    num_states: int = 1
    """Recurrent states stored of each unroll, evenly spaced, where sequences begin: at least as
    many as let each step be learned from. unroll_length: one for each step."""
    replay: ReplayConfig = field(default_factory=ReplayConfig)

    store_name = "replay"
    publish_period = 8  # updates between publications, unless the learner is told otherwise

    def __post_init__(self):
        if not 0 <= self.gamma <= 1 or not 0 < self.polyak <= 1 or self.n_step < 1:
            raise ValueError(
                "expected 0 <= gamma <= 1, 0 < polyak <= 1 and n_step >= 1, got "
                f"{self.gamma}, {self.polyak} and {self.n_step}"
            )
        if not 0 < self.reward_scale < inf:
            raise ValueError(f"expected reward_scale > 0, got {self.reward_scale}")
        if self.target_period < 1 or self.batch_size < 1:
            raise ValueError(
                "expected target_period >= 1 and batch_size >= 1, got "
                f"{self.target_period} and {self.batch_size}"
            )
        check_gradient_settings(self.learning_rate, self.max_grad_norm, self.adam_eps)
        check_range("reward_clip", self.reward_clip)
        self._check_distribution()
        self._check_sequences()
        if not isinstance(self.replay, ReplayConfig):
            raise ValueError(
                f"expected replay to be a ReplayConfig, got {type(self.replay).__name__}; "
                "value-based algorithms, and they alone, learn from a replay"
            )
        if self.replay.learning_starts < self.batch_transitions:
            raise ValueError(
                f"expected learning_starts of at least one batch of {self.batch_transitions}, got "
                f"{self.replay.learning_starts}"
            )

    def _check_distribution(self) -> None:
        kind = self.distribution
        if kind not in DISTRIBUTIONS:
            raise ValueError(f"expected distribution of {DISTRIBUTIONS}, got {kind!r}")
        if self.num_atoms < 2 or not -inf < self.value_min < self.value_max < inf:
            raise ValueError(
                "expected num_atoms >= 2 and finite value_min < value_max, got "
                f"{self.num_atoms}, {self.value_min} and {self.value_max}"
            )
        if min(self.num_quantiles, self.num_tau, self.num_acting_tau) < 1:
            raise ValueError(
                "expected num_quantiles, num_tau and num_acting_tau of at least 1, got "
                f"{self.num_quantiles}, {self.num_tau} and {self.num_acting_tau}"
            )
        temperature, clip = self.munchausen_temperature, self.munchausen_clip
        if not (0 <= self.munchausen <= 1 and 0 < temperature < inf and -inf < clip <= 0):
            raise ValueError(
                "expected 0 <= munchausen <= 1, munchausen_temperature > 0 and munchausen_clip <= "
                f"0, got {self.munchausen}, {temperature} and {clip}"
            )

    def _check_sequences(self) -> None:
        if min(self.sequence_length, self.burn_in) < 0 or self.num_states < 1:
            raise ValueError(
                "expected sequence_length >= 0, burn_in >= 0 and num_states >= 1, got "
                f"{self.sequence_length}, {self.burn_in} and {self.num_states}"
            )
        if self.loss_on not in ("all", "last"):
            raise ValueError(f"expected loss_on of ('all', 'last'), got {self.loss_on!r}")
        of_sequences = (self.burn_in, self.loss_on, self.num_states)
        if not self.sequence_length and of_sequences != (0, "all", 1):
            raise ValueError(
                "expected sequence_length of at least 1 with burn_in, loss_on='last' or several "
                f"num_states, got 0 with {of_sequences}; single transitions have no use for them"
            )

    @property
    def head(self) -> Any:
        """What a built-in model gets on top."""
        return {
            "none": "q",
            "c51": C51(self.num_atoms, self.value_min, self.value_max),
            "qr": QR(self.num_quantiles),
            "iqn": IQN(self.num_tau, self.num_acting_tau),
        }[self.distribution]

    @property
    def batch_transitions(self) -> int:
        """Transitions of one update, as the rate limit counts them."""
        return self.batch_size * max(1, self.sequence_length)

    @property
    def replay_options(self) -> dict:
        """Keyword arguments of the replay that decide its memory."""
        return {
            "priority_exponent": self.replay.priority_exponent,
            "sequence_length": self.sequence_length,
            "burn_in": self.burn_in,
            "state_dtype": self.replay.state_dtype,
        }

    @property
    def store_device(self) -> str:
        return self.replay.device

    @property
    def kept_env_steps(self) -> int:
        """Env steps that checkpoints stream to the disk."""
        return self.replay.capacity

    def policy(self) -> EpsilonGreedy:
        """How actors act unless the launch file says otherwise."""
        return EpsilonGreedy()

    def build(self, model: nn.Module, device: torch.device) -> DQN:
        from asyncrl.algorithms.dqn import DQN

        return DQN(self, model, device)

    def build_replay(
        self, model: nn.Module, spec: Spec, num_lanes: int, seed: int, learns_on: torch.device
    ) -> Replay:
        """The replay, on the device that learns where that is a GPU on which it fits."""
        replay, nbytes = self.replay, self.store_nbytes(model, spec, num_lanes)
        device = replay.device
        if device == "auto":
            fits = learns_on.type == "cuda" and fits_on_gpu(learns_on, nbytes)
            device = learns_on if fits else "cpu"
        return Replay(
            spec, num_lanes, replay.capacity, self.batch_size, self.limiter(spec, num_lanes),
            getattr(model, "frame_stack", 1), self.n_step, device, seed,
            importance_exponent=replay.importance_exponent, loss_on=self.loss_on,
            **self.replay_options,
        )  # fmt: skip

    def store_nbytes(self, model: nn.Module, spec: Spec, num_lanes: int) -> int:
        """Bytes the replay will take; ValueError, before anything is allocated, for what this
        algorithm cannot learn from."""
        recurrent = spec.is_recurrent
        if recurrent and not self.sequence_length:
            raise ValueError(
                "expected sequence_length of at least 1 for a model with a memory, got 0 for the "
                f"state {spec.state}; single transitions do not tell what it remembers"
            )
        if self.burn_in and not recurrent:
            raise ValueError(
                f"expected burn_in=0 for a model without a memory, got {self.burn_in}; there is "
                "nothing to warm up: leave it out, or give the model a memory (lstm=512)"
            )
        self._check_coverage(spec)
        self.limiter(spec, num_lanes)
        return self._nbytes(model, spec, num_lanes)

    def _check_coverage(self, spec: Spec) -> None:
        """Sequences begin where states are stored: each step must be in the loss of some."""
        between = spec.unroll_length // spec.num_states
        learned = 1 if self.loss_on == "last" else self.sequence_length
        if self.sequence_length and between > learned:
            raise ValueError(
                f"expected a stored state at least each {learned} steps, as many as a sequence is "
                f"learned from (sequence_length={self.sequence_length}, loss_on={self.loss_on!r}), "
                f"got one each {between} (unroll_length={spec.unroll_length}, "
                f"num_states={spec.num_states}); the steps between would never be learned from: "
                "raise num_states"
            )

    def checkpoint_nbytes(self, model: nn.Module, spec: Spec, num_lanes: int) -> int:
        """Bytes of the replay that each checkpoint holds: what its unrolls do not tell."""
        return self._nbytes(model, spec, num_lanes, saved=True)

    def _nbytes(self, model: nn.Module, spec: Spec, num_lanes: int, saved: bool = False) -> int:
        frame_stack = getattr(model, "frame_stack", 1)
        return Replay.nbytes(
            spec, num_lanes, self.replay.capacity, frame_stack, self.n_step, **self.replay_options,
            saved=saved,
        )  # fmt: skip

    def limiter(self, spec: Spec, num_lanes: int) -> RateLimiter:
        """Updates begin when some lane is sure to hold as many rows as a draw looks at."""
        replay = self.replay
        length = self.burn_in + max(1, self.sequence_length) + self.n_step
        return RateLimiter(
            replay.samples_per_insert,
            self.batch_transitions,
            max(replay.learning_starts, length * spec.num_envs * num_lanes),
            replay.tolerance,
            spec.unroll_length * spec.num_envs * num_lanes,
        )
