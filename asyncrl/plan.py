"""The plan of a run: what its launch file means, found out once before anything is started.

A short-lived child executes the launch file, builds the environment and the model once, and refuses
what cannot work. Its plan is plain JSON, so that the supervisor needs no torch.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from asyncrl.foreign import nobody_reads
from asyncrl.spec_json import fields_to_json, spec_to_json
from asyncrl.transport.ring import Ring
from asyncrl.transport.weights import WeightsBuffer

EXIT_FAILED, EXIT_REFUSED = 1, 2
MAX_THREADS = 1_000  # beyond which some libraries do not refuse, but crash


@dataclass(frozen=True)
class Plan:
    """What `prepare` found out: all that the parent must know, in plain JSON types."""

    config: dict  # described, for config.json and comparisons
    spec: dict
    weights: dict
    memory: list  # of [what, bytes]
    disk_nbytes: int
    policies: list
    num_actors: int
    num_lanes: int
    slots_per_lane: int
    total_env_steps: int
    schedule: str
    evaluates: bool
    measured: list = field(default_factory=list)  # options, in place of what was "auto"
    device: str = "cpu"  # what learns
    learns_until: int | None = None  # env steps; the learning rate is 0 behind them
    unset: list = field(default_factory=list)  # paths in config of what is at its default

    @property
    def parameters(self) -> dict:
        """Names, shapes and types of what the model learns and keeps."""
        return {"model": self.weights["dict"]["model"]["dict"]}

    @classmethod
    def read(cls, folder: Path) -> Plan:
        return cls(**json.loads((folder / "plan.json").read_text()))


def prepare(launch_file: Path, options: list[str], original: Path) -> Plan:
    """Execute the launch file, build env and model once, and refuse what cannot work."""
    from asyncrl.actor import context_fields
    from asyncrl.config import resolve
    from asyncrl.describe import describe, unset_fields
    from asyncrl.envs import make_envs
    from asyncrl.foreign import call
    from asyncrl.models.contract import try_model
    from asyncrl.policies import as_mixture
    from asyncrl.policy_contract import check_policy
    from asyncrl.transport.weights import weights_fields

    config = resolve(launch_file, options, original)
    _check_machine(config)
    envs = call("the environment's constructor", make_envs, config.env, 1)
    observation_space, action_space = envs.observation_space, envs.action_space
    envs.close()
    model = call("the model's constructor", config.model, observation_space, action_space)
    state, outputs = try_model(model, config.algorithm.head, observation_space, action_space)
    mixture = as_mixture(config.policy)
    outputs = {name: output[0].detach().float().numpy() for name, output in outputs.items()}
    check_policy(mixture, outputs, action_space)
    measured = []
    if config.actor.num_actors == "auto":
        from asyncrl.costs import best_num_actors

        number = call("the environment", best_num_actors, config)
        config = replace(config, actor=replace(config.actor, num_actors=number))
        measured = ["--actor.num-actors", str(number)]
    _check_devices(config)
    actor = config.actor
    spec = config.spec(observation_space, action_space, state)
    weights = weights_fields(model.state_dict(), context_fields(len(mixture.names)))
    store = config.algorithm.store_nbytes(model, spec, actor.num_lanes)
    parameters = sum(tensor.nbytes for tensor in model.state_dict().values())
    memory = _memory(config, spec, WeightsBuffer.nbytes(weights), parameters, store)
    rows = min(config.algorithm.kept_env_steps, config.total_env_steps)
    streamed = rows / (spec.unroll_length * spec.num_envs) * spec.layout.nbytes
    streamed *= config.learner.save_replay
    saved = getattr(config.algorithm, "checkpoint_nbytes", config.algorithm.store_nbytes)
    saved = saved(model, spec, actor.num_lanes) + 4 * parameters  # the best and one on its way too
    return Plan(
        config=describe(config),
        spec=spec_to_json(spec),
        weights=fields_to_json(weights),
        memory=memory,
        disk_nbytes=int(streamed) + (config.learner.keep_checkpoints + 2) * saved,
        policies=list(mixture.names),
        num_actors=actor.num_actors,
        num_lanes=actor.num_lanes,
        slots_per_lane=actor.slots_per_lane,
        total_env_steps=config.total_env_steps,
        schedule=config.schedule,
        evaluates=config.evaluation.period_steps > 0,
        measured=measured,
        device=config.learner.resolved_device().type,
        learns_until=_learns_until(config),
        unset=unset_fields(config),
    )


def _check_machine(config) -> None:
    """ValueError for threads, GPUs or a compiler that there are not."""
    import torch

    from asyncrl.learner_config import check_compiler

    for name in ("learner", "actor", "env"):
        if (threads := getattr(config, name).num_threads) > MAX_THREADS:
            raise ValueError(
                f"expected {name}.num_threads of at most {MAX_THREADS:,}, got {threads:,}; more "
                "than there are processors only wait for each other"
            )
    for name in (config.learner.device, config.actor.device):  # before one is begun to be used
        gpu = re.fullmatch(r"cuda(?::(\d+))?", name)
        if gpu and int(gpu[1] or 0) >= (there := torch.cuda.device_count()):
            raise _unusable(name, f"there are {there} GPUs")
    if config.learner.compile:
        check_compiler()


def _check_devices(config) -> None:
    """ValueError for a device that there is not. Begins to use a GPU: behind whatever may fork."""
    import torch

    devices = {config.learner.device, config.actor.device, config.algorithm.store_device}
    for name in devices - {"auto"}:
        try:
            if torch.empty(1, device=name).is_meta:
                raise RuntimeError("it holds no numbers")
        except (RuntimeError, AssertionError) as error:
            raise _unusable(name, error) from None


def _unusable(device: str, why: object) -> ValueError:
    return ValueError(
        f"expected a device that torch can use here, got {device!r}: {why}; use cpu or auto"
    )


def _memory(config, spec, weights: int, parameters: int, store: int) -> list:
    """[what, bytes] of main memory; ValueError for a store that its GPU has no room for."""
    import torch

    from asyncrl.stores.replay_config import fits_on_gpu

    actor, store_device = config.actor, config.algorithm.store_device
    evaluates = config.evaluation.period_steps > 0
    num_processes = evaluates + (1 if config.schedule == "serial" else 1 + actor.num_actors)
    workers = actor.num_lanes * actor.envs_per_lane + evaluates * config.evaluation.num_envs
    workers *= config.env.vectorization == "async"
    memory = [
        [f"{actor.num_lanes} lanes of {actor.slots_per_lane} unrolls",
         actor.num_lanes * Ring.nbytes(spec, actor.slots_per_lane)],
        ["weights, two copies", weights],
        ["parameters, target, gradients and moments", 5 * parameters],
        [f"{num_processes} processes of about 300 MB", num_processes * 300_000_000],
        [f"{workers} processes of single environments, of 10 MB or more", workers * 10_000_000],
        ["supervisor and template", 260_000_000],
    ]  # fmt: skip
    learns_on = config.learner.resolved_device()
    stored_on = learns_on if store_device == "auto" else torch.device(store_device)
    in_host_memory = stored_on.type == "cpu"
    if not in_host_memory and not fits_on_gpu(stored_on, store):
        if store_device != "auto":
            raise ValueError(
                f"expected room for a {config.algorithm.store_name} of {store / 1e9:.2f} GB on "
                f"{store_device}, got less; lower its capacity, or keep it in main memory with "
                "--algorithm.replay.device cpu"
            )
        in_host_memory = True
    if in_host_memory:
        memory.insert(0, [config.algorithm.store_name, store])
    return [line for line in memory if line[1]]


def _learns_until(config) -> int | None:
    from asyncrl.schedules import value_at

    rate, total = getattr(config.algorithm, "learning_rate", None), config.total_env_steps
    if rate is None:
        return None
    moments = (total * percent // 100 for percent in range(100, 0, -1))
    return next((moment for moment in moments if value_at(rate, moment) > 0), 0)


def in_words(launch_file: Path, work: Callable[[], object]) -> int:
    """Do work that executes a launch file; the exit status, once it was said what it raised."""
    from asyncrl.config import ConfigError, LaunchFileError

    try:
        work()
        sys.stdout.flush()
    except (ConfigError, ValueError) as error:
        if isinstance(error, LaunchFileError) and not isinstance(error.__cause__, ValueError):
            traceback.print_exception(error.__cause__)
        print(f"asyncrl: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except KeyboardInterrupt:
        return 130
    except (Exception, SystemExit) as error:
        if isinstance(error, BrokenPipeError) and nobody_reads():
            return EXIT_FAILED
        frames = traceback.extract_tb(error.__traceback__)
        wrong = type(error).__name__
        if isinstance(error, SystemExit):
            if "apply_options" in [frame.name for frame in frames]:  # options refused, or --help
                raise
            wrong = "expected it to go on, but it calls exit: SystemExit"
        else:
            traceback.print_exc()
        own = [frame for frame in frames if Path(frame.filename) == launch_file]
        where = f" (line {own[-1].lineno})" if own else ""
        print(f"asyncrl: {launch_file}{where} cannot be used: {wrong}: {error}", file=sys.stderr)
        return EXIT_REFUSED
    return 0


def prepare_main(launch_file: Path, original: Path, fd: int, options: list[str]) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def work() -> None:
        plan = prepare(launch_file, options, original)
        with os.fdopen(fd, "w") as file:
            json.dump(vars(plan), file)

    return in_words(original, work)
