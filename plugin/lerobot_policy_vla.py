"""LeRobot's commands import this when they start: it registers policy, environment, robot and teleoperator."""

import envs.lerobot_plugin
import vla.lerobot_plugin

__all__ = ["envs", "vla"]
