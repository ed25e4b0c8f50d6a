"""The processes of a run: how the parts are wired together in each of them.

`child_main` is one process, `asyncrl.supervisor` the parent of all, who has them forked from
`asyncrl.template`. Only `prepare` is started by itself (`asyncrl.program`).

    prepare    the plan of a run (asyncrl.plan)
    learner 0  Learner on all lanes            actor i   Actor on its lanes
    evaluator  games beside training           serial    actors and learner in one process
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import traceback
from pathlib import Path

import numpy as np

from asyncrl.disk import CheckpointError
from asyncrl.logs import EventLog
from asyncrl.plan import EXIT_FAILED, EXIT_REFUSED, Plan, prepare_main
from asyncrl.priority import give_way
from asyncrl.spec_json import fields_from_json, spec_from_json
from asyncrl.threads import Threads, halves
from asyncrl.transport.ring import Ring, Word
from asyncrl.transport.shared_memory import Doorbell, Segment, die_with_parent
from asyncrl.transport.status import Status
from asyncrl.transport.weights import WeightsBuffer, WeightsReader, WeightsWriter

MAX_PERIODS = 10  # of evaluation, that training goes on for while games of one do not end
EVALUATOR_NICE = 5  # at 19 its games hardly end where all cores are busy (docs/speed.md)
MAX_ENV_FAILURES = 10  # of an actor's environments, without a whole unroll in between


class Connections:
    """The shared memory and doorbells of a run, as a child attaches them by file descriptor."""

    def __init__(self, plan: Plan, fds: dict):
        spec = spec_from_json(plan.spec)
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
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # by how many there are, orthogonal weights are rounded
        spec = self.connections.spec
        model = self.config.model(spec.observation_space, spec.action_space)
        torch.set_num_threads(threads)
        return model

    def make_actor(self, index: int, generation: int):
        from asyncrl.actor import Actor
        from asyncrl.envs import make_envs
        from asyncrl.guards import GuardedEnvs
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
            lambda: GuardedEnvs(make_envs(config.env, config.actor.envs_per_lane)),
            config.seed,
            generation,
        )

    def make_learner(self):
        from asyncrl.learner import Learner

        config, links = self.config, self.connections
        status = links.status
        if "cpu" == config.learner.resolved_device().type != self.plan.device:
            raise RuntimeError(
                f"expected {self.plan.device} for learning, as when this run was started, got a "
                "GPU that is gone (nvidia-smi); resume with --learner.device cpu to do without"
            )

        def beat() -> bool:
            status.beat(Status.LEARNER_BEAT)
            return status.stopping

        model = self.make_model()
        algorithm = config.learner.build(config.algorithm, model)
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
            read_status=status.metrics,
            beat=beat,
        )


def run_actor(process: Process, index: int, generation: int) -> None:
    import torch

    from asyncrl.guards import EnvFailed

    config, links = process.config.actor, process.connections
    give_way(config.nice)
    torch.set_num_threads(config.num_threads)
    torch.set_flush_denormal(True)
    rebuilds = links.rings[index * config.lanes_per_actor].words[Word.REBUILDS :][:1]
    actor = process.make_actor(index, generation + int(rebuilds[0]))
    bell, events = links.actor_bells[index], EventLog(process.folder / "events.log")
    failures, told = 0, set()  # in a row; what they said

    def idle() -> bool:
        actor.idle()
        return links.status.stopping

    try:
        while bell.wait_for(actor.may_begin, idle):
            try:
                actor.play()
                failures = 0
            except EnvFailed as error:
                failures += 1
                # Turns must be exact: all go back to the last checkpoint.
                if failures > MAX_ENV_FAILURES or process.config.schedule != "async":
                    raise
                rebuilds[0] += 1
                if rebuilds[0] < 100 or rebuilds[0] % 100 == 0:  # a week has many steps
                    text = f"actor {index}: environments made anew: {error}"
                    if str(error) not in told:  # where it was raised, once
                        told.add(str(error))
                        frames = traceback.format_exception(error.__cause__)
                        text = f"{text}\n{''.join(frames).strip()}"
                    events.event("env", text, times=rebuilds[0])
                rebuild(actor)
            links.learner_bell.ring()
            if links.status.stopping:
                return
    finally:
        actor.close()


def rebuild(actor) -> None:
    """Let go of an actor's environments: its next unroll begins with new ones, behind a seam.

    What it had not committed does not exist, so episodes that failed are in no statistics.
    """
    actor.generation += 1
    for lane in actor.lanes:
        if lane.envs is not None:
            with contextlib.suppress(Exception):  # they have failed already
                lane.envs.close()
        lane.envs = lane.unroll = None


def run_learner(process: Process, index: int, generation: int) -> None:
    import torch

    config, links = process.config.learner, process.connections
    turn_based = process.config.schedule != "async"
    torch.set_flush_denormal(True)
    learner = process.make_learner()
    threads = config.resolved_threads(learner.model)
    if turn_based and not config.num_threads:
        threads = 1
    on_gpu = config.resolved_device().type == "cuda"
    torch.backends.cudnn.benchmark = on_gpu and not turn_based  # the quickest of its algorithms
    # What is compiled is so for a number of threads.
    adapts = not (turn_based or config.num_threads or on_gpu or config.compile)
    # Two teams draw from one generator, whoever comes first; in turns all must be exact.
    use = torch.set_num_threads if turn_based else learner.algorithm.teams.use
    learner.threads = Threads(
        halves(threads) if adapts else [threads], use,
        lambda text: learner.events.event("learner", text),
    )  # fmt: skip
    status = links.status

    def wait(condition) -> bool:
        return not learner.beat() and links.learner_bell.wait_for(condition, learner.beat)

    begin(learner, status)
    if turn_based:
        learner.run_in_turns(wait)
    else:
        learner.run_async(wait)
    learner.finish()
    status.words[Status.DONE] = 1


def run_serial(process: Process, index: int, generation: int) -> None:
    """The same actors and learner, called in turn in this one process."""
    import torch

    links, config = process.connections, process.config
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    learner = process.make_learner()
    actors = [process.make_actor(actor, 0) for actor in range(config.actor.num_actors)]
    status = links.status

    def play(condition) -> bool:
        for actor in actors:
            actor.play()
        return not learner.beat()

    begin(learner, status)
    learner.run_in_turns(play)
    learner.finish()
    status.words[Status.DONE] = 1
    for actor in actors:
        actor.close()


def begin(learner, status: Status) -> None:
    """Load the newest checkpoint, and say in the log where the run goes on."""
    try:
        resumed = learner.start(resume=True)
    except CheckpointError as error:
        if not status.words[Status.LEARNER_RESTARTS]:
            error.exit_status = EXIT_REFUSED  # later it is tried again: a disk may come back
        raise
    if learner.stopped:  # and has said so
        return
    text = f"resumed at {learner.env_steps} env steps" if resumed else "begun at 0 env steps"
    device = learner.config.resolved_device()
    learner.events.event("learner", f"{text}, on {device}", updates=learner.updates)


def run_evaluator(process: Process, index: int, generation: int) -> None:
    """Games with published weights whenever `period_steps` env steps have gone by."""
    import torch

    from asyncrl.checkpoint import Checkpoints
    from asyncrl.disk import CheckpointError
    from asyncrl.envs import make_envs
    from asyncrl.evaluate import play_games, summarise
    from asyncrl.guards import EnvFailed, GuardedEnvs

    give_way(EVALUATOR_NICE)
    torch.set_num_threads(1)
    config, links = process.config.evaluation, process.connections
    status, weights = links.status, WeightsReader(links.weights)
    model = process.make_model().eval().requires_grad_(False)

    def make_guarded() -> GuardedEnvs:
        return GuardedEnvs(make_envs(process.config.env, config.num_envs))

    envs = make_guarded()
    checkpoints = Checkpoints(process.folder / "checkpoints")
    events = EventLog(process.folder / "events.log")
    try:
        checkpoints.clean(best=True)
    except CheckpointError as error:
        events.event("checkpoint", f"best may not be saved: {error}")
    best = checkpoints.best()
    best_return = best.state["eval/return"] if best else -np.inf
    next_at = config.period_steps

    def idle() -> bool:
        status.beat(Status.EVALUATOR_BEAT)
        return status.stopping

    def published() -> int:
        """The env steps of the newest weights, -1 where there are none."""
        version = int(links.weights.version[0])
        newest = links.weights.copies[version % 2]["context"]["env_steps"]
        return int(newest) if version > 0 else -1

    def due() -> bool:
        return published() >= next_at

    while links.evaluator_bell.wait_for(due, idle):
        pulled = weights.pull()
        if pulled is None:
            continue
        env_steps = int(pulled["context"]["env_steps"])
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(torch.from_numpy(pulled["model"][name]))
        next_at = (env_steps // config.period_steps + 1) * config.period_steps
        latest = env_steps + MAX_PERIODS * config.period_steps
        try:
            games = play_games(
                model, envs, config.num_episodes, process.config.seed, config.epsilon,
                on_step=lambda step, action: idle() or published() > latest,  # noqa: B023
            )  # fmt: skip
        except EnvFailed as error:
            events.event("env", f"evaluator: environments made anew: {error}", env_steps=env_steps)
            with contextlib.suppress(Exception):  # they have failed already
                envs.close()
            envs = make_guarded()
            continue
        if status.stopping:
            return
        if len(games) < config.num_episodes:
            text = f"evaluation given up: {len(games)} of {config.num_episodes} games ended while "
            text += f"training went on for {MAX_PERIODS} periods; give the games a time limit"
            events.event("warning", text, env_steps=env_steps)
            continue
        summary = summarise(games) | {"eval/env_steps": env_steps}
        status.numbers[: len(Status.EVALUATION)] = [summary[name] for name in Status.EVALUATION]
        events.event("evaluated", f"mean return {summary['eval/return']:.2f} over "
                     f"{len(games)} games", env_steps=env_steps)  # fmt: skip
        if summary["eval/return"] > best_return:
            tensors = {name: np.array(array) for name, array in pulled["model"].items()}
            try:
                checkpoints.save(env_steps, tensors, summary, best=True)
                best_return = summary["eval/return"]
            except CheckpointError as error:
                events.event("checkpoint", f"best not saved: {error}")


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
        die_with_parent(os.getppid())
        try:
            status = prepare_main(Path(rest[0]), Path(rest[1]), int(rest[2]), rest[3:])
        except SystemExit as refused:  # options; or --help
            status = refused.code or 0
        sys.stdout.flush()
        os._exit(status)  # at once: the parent is about to say that it still waits
    folder, parent, generation, fds = rest
    die_with_parent(int(parent))
    if role in ("actor", "evaluator"):  # if memory runs out, not the learner, which has most of it
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("800")
    try:
        process = Process(Path(folder), json.loads(fds))
        ROLES[role](process, int(index), int(generation))
    except (Exception, SystemExit) as error:  # an environment may call exit()
        if status := getattr(error, "exit_status", None):  # nobody's mistake in code
            print(f"asyncrl: {error}", file=sys.stderr)
            return status
        traceback.print_exc()
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(child_main(sys.argv[1:]))
