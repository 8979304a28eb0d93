"""Any robot of LeRobot's as a robot of ours, by LeRobot's own contract (`lerobot.robots.Robot`, 0.6).

LeRobot speaks in its drivers' units, and so do its datasets and the policies trained on them: state and actions
stay in those. `joints`, what is limited and commanded, are SI: see UNITS. lerobot is imported where the robot
runs, never in the controller.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from vla.control.robot import Reading, Robot
from vla.observation import Features

UNITS = {  # what LeRobot's 1.0 is
    "degrees": math.pi / 180,  # radians
    "radians": 1.0,
    "normalized": 0.01,  # -100 … 100 of the calibrated range: -1 … 1 of it, no angle
}
GRIPPER = 0.01  # 0 … 100: the fraction that it is open


class LeRobotArm(Robot):
    """Absolute joint positions: an action is where `<joint>.pos` should be, in LeRobot's units.

    Its own timeout: LeRobot has none. Its servos hold the last goal they were sent for as long as they have
    power; disconnecting takes their torque away, and lets the arm fall, unless the driver's
    configuration says otherwise (disable_torque_on_disconnect of the SO-101).
    A bus serves one request at a time, so a command may wait for a reading of the motors.
    LeRobot does not say when a picture was taken: its time is when it was first seen. A camera whose pictures
    do not change at all, which those of a real one do, is therefore taken for frozen.
    """

    def __init__(
        self,
        type: str,
        config: Mapping[str, Any],
        cameras: Mapping[str, Mapping[str, int]],
        joints: Sequence[str],
        fps: int = 30,
        units: str = "degrees",
        gripper: str = "gripper",
    ) -> None:
        """type: as in `--robot.type`, or "module:Class"; config: the fields of its configuration; cameras:
        name -> height and width, as the driver delivers; joints: in the order of the policy's state and actions,
        without ".pos"; units: of UNITS, for all joints but `gripper`, which LeRobot gives in 0 … 100.
        Raises ValueError for other units.
        """
        if units not in UNITS:
            raise ValueError(
                f"units: got {units!r}, expected one of {', '.join(UNITS)}. remedy: correct units."
            )
        self.type, self.config, self.joints = type, dict(config), tuple(joints)
        sizes = {name: (int(size["height"]), int(size["width"])) for name, size in cameras.items()}
        self.features = Features(sizes, len(self.joints), len(self.joints), fps)
        self.scale = np.array([GRIPPER if joint == gripper else UNITS[units] for joint in self.joints])
        self.bus = threading.Lock()  # readings and commands come from two threads
        self.images: dict[str, np.ndarray] = {}
        self.stamps: dict[str, float] = {}

    def target(self, action: np.ndarray, target: np.ndarray, reading: Reading) -> np.ndarray:
        return np.asarray(action, np.float64) * self.scale

    def connect(self) -> None:
        """Raises ValueError for an unknown type, a wrong configuration, or other joints and cameras."""
        self.robot = make(self.type, self.config)
        self._compare("joints", {f"{name}.pos" for name in self.joints}, set(self.robot.action_features))
        seen = self.robot.observation_features
        pictures = {name: tuple(shape) for name, shape in seen.items() if isinstance(shape, tuple)}
        self._compare("cameras", {n: (*size, 3) for n, size in self.features.cameras.items()}, pictures)
        missing = {f"{name}.pos" for name in self.joints} - set(seen)
        self._compare("joints that it does not observe", set(), missing)
        self.robot.connect(calibrate=False)  # calibration asks questions; LeRobot's own command does it
        if not self.robot.is_calibrated:
            self.robot.disconnect()
            raise ValueError(
                f"robot {self.type}: got one that is not calibrated, expected its calibration. remedy: run "
                f"lerobot-calibrate --robot.type={self.type} with the same id."
            )

    def observe(self) -> Reading:
        with self.bus:
            stamp = time.monotonic()
            seen = self.robot.get_observation()
        state = np.array([seen[f"{name}.pos"] for name in self.joints], np.float64)
        for name in self.features.cameras:
            image = np.asarray(seen[name])
            if name not in self.images or not np.array_equal(image, self.images[name]):
                self.images[name], self.stamps[name] = image.copy(), stamp
        return Reading(
            dict(self.images), dict(self.stamps), state.astype(np.float32), state * self.scale, stamp
        )

    def send(self, command: np.ndarray) -> None:
        values = command / self.scale
        with self.bus:
            self.robot.send_action(
                {f"{name}.pos": float(value) for name, value in zip(self.joints, values, strict=True)}
            )

    def disconnect(self) -> None:
        with self.bus:
            if self.robot.is_connected:
                self.robot.disconnect()

    def _compare(self, what: str, expected: Any, got: Any) -> None:
        if expected != got:
            raise ValueError(
                f"{what}: got {expected}, expected the robot's {got}. remedy: correct robot.kwargs."
            )


def make(type: str, config: Mapping[str, Any]) -> Any:
    """A `lerobot.robots.Robot`, not connected. Raises ValueError for an unknown type or a wrong configuration."""
    import draccus
    from lerobot import robots

    for camera in config.get("cameras", {}).values():  # a camera's configuration is known by its import
        with suppress(ImportError):
            importlib.import_module(f"lerobot.cameras.{camera['type']}")
    module, _, name = type.rpartition(":")
    try:
        if module:
            cls = getattr(importlib.import_module(module), name)
            return cls(draccus.decode(cls.config_class, dict(config)))
        for package in pkgutil.iter_modules(robots.__path__):  # as is a robot's
            if type in robots.RobotConfig.get_known_choices():
                break
            if package.ispkg:
                with suppress(ImportError):
                    importlib.import_module(f"lerobot.robots.{package.name}")
        return robots.make_robot_from_config(
            draccus.decode(robots.RobotConfig, {"type": type, **dict(config)})
        )
    except (ImportError, AttributeError, draccus.utils.DecodingError) as error:
        raise ValueError(
            f"type, config: got {type!r} with {dict(config)}, expected a robot of LeRobot's and its configuration "
            f"({error}). remedy: see lerobot's documentation of that robot."
        ) from error
