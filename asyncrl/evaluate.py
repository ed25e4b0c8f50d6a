"""Evaluation: whole games of the greedy (or nearly greedy) policy, without learning.

The same function plays for `asyncrl eval` from a checkpoint and for the evaluator process, which
pulls published weights now and then while training goes on.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from asyncrl.checkpoint import Checkpoints
from asyncrl.disk import CheckpointError
from asyncrl.env_config import EnvConfig
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
) -> list[Game]:
    """Play `num_games` games (rounded up to a whole number an environment), in order of their end.

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
    games: list[Game] = []
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


# -- of a run's checkpoint -----------------------------------------------------------------------


class Weights(NamedTuple):
    """The model of a checkpoint."""

    tensors: dict[str, np.ndarray]
    env_steps: int  # of training
    checkpoint: str
    refused: list[str]  # newer checkpoints that are damaged, and how


def read_weights(folder: Path, which: str = "newest") -> Weights:
    """The model of a run's newest valid checkpoint, or of its best; else CheckpointError."""
    checkpoints = Checkpoints(folder / "checkpoints")
    loaded = checkpoints.best() if which == "best" else checkpoints.newest_valid()
    refused = [f"{path.name} not used: {reason}" for path, reason in checkpoints.rejected]
    if loaded is None:
        when = "the first evaluation beside training" if which == "best" else "some minutes"
        raise CheckpointError(
            f"expected a valid {which} checkpoint in {checkpoints.folder}, got "
            + ("; ".join(refused) or f"none; a run has its first one after {when}")
        )
    prefix = "" if which == "best" else "algorithm|model|"  # see Learner.save
    tensors = {
        name.removeprefix(prefix): loaded.tensors[name]
        for name in loaded.tensors
        if name.startswith(prefix)
    }
    env_steps = loaded.state["eval/env_steps" if which == "best" else "env_steps"]
    return Weights(tensors, int(env_steps), loaded.path.name, refused)


def load_weights(model: nn.Module, weights: Weights) -> None:
    """Fill the model; ValueError where it is not the one that was trained."""
    try:
        model.load_state_dict({k: torch.from_numpy(v) for k, v in weights.tensors.items()})
    except RuntimeError as error:
        raise ValueError(
            f"expected the model that {weights.checkpoint} was saved from, got another: {error}; "
            "has code that the launch file imports been changed since?"
        ) from error


def protocol_words(env: EnvConfig) -> str:
    """Under which rules the games of a resolved EnvConfig are played."""
    if env.protocol == "none":
        sticky = f", sticky actions {env.kwargs.get('repeat_action_probability', 0.25):g}"
        return f"none: the environment's own rules{sticky if env.is_ale else ''}"
    rules = env.kwargs | env.atari
    words = [
        f"sticky actions {rules['repeat_action_probability']:g}",
        "all 18 actions" if rules["full_action_space"] else "minimal actions",
        f"0 to {rules['noop_max']} no-ops" + " and FIRE" * rules["use_fire_reset"] + " at a start",
        f"{rules['frameskip']} frames a step",
        f"at most {rules['max_num_frames_per_episode']:,} frames a game",
    ]
    if env.max_idle_steps:
        words.append(f"cut after {env.max_idle_steps:,} env steps without reward")
    return f"{env.protocol}: " + "; ".join(words)


def table(games: Sequence[Game], env: EnvConfig) -> list[tuple[str, str]]:
    """What the games came to, as (name, words); every number with what it is a number of."""
    scores = np.array([game.score for game in games])
    lengths = np.array([game.length for game in games])
    cut = sum(game.cut for game in games)
    rows = [
        ("mean return", f"{scores.mean():.2f} +- {scores.std():.2f} ({len(games)} games, "
         "standard deviation of a game)"),
        ("median", f"{np.median(scores):g}, from {scores.min():g} to {scores.max():g}"),
    ]  # fmt: skip
    if (lives := max(len(game.lives) for game in games)) > 1:
        means = summarise(list(games))
        words = f"{means['eval/life_return']:.2f}; {lives} x per life = "
        rows.append(("per life", f"{words}{means['eval/life_score']:.2f}"))
    rows.append(("length", f"{lengths.mean():,.0f} env steps, from {lengths.min():,} to "
                 f"{lengths.max():,}; {cut} of {len(games)} games were cut off"))  # fmt: skip
    return [*rows, ("protocol", protocol_words(env))]


def keep(
    folder: Path,
    which: str,
    weights: Weights,
    games: Sequence[Game],
    num_games: int,
    env: EnvConfig,
    how: dict,
) -> None:
    """Add a line to the run's evaluations.jsonl; a folder that refuses is only reported."""
    scores = np.array([game.score for game in games])
    line = {
        "time": time.time(),
        "env_steps": weights.env_steps,
        "checkpoint": weights.checkpoint,
        "which": which,
        "complete": len(games) == num_games,  # else it was interrupted
        **summarise(list(games)),
        "eval/return_std": float(scores.std()),
        "eval/return_median": float(np.median(scores)),
        "protocol": protocol_words(env),
        **how,
        "games": [game._asdict() for game in games],
    }
    try:
        with open(folder / "evaluations.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        print(f"asyncrl: this evaluation is not kept: {error}", file=sys.stderr)
