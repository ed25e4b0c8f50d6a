"""One experiment: the parts' configurations together, and how a launch file becomes one.

A launch file is Python with a `Config` named `config` (and perhaps others: profiles). Its options
are the fields, by dotted name: `--actor.num-actors 2`. Every process of a run executes the launch
file again and applies the same options, so nothing of the user's is ever pickled.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
import traceback
import types
import typing
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import typeguard
import tyro
from gymnasium.spaces import Space
from torch import nn

from asyncrl.actor import ActorConfig
from asyncrl.algorithms.dqn import DQNConfig
from asyncrl.env_config import EnvConfig
from asyncrl.evaluate import EvaluationConfig
from asyncrl.foreign import name_of
from asyncrl.learner_config import LearnerConfig
from asyncrl.models import ModelConfig
from asyncrl.program import program
from asyncrl.types import Spec, Tree

ALL_ITEMS = typeguard.CollectionCheckStrategy.ALL_ITEMS


class ConfigError(Exception):
    """The user asked for something that cannot be: one clear message, exit status 2."""


class LaunchFileError(ConfigError):
    """A launch file raised, or is no Python."""


@dataclass(frozen=True)
class Config:
    """Everything that decides a run."""

    env: EnvConfig
    model: Any = field(default_factory=ModelConfig)
    policy: Any = None
    """How actors act (None: as the algorithm suggests)."""
    algorithm: Any = field(default_factory=DQNConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    total_env_steps: int = 1_000_000
    """Env steps of the whole run; a resumed run may raise it."""
    seed: int = 1
    """Of weights, environments and draws; what is random differs by lane and start."""
    schedule: Literal["async", "lockstep", "serial"] = "async"
    """async: actors and learner overlap. lockstep: they take turns, bit-exact on a CPU.
    serial: the same in one process, for a debugger that attaches to it."""

    def __post_init__(self):
        if self.total_env_steps < 1:
            raise ValueError(f"expected total_env_steps >= 1, got {self.total_env_steps}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"expected seed from 0 to 2**63 - 1, got {self.seed}")

    def spec(self, observation_space: Space, action_space: Space, state: Tree) -> Spec:
        """What an unroll holds, for a model with such fields of a state."""
        actor, algorithm = self.actor, self.algorithm
        return Spec(
            actor.unroll_length, actor.envs_per_lane, observation_space, action_space, state,
            num_states=getattr(algorithm, "num_states", 1),
            values=getattr(algorithm, "records_values", False),
        )  # fmt: skip


def load_launch_file(path: Path, original: Path | None = None) -> types.ModuleType:
    """Execute a launch file; its imports see the folder it (or the original of a copy) lies in."""
    original = original or path
    module = types.ModuleType("asyncrl_launch_file")
    module.__file__ = str(original)
    sys.modules[module.__name__] = module  # dataclasses of the user's look themselves up there
    folder = str(original.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        code = compile(path.read_bytes(), str(original), "exec", dont_inherit=True)
        exec(code, module.__dict__)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(original)]
        where = f" (line {lines[-1]})" if lines else ""
        refused = f"{original}{where} cannot be used"
        if not isinstance(error, ValueError):
            _check_what_was_made(error, refused)
        raise LaunchFileError(f"{refused}: {type(error).__name__}: {error}") from error
    return module


def _check_what_was_made(error: Exception, refused: str) -> None:
    """ConfigError where an error arose as a dataclass looked at values of the wrong type."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "__post_init__" and "self" in frame.f_locals:
            part = frame.f_locals["self"]
            try:
                check_types(part, type(part).__name__)
            except ConfigError as wrong:
                raise ConfigError(f"{refused}: {wrong}") from None


def choose_profile(module: types.ModuleType, name: str) -> Config:
    """The `Config` of that name in a launch file."""
    profiles = [key for key, value in vars(module).items() if isinstance(value, Config)]
    if name in profiles:
        return getattr(module, name)
    nearest = difflib.get_close_matches(name, profiles, 1)
    remedy = f"write `{name} = Config(...)` in it"
    if profiles:
        remedy = f"choose one of these by --profile, or {remedy}"
    if nearest:
        remedy = f"did you mean --profile {nearest[0]}?"
    raise ConfigError(
        f"expected {module.__file__} to define a Config named '{name}', got "
        f"{', '.join(profiles) or 'none'}; {remedy}"
    )


