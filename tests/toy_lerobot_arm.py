"""A simulated arm by LeRobot's own contract: its base class, configuration, errors, units and cameras."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from lerobot.robots import Robot, RobotConfig
from lerobot.utils.decorators import check_if_already_connected, check_if_not_connected

MOTORS = ("pan", "lift", "gripper")


@RobotConfig.register_subclass("toy_arm")
@dataclass
class ToyArmConfig(RobotConfig):
    port: str = ""
    calibrated: bool = True
    speed: float = 50.0  # units a reading


class ToyArm(Robot):
    """Motors in degrees, the gripper in 0 … 100; it clips the gripper, as drivers do. The camera sees the pan."""

    config_class = ToyArmConfig
    name = "toy_arm"

    def __init__(self, config: ToyArmConfig) -> None:
        super().__init__(config)
        self.config = config
        self.position = dict.fromkeys(MOTORS, 0.0)
        self.goal = dict(self.position)
        self.connected = False

    @cached_property
    def observation_features(self) -> dict[str, Any]:
        return {f"{motor}.pos": float for motor in MOTORS} | {"wrist": (6, 8, 3)}

    @cached_property
    def action_features(self) -> dict[str, Any]:
        return {f"{motor}.pos": float for motor in MOTORS}

    @property
    def is_connected(self) -> bool:
        return self.connected

    @property
    def is_calibrated(self) -> bool:
        return self.config.calibrated

    @check_if_already_connected
    def connect(self, calibrate: bool = True) -> None:
        if calibrate and not self.is_calibrated:
            self.calibrate()
        self.connected = True

    def calibrate(self) -> None:
        raise AssertionError("calibration asks for a person")

    def configure(self) -> None:
        """Nothing to configure."""

    @check_if_not_connected
    def get_observation(self) -> dict[str, Any]:
        for motor, goal in self.goal.items():
            way = goal - self.position[motor]
            self.position[motor] += float(np.clip(way, -self.config.speed, self.config.speed))
        image = np.full((6, 8, 3), int(abs(self.position["pan"])) % 256, np.uint8)
        return {f"{motor}.pos": value for motor, value in self.position.items()} | {"wrist": image}

    @check_if_not_connected
    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        self.goal = {motor: action[f"{motor}.pos"] for motor in MOTORS}
        self.goal["gripper"] = float(np.clip(self.goal["gripper"], 0, 100))
        return {f"{motor}.pos": goal for motor, goal in self.goal.items()}

    @check_if_not_connected
    def disconnect(self) -> None:
        self.connected = False
