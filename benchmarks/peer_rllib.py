"""RLlib's IMPALA on Breakout, for benchmarks/throughput.py, in an environment of its own.

    python benchmarks/peer_rllib.py METRICS_FILE impala [SEED]

Processes, two on two cores, share out 32 environments, with its own Atari wrappers; the learner, a
thread of the main process, has the torch threads of that process. One pass over each batch,
V-trace. Counted are the env steps of the batches that were learned from: what overflows its queue
is dropped, and its own count of what it learns from has a step more for each fragment.
"""

import json
import os
import sys
import time

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ale_py  # noqa: F401  (registers the games)
import gymnasium
import ray
import torch
from ray.rllib.algorithms.impala import IMPALAConfig
from ray.rllib.algorithms.impala.torch.impala_torch_learner import IMPALATorchLearner
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
from ray.rllib.env.wrappers.atari_wrappers import wrap_atari_for_new_api_stack
from ray.tune.registry import register_env

BATCH = 640  # env steps


class Learner(IMPALATorchLearner):
    """Theirs, counting its updates."""

    updates = 0

    def after_gradient_based_update(self, *, timesteps: dict) -> None:
        super().after_gradient_based_update(timesteps=timesteps)
        Learner.updates += 1


def make_env(_) -> gymnasium.Env:
    env = gymnasium.make("ale_py:BreakoutNoFrameskip-v4")
    return wrap_atari_for_new_api_stack(env, dim=84, frameskip=4, framestack=4)


def main() -> None:
    path = sys.argv[1]
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    cores = int(os.environ.get("BENCHMARK_CORES", 0)) or len(os.sched_getaffinity(0))
    runners = max(2, min(1 << cores.bit_length() - 1, 16))  # which share 32 envs out
    ray.init(num_cpus=runners + 2, include_dashboard=False)
    register_env("breakout", make_env)
    valid = [[32, 8, 4, "valid"], [64, 4, 2, "valid"], [64, 3, 1, "valid"]]
    config = (
        IMPALAConfig()
        .environment("breakout", clip_rewards=True)
        .env_runners(
            num_env_runners=runners, num_envs_per_env_runner=32 // runners,
            rollout_fragment_length=20,
        )
        .learners(
            num_learners=0, num_aggregator_actors_per_learner=0,
            num_gpus_per_learner=int(torch.cuda.is_available()),
        )
        .training(
            train_batch_size_per_learner=BATCH, num_epochs=1, lr=5e-4, entropy_coeff=0.01,
            vf_loss_coeff=0.5, grad_clip=0.5, learner_class=Learner,
        )
        .rl_module(model_config=DefaultModelConfig(
            conv_filters=valid, conv_activation="relu", head_fcnet_hiddens=[512],
        ))
        .reporting(min_time_s_per_iteration=1)
        .debugging(seed=seed, log_level="ERROR")
    )  # fmt: skip
    algorithm = config.build_algo()
    while True:
        algorithm.train()
        updates = Learner.updates
        row = {"time": time.time(), "env_steps": updates * BATCH, "updates": updates}
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