def apply_options(config: Config, options: Sequence[str], program: str) -> Config:
    """`config` with command-line options applied; tyro refuses unknown names and wrong types."""
    with warnings.catch_warnings():  # a list, where a tuple is declared, is as good
        like = "The field .* is annotated with type `tuple.* has type `<class 'list'>`"
        warnings.filterwarnings("ignore", like, UserWarning)
        return tyro.cli(
            Config,
            default=config,
            args=list(options),
            prog=program,
            description="Options of this launch file, with its values as defaults.",
            config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
        )


def _split_profile(option: str) -> list[str]:
    return option.split("=", 1) if option.startswith("--profile=") else [option]


def resolve(path: Path, options: Sequence[str], original: Path | None = None) -> Config:
    """The configuration that a launch file and options (with `--profile NAME`) make."""
    options = [part for option in options for part in _split_profile(option)]
    profile = "config"
    while "--profile" in options:
        position = options.index("--profile")
        if position + 1 == len(options):
            raise ConfigError("expected a name after --profile, got nothing")
        profile = options[position + 1]
        del options[position : position + 2]
    module = load_launch_file(path, original)
    config = choose_profile(module, profile)
    check_types(config)
    program = f"asyncrl train {(original or path).name} RUN_ID"
    return complete(apply_options(config, options, program))


def check_types(part: Any, name: str = "") -> None:
    """ConfigError for a value in one of asyncrl's own dataclasses that is not of its declared type,
    or not a number. Options are checked by tyro; this is for what a launch file says."""
    if isinstance(part, tuple | list):
        for i, item in enumerate(part):
            check_types(item, f"{name}[{i}]")
    if not dataclasses.is_dataclass(part) or not type(part).__module__.startswith("asyncrl."):
        return
    for key, hint in typing.get_type_hints(type(part)).items():
        value, inner = getattr(part, key), f"{name}.{key}".lstrip(".")
        try:
            plain = tuple(value) if isinstance(value, list) else value
            typeguard.check_type(plain, hint, collection_check_strategy=ALL_ITEMS)
            right = value == value and not (isinstance(value, bool) and hint in (int, float))
        except typeguard.TypeCheckError:
            right = False
        if not right:
            kind = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            remedy = f"; write {value.__name__}(...)" if isinstance(value, type) else ""
            if hint is EnvConfig and isinstance(value, str):
                remedy = f"; write EnvConfig({value!r})"
            raise ConfigError(f"expected {inner} to be {kind}, got {name_of(value)}{remedy}")
        check_types(value, inner)


def complete(config: Config) -> Config:
    """`config` with everything decided that was left to the parts."""
    check_types(config)
    model, algorithm = config.model, config.algorithm
    if isinstance(algorithm, type) or not hasattr(algorithm, "store_name"):
        raise ConfigError(
            "expected algorithm to be the configuration of one, as DQNConfig(), A2CConfig() or "
            f"PPOConfig(), got {name_of(algorithm)}"
        )
    if model is ModelConfig:
        raise ConfigError("expected model to be an object, got a class; write ModelConfig()")
    if isinstance(model, nn.Module) or not callable(model):
        got = f"a model, {type(model).__name__}" if isinstance(model, nn.Module) else repr(model)
        raise ConfigError(
            "expected model to be a function of (observation space, action space) that makes a "
            f"model, got {got}; write model=lambda obs, act: ..."
        )
    if isinstance(model, ModelConfig) and model.head == "auto":
        model = dataclasses.replace(model, head=algorithm.head)
    policy = algorithm.policy() if config.policy is None else config.policy
    learner = config.learner
    if hasattr(algorithm, "rollout") and learner.publish_period > 1:
        raise ConfigError(
            f"expected learner.publish_period of 0 or 1 with {type(algorithm).__name__}, got "
            f"{learner.publish_period}: lag is counted in publications, one after each rollout"
        )
    if learner.publish_period == 0:
        learner = dataclasses.replace(learner, publish_period=algorithm.publish_period)
    return dataclasses.replace(
        config, env=config.env.resolved(), model=model, policy=policy, learner=learner
    )


def main(launch_file: str) -> None:
    """For the last line of a launch file: `python launch/x.py RUN_ID [options]` trains it."""
    import os

    if "asyncrl_launch_file" in sys.modules:  # this is executed to find its Config
        raise ConfigError(
            'expected main(__file__) below `if __name__ == "__main__":`, got it called while the '
            "launch file was read; write that line above it, or it would start itself for ever"
        )
    command = program("asyncrl", "train", launch_file, *sys.argv[1:])
    os.execv(sys.executable, command)
