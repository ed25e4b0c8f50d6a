"""Stable-Baselines3's DQN on Breakout, for benchmarks/throughput.py, in an environment of its own.

    python benchmarks/peer_sb3.py METRICS_FILE [SEED]

Its own Atari wrappers and its vanilla DQN: one environment, batches of 32 every 4 env steps.
Epsilon stays at 0.1: about where a run of full length spends its time. SB3 evaluates no net for a
random action, so the first steps of a run, nearly all random, are faster than the rest.
"""

import json
import sys
import time

import ale_py
import gymnasium
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecFrameStack


class Rows(BaseCallback):
    """A row of JSON a second."""

    def __init__(self, path: str):
        super().__init__()
        self.path, self.last = path, 0.0

    def _on_step(self) -> bool:
        now = time.time()
        if now - self.last >= 1:
            self.last = now
            row = {"time": now, "env_steps": self.num_timesteps, "updates": self.model._n_updates}
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        return True


def main() -> None:
    gymnasium.register_envs(ale_py)
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    env = VecFrameStack(make_atari_env("BreakoutNoFrameskip-v4", n_envs=1, seed=seed), 4)
    model = DQN(
        "CnnPolicy",
        env,
        learning_rate=1e-4,
        buffer_size=100_000,
        learning_starts=2_000,
        batch_size=32,
        train_freq=4,
        gradient_steps=1,
        target_update_interval=8_000,
        optimize_memory_usage=True,
        replay_buffer_kwargs={"handle_timeout_termination": False},
        exploration_initial_eps=0.1,
        exploration_final_eps=0.1,
        seed=seed,
    )
    model.learn(10_000_000, callback=Rows(sys.argv[1]))


if __name__ == "__main__":
    main()
