"""Sample Factory's APPO, for benchmarks/throughput.py, in an environment of its own.

    python benchmarks/peer_sf.py METRICS_FILE ppo|impala|cartpole_ppo [SEED [ENVIRONMENTS]]

Asynchronous; on the GPU where there is one. Workers, two on two cores, share out the environments
and step one half of theirs while the net evaluates the other; a process each for inference and
learning. Its own Atari wrappers: four frames an env step, 84 x 84 grey, four stacked; an env step
is a decision, whatever its frames. It learns on a single thread unless its model is told otherwise;
here the Nature net gets all cores. PPO on Breakout has eight environments, and with more of them
shorter rollouts, of as many steps in all. Inputs and returns are not normalised, as the other
systems do not. impala is PPO's loss with GAE in one pass: version 2.1.1 with V-trace fails as it
reports its first batch. Updates are counted as configured; it may end its epochs early where the
loss no longer moves.
"""

import json
import os
import signal
import sys
import time
from multiprocessing import current_process

import gymnasium
import torch
from ale_py.registration import register_v0_v4_envs
from sample_factory.algo.runners.runner import AlgoObserver
from sample_factory.algo.utils.context import global_model_factory
from sample_factory.cfg.arguments import parse_full_cfg, parse_sf_args
from sample_factory.envs.env_utils import register_env
from sample_factory.model.encoder import default_make_encoder_func
from sample_factory.train import make_runner
from sf_examples.atari.atari_utils import make_atari_env

register_v0_v4_envs()  # in each process; ALE does it by itself for a newer Gymnasium only

CORES = int(os.environ.get("BENCHMARK_CORES", 0)) or len(os.sched_getaffinity(0))
SHARED = dict(
    device="gpu" if torch.cuda.is_available() else "cpu", async_rl=True,
    worker_num_splits=2, use_rnn=False, normalize_input=False, normalize_returns=False,
    max_grad_norm=0.5, adam_eps=1e-5, summaries_use_frameskip=False, save_every_sec=10**6,
)  # fmt: skip


def shared_out(num_envs: int) -> dict[str, int]:
    """A worker for each core as far as each has two envs, which it steps in turns; at least two."""
    workers = max(2, min(1 << CORES.bit_length() - 1, num_envs // 2))
    return {"num_workers": workers, "num_envs_per_worker": num_envs // workers}


BREAKOUT = dict(
    env="atari_breakout", env_frameskip=4, env_framestack=4, obs_scale=255.0, nonlinearity="relu",
    encoder_conv_architecture="convnet_atari", exploration_loss_coeff=0.01,
)  # fmt: skip
SETTINGS = {
    "ppo": BREAKOUT | dict(
        batch_size=256, num_batches_per_epoch=4, num_epochs=4, shuffle_minibatches=True,
        learning_rate=2.5e-4, ppo_clip_ratio=0.1,
    ),
    "impala": BREAKOUT | dict(
        **shared_out(32), rollout=20, batch_size=640, num_epochs=1, learning_rate=5e-4,
    ),
    "cartpole_ppo": dict(
        env="CartPole-v1", **shared_out(8), rollout=32, batch_size=64,
        num_batches_per_epoch=4, num_epochs=10, shuffle_minibatches=True, learning_rate=1e-3,
        gamma=0.98, gae_lambda=0.8, ppo_clip_ratio=0.2, exploration_loss_coeff=0.0,
        encoder_mlp_layers=[64, 64], nonlinearity="tanh", actor_critic_share_weights=False,
    ),
}  # fmt: skip


class Rows(AlgoObserver):
    """A row of JSON a second; a training step of theirs is all passes over one set of rollouts."""

    def __init__(self, path: str, cfg):
        self.path, self.last = path, 0.0
        self.env_steps = cfg.batch_size * cfg.num_batches_per_epoch
        self.updates = cfg.num_batches_per_epoch * cfg.num_epochs

    def on_training_step(self, runner, training_iteration_since_resume: int) -> None:
        now, count = time.time(), training_iteration_since_resume
        if now - self.last >= 1:
            self.last = now
            row = {"env_steps": count * self.env_steps, "updates": count * self.updates}
            with open(self.path, "a") as file:
                file.write(json.dumps({"time": now} | row) + "\n")


def make_cartpole(name: str, cfg, env_config, render_mode: str | None = None) -> gymnasium.Env:
    return gymnasium.make(name, render_mode=render_mode)


def make_encoder(cfg, obs_space):
    """Their own; it is made in the process that learns too, and that one gets its threads here."""
    if cfg.env == "atari_breakout" and current_process().name.startswith("learner"):
        torch.set_num_threads(CORES)
    return default_make_encoder_func(cfg, obs_space)


def arguments(settings: dict) -> list[str]:
    words = []
    for name, value in settings.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def main() -> None:
    path, task = sys.argv[1:3]
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    register_env("atari_breakout", make_atari_env)
    register_env("CartPole-v1", make_cartpole)
    global_model_factory().register_encoder_factory(make_encoder)
    settings = SHARED | SETTINGS[task]
    if task == "ppo":  # rollouts of 1,024 steps
        num_envs = int(sys.argv[4]) if len(sys.argv) > 4 else 8
        settings |= shared_out(num_envs) | {"rollout": 1024 // num_envs}
    words = arguments(settings | {"train_dir": f"{path}.folder", "experiment": task, "seed": seed})
    parser, _ = parse_sf_args(words)
    cfg, runner = make_runner(parse_full_cfg(parser, words))
    runner.register_observer(Rows(path, cfg))

    def finish(*_) -> None:  # the way that leaves no shared memory behind
        cfg.train_for_env_steps = 0  # looked at after each training step

    signal.signal(signal.SIGTERM, finish)
    runner.init()
    runner.run()


if __name__ == "__main__":
    main()
