"""A2C: advantage actor-critic (Mnih et al. 2016); with V-trace, IMPALA (Espeholt et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from asyncrl.algorithms import actor_critic as ac
from asyncrl.algorithms.distributions import log_prob
from asyncrl.algorithms.gradient import (
    GradientStep,
    Metrics,
    OptimizerName,
    check_gradient_settings,
)
from asyncrl.algorithms.teams import Teams
from asyncrl.models.precision import Precision, computes_in_bfloat16
from asyncrl.policies import Sample
from asyncrl.schedules import check_range, value_at
from asyncrl.stores.rollout import Rollout, RolloutConfig, RolloutQueue
from asyncrl.types import Spec


@dataclass(frozen=True)
class A2CConfig:
    """One step of gradient descent on each rollout."""

    gamma: float = 0.99
    """Discount an env step."""
    estimator: ac.Estimator = "gae"
    """Of advantages: gae, n_step, or vtrace, which corrects for policies that lag (IMPALA)."""
    lambda_: float = 1.0
    """Of gae and vtrace; 1: rewards up to the unroll's end, then its bootstrap value."""
    n_step: int = 5
    """Rewards in a target of the estimator n_step."""
    value_coef: float = 0.5
    entropy_coef: Any = 0.01
    """A number, or a schedule over env steps."""
    clip_rho: float = 1.0
    """Importance ratios of the policy's loss, and of vtrace's TD errors, are cut off here."""
    normalize_advantage: bool = False
    reward_clip: float = 0.0
    """Clip rewards to [-reward_clip, reward_clip] (0: as they are)."""
    learning_rate: Any = 7e-4
    """A number, or a schedule over env steps."""
    optimizer: OptimizerName = "rmsprop"
    optimizer_eps: float = 1e-5
    max_grad_norm: float = 0.5
    """Clip the gradient's norm (0: as it is)."""
    precision: Precision = "auto"
    """What the network computes in while learning; weights stay float32. auto: bfloat16 where the
    hardware multiplies it."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)

    head = "actor_critic"  # what a built-in model gets on top
    publish_period = 1  # updates between publications, unless the learner is told otherwise
    kept_env_steps = 0  # a checkpoint streams none of them
    store_name, store_device = "rollout queue", "cpu"

    def __post_init__(self):
        ac.check_settings(
            self.rollout, self.gamma, self.lambda_, self.n_step, value_coef=self.value_coef,
            entropy_coef=self.entropy_coef, reward_clip=self.reward_clip,
        )  # fmt: skip
        check_range("clip_rho", self.clip_rho, above=True)
        if self.estimator == "vtrace" and self.clip_rho < 1:
            raise ValueError(
                f"expected clip_rho of at least 1 for vtrace, got {self.clip_rho}: TD errors may "
                "not be cut off lower than the ratios that carry them back, which are at 1"
            )
        check_gradient_settings(self.learning_rate, self.max_grad_norm, self.optimizer_eps)

    def policy(self) -> Sample:
        """How actors act unless the launch file says otherwise."""
        return Sample()

    def build(self, model: nn.Module, device: torch.device) -> A2C:
        return A2C(self, model, device)

    def store_nbytes(self, model: nn.Module, spec: Spec, num_lanes: int) -> int:
        """Bytes the queue will take at most."""
        return RolloutQueue.nbytes(self.rollout, spec, num_lanes)


def a2c_loss(
    current: Tensor, behaviour: Tensor, advantage: Tensor, mask: ac.Mask, clip_rho: float
) -> Tensor:
    """The policy's loss of each step, 0 where not valid; all (T, N). Steps acted by another policy
    count by their clipped ratio."""
    rho = ac.importance_ratio(current, behaviour).clamp(max=clip_rho).detach()
    weight = mask.zero(rho * advantage)
    return mask.zero(-weight * current)


class A2C:
    """Model and optimizer; `update` is one step of gradient descent on one rollout."""

    def __init__(self, config: A2CConfig, model: nn.Module, device: torch.device):
        self.config, self.device = config, device
        self.model = model.to(device)
        self.descend = GradientStep(
            self.model, config.learning_rate, config.max_grad_norm, config.optimizer_eps,
            config.optimizer,
        )  # fmt: skip
        self.bfloat16 = computes_in_bfloat16(config.precision, device, self.model)
        self.teams = Teams(self.model, device)

    @property
    def updates(self) -> int:
        """Optimizer steps."""
        return self.descend.count

    def store(self, spec: Spec, num_lanes: int, seed: int) -> RolloutQueue:
        """The queue of unrolls this algorithm learns from."""
        return RolloutQueue(self.config.rollout, spec, num_lanes)

    def update(self, store: RolloutQueue) -> Metrics:
        """One rollout, one step."""
        config, rollout = self.config, store.sample(self.device)
        mask, env_steps = ac.Mask(rollout.valid), store.limiter.inserted
        losses, target, known = self._losses(
            rollout, mask, value_at(config.entropy_coef, env_steps)
        )
        metrics = self.descend(losses.loss, env_steps) | losses.means(mask)
        store.used(1)
        # Afterwards, because it writes to weights whose values the gradient needs.
        ac.renormalize(self.model, target.value, rollout.valid)
        ac.update_statistics(self.model, rollout)
        ratio = losses.ratio
        return metrics | {
            "loss/kl": lambda: ac.divergence(ratio, mask),
            "loss/clipped": lambda: mask.mean((ratio > config.clip_rho).float()),
            "loss/value_mean": lambda: mask.mean(known),
            "loss/explained_variance": lambda: ac.explained_variance(known, target.value, mask),
        }

    def _losses(
        self, rollout: Rollout, mask: ac.Mask, entropy_coef: float
    ) -> tuple[ac.Losses, ac.Targets, Tensor]:
        """Of a rollout; what it learns towards; and the values (T, N) it learns from."""
        config = self.config
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            outputs = self.teams.forward(rollout.obs, rollout.first, rollout.state)
        value = outputs["value"]
        outputs = {name: output[:-1] for name, output in outputs.items()}
        current = log_prob(outputs, rollout.action)
        target = ac.targets(
            config.estimator, rollout, value.detach(), current.detach(), config.gamma,
            config.lambda_, config.n_step, config.reward_clip, config.clip_rho,
        )  # fmt: skip
        scale = ac.return_scale(self.model)
        advantage = target.advantage / scale
        if config.normalize_advantage:
            advantage = ac.normalize(advantage, mask)
        ratio = ac.importance_ratio(current.detach(), rollout.log_prob)
        error = mask.zero(value[:-1] - target.value) / scale
        losses = ac.losses_of(
            a2c_loss(current, rollout.log_prob, advantage, mask, config.clip_rho),
            0.5 * error.square(), ratio, outputs, mask, config.value_coef, entropy_coef,
        )  # fmt: skip
        return losses, target, value[:-1].detach()

    def compile(self) -> None:
        """Have the loss of a rollout compiled at its first use, for one team."""
        self._losses, self.teams.most = torch.compile(self._losses), 1

    def state_dict(self) -> dict:
        """Nested dict of tensors and numbers."""
        return {"model": self.model.state_dict(), "optimizer": self.descend.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.descend.load_state_dict(state["optimizer"])
