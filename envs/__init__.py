"""Gymnasium environments: `gymnasium.make("envs:Tabletop-v0")`."""

import os

# Must be set before mujoco is imported; without a display the default (GLFW) fails.
if not os.environ.get("DISPLAY"):
    os.environ.setdefault("MUJOCO_GL", "egl")

import gymnasium

# The environment truncates by itself, per skill; this is an outer limit.
gymnasium.register("Tabletop-v0", entry_point="envs.tabletop:Tabletop", max_episode_steps=300)
# They end their episodes themselves.
gymnasium.register("Metaworld-v0", entry_point="envs.metaworld:Metaworld")
gymnasium.register("LeRobotMetaworld-v0", entry_point="envs.lerobot_metaworld:LeRobotMetaworld")
