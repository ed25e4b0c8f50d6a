"""Plain synchronous A2C and PPO loops in one process, for benchmarks/throughput.py.

    python benchmarks/peer_plain_on_policy.py METRICS_FILE a2c|ppo [SEED]

In the manner of CleanRL: all threads step the environments, then evaluate the net, then learn. The
environments are ALE's vector env, stacked by ALE; net, rollout, minibatches, optimizer and what it
computes in are those of asyncrl in the comparison.
"""

import json
import os
import sys
import time

import ale_py
import gymnasium as gym
import numpy as np
import torch
from measure import REPOSITORY, like_a_run
from torch import nn
from torch.distributions import Categorical

from asyncrl.config import resolve
from asyncrl.models.precision import computes_in_bfloat16

STACK, GAMMA = 4, 0.99
TASKS = {  # environments, steps, epochs, minibatches
    "a2c": (16, 5, 1, 1),
    "ppo": (8, 128, 4, 4),
}


class Net(nn.Module):
    def __init__(self, num_actions: int):
        super().__init__()
        self.torso = nn.Sequential(
            nn.Conv2d(STACK, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(),
            nn.Conv2d(64, 64, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(),
        )  # fmt: skip
        self.policy, self.value = nn.Linear(512, num_actions), nn.Linear(512, 1)

    def forward(self, image: torch.Tensor) -> tuple[Categorical, torch.Tensor]:
        features = self.torso(image)
        return Categorical(logits=self.policy(features).float()), self.value(features).float()[:, 0]


def main() -> None:
    like_a_run()
    path, task = sys.argv[1:3]
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    B, T, epochs, num_minibatches = TASKS[task]
    torch.manual_seed(seed)
    torch.set_num_threads(os.cpu_count() or 1)
    torch.set_flush_denormal(True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bfloat16 = computes_in_bfloat16("auto", device)
    gym.register_envs(ale_py)
    config = resolve(REPOSITORY / "launch" / f"breakout_{task}.py", [])
    settings = config.env.atari | {"stack_num": STACK, "num_threads": os.cpu_count()}
    envs = gym.make_vec(config.env.id, B, "vector_entry_point", **settings)
    net = Net(int(envs.single_action_space.n)).to(device, memory_format=torch.channels_last)
    if task == "ppo":
        optimizer = torch.optim.Adam(net.parameters(), lr=2.5e-4, eps=1e-5, fused=True)
    else:
        optimizer = torch.optim.RMSprop(net.parameters(), lr=7e-4, eps=1e-5)

    def image(frames: torch.Tensor) -> torch.Tensor:
        dtype = torch.bfloat16 if bfloat16 else torch.float32
        channels_last = torch.stack(frames.unbind(1), -1).movedim(-1, 1)
        return channels_last.to(device, dtype).mul_(1 / 255)

    def evaluate(frames: torch.Tensor) -> tuple[Categorical, torch.Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            return net(image(frames))

    obs = torch.zeros((T, B, STACK, 84, 84), dtype=torch.uint8)
    action = torch.zeros((T, B), dtype=torch.int64)
    log_prob, value, reward, ended = (torch.zeros((T, B)) for _ in range(4))
    frames, _ = envs.reset(seed=seed)
    updates, env_steps, last = 0, 0, 0.0
    while True:
        for t in range(T):
            obs[t] = torch.from_numpy(frames)
            with torch.no_grad():
                policy, value[t] = evaluate(obs[t])
            action[t] = policy.sample()
            log_prob[t] = policy.log_prob(action[t])
            frames, rewards, terminated, truncated, _ = envs.step(action[t].numpy())
            reward[t] = torch.from_numpy(np.sign(rewards))
            ended[t] = torch.from_numpy(terminated | truncated)
        env_steps += T * B
        with torch.no_grad():
            following = evaluate(torch.from_numpy(frames))[1]
        advantage, trace = torch.zeros((T, B)), torch.zeros(B)
        for t in reversed(range(T)):
            delta = reward[t] + GAMMA * (1 - ended[t]) * following - value[t]
            trace = delta + GAMMA * 0.95 * (1 - ended[t]) * trace
            advantage[t], following = trace, value[t]
        columns = [x.flatten(0, 1) for x in (obs, action, log_prob, advantage, advantage + value)]
        for _ in range(epochs):
            for index in torch.randperm(T * B).chunk(num_minibatches):
                frames_, action_, old, advantage_, target = (x[index] for x in columns)
                policy, values = evaluate(frames_)
                current = policy.log_prob(action_)
                if task == "ppo":
                    advantage_ = (advantage_ - advantage_.mean()) / (advantage_.std() + 1e-8)
                    ratio = (current - old).exp()
                    clipped = ratio.clamp(0.9, 1.1)
                    loss = -torch.minimum(ratio * advantage_, clipped * advantage_).mean()
                else:
                    loss = -(current * advantage_).mean()
                loss = loss + 0.25 * (values - target).square().mean()
                loss = loss - 0.01 * policy.entropy().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(net.parameters(), 0.5)
                optimizer.step()
                updates += 1
        if time.time() - last >= 1:
            last = time.time()
            with open(path, "a") as file:
                row = {"time": last, "env_steps": env_steps, "updates": updates}
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
