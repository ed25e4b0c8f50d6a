"""Stable-Baselines3, for benchmarks/throughput.py, in an environment of its own.

    python benchmarks/peer_sb3.py METRICS_FILE dqn|a2c|ppo|cartpole_ppo [SEED [ENVIRONMENTS]]

Its own Atari wrappers and its own DQN, A2C and PPO. DQN has one environment unless told otherwise,
as its users mostly run it; PPO on Breakout has eight, and with more of them shorter rollouts, of as
many steps in all. Epsilon stays at 0.1: about where a run of full length spends its time.
SB3 evaluates no net for a random action, so the first steps of a run, nearly all random, are faster
than the rest.
"""

import json
import sys
import time

import ale_py
import gymnasium
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.vec_env import VecFrameStack

SETTINGS = {
    "dqn": dict(
        learning_rate=1e-4, buffer_size=100_000, learning_starts=2_000, batch_size=32,
        target_update_interval=8_000, optimize_memory_usage=True,
        replay_buffer_kwargs={"handle_timeout_termination": False},
        exploration_initial_eps=0.1, exploration_final_eps=0.1,
    ),
    "a2c": dict(n_steps=5, ent_coef=0.01),
    "ppo": dict(
        batch_size=256, n_epochs=4, learning_rate=2.5e-4, clip_range=0.1,
        ent_coef=0.01,
    ),
    "cartpole_ppo": dict(
        n_steps=32, batch_size=64, n_epochs=10, gamma=0.98, gae_lambda=0.8, learning_rate=1e-3,
        policy_kwargs={"net_arch": [64, 64]},
    ),
}  # fmt: skip
KINDS = {  # class, environments
    "dqn": (DQN, 1), "a2c": (A2C, 16), "ppo": (PPO, 8), "cartpole_ppo": (PPO, 8),
}  # fmt: skip
# SB3 counts epochs of PPO, not optimizer steps.
STEPS_A_COUNT = {"dqn": 1, "a2c": 1, "ppo": 4, "cartpole_ppo": 4}


class Rows(BaseCallback):
    """A row of JSON a second."""

    def __init__(self, path: str, steps_a_count: int):
        super().__init__()
        self.path, self.last, self.steps_a_count = path, 0.0, steps_a_count

    def _on_step(self) -> bool:
        now = time.time()
        if now - self.last >= 1:
            self.last = now
            updates = self.model._n_updates * self.steps_a_count
            row = {"time": now, "env_steps": self.num_timesteps, "updates": updates}
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        return True


def main() -> None:
    gymnasium.register_envs(ale_py)
    path, task = sys.argv[1:3]
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    kind, num_envs = KINDS[task]
    settings = SETTINGS[task]
    if len(sys.argv) > 4:
        num_envs = int(sys.argv[4])
    if task == "ppo":  # rollouts of 1,024 steps
        settings = settings | {"n_steps": 1024 // num_envs}
    if task == "dqn":  # one update every 4 env steps
        every = max(4 // num_envs, 1)  # calls of step()
        settings = settings | {"train_freq": every, "gradient_steps": every * num_envs // 4}
    if task == "cartpole_ppo":
        policy, env = "MlpPolicy", make_vec_env("CartPole-v1", n_envs=num_envs, seed=seed)
    else:
        env = make_atari_env("BreakoutNoFrameskip-v4", n_envs=num_envs, seed=seed)
        policy, env = "CnnPolicy", VecFrameStack(env, 4)
    model = kind(policy, env, seed=seed, **settings)
    model.learn(10_000_000, callback=Rows(path, STEPS_A_COUNT[task]))


if __name__ == "__main__":
    main()
