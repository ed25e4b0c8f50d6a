"""Evaluation: whole games of the greedy (or nearly greedy) policy, without learning.

The same function plays for `asyncrl eval` (asyncrl/eval.py) from a checkpoint and for the evaluator
process, which pulls published weights now and then while training goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from asyncrl.env_group import EnvGroup
from asyncrl.envs import seed_for
from asyncrl.models.layers import noisy_layers
from asyncrl.policies import Context, EpsilonGreedy, Greedy, unroll_rng
from asyncrl.types import tree_map

EVALUATION_LANE = 1_000_000  # seeds and random numbers that no acting lane uses


@dataclass(frozen=True)
class EvaluationConfig:
    """Games played beside training."""

    period_steps: int = 100_000
    """Env steps of training between two evaluations (0: none)."""
    num_episodes: int = 10
    """Whole games of an evaluation."""
    num_envs: int = 5
    """Played side by side; each plays the same number of games, so that short ones do not win."""
    epsilon: float = 0.01
    """Random actions among the greedy ones; a little keeps a game from looping without end. Box
    actions are always greedy, the middle of the policy's distribution."""

    def __post_init__(self):
        if self.period_steps < 0 or self.num_episodes < 1 or self.num_envs < 1:
            raise ValueError(
                "expected evaluation.period_steps >= 0, num_episodes >= 1 and num_envs >= 1, got "
                f"{self.period_steps}, {self.num_episodes} and {self.num_envs}"
            )
        if not 0 <= self.epsilon <= 1:
            raise ValueError(f"expected evaluation.epsilon from 0 to 1, got {self.epsilon}")


class Game(NamedTuple):
    """One whole game."""

    score: float  # unclipped rewards, all lives
    length: int  # env steps
    lives: tuple[float, ...]  # the score of each life; one entry where lives are not told
    cut: bool = False  # truncated: by a time limit, or after too long without reward


def first_seed(seed: int) -> int:
    """What the first environment of an evaluation is reset with; the others take the next ones."""
    return seed_for(seed, EVALUATION_LANE, 0)


def play_games(
    model: nn.Module,
    envs: EnvGroup,
    num_games: int,
    seed: int,
    epsilon: float = 0.01,
    on_step: Callable[[Any, np.ndarray], bool] = lambda step, action: False,
    games: list[Game] | None = None,
) -> list[Game]:
    """Play `num_games` games (rounded up to a whole number an environment), in order of their end;
    they are put into `games`, where what raises later does not take them along.

    Actions are the best, or the likeliest, and random with probability `epsilon`: vectors of
    discrete actions as a whole, Box actions never. Models keep their memory from step to step, and
    noisy layers are silenced for good. Episodes that are lives of one game make one `Game`.
    `on_step(step, action)` is called after every step and may return True to give up early. The
    environments begin with `first_seed(seed)`.
    """
    B, device = envs.num_envs, next(model.parameters(), torch.empty(0)).device
    per_env = -(-num_games // B)
    for layer in noisy_layers(model):
        layer.silence()
    context, rng = Context(0), unroll_rng(seed, EVALUATION_LANE, 0)
    obs = envs.reset(first_seed(seed))
    first, state = np.ones(B, bool), tree_map(lambda x: x.to(device), model.initial_state(B))
    games = [] if games is None else games
    played = np.zeros(B, int)
    life, score, length = np.zeros(B), np.zeros(B), np.zeros(B, int)
    lives: list[list[float]] = [[] for _ in range(B)]
    while (played < per_env).any():
        with torch.inference_mode():
            rows = tree_map(lambda x: torch.from_numpy(x).unsqueeze(0).to(device), obs)
            outputs, state = model(rows, torch.from_numpy(first).unsqueeze(0).to(device), state)
            outputs = {name: output[0].float().cpu().numpy() for name, output in outputs.items()}
        policy = Greedy() if "mean" in outputs else EpsilonGreedy(epsilon)
        action, _, _ = policy(outputs, (), first, None, context, rng)
        envs.send(action)
        step = envs.recv()
        obs, first = step.obs, step.first
        life += step.reward
        score, length = score + step.episode_return, length + step.episode_length
        for env in np.nonzero(step.terminated | (step.truncated & ~step.goes_on))[0]:
            lives[env].append(float(life[env]))
            life[env] = 0
        for env in np.nonzero(step.game_over & ~step.goes_on)[0]:
            if played[env] < per_env:
                result = float(score[env]), int(length[env]), tuple(lives[env])
                games.append(Game(*result, cut=bool(step.truncated[env])))
            played[env] += 1
            score[env], length[env], lives[env] = 0, 0, []
        if on_step(step, action):
            break
    return games


def summarise(games: list[Game]) -> dict[str, float]:
    """Means as metrics: `eval/return` of whole games, `eval/life_return` of single lives,
    `eval/life_score`, which is lives of a game x that, `eval/length`; and `eval/episodes`."""
    if not games:
        return {}
    per_life = float(np.mean([life for game in games for life in game.lives]))
    return {
        "eval/return": float(np.mean([game.score for game in games])),
        "eval/life_return": per_life,
        "eval/life_score": max(len(game.lives) for game in games) * per_life,
        "eval/length": float(np.mean([game.length for game in games])),
        "eval/episodes": len(games),
    }
