"""Evaluation: whole games of the greedy (or nearly greedy) policy, without learning.

The same function plays for `asyncrl eval` from a checkpoint and for the evaluator process, which
pulls published weights now and then while training goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from asyncrl.envs import EnvGroup, seed_for
from asyncrl.policies import Context, EpsilonGreedy, unroll_rng
from asyncrl.types import tree_map

EVALUATION_LANE = 1_000_000  # seeds and random numbers that no acting lane uses


@dataclass(frozen=True)
class EvaluationConfig:
    """Games played beside training."""

    period_steps: int = 100_000
    """Env steps of training between two evaluations (0: none)."""
    num_episodes: int = 10
    num_envs: int = 5
    """Played side by side; each plays the same number of games, so that short ones do not win."""
    epsilon: float = 0.01
    """Random actions among the greedy ones; a little keeps a game from looping without end."""


class Game(NamedTuple):
    """One whole game."""

    score: float  # unclipped rewards, all lives
    length: int  # env steps
    lives: tuple[float, ...]  # the score of each life; one entry where the game has no lives


def play_games(
    model: nn.Module,
    envs: EnvGroup,
    num_games: int,
    seed: int,
    epsilon: float = 0.01,
    on_step: Callable[[Any, np.ndarray], bool] = lambda step, action: False,
) -> list[Game]:
    """Play `num_games` games (rounded up to a whole number an environment), in order of their end.

    `on_step(step, action)` is called after every step and may return True to give up early.
    """
    B, device = envs.num_envs, next(model.parameters()).device
    per_env = -(-num_games // B)
    policy, context = EpsilonGreedy(epsilon), Context(0)
    rng = unroll_rng(seed, EVALUATION_LANE, 0)
    obs = envs.reset(seed_for(seed, EVALUATION_LANE, 0))
    first, state = np.ones(B, bool), tree_map(lambda x: x.to(device), model.initial_state(B))
    games: list[Game] = []
    played = np.zeros(B, int)
    life = np.zeros(B)
    lives: list[list[float]] = [[] for _ in range(B)]
    while (played < per_env).any():
        with torch.inference_mode():
            rows = tree_map(lambda x: torch.from_numpy(x).unsqueeze(0).to(device), obs)
            outputs, state = model(rows, torch.from_numpy(first).unsqueeze(0).to(device), state)
            outputs = {name: output[0].cpu().numpy() for name, output in outputs.items()}
        action, _, _ = policy(outputs, (), first, None, context, rng)
        envs.send(action)
        step = envs.recv()
        obs, first = step.obs, step.first
        life += step.reward
        for env in np.nonzero(step.terminated | step.truncated)[0]:
            lives[env].append(float(life[env]))
            life[env] = 0
        for env in np.nonzero(step.game_over)[0]:
            if played[env] < per_env:
                score, length = float(step.episode_return[env]), int(step.episode_length[env])
                games.append(Game(score, length, tuple(lives[env])))
            played[env] += 1
            lives[env] = []
        if on_step(step, action):
            break
    return games


def summarise(games: list[Game]) -> dict[str, float]:
    """Means as metrics: `eval/return`, `eval/life_return`, `eval/length`, `eval/episodes`."""
    if not games:
        return {}
    return {
        "eval/return": float(np.mean([game.score for game in games])),
        "eval/life_return": float(np.mean([life for game in games for life in game.lives])),
        "eval/length": float(np.mean([game.length for game in games])),
        "eval/episodes": len(games),
    }
