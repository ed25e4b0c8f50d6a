"""Small environments that show what an algorithm can do; importing this registers their ids.

    asyncrl/MaskedCartPole-v1   CartPole without velocities: solved only with memory

`EnvConfig("asyncrl/MaskedCartPole-v1")` imports this by itself; for `gymnasium.make` write
"asyncrl.example_envs:asyncrl/MaskedCartPole-v1", or import it before.
"""

import gymnasium as gym

gym.register(
    "asyncrl/MaskedCartPole-v1",
    entry_point="asyncrl.example_envs.masked_cartpole:MaskedCartPole",
    max_episode_steps=500,
)
