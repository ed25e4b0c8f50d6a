"""What all guards together cost: training with and without them, in turns within one process.

    python benchmarks/guards.py
    python benchmarks/guards.py --launch launch/breakout_dqn.py --block 512

One actor and the learner are called in turn, as in `serial`. In every second block of env steps
these are taken away: the checks of actions, observations and rewards and what catches a failing
environment (guards.py, env_group.py, env_actions.py), the guard of updates and of what is
published, the test whether gradients are finite (gradient.py), and all heartbeats. Compared is the
CPU time an env step of neighbouring blocks. The goal is met where the cost and two of its standard
errors are 2 % at most; where it is not, a note says whether it is missed or only undecided.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from measure import REPOSITORY, Report, arguments, like_a_run
from torch import nn

from asyncrl.actor import Actor
from asyncrl.algorithms.gradient import GradientStep
from asyncrl.env_actions import Actions
from asyncrl.env_group import EnvGroup
from asyncrl.folder import RunFolder
from asyncrl.guards import GuardedEnvs, UpdateGuard
from asyncrl.plan import prepare
from asyncrl.run import Process
from asyncrl.schedules import value_at
from asyncrl.supervisor import Supervisor
from asyncrl.transport.status import Status

LAUNCH = ["launch/cartpole_dqn.py", "launch/cartpole_ppo.py", "launch/breakout_dqn.py"]
MOST = 2.0  # %


def without_guards() -> contextlib.ExitStack:
    """A context in which nothing is checked."""

    def cast(self, action):
        return action.reshape(-1, *self.own.shape).astype(self.own.dtype, copy=False)

    def adopt(self, space, obs, name):
        return obs.copy() if self._copies else obs

    never = torch.zeros(())

    def step(self, env_steps):
        for group in self.optimizer.param_groups:
            group["lr"] = value_at(self.learning_rate, env_steps)
        gradients = self._gradients()
        one = len(gradients) == 1
        norm = torch.linalg.vector_norm(*gradients) if one else nn.utils.get_total_norm(gradients)
        length, most = norm.item(), self.max_grad_norm or float("inf")
        if length > most:
            for gradient in gradients:
                gradient.mul_(most / (length + 1e-6))
        self.optimizer.step()
        self.count += 1
        return {"loss/grad_norm": norm, "loss/skipped": never}

    nothing = lambda *arguments: None  # noqa: E731
    stack = contextlib.ExitStack()
    for owner, name, instead in (
        (Actions, "for_env", cast), (EnvGroup, "_adopt", adopt), (EnvGroup, "_check", nothing),
        (GuardedEnvs, "_try", lambda self, call, *arguments: call(*arguments)),
        (UpdateGuard, "update", lambda self, algorithm, store: algorithm.update(store)),
        (UpdateGuard, "settle", nothing), (UpdateGuard, "check", nothing),
        (GradientStep, "_step", step), (Actor, "beat", nothing), (Status, "beat", nothing),
    ):  # fmt: skip
        stack.enter_context(mock.patch.object(owner, name, instead))
    return stack


class Training:
    """A run's actors and learner in this process, until its folder goes."""

    def __init__(self, launch: Path, folder: Path, options: list[str]):
        plan = prepare(launch, options, launch)
        with RunFolder(folder) as run:
            run.launch = {"file": str(launch), "options": options}
            run.source = launch.read_bytes()
            run.begin(plan)
            self.parts = Supervisor(folder, plan)  # the shared memory; nothing is started
        process = Process(folder, self.parts.fds)
        self.learner = process.make_learner()
        self.actors = [process.make_actor(i, 0) for i in range(plan.num_actors)]
        self.learner.start(resume=False)

    def block(self, env_steps: int) -> float:
        """CPU seconds an env step over this many of them."""
        learner = self.learner
        begun, cpu = learner.env_steps, time.process_time()
        while learner.env_steps < begun + env_steps:
            for index, actor in enumerate(self.actors):
                learner.throttle.permit(index)
                actor.play()
            learner.drain()
            if learner.learn(learner.store.updates_allowed()):
                learner.publish()
        return (time.process_time() - cpu) / (learner.env_steps - begun)

    def warm_up(self) -> None:
        """Until updates are made."""
        while self.learner.updates < 20:
            self.block(1)

    def close(self) -> None:
        for actor in self.actors:
            actor.close()


def main() -> None:
    parser = arguments(__doc__, repeats=240)
    parser.add_argument("--launch", nargs="+", default=LAUNCH, help="launch files")
    size = "env steps; for images an eighth, and a quarter of the repeats"
    parser.add_argument("--block", type=int, default=256, help=size)
    options, rest = parser.parse_known_args()  # the rest are options of the launch files
    like_a_run()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    report, rows = Report("guards", options), []
    for launch in options.launch:
        with tempfile.TemporaryDirectory() as folder:
            how = ["--schedule", "serial", "--learner.device", "cpu", *rest]
            training = Training((REPOSITORY / launch).resolve(), Path(folder) / "run", how)
            training.warm_up()
            image = len(training.learner.spec.observation_space.shape or ()) > 1
            block = options.block // 8 if image else options.block
            repeats = options.repeats // 4 if image else options.repeats
            costs: dict[bool, list[float]] = {True: [], False: []}
            for repeat in range(repeats):
                for guarded in ((True, False), (False, True))[repeat % 2]:
                    with contextlib.nullcontext() if guarded else without_guards():
                        costs[guarded].append(training.block(block))
            training.close()
        ratio = np.array(costs[True]) / np.array(costs[False]) - 1
        rng = np.random.default_rng(0)
        error = np.median(rng.choice(ratio, (2_000, len(ratio))), axis=1).std()  # bootstrap
        rows.append({
            "launch file": Path(launch).stem, "blocks": f"{len(ratio)} x 2 of {block}",
            "us an env step": [1e6 * cost for cost in costs[True]],
            "without guards": [1e6 * cost for cost in costs[False]],
            "cost, %": 100 * float(np.median(ratio)), "standard error": 100 * float(error),
        })  # fmt: skip
    report.table(rows)
    for row in rows:
        cost, errors = row["cost, %"], 2 * row["standard error"]
        what = f"cost of all guards, {row['launch file']}"
        report.goal(f"{what}, and two standard errors", cost + errors, at_most=MOST, unit=" %")
        if cost + errors > MOST:
            verdict = "not met" if cost - errors > MOST else "undecided"
            report.note(f"{what}: {verdict}, {cost:.1f} +- {errors:.1f} %")
    report.finish()


if __name__ == "__main__":
    main()
