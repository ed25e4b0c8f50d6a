"""DQN and its family (Mnih et al. 2015): one update, whose switches stand in `dqn_config`.

Double (van Hasselt et al. 2016), dueling (in the model), n-step, prioritised, noisy and C51 are
Rainbow (Hessel et al. 2018). QR-DQN and IQN: Dabney et al. 2018. Munchausen: Vieillard et al.
2020. Sequences with stored states, burn-in and rescaling: R2D2 (Kapturowski et al. 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from asyncrl.algorithms import value_distributions as vd
from asyncrl.algorithms.dqn_config import DQNConfig
from asyncrl.algorithms.gradient import GradientStep, frozen_copy
from asyncrl.algorithms.returns import n_step_return
from asyncrl.algorithms.teams import Teams
from asyncrl.models.layers import noisy_layers
from asyncrl.models.memory import preparation, states_before
from asyncrl.models.precision import computes_in_bfloat16
from asyncrl.stores.replay import Replay
from asyncrl.transfer import staged
from asyncrl.types import Spec, Tree, tree_map

__all__ = ["DQN", "DQNConfig", "dqn_loss"]


class Batch(NamedTuple):
    """What one update learns from, (N,) transitions or (L, N) of sequences: `..` below."""

    outputs: dict[str, Tensor]  # (.., ...) of the online net, with gradient
    before: dict[str, Tensor]  # (.., ...) of the target net there, for Munchausen
    action: Tensor  # (..) int64
    returns: Tensor  # (..) discounted rewards of the window, scaled and clipped
    discount: Tensor  # (..) of the value behind it
    following: vd.Return  # (.., M) behind the window, in units of the rewards
    weight: Tensor  # (..) 0 for what must not count
    states: Tree  # (rows, N, *state) of the target net


class Losses(NamedTuple):
    """Of a batch: the loss, with its graph; without, each transition's error and weight (..), the
    values (.., A) of the online net, and the target net's states, to be stored anew."""

    loss: Tensor
    error: Tensor
    weight: Tensor
    q: Tensor
    states: Tree


def dqn_loss(
    outputs: dict[str, Tensor],
    head: Any,
    action: Tensor,
    target: vd.Return,
    weight: Tensor,
    huber: bool,
) -> tuple[Tensor, Tensor]:
    """(loss, error (..)) of the returns of actions (..) against fixed targets (.., M).

    The loss is the sum by weight (..) over the number of weights that are not 0.
    """
    loss, error = vd.return_loss(outputs, head, action, target, huber)
    return (loss * weight).sum() / (weight > 0).sum().clamp(min=1), error


