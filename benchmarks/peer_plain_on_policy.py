"""Plain synchronous A2C and PPO loops in one process, for benchmarks/throughput.py.

    python benchmarks/peer_plain_on_policy.py METRICS_FILE a2c|ppo|impala|cartpole_ppo [SEED]

In the manner of CleanRL: all threads step the environments, then evaluate the net, then learn. The
environments are ALE's vector env, stacked by ALE, or Gymnasium's SyncVectorEnv of CartPole; net,
rollout, minibatches, optimizer and what it computes in are those of asyncrl in the comparison.
impala is A2C of its shape and with its optimizer: nothing lags here that V-trace could correct.
CartPole's net is too small for a second thread.
"""

import json
import sys
import time
from typing import NamedTuple

import ale_py
import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from measure import REPOSITORY, like_a_run
from torch import nn
from torch.distributions import Categorical

from asyncrl.config import resolve
from asyncrl.limits import usable_cores
from asyncrl.models.precision import computes_in_bfloat16

STACK = 4


class Shape(NamedTuple):
    envs: int
    steps: int
    epochs: int
    minibatches: int
    learning_rate: float
    gamma: float = 0.99
    lambda_: float = 0.95
    clip: float = 0.0  # of PPO's ratio; 0: A2C
    entropy: float = 0.01


TASKS = {
    "a2c": Shape(16, 5, 1, 1, 7e-4),
    "ppo": Shape(32, 32, 4, 4, 2.5e-4, clip=0.1),
    "impala": Shape(32, 20, 1, 1, 5e-4, lambda_=1.0),
    "cartpole_ppo": Shape(8, 32, 10, 4, 1e-3, 0.98, 0.8, clip=0.2, entropy=0.0),
}


class Net(nn.Module):
    def __init__(self, num_actions: int):
        super().__init__()
        self.torso = nn.Sequential(
            nn.Conv2d(STACK, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(),
            nn.Conv2d(64, 64, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(),
        )  # fmt: skip
        self.policy, self.value = nn.Linear(512, num_actions), nn.Linear(512, 1)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.torso(image)
        return self.policy(features).float(), self.value(features).float()[:, 0]


class SmallNet(nn.Module):
    def __init__(self, num_inputs: int, num_actions: int):
        super().__init__()

        def layers(num_outputs: int) -> nn.Module:
            return nn.Sequential(
                nn.Linear(num_inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(),
                nn.Linear(64, num_outputs),
            )  # fmt: skip

        self.policy, self.value = layers(num_actions), layers(1)

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.policy(obs).float(), self.value(obs).float()[:, 0]


def main() -> None:
    like_a_run()
    path, task = sys.argv[1:3]
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    shape, pixels = TASKS[task], task != "cartpole_ppo"
    B, T = shape.envs, shape.steps
    torch.manual_seed(seed)
    torch.set_num_threads(usable_cores() if pixels else 1)
    torch.set_flush_denormal(True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gym.register_envs(ale_py)
    launch = f"breakout_{task}.py" if pixels else f"{task}.py"
    env = resolve(REPOSITORY / "launch" / launch, []).env
    if pixels:
        settings = env.atari | {"stack_num": STACK, "num_threads": usable_cores()}
        envs = gym.make_vec(env.id, B, "vector_entry_point", **settings)
        net = Net(int(envs.single_action_space.n)).to(device, memory_format=torch.channels_last)
    else:
        envs = gym.make_vec(env.id, B, "sync", {"autoreset_mode": AutoresetMode.SAME_STEP})
        num_inputs, num_actions = envs.single_observation_space.shape[0], envs.single_action_space.n
        net = SmallNet(num_inputs, int(num_actions)).to(device)
    bfloat16 = computes_in_bfloat16("auto", device, net)
    if task == "a2c":
        optimizer = torch.optim.RMSprop(net.parameters(), lr=shape.learning_rate, eps=1e-5)
    else:
        optimizer = torch.optim.Adam(net.parameters(), shape.learning_rate, eps=1e-5, fused=True)

    def image(frames: torch.Tensor) -> torch.Tensor:
        dtype = torch.bfloat16 if bfloat16 else torch.float32
        channels_last = torch.stack(frames.unbind(1), -1).movedim(-1, 1)
        return channels_last.to(device).to(dtype).mul_(1 / 255)

    def evaluate(frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and values, on the device."""
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            return net(image(frames) if pixels else frames.to(device))

    action = torch.zeros((T, B), dtype=torch.int64)
    log_prob, value, reward, ended = (torch.zeros((T, B)) for _ in range(4))
    frames, _ = envs.reset(seed=seed)
    obs = torch.zeros((T, *frames.shape), dtype=torch.from_numpy(frames).dtype)
    updates, env_steps, last = 0, 0, 0.0
    while True:
        for t in range(T):
            obs[t] = torch.from_numpy(frames)
            with torch.no_grad():
                logits, value[t] = evaluate(obs[t])
            policy = Categorical(logits=logits.cpu())
            action[t] = policy.sample()
            log_prob[t] = policy.log_prob(action[t])
            frames, rewards, terminated, truncated, _ = envs.step(action[t].numpy())
            reward[t] = torch.from_numpy(np.sign(rewards))
            ended[t] = torch.from_numpy(terminated | truncated)
        env_steps += T * B
        with torch.no_grad():
            following = evaluate(torch.from_numpy(frames))[1].cpu()
        advantage, trace = torch.zeros((T, B)), torch.zeros(B)
        for t in reversed(range(T)):
            delta = reward[t] + shape.gamma * (1 - ended[t]) * following - value[t]
            trace = delta + shape.gamma * shape.lambda_ * (1 - ended[t]) * trace
            advantage[t], following = trace, value[t]
        columns = [x.flatten(0, 1) for x in (obs, action, log_prob, advantage, advantage + value)]
        for _ in range(shape.epochs):
            for index in torch.randperm(T * B).chunk(shape.minibatches):
                batch = (column[index].to(device) for column in columns)
                frames_, action_, old, advantage_, target = batch
                logits, values = evaluate(frames_)
                policy = Categorical(logits=logits)
                current = policy.log_prob(action_)
                if shape.clip:
                    advantage_ = (advantage_ - advantage_.mean()) / (advantage_.std() + 1e-8)
                    ratio = (current - old).exp()
                    clipped = ratio.clamp(1 - shape.clip, 1 + shape.clip)
                    loss = -torch.minimum(ratio * advantage_, clipped * advantage_).mean()
                else:
                    loss = -(current * advantage_).mean()
                loss = loss + 0.25 * (values - target).square().mean()
                loss = loss - shape.entropy * policy.entropy().mean()
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
