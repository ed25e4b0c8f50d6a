"""PPO: proximal policy optimisation with a clipped ratio (Schulman et al. 2017)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

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
from asyncrl.models.memory import preparation
from asyncrl.models.precision import Precision, computes_in_bfloat16
from asyncrl.policies import Sample
from asyncrl.schedules import value_at
from asyncrl.stores.rollout import RolloutConfig, RolloutQueue, Sequences, Steps
from asyncrl.transfer import staged
from asyncrl.types import Spec, tree_map


@dataclass(frozen=True)
class PPOConfig:
    """A few epochs of minibatches on each rollout."""

    gamma: float = 0.99
    """Discount an env step."""
    estimator: ac.Estimator = "gae"
    """Of advantages: gae, n_step, or vtrace, which corrects for policies that lag."""
    values_by: Literal["learner", "actor"] = "learner"
    """Whose values advantages and targets are made of: the learner's, for a pass over each rollout,
    or those of the weights that acted, noted by the actors on their way, which are older."""
    lambda_: float = 0.95
    """Of gae and vtrace."""
    n_step: int = 5
    """Rewards in a target of the estimator n_step."""
    epochs: int = 4
    """Passes over each rollout."""
    num_minibatches: int = 4
    """Steps of gradient descent in a pass."""
    minibatch_of: Literal["auto", "steps", "sequences"] = "auto"
    """Shuffled steps, or whole unrolls of shuffled environments; auto: sequences for a model with a
    recurrent state, else steps."""
    clip_ratio: Any = 0.2
    """A number, or a schedule over env steps."""
    clip_value: float = 0.0
    """Clip the value's move from its old one (0: do not), in units of the return's scale."""
    target_kl: float = 0.0
    """Stop the passes over a rollout once the approximate KL divergence of whoever acted from the
    policy that learns is above (0: never); lag and policy mixes count in it."""
    value_coef: float = 0.5
    entropy_coef: Any = 0.0
    """A number, or a schedule over env steps."""
    normalize_advantage: bool = True
    """Over each minibatch."""
    reward_clip: float = 0.0
    """Clip rewards to [-reward_clip, reward_clip] (0: as they are)."""
    learning_rate: Any = 2.5e-4
    """A number, or a schedule over env steps."""
    optimizer: OptimizerName = "adam"
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
            clip_ratio=self.clip_ratio, clip_value=self.clip_value,
            target_kl=self.target_kl,
        )  # fmt: skip
        if self.clip_ratio == 0:
            raise ValueError("expected clip_ratio above 0, got 0: no step could be learned from")
        if self.epochs < 1 or self.num_minibatches < 1:
            raise ValueError(
                "expected epochs and num_minibatches of at least 1, got "
                f"{self.epochs} and {self.num_minibatches}"
            )
        if self.estimator == "vtrace" and self.values_by == "actor":
            raise ValueError(
                "expected values_by learner for vtrace, got actor: it compares the policy "
                "that learns with the one that acted, which takes a pass over each rollout"
            )
        check_gradient_settings(self.learning_rate, self.max_grad_norm, self.optimizer_eps)

    @property
    def records_values(self) -> bool:
        """Whether actors note values."""
        return self.values_by == "actor"

    def policy(self) -> Sample:
        """How actors act unless the launch file says otherwise."""
        return Sample()

    def build(self, model: nn.Module, device: torch.device) -> PPO:
        return PPO(self, model, device)

    def sequences(self, spec: Spec) -> bool:
        """Whether minibatches are of whole sequences."""
        if self.minibatch_of == "auto":
            return spec.is_recurrent
        return self.minibatch_of == "sequences"

    def store_nbytes(self, model: nn.Module, spec: Spec, num_lanes: int) -> int:
        """Bytes the queue will take at most; ValueError for minibatches that cannot be."""
        num_envs = (self.rollout.num_unrolls or num_lanes) * spec.num_envs
        sequences = self.sequences(spec)
        if not sequences and spec.is_recurrent:
            raise ValueError(
                "expected minibatch_of sequences for a model with a recurrent state, got steps; "
                f"its state {spec.state} cannot be cut out of a rollout step by step"
            )
        pieces = num_envs if sequences else num_envs * spec.unroll_length
        if pieces % self.num_minibatches:
            raise ValueError(
                f"expected num_minibatches that divides the {pieces} "
                f"{'environments' if sequences else 'steps'} of a rollout, got "
                f"{self.num_minibatches}; change it, actor.envs_per_lane or actor.unroll_length"
            )
        return RolloutQueue.nbytes(self.rollout, spec, num_lanes)


def ppo_loss(
    current: Tensor, behaviour: Tensor, advantage: Tensor, mask: ac.Mask, clip_ratio: float
) -> tuple[Tensor, Tensor]:
    """(policy loss of each step, 0 where not valid, importance ratio); inputs of one shape.

    `behaviour` is the log-probability of whoever acted, so it may be any policy of any age.
    """
    ratio = mask.zero(current - behaviour).clamp(-20, 20).exp()
    advantage = mask.zero(advantage)
    clipped = ratio.clamp(1 - clip_ratio, 1 + clip_ratio)
    return -torch.minimum(ratio * advantage, clipped * advantage), ratio


def value_loss(
    value: Tensor, old: Tensor, target: Tensor, mask: ac.Mask, clip: float, scale: Tensor | float
) -> Tensor:
    """Half the squared error of each step in units of `scale`, 0 where not valid; the worse of
    clipped and free if `clip`."""
    error = mask.zero(value - target).square()
    if clip:
        near = old + (value - old).clamp(-clip * scale, clip * scale)
        error = torch.maximum(error, mask.zero(near - target).square())
    return 0.5 / scale**2 * error


class PPO:
    """Model and optimizer; `update` is all epochs on one rollout."""

    def __init__(self, config: PPOConfig, model: nn.Module, device: torch.device):
        self.config, self.device = config, device
        self.model = model.to(device)
        self.descend = GradientStep(
            self.model, config.learning_rate, config.max_grad_norm, config.optimizer_eps,
            config.optimizer,
        )  # fmt: skip
        self.bfloat16 = computes_in_bfloat16(config.precision, device, self.model)
        self.teams = Teams(self.model, device)
        self.prepare = preparation(self.model, device)
        self.generator = torch.Generator()
        self.beat: Callable[[], bool] = lambda: False  # called at each step; whether to stop there

    @property
    def updates(self) -> int:
        """Optimizer steps."""
        return self.descend.count

    def store(self, spec: Spec, num_lanes: int, seed: int) -> RolloutQueue:
        """The queue of unrolls this algorithm learns from."""
        self.of_sequences = self.config.sequences(spec)
        self.generator.manual_seed(seed)
        return RolloutQueue(self.config.rollout, spec, num_lanes, self.config.epochs)

    def update(self, store: RolloutQueue) -> Metrics:
        """One rollout, `epochs` passes; returns metrics of the last step, and of all steps (steps,)
        which were skipped."""
        config, rollout = self.config, store.sample(self.device)
        T, N = rollout.action.shape[:2]
        inputs = Sequences(rollout) if self.of_sequences else Steps(
            rollout, getattr(self.model, "frame_stack", 1)
        )  # fmt: skip
        if self.prepare and not self.of_sequences and config.epochs > 1:
            inputs.prepare(self.prepare)
        pieces = N if self.of_sequences else T * N
        size = max(1, pieces // config.num_minibatches)
        value, current = rollout.value, None
        if not len(value):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
                rows = T * N // config.num_minibatches
                value, current = ac.evaluate(self.teams.forward, rollout, rows)
        target = ac.targets(
            config.estimator, rollout, value, current, config.gamma, config.lambda_,
            config.n_step, config.reward_clip,
        )  # fmt: skip
        ac.renormalize(self.model, target.value, rollout.valid)
        advantage = target.advantage / ac.return_scale(self.model)
        columns = (
            rollout.action, rollout.log_prob, rollout.valid, value[:-1], advantage, target.value,
        )  # fmt: skip
        if not self.of_sequences:
            columns = tuple(column.flatten(0, 1).unsqueeze(0) for column in columns)

        metrics: Metrics = {}
        skipped: list[Tensor] = []
        for index, *chosen in self._minibatches(pieces, size, columns):
            metrics = self._step(inputs[index], *chosen, store.limiter.inserted)
            skipped.append(metrics["loss/skipped"])
            kl = metrics["loss/kl"]  # a number already where it was made in parts
            if self.beat() or (
                config.target_kl and (kl() if callable(kl) else kl) > config.target_kl
            ):
                break
        store.used(len(skipped) / -(-pieces // size))
        metrics["loss/skipped"] = torch.stack(skipped)
        mask, known = ac.Mask(rollout.valid), value[:-1]
        metrics["loss/explained_variance"] = lambda: ac.explained_variance(
            known, target.value, mask
        )
        metrics["loss/value_mean"] = lambda: mask.mean(known)
        ac.update_statistics(self.model, rollout)
        return metrics

    def _minibatches(
        self, pieces: int, size: int, columns: Iterable[Tensor]
    ) -> Iterator[tuple[Tensor, ...]]:
        """(index (size,), its part of each column (T, size)) of all passes, shuffled in each."""
        for _ in range(self.config.epochs):
            order = staged(torch.randperm(pieces, generator=self.generator), self.device)
            order = order.to(self.device, non_blocking=True)
            shuffled = [column[:, order].split(size, 1) for column in columns]
            yield from zip(order.split(size), *shuffled, strict=True)

    def _step(
        self, inputs, action, behaviour, valid, old_value, advantage, value_target, env_steps: int
    ) -> Metrics:
        """One minibatch, one step of gradient descent: columns (1, n) of steps or (T, n) of
        sequences, and of actions (1, n, *action); env_steps is the clock of schedules."""
        config, mask = self.config, ac.Mask(valid)
        if config.normalize_advantage:
            advantage = ac.normalize(advantage, mask)
        clip_ratio = value_at(config.clip_ratio, env_steps)
        entropy_coef = value_at(config.entropy_coef, env_steps)
        rows, states = inputs[:2], inputs[2]
        columns = action, behaviour, old_value, advantage, value_target

        def means(envs: slice) -> Metrics:
            """Of the loss and its parts, over the valid steps of some columns."""
            state = tree_map(lambda leaf: leaf[envs], states)
            obs, first = tree_map(lambda leaf: leaf[:, envs], rows)
            its = mask if envs == slice(None) else ac.Mask(valid[:, envs])
            losses = self._losses(
                obs, first, state, *(column[:, envs] for column in columns), its,
                clip_ratio, entropy_coef,
            )  # fmt: skip
            ratio = losses.ratio
            return losses.means(its) | {
                "loss": losses.loss,
                "loss/kl": lambda: ac.divergence(ratio, its),
                "loss/clipped": lambda: ac.clipped_share(ratio, its, clip_ratio),
            }

        return self.descend.on_means(means, valid, env_steps)

    def _losses(
        self, obs, first, state, action, behaviour, old_value, advantage, value_target,
        mask: ac.Mask, clip_ratio: float, entropy_coef: float,
    ) -> ac.Losses:  # fmt: skip
        """Of some columns of a minibatch."""
        config = self.config
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            outputs = self.teams.forward(obs, first, state)
        current = log_prob(outputs, action)
        policy, ratio = ppo_loss(current, behaviour, advantage, mask, clip_ratio)
        value = value_loss(
            outputs["value"], old_value, value_target, mask, config.clip_value,
            ac.return_scale(self.model),
        )  # fmt: skip
        return ac.losses_of(policy, value, ratio, outputs, mask, config.value_coef, entropy_coef)

    def compile(self) -> None:
        """Have the losses of minibatches compiled at their first use, for one team."""
        self._losses, self.teams.most = torch.compile(self._losses), 1

    def state_dict(self) -> dict:
        """Nested dict of tensors and numbers."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.descend.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.descend.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
