"""The tabletop as LeRobot sees it: `--env.type=tabletop`, `--robot.type=tabletop`, `--teleop.type=tabletop_expert`."""

from envs.lerobot_plugin import config_arm, config_expert, tabletop_env

__all__ = ["config_arm", "config_expert", "tabletop_env"]
