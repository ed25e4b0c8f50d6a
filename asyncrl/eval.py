"""`asyncrl eval`: whole games with a checkpoint of a run, and what is told of them."""

from __future__ import annotations

import json
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from gymnasium.spaces import Box
from torch import nn

from asyncrl import video
from asyncrl.checkpoint import Checkpoints
from asyncrl.config import Config, ConfigError, resolve
from asyncrl.disk import CheckpointError
from asyncrl.env_config import EnvConfig
from asyncrl.env_group import EnvDataError, Step
from asyncrl.envs import make_envs
from asyncrl.evaluate import Game, play_games, summarise
from asyncrl.folder import Refused, stored_launch
from asyncrl.models.precision import device_called

PROGRESS_SECONDS = 20.0


def main(folder: Path, options) -> int:
    """Play by the words of the command line, tell and keep the result; Refused where that cannot
    be. Returns the exit status."""
    torch.set_num_threads(1)  # more wait for each other, for minutes where a run goes on beside it
    num_envs = 1 if options.render_mode else min(options.envs, options.episodes)
    num_games = num_envs * -(-options.episodes // num_envs)
    watchers, recorder = [], None
    try:
        weights = read_weights(folder, options.checkpoint)
        config = config_of(folder)
        seed = config.seed + 1000 if options.seed is None else options.seed
        if options.video:
            recorder = video.Recorder(config.env, num_envs, seed)
            watchers.append(recorder)
        if not options.render_mode:
            envs = make_envs(config.env, num_envs)
        elif video.has_twin(config.env):
            envs = make_envs(config.env, 1)
            watchers.append(video.Window(config.env, seed))
        else:
            video.expect_display()
            envs = video.make_visible(config.env, 1, options.render_mode)
        model = config.model(envs.observation_space, envs.action_space)
        load_weights(model, weights)
        model.to(device_for(options.device)).eval().requires_grad_(False)
    except (CheckpointError, ConfigError, EnvDataError, ImportError, ValueError) as error:
        raise Refused(str(error)) from error
    for refused in weights.refused:
        print(f"asyncrl: {refused}", file=sys.stderr)
    after = f"after {weights.env_steps:,} env steps"
    print(f"run {folder.resolve().name}: {weights.checkpoint}, {after}", flush=True)

    games, failed = [], False
    watchers.append(_Progress(games, num_games))
    with _Interrupt() as interrupt:
        watchers.append(lambda step, action: interrupt.seen)
        try:
            play_games(
                model, envs, num_games, seed, options.epsilon,
                lambda step, action: any([watch(step, action) for watch in watchers]), games,
            )  # fmt: skip
            envs.close()
        except (Exception, SystemExit):  # of the user's; the games before it are told
            traceback.print_exc()
            failed = True
    how = {"seed": seed, "envs": num_envs}
    if not isinstance(envs.action_space, Box):  # there the likeliest action is always taken
        how = {"epsilon": options.epsilon} | how
    if games:
        keep(folder, options.checkpoint, weights, games, num_games, config.env, how)
        for name, words in table(games, config.env):
            print(f"{name:<12}{words}")
        print("played with " + ", ".join(f"{name} {value}" for name, value in how.items()))
    if len(games) < num_games:
        short = "; short ones end first, so this is not what all would come to" if games else ""
        print(f"stopped: {len(games)} of {num_games} games had ended{short}")
        return 1 if failed else 130 if interrupt.seen else 0
    filmed = _film(recorder, num_games // num_envs, folder, weights) if recorder else 0
    return filmed or int(failed)


def _film(recorder: video.Recorder, per_env: int, folder: Path, weights: Weights) -> int:
    """The best game of all; returns the exit status."""
    best = recorder.best(per_env)
    print(f"filming the best game ({best.score:g}), played again from its seed ...", flush=True)
    try:
        print(recorder.film(best, folder / "videos", weights.env_steps))
    except (EnvDataError, OSError) as error:
        print(f"asyncrl: no video: {error}", file=sys.stderr)
        return 1
    return 0


def config_of(folder: Path) -> Config:
    """The configuration of a run, from its own copy of the launch file; else Refused."""
    file, options = stored_launch(folder)
    copy = folder / "launch.py"
    if not copy.is_file():
        raise Refused(
            f"expected {copy}, the run's own launch file, which is not there; put it back"
        )
    return resolve(copy, options, file)


def device_for(name: str) -> torch.device:
    """The device of that name; ValueError where there is none."""
    try:
        device = device_called(name)
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError) as error:
        expected = "expected auto, cpu, or cuda or cuda:N for a GPU that is there"
        raise ValueError(f"--device: {expected}, got {name!r}") from error
    return device


class _Progress:
    """Says from time to time how far the games are: some never end."""

    def __init__(self, games: list[Game], num_games: int):
        self.games, self.num_games = games, num_games
        self.env_steps, self.told = 0, time.monotonic()

    def __call__(self, step: Step, action: np.ndarray) -> bool:
        self.env_steps += len(action)
        if time.monotonic() - self.told > PROGRESS_SECONDS:
            self.told = time.monotonic()
            print(
                f"asyncrl: {len(self.games)} of {self.num_games} games have ended after "
                f"{self.env_steps:,} env steps; Ctrl-C tells what they came to",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        return False


class _Interrupt:
    """The first Ctrl-C is only noted; the second interrupts."""

    seen = False

    def __enter__(self) -> _Interrupt:
        self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *error) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _note(self, number, frame) -> None:
        self.seen = True
        signal.signal(signal.SIGINT, self._previous)


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
    starts = f"0 to {max(rules['noop_max'] - 1, 0)} no-ops at a start"  # as ALE draws them
    if rules["use_fire_reset"]:
        starts += ", FIRE instead of the first where there is one"
    words = [
        f"sticky actions {rules['repeat_action_probability']:g}",
        "all 18 actions" if rules["full_action_space"] else "minimal actions",
        starts,
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
