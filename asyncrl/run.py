"""The processes of a run: how the parts are wired together in each of them.

`python -m asyncrl.run ROLE INDEX ...` is one process; `asyncrl.supervisor` is their parent.

    prepare    executes the launch file once: config, sizes, all refusals   -> Plan, as JSON
    learner 0  Learner on all lanes            actor i   Actor on its lanes
    evaluator  games beside training           serial    actors and learner in one process
"""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from asyncrl.metrics import EventLog
from asyncrl.transport.ring import Ring
from asyncrl.transport.shared_memory import Doorbell, Segment, die_with_parent
from asyncrl.transport.weights import WeightsBuffer, WeightsReader, WeightsWriter
from asyncrl.types import Spec, fields_from_json, fields_to_json

EXIT_FAILED, EXIT_REFUSED = 1, 2
STATUS_BYTES = 4096


class Status:
    """A few words all processes of a run share; each has one writer."""

    def __init__(self, buffer):
        self.words = np.ndarray((8,), np.int64, buffer, 0)
        self.numbers = np.ndarray((16,), np.float64, buffer, 1024)

    STOP, LEARNER_BEAT, EVALUATOR_BEAT, READY = range(4)  # supervisor, learner, evaluator, learner
    EVALUATION = ("eval/return", "eval/life_return", "eval/length", "eval/episodes",
                  "eval/env_steps")  # fmt: skip

    @property
    def stopping(self) -> bool:
        return bool(self.words[self.STOP])

    def beat(self, word: int) -> None:
        self.words[word] = time.monotonic_ns()

    def evaluation(self) -> dict[str, float]:
        """The last evaluation as metrics, once there is one."""
        values = dict(zip(self.EVALUATION, self.numbers.tolist(), strict=False))
        return values if values["eval/episodes"] else {}


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

    @classmethod
    def read(cls, folder: Path) -> Plan:
        return cls(**json.loads((folder / "plan.json").read_text()))


# -- one process of a run ------------------------------------------------------------------------


class Connections:
    """The shared memory and doorbells of a run, as a child attaches them by file descriptor."""

    def __init__(self, plan: Plan, fds: dict):
        spec = Spec.from_json(plan.spec)
        self.status = Status(Segment.attach(fds["status"]).buffer)
        weights = WeightsBuffer(
            Segment.attach(fds["weights"]).buffer, fields_from_json(plan.weights)
        )
        self.weights = weights
        self.rings = [
            Ring(Segment.attach(fd).buffer, spec, plan.slots_per_lane) for fd in fds["lanes"]
        ]
        self.learner_bell = Doorbell(fds["learner_bell"])
        self.actor_bells = [Doorbell(fd) for fd in fds["actor_bells"]]
        self.evaluator_bell = Doorbell(fds["evaluator_bell"])
        self.spec = spec


def prepare(launch_file: Path, options: list[str], original: Path) -> Plan:
    """Execute the launch file, build env and model once, and refuse what cannot work."""
    import torch  # noqa: F401  (timed here, not in the parent)

    from asyncrl.actor import CONTEXT_FIELDS
    from asyncrl.config import resolve
    from asyncrl.describe import describe
    from asyncrl.envs import make_envs
    from asyncrl.policies import as_mixture
    from asyncrl.transport.weights import weights_fields
    from asyncrl.types import Field, tree_map

    config = resolve(launch_file, options, original)
    actor = config.actor
    envs = make_envs(config.env, 1)
    observation_space, action_space = envs.observation_space, envs.action_space
    envs.close()
    model = config.model(observation_space, action_space)
    state = tree_map(lambda x: Field(tuple(x.shape[1:]), Field.of(x).dtype), model.initial_state(1))
    spec = Spec(actor.unroll_length, actor.envs_per_lane, observation_space, action_space, state)
    device = config.learner.resolved_device()
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "expected a CUDA device for learner.device='cuda', got none on this machine; "
            "use --learner.device auto"
        )
    weights = weights_fields(model.state_dict(), CONTEXT_FIELDS)
    store = config.algorithm.store_nbytes(model, spec, actor.num_lanes)
    mixture = as_mixture(config.policy)
    num_processes = 1 if config.schedule == "serial" else 1 + actor.num_actors
    memory = [
        [f"{actor.num_lanes} lanes of {actor.slots_per_lane} unrolls",
         actor.num_lanes * Ring.nbytes(spec, actor.slots_per_lane)],
        ["weights, two copies", WeightsBuffer.nbytes(weights)],
        [f"{num_processes} processes of about 300 MB", num_processes * 300_000_000],
        ["supervisor", 80_000_000],
    ]  # fmt: skip
    if device.type == "cpu":
        memory.insert(0, ["replay", store])
    rows = min(getattr(config.algorithm.replay, "capacity", 0), config.total_env_steps)
    unrolls = rows / (spec.unroll_length * spec.num_envs)
    return Plan(
        config=describe(config),
        spec=spec.to_json(),
        weights=fields_to_json(weights),
        memory=memory,
        disk_nbytes=int(unrolls * spec.layout.nbytes) if config.learner.save_replay else 0,
        policies=list(mixture.names),
        num_actors=actor.num_actors,
        num_lanes=actor.num_lanes,
        slots_per_lane=actor.slots_per_lane,
        total_env_steps=config.total_env_steps,
        schedule=config.schedule,
        evaluates=config.evaluation.period_steps > 0,
    )