class DQN:
    """Online net, target net and optimizer; `update` is one step of gradient descent."""

    def __init__(self, config: DQNConfig, model: nn.Module, device: torch.device):
        self.config, self.device = config, device
        self.model = model.to(device)
        self.target = frozen_copy(self.model)
        self.average = get_ema_multi_avg_fn(1 - config.polyak)
        self.target_parameters = list(self.target.parameters())
        self.buffers = list(zip(self.target.buffers(), self.model.buffers(), strict=True))
        self.descend = GradientStep(
            self.model, config.learning_rate, config.max_grad_norm, config.adam_eps
        )
        self.bfloat16 = computes_in_bfloat16(config.precision, device, self.model)
        self.noisy = noisy_layers(self.model, self.target)
        self.teams = Teams(self.model, device)
        self.prepare = None if config.sequence_length else preparation(self.model, device)
        self.head, self.refreshes = config.head, False
        self.ahead = None  # the next sample and what the target net makes of it
        self.chooses = config.double and not config.munchausen  # the online net, the next action

    @property
    def updates(self) -> int:
        """Optimizer steps."""
        return self.descend.count

    def store(self, spec: Spec, num_lanes: int, seed: int) -> Replay:
        """The replay this algorithm learns from, on the GPU when it fits there."""
        self.refreshes = spec.is_recurrent and self.config.replay.refresh_states
        return self.config.build_replay(self.model, spec, num_lanes, seed, self.device)

    def update(self, store: Replay) -> dict[str, Tensor]:
        """One batch, one step; returns metrics as 0-d tensors."""
        config = self.config
        for layer in self.noisy:
            layer.redraw()
        (sample, target), self.ahead = self.ahead or (self._draw(store), None), None
        rows = store.refresh_rows if self.refreshes else ()
        losses = self._losses(sample, rows, target)
        if rows:
            store.write_states(sample.index, losses.states)
        descend = partial(self.descend, losses.loss, store.limiter.inserted)
        if self._may_look_ahead(store):
            metrics, self.ahead = self.teams.both(descend, partial(self._look_ahead, store))
        else:
            metrics = descend()
        error, learned = losses.error, losses.weight > 0
        priority = vd.sequence_priority(error, learned) if learned.ndim > 1 else error.abs()
        if config.replay.priority_exponent:
            store.update_priorities(sample.index, priority.to(store.device))
        metrics |= {"loss/q": losses.loss.detach(), "loss/td_error": priority.mean()}
        variance, mean = torch.var_mean(losses.q)
        metrics |= {"loss/q_mean": mean, "loss/q_variance": variance}
        if self.updates % config.target_period == 0:
            self._move_target()
        return metrics

    def _draw(self, store: Replay) -> Any:
        """A sample of transitions or sequences, where it is learned from; its index stays."""
        sample = store.sample_sequences() if self.config.sequence_length else store.sample()
        device, onto_gpu = self.device, self.device.type == "cuda"  # from one, nobody would wait
        rest = sample._replace(index=())
        rest = tree_map(lambda part: staged(part, device).to(device, non_blocking=onto_gpu), rest)
        if self.prepare:
            (obs, state), (next_obs, next_state) = (self.prepare(*its) for its in _inputs(rest))
            rest = rest._replace(obs=obs, state=state, next_obs=next_obs, next_state=next_state)
        return rest._replace(index=sample.index)

    def _may_look_ahead(self, store: Replay) -> bool:
        """Whether the next batch depends on nothing that this update is going to change."""
        config = self.config
        depends = self.noisy or config.sequence_length or config.replay.priority_exponent
        moves = (self.updates + 1) % config.target_period == 0
        return self.teams.count > 1 and not depends and not moves and store.updates_allowed() > 0

    def _look_ahead(self, store: Replay) -> tuple[Any, tuple[Tree, Tree]]:
        """The next batch, and what the target net makes of it."""
        sample = self._draw(store)
        return sample, self._target_pass(sample)

    def _target_pass(self, sample: Any) -> tuple[Tree, Tree]:
        """Its outputs behind and, for Munchausen, before the windows."""
        now, later = _inputs(sample)
        with torch.no_grad():
            before = self._outputs(self.target, *now) if self.config.munchausen else {}
            return self._outputs(self.target, *later), before

    def _losses(self, sample: Any, rows: Sequence[int], target: Any = None) -> Losses:
        """Of a sample of transitions or sequences, with new states before some rows of these."""
        sequences, huber = self.config.sequence_length > 0, self.config.huber
        batch = self._sequences(sample, rows) if sequences else self._transitions(sample, target)
        loss, error = dqn_loss(
            batch.outputs, self.head, batch.action, self._target(batch), batch.weight, huber
        )
        return Losses(loss, error, batch.weight, batch.outputs["q"].detach(), batch.states)

    def compile(self) -> None:
        """Have the loss of a batch compiled at its first use, for one team."""
        self._losses, self.teams.most = torch.compile(self._losses), 1

    def _transitions(self, sample: Any, target: Any) -> Batch:
        """Single transitions, whose windows the replay has already cut."""
        returns, discount = n_step_return(
            self._counted(sample.reward), sample.steps, sample.terminated, self.config.gamma
        )
        now, later = _inputs(sample)
        online = partial(self._outputs, self.model, *now)

        def online_next() -> Tree:
            with torch.no_grad():
                return self._outputs(self.model, *later) if self.chooses else {}

        if target is not None and self.chooses and getattr(self.model, "pure", False):
            outputs, next_online = self.teams.both(online, online_next)
        elif target is not None:
            next_online, outputs = online_next(), online()
        else:
            (next_online, outputs), target = self.teams.both(
                lambda: (online_next(), online()), partial(self._target_pass, sample)
            )
        next_target, before = target
        following = self._following(_at(next_target, 0), _at(next_online, 0))
        return Batch(
            _at(outputs, 0), _at(before, 0), sample.action.long(), returns, discount, following,
            sample.weight, {},
        )  # fmt: skip

    def _sequences(self, batch: Any, rows: Sequence[int]) -> Batch:
        """Both nets go through whole sequences; the online one learns behind the burn-in."""
        config = self.config
        warm_up, rest = slice(config.burn_in), slice(config.burn_in, None)
        length = config.sequence_length
        # The rows behind those it learns from matter to the online net where it chooses there.
        seen = rest if self.chooses else slice(config.burn_in, config.burn_in + length)

        def online() -> Tree:
            state = batch.state
            if config.burn_in:
                with torch.no_grad(), self._autocast():
                    _, state = self.model(_at(batch.obs, warm_up), batch.first[warm_up], state)
            return self._outputs(self.model, _at(batch.obs, seen), batch.first[seen], state)

        def target() -> tuple[Tree, Tree]:
            with torch.no_grad(), self._autocast():
                return self._target_outputs(batch, rows)

        online, (target, states) = self.teams.both(online, target)
        target = _at(target, rest)
        returns, discount, end = vd.windows(
            self._counted(batch.reward[rest]), batch.terminated[rest], batch.truncated[rest],
            config.gamma, config.n_step, length,
        )  # fmt: skip
        env = torch.arange(end.shape[1], device=self.device).expand_as(end)
        there = _at(online, (end, env)) if self.chooses else {}
        following = self._following(_at(target, (end, env)), there)
        learned = slice(length)
        action, weight = batch.action[rest][learned], batch.weight * batch.learn[rest][learned]
        return Batch(
            _at(online, learned), _at(target, learned), action.long(), returns, discount,
            following, weight, states,
        )  # fmt: skip

    def _target_outputs(self, batch: Any, rows: Sequence[int]) -> tuple[Tree, Tree]:
        """(T+1, N, ...) of the target net, and the states it is in before some rows."""
        inputs = batch.obs, batch.first, batch.state
        return states_before(self.target, *inputs, rows) if rows else (self.target(*inputs)[0], {})

    def _following(self, target: dict[str, Tensor], online: dict[str, Tensor]) -> vd.Return:
        """(.., M) return from observations on, as rewards count, by both nets' outputs there; {} of
        the online net where it does not choose."""
        config = self.config
        if config.munchausen:
            temperature = config.munchausen_temperature
            return vd.soft_return(target, self.head, temperature, config.value_rescaling)
        q = (online or target)["q"]
        return vd.greedy_return(target, self.head, q, config.value_rescaling)

    def _target(self, batch: Batch) -> vd.Return:
        """(.., M) what the batch's returns are drawn towards."""
        config, reward = self.config, batch.returns
        if config.munchausen:
            reward = reward + config.munchausen * vd.munchausen_reward(
                batch.before["q"], batch.action, config.munchausen_temperature,
                config.munchausen_clip, config.value_rescaling,
            )  # fmt: skip
        values = reward.unsqueeze(-1) + batch.discount.unsqueeze(-1) * batch.following.values
        values = vd.rescale(values) if config.value_rescaling else values
        return batch.following._replace(values=values)

    def _autocast(self) -> torch.autocast:
        """bfloat16 where that is on. What runs without gradient has a context of its own, and keeps
        no weights: older PyTorch would give those it casts, without gradient, to whatever else
        runs in the same one, or in another thread."""
        return torch.autocast(
            self.device.type, torch.bfloat16, self.bfloat16, cache_enabled=torch.is_grad_enabled()
        )

    def _outputs(self, net: nn.Module, obs: Tree, first: Tensor, state: Tree) -> Tree:
        """What a net makes of rows (T, N, ...)."""
        with self._autocast():
            return net(obs, first, state)[0]

    def _counted(self, reward: Tensor) -> Tensor:
        """Rewards as they are learned from."""
        scale, clip = self.config.reward_scale, self.config.reward_clip
        reward = reward if scale == 1 else reward * scale
        return reward.clamp(-clip, clip) if clip else reward

    @torch.no_grad()
    def _move_target(self) -> None:
        """Parameters go the share `polyak` of the way to the online net's; buffers are copied."""
        self.average(self.target_parameters, self.descend.parameters, None)
        for buffer, online in self.buffers:
            buffer.copy_(online)

    def state_dict(self) -> dict:
        """Nested dict of tensors and numbers."""
        return {
            "model": self.model.state_dict(),
            "target": self.target.state_dict(),
            "optimizer": self.descend.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.ahead = None
        self.model.load_state_dict(state["model"])
        self.target.load_state_dict(state["target"])
        self.descend.load_state_dict(state["optimizer"])


def _inputs(sample: Any) -> tuple[tuple, tuple]:
    """(obs, first, state) before and behind the windows of a sample."""
    now = sample.obs, sample.first, sample.state
    return now, (sample.next_obs, sample.next_first, sample.next_state)


def _at(tree: Tree, where: Any) -> Tree:
    """The rows of all leaves (T, N, ...) that a slice or an index chooses."""
    return tree_map(lambda leaf: leaf[where], tree)
