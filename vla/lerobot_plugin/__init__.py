"""The policy as LeRobot sees it: importing this registers `--policy.type=vla`."""

from vla.lerobot_plugin import configuration_vla

__all__ = ["configuration_vla"]
