"""Small environments that show what an algorithm can do; importing this registers their ids.

    asyncrl/MaskedCartPole-v1     CartPole without velocities: solved only with memory
    asyncrl/PixelCartPole-v1      CartPole as a grey picture of 40 x 80
    asyncrl/DoorMemory-v0         a door flashes, later all open: enter the one that flashed
    asyncrl/GridWorld-v0          goals and fire, of which only the neighbouring fields are seen
    asyncrl/TinyBreakout-v0       Breakout on 10 x 10 fields by the rules of MinAtar
    asyncrl/AncestorBreakout-v0   Atari Breakout as asyncrl's main ancestor played it; needs ale-py

`EnvConfig("asyncrl/MaskedCartPole-v1")` imports this by itself; for `gymnasium.make` write
"asyncrl.example_envs:asyncrl/MaskedCartPole-v1", or import it before.
"""

import gymnasium as gym

for name, entry_point, max_episode_steps in (
    ("MaskedCartPole-v1", "masked_cartpole:MaskedCartPole", 500),
    ("PixelCartPole-v1", "pixel_cartpole:PixelCartPole", 500),
    ("DoorMemory-v0", "door_memory:DoorMemory", None),  # ends by itself
    ("GridWorld-v0", "gridworld:GridWorld", 50),
    ("TinyBreakout-v0", "tiny_breakout:TinyBreakout", 10_000),
    ("AncestorBreakout-v0", "ancestor_breakout:AncestorBreakout", 10_000),
):
    gym.register(
        f"asyncrl/{name}",
        entry_point=f"asyncrl.example_envs.{entry_point}",
        max_episode_steps=max_episode_steps,
    )
