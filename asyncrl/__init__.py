"""asyncrl: asynchronous actor-learner deep RL for long, unattended runs on one box.

One transition and one weight update go round like this, a file a station:

    envs ──> actor ──> ring ──> learner ──> store ──> algorithm
               ^                                          │
               └───────────── weights <───────────────────┘

    env_group.py   B environments behind send and recv: what a row is       (envs.py: by name)
    actor.py       env + model + policy -> one unroll of each of its lanes  (models/, policies.py)
    types.py       the unroll: every field that crosses, described once
    transport/     ring.py and weights.py on any memory; shared_memory.py of Linux
    learner.py     drain -> store -> update -> publish; what is saved       (throttle.py)
    stores/        replay.py: rows, seams, draws; rollout.py: a queue; limiter.py: who waits
                   (selection.py, sum_tree.py: priorities; sequences.py: recurrent states)
    algorithms/    dqn.py, a2c.py, ppo.py: config, loss and update; returns.py
    run.py         how these are wired in each process; supervisor.py keeps them alive

A launch file needs the names below; they are imported when first asked for, so that a process which
needs no torch loads none.
"""

from importlib import import_module

_HOME = {
    "config": ("Config", "main"),
    "env_config": ("EnvConfig",),
    "models": ("ModelConfig",),
    "policies": (
        "EpsilonGreedy",
        "EpsilonLadder",
        "Greedy",
        "Mixture",
        "Part",
        "Random",
        "Sample",
        "Softmax",
    ),
    "switch_policies": ("Certainty", "RandomSwitch", "Switch"),
    "schedules": ("Exponential", "Linear", "Piecewise"),
    "algorithms.dqn": ("DQNConfig",),
    "algorithms.a2c": ("A2CConfig",),
    "algorithms.ppo": ("PPOConfig",),
    "stores.replay": ("ReplayConfig",),
    "stores.rollout": ("RolloutConfig",),
    "actor": ("ActorConfig",),
    "learner_config": ("LearnerConfig",),
    "evaluate": ("EvaluationConfig",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'asyncrl' has no attribute {name!r}")
    return getattr(import_module(f"asyncrl.{_MODULE_OF[name]}"), name)
