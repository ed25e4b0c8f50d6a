"""A plain DQN loop in one process, for benchmarks/throughput.py: what there is without asyncrl.

    python benchmarks/peer_plain_dqn.py METRICS_FILE dqn [SEED]

In the manner of CleanRL: step the environments, store, update, again. The environments are ALE's
vector env with as many games as the actor of launch/breakout_dqn.py has, stacked by ALE; the net,
the batch, the updates an env step and what it computes in are those of asyncrl in the comparison.
"""

import json
import sys
import time
from copy import deepcopy

import ale_py
import gymnasium as gym
import numpy as np
import torch
from measure import REPOSITORY, like_a_run
from torch import nn

from asyncrl.config import resolve
from asyncrl.limits import usable_cores
from asyncrl.models.precision import computes_in_bfloat16

BATCH, STEPS_A_BATCH, CAPACITY, LEARNING_STARTS, STACK = 32, 4, 100_000, 2_000, 4
EPSILON, GAMMA, TARGET_PERIOD = 0.1, 0.99, 2_000


def nature(num_actions: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(STACK, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(),
        nn.Conv2d(64, 64, 3, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, num_actions),
    )  # fmt: skip


def main() -> None:
    like_a_run()
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    torch.manual_seed(seed)
    torch.set_num_threads(usable_cores())
    torch.set_flush_denormal(True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gym.register_envs(ale_py)
    config = resolve(REPOSITORY / "launch" / "breakout_dqn.py", [])
    B = config.actor.lanes_per_actor * config.actor.envs_per_lane
    settings = config.env.atari | {"stack_num": STACK, "num_threads": min(B, usable_cores())}
    envs = gym.make_vec(config.env.id, B, "vector_entry_point", **settings)
    num_actions, rng = int(envs.single_action_space.n), np.random.default_rng(seed)
    net = nature(num_actions).to(device, memory_format=torch.channels_last)
    bfloat16 = computes_in_bfloat16("auto", device, net)
    target = deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, fused=True)
    rows = CAPACITY // B
    obs = np.zeros((rows, B, 84, 84), np.uint8)  # newest frame only; row r + 1 follows row r
    action, reward = np.zeros((rows, B), np.int64), np.zeros((rows, B), np.float32)
    terminated, first = np.zeros((rows, B), bool), np.zeros((rows, B), bool)

    def image(frames: np.ndarray) -> torch.Tensor:
        dtype = torch.bfloat16 if bfloat16 else torch.float32
        channels_last = torch.stack(torch.from_numpy(frames).unbind(1), -1).movedim(-1, 1)
        return channels_last.to(device).to(dtype).mul_(1 / 255)

    def stacks(row: np.ndarray, env: np.ndarray) -> np.ndarray:
        """(N, 4, 84, 84) that end at the given rows and begin where the episode did."""
        found = [row]
        for _ in range(STACK - 1):
            row = np.where(first[row % rows, env], row, row - 1)
            found.append(row)
        return obs[np.stack(found[::-1], 1) % rows, env[:, None]]

    def update(end: int) -> None:
        row = rng.integers(max(end - rows + STACK, STACK), end - 1, BATCH)
        env, at = rng.integers(B, size=BATCH), row % rows
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            with torch.no_grad():
                following = target(image(stacks(row + 1, env))).max(1).values.float()
            q = net(image(stacks(row, env))).float()
        alive = torch.from_numpy(GAMMA * ~terminated[at, env]).float().to(device)
        clipped = torch.from_numpy(np.sign(reward[at, env])).to(device)
        chosen = q.gather(1, torch.from_numpy(action[at, env]).to(device).unsqueeze(1)).squeeze(1)
        loss = nn.functional.smooth_l1_loss(chosen, clipped + alive * following)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 10.0)
        optimizer.step()

    frames, info = envs.reset(seed=seed)
    opens, over = np.ones(B, bool), np.zeros(B, bool)
    updates, last = 0, 0.0
    for t in range(10**9):
        at = t % rows
        obs[at], first[at] = frames[:, -1], opens
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            action[at] = net(image(frames)).argmax(1).cpu().numpy()
        explore = rng.random(B) < EPSILON
        action[at, explore] = rng.integers(num_actions, size=int(explore.sum()))
        frames, reward[at], ended, cut, info = envs.step(action[at])
        # The step after a game's end resets it; this loop learns from that row as from any other.
        terminated[at], opens, over = ended, over, (ended & (info["lives"] == 0)) | cut
        env_steps = (t + 1) * B
        while env_steps > LEARNING_STARTS and updates * STEPS_A_BATCH < env_steps - LEARNING_STARTS:
            update(t + 1)
            updates += 1
            if updates % TARGET_PERIOD == 0:
                target.load_state_dict(net.state_dict())
        if time.time() - last >= 1:
            last = time.time()
            with open(sys.argv[1], "a") as file:
                row = {"time": last, "env_steps": env_steps, "updates": updates}
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
