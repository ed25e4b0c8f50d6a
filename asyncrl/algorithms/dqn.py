"""DQN: Q-learning from replay (Mnih et al. 2015), double (van Hasselt et al. 2016), n-step."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from asyncrl.algorithms.gradient import GradientStep, check_gradient_settings
from asyncrl.algorithms.returns import n_step_return
from asyncrl.models.precision import Precision, computes_in_bfloat16
from asyncrl.policies import EpsilonGreedy
from asyncrl.stores.limiter import RateLimiter
from asyncrl.stores.replay import Replay, ReplayConfig, Sample
from asyncrl.types import Spec, tree_map


@dataclass(frozen=True)
class DQNConfig:
    """Q-learning; the switches make its family."""

    gamma: float = 0.99
    """Discount an env step."""
    n_step: int = 1
    """Rewards in a target before it bootstraps."""
    double: bool = True
    """Choose the next action by the online net, value it by the target net."""
    huber: bool = True
    """Linear loss for TD errors above 1; else squared."""
    reward_clip: float = 1.0
    """Clip rewards to [-reward_clip, reward_clip] (0: as they are)."""
    batch_size: int = 32
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
    replay: ReplayConfig = field(default_factory=ReplayConfig)

    head = "q"  # what a built-in model gets on top
    store_name = "replay"
    publish_period = 8  # updates between publications, unless the learner is told otherwise

    def __post_init__(self):
        if not 0 <= self.gamma <= 1 or not 0 < self.polyak <= 1 or self.n_step < 1:
            raise ValueError(
                "expected 0 <= gamma <= 1, 0 < polyak <= 1 and n_step >= 1, got "
                f"{self.gamma}, {self.polyak} and {self.n_step}"
            )
        if self.target_period < 1 or self.batch_size < 1:
            raise ValueError(
                "expected target_period >= 1 and batch_size >= 1, got "
                f"{self.target_period} and {self.batch_size}"
            )
        check_gradient_settings(self.learning_rate, self.max_grad_norm)
        if self.reward_clip < 0:
            raise ValueError(f"expected reward_clip of at least 0, got {self.reward_clip}")
        if self.replay.learning_starts < self.batch_size:
            raise ValueError(
                f"expected learning_starts of at least one batch of {self.batch_size}, got "
                f"{self.replay.learning_starts}"
            )

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
        return DQN(self, model, device)

    def store_nbytes(self, model: nn.Module, spec: Spec, num_lanes: int) -> int:
        """Bytes the replay will take; ValueError, before anything is allocated, for what this
        algorithm cannot learn from."""
        frame_stack = getattr(model, "frame_stack", 1)
        if set(spec.state) - {"frames"} or (frame_stack > 1) != ("frames" in spec.state):
            raise ValueError(
                "expected a model without memory or with a frame stack (state {'frames': ...} and "
                f"frame_stack set), got state {sorted(spec.state)} and frame_stack={frame_stack}; "
                "DQN does not learn recurrent models from replay"
            )
        self.limiter(spec, num_lanes)
        return Replay.nbytes(spec, num_lanes, self.replay.capacity, frame_stack, self.n_step)

    def limiter(self, spec: Spec, num_lanes: int) -> RateLimiter:
        replay = self.replay
        return RateLimiter(
            replay.samples_per_insert,
            self.batch_size,
            replay.learning_starts,
            replay.tolerance,
            spec.unroll_length * spec.num_envs * num_lanes,
        )


def dqn_loss(
    q: Tensor, action: Tensor, target: Tensor, weight: Tensor, huber: bool
) -> tuple[Tensor, Tensor]:
    """(loss, td_error (N,)) of Q(s, a) against fixed targets.

    q: (N, A); action: (N,) int64; target, weight: (N,). The loss is the weighted mean.
    """
    chosen = q.gather(1, action.unsqueeze(1)).squeeze(1)
    loss = nn.functional.huber_loss if huber else nn.functional.mse_loss
    loss = loss(chosen, target, reduction="none")
    return (loss * weight).sum() / weight.sum().clamp(min=1), (target - chosen).detach()


def double_q(next_q: Tensor, next_target_q: Tensor, double: bool) -> Tensor:
    """(N,) value of the next state from (N, A) online and target values."""
    if double:
        return next_target_q.gather(1, next_q.argmax(1, keepdim=True)).squeeze(1)
    return next_target_q.max(1).values


class DQN:
    """Online net, target net and optimizer; `update` is one step of gradient descent."""

    def __init__(self, config: DQNConfig, model: nn.Module, device: torch.device):
        self.config, self.device = config, device
        self.model = model.to(device)
        self.target = deepcopy(self.model).requires_grad_(False)
        self.descend = GradientStep(
            self.model, config.learning_rate, config.max_grad_norm, config.adam_eps
        )
        self.bfloat16 = computes_in_bfloat16(config.precision, device)

    @property
    def updates(self) -> int:
        """Optimizer steps."""
        return self.descend.count

    def store(self, spec: Spec, num_lanes: int, seed: int) -> Replay:
        """The replay this algorithm learns from, on the GPU when it fits there."""
        config, device = self.config, self.config.replay.device
        nbytes = config.store_nbytes(self.model, spec, num_lanes)
        if device == "auto":
            device = "cpu"
            if self.device.type == "cuda":
                free, _ = torch.cuda.mem_get_info(self.device)
                device = self.device if nbytes < 0.8 * free else "cpu"
        return Replay(
            spec,
            num_lanes,
            config.replay.capacity,
            config.batch_size,
            config.limiter(spec, num_lanes),
            getattr(self.model, "frame_stack", 1),
            config.n_step,
            device,
            seed,
        )

    def update(self, store: Replay) -> dict[str, Tensor]:
        """One batch, one step; returns metrics as 0-d tensors."""
        config = self.config
        sample: Sample = store.sample()
        if store.device != self.device:
            sample = _to(sample, self.device)
        reward = sample.reward
        if config.reward_clip:
            reward = reward.clamp(-config.reward_clip, config.reward_clip)
        returns, discount = n_step_return(reward, sample.steps, sample.terminated, config.gamma)

        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            with torch.no_grad():
                following = (sample.next_obs, sample.next_first, sample.next_state)
                next_target_q = self.target(*following)[0]["q"][0]
                next_q = self.model(*following)[0]["q"][0] if config.double else next_target_q
                target = returns + discount * double_q(next_q, next_target_q, config.double)
            q = self.model(sample.obs, sample.first, sample.state)[0]["q"][0]
        loss, td_error = dqn_loss(q, sample.action, target, sample.weight, config.huber)

        metrics = self.descend(loss, store.limiter.inserted)
        metrics |= {"loss/q": loss.detach(), "loss/td_error": td_error.abs().mean()}
        metrics["loss/q_mean"] = q.detach().mean()
        if self.updates % config.target_period == 0:
            self._move_target()
        return metrics

    def _move_target(self) -> None:
        with torch.no_grad():
            targets, online = self.target.state_dict(), self.model.state_dict()
            for name, tensor in targets.items():
                if tensor.is_floating_point():
                    tensor.lerp_(online[name], self.config.polyak)
                else:
                    tensor.copy_(online[name])

    def state_dict(self) -> dict:
        """Nested dict of tensors and numbers."""
        return {
            "model": self.model.state_dict(),
            "target": self.target.state_dict(),
            "optimizer": self.descend.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.target.load_state_dict(state["target"])
        self.descend.load_state_dict(state["optimizer"])


def _to(sample: Sample, device: torch.device) -> Sample:
    return tree_map(lambda tensor: tensor.to(device, non_blocking=True), sample)