def versions() -> dict[str, str]:
    """Versions of what decides a run."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("torch", "numpy", "gymnasium", "ale-py"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


class Process:
    """What every child does first, and what it needs to build its part."""

    def __init__(self, folder: Path, fds: dict):
        from asyncrl.config import resolve

        self.folder = folder
        launch = json.loads((folder / "launch.json").read_text())
        self.plan = Plan.read(folder)
        self.connections = Connections(self.plan, fds)
        self.config = resolve(folder / "launch.py", launch["options"], Path(launch["file"]))

    def make_model(self):
        import torch

        torch.manual_seed(self.config.seed)
        spec = self.connections.spec
        return self.config.model(spec.observation_space, spec.action_space)

    def make_actor(self, index: int, generation: int):
        from asyncrl.actor import Actor
        from asyncrl.envs import make_envs
        from asyncrl.policies import as_mixture

        config, links = self.config, self.connections
        lanes = config.actor.lanes_per_actor
        return Actor(
            index,
            config.actor,
            {lane: links.rings[lane] for lane in range(index * lanes, (index + 1) * lanes)},
            WeightsReader(links.weights),
            self.make_model(),
            as_mixture(config.policy),
            lambda: make_envs(config.env, config.actor.envs_per_lane),
            config.seed,
            generation,
        )

    def make_learner(self):
        from asyncrl.learner import Learner

        config, links = self.config, self.connections
        model = self.make_model()
        algorithm = config.algorithm.build(model, config.learner.resolved_device())
        return Learner(
            config.learner,
            config.actor,
            algorithm,
            model,
            links.spec,
            links.rings,
            WeightsWriter(links.weights),
            tuple(self.plan.policies),
            self.folder,
            config.seed,
            config.total_env_steps,
            ring_actor=lambda actor: links.actor_bells[actor].ring(),
            turn_based=config.schedule != "async",
            read_evaluation=links.status.evaluation,
        )


def run_actor(process: Process, index: int, generation: int) -> None:
    import torch

    config, links = process.config.actor, process.connections
    os.nice(config.nice)
    torch.set_num_threads(config.num_threads)
    actor = process.make_actor(index, generation)
    bell = links.actor_bells[index]

    def idle() -> bool:
        actor.idle()
        return links.status.stopping

    try:
        while bell.wait_for(actor.may_begin, idle):
            actor.play()
            links.learner_bell.ring()
            if links.status.stopping:
                return
    finally:
        actor.close()


def run_learner(process: Process, index: int, generation: int) -> None:
    import torch

    config, links = process.config.learner, process.connections
    turn_based = process.config.schedule != "async"
    torch.set_num_threads(config.num_threads or (1 if turn_based else os.cpu_count() or 1))
    torch.set_flush_denormal(True)
    learner = process.make_learner()
    status = links.status

    def idle() -> bool:
        status.beat(Status.LEARNER_BEAT)
        return status.stopping

    def wait(condition) -> bool:
        return not idle() and links.learner_bell.wait_for(condition, idle)

    resumed = learner.start(resume=True)
    announce(learner, resumed)
    status.words[Status.READY] = 1
    if turn_based:
        learner.run_in_turns(wait)
    else:
        learner.run_async(wait)
    learner.finish()


def run_serial(process: Process, index: int, generation: int) -> None:
    """The same actors and learner, called in turn in this one process."""
    import torch

    links, config = process.connections, process.config
    torch.set_num_threads(1)
    learner = process.make_learner()
    actors = [process.make_actor(actor, 0) for actor in range(config.actor.num_actors)]
    status = links.status

    def play(condition) -> bool:
        status.beat(Status.LEARNER_BEAT)
        for actor in actors:
            actor.play()
        return not status.stopping

    announce(learner, learner.start(resume=True))
    status.words[Status.READY] = 1
    learner.run_in_turns(play)
    learner.finish()
    for actor in actors:
        actor.close()


def announce(learner, resumed: bool) -> None:
    """Say in the log where the run goes on."""
    text = f"resumed at {learner.env_steps} env steps" if resumed else "begun at 0 env steps"
    learner.events.event("learner", text, updates=learner.updates)


def run_evaluator(process: Process, index: int, generation: int) -> None:
    """Games with published weights whenever `period_steps` env steps have gone by."""
    import torch

    from asyncrl.checkpoint import CheckpointError, Checkpoints
    from asyncrl.envs import make_envs
    from asyncrl.evaluate import play_games, summarise

    os.nice(19)
    torch.set_num_threads(1)
    config, links = process.config.evaluation, process.connections
    status, weights = links.status, WeightsReader(links.weights)
    model = process.make_model().eval().requires_grad_(False)
    envs = make_envs(process.config.env, config.num_envs)
    checkpoints = Checkpoints(process.folder / "checkpoints")
    best = checkpoints.best()
    best_return = best.state["eval/return"] if best else -np.inf
    events = EventLog(process.folder / "events.log")
    next_at = config.period_steps

    def idle() -> bool:
        status.beat(Status.EVALUATOR_BEAT)
        return status.stopping

    def due() -> bool:
        version = int(links.weights.version[0])
        published = links.weights.copies[version % 2]["context"]["env_steps"]
        return version > 0 and int(published) >= next_at

    while links.evaluator_bell.wait_for(due, idle):
        pulled = weights.pull()
        if pulled is None:
            continue
        env_steps = int(pulled["context"]["env_steps"])
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(torch.from_numpy(pulled["model"][name]))
        games = play_games(
            model, envs, config.num_episodes, process.config.seed, config.epsilon,
            on_step=lambda step, action: idle(),
        )  # fmt: skip
        if status.stopping:
            return
        summary = summarise(games) | {"eval/env_steps": env_steps}
        status.numbers[: len(Status.EVALUATION)] = [summary[name] for name in Status.EVALUATION]
        events.event("evaluated", f"mean return {summary['eval/return']:.2f} over "
                     f"{len(games)} games", env_steps=env_steps)  # fmt: skip
        if summary["eval/return"] > best_return:
            best_return = summary["eval/return"]
            tensors = {name: np.array(array) for name, array in pulled["model"].items()}
            try:
                checkpoints.save(env_steps, tensors, summary, best=True)
            except CheckpointError as error:
                events.event("checkpoint", f"best not saved: {error}")
        next_at = (env_steps // config.period_steps + 1) * config.period_steps


ROLES = {
    "actor": run_actor,
    "learner": run_learner,
    "serial": run_serial,
    "evaluator": run_evaluator,
}


def child_main(arguments: list[str]) -> int:
    """Entry of every child: role, index, then its run folder and connections."""
    role, index, *rest = arguments
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the group; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    if role == "prepare":
        return _prepare_main(Path(rest[0]), Path(rest[1]), int(rest[2]), rest[3:])
    folder, parent, generation, fds = rest
    die_with_parent(int(parent))
    try:
        process = Process(Path(folder), json.loads(fds))
        ROLES[role](process, int(index), int(generation))
    except Exception:
        traceback.print_exc()
        return EXIT_FAILED
    return 0


def _prepare_main(launch_file: Path, original: Path, fd: int, options: list[str]) -> int:
    from asyncrl.config import ConfigError

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        plan = prepare(launch_file, options, original)
    except (ConfigError, ValueError) as error:
        print(f"asyncrl: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if Path(frame.filename) == original]
        where = f" (line {own[-1].lineno})" if own else ""
        traceback.print_exc()
        print(f"asyncrl: {original}{where} cannot be used: {type(error).__name__}: {error}",
              file=sys.stderr)  # fmt: skip
        return EXIT_REFUSED
    with os.fdopen(fd, "w") as file:
        json.dump(vars(plan), file)
    return 0


if __name__ == "__main__":
    sys.exit(child_main(sys.argv[1:]))
