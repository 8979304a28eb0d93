"""What a robot is to this project: one class of four methods, and how its actions become positions.

    A action_dim   J joints, the gripper among them   P state_dim   N any number of poses

The methods that touch hardware (connect, observe, send, disconnect) run in a process of the robot's own, at
its own pace (process.py); the two that compute (target, position) run in the controller and
must neither wait nor fail. Only the controller's safety layer calls `send`, through that process:
a Robot is never driven directly. Units are SI: metres, radians, seconds; times are
CLOCK_MONOTONIC (`time.monotonic`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vla.observation import Features


@dataclass
class Reading:
    """What a robot's sensors say. Pictures may be older than the joints; every one has its own time.

    images: camera -> (h, w, 3) uint8, taken at stamps[camera]; state: (P,) float32, what the
    policy sees; joints: (J,) float64, measured positions; stamp: when state and joints were measured.
    """

    images: dict[str, np.ndarray]
    stamps: dict[str, float]
    state: np.ndarray
    joints: np.ndarray
    stamp: float
    report: dict[str, Any] = field(
        default_factory=dict
    )  # what else the robot says: success, its own timeouts


class Robot(ABC):
    """Subclass, set `features` and `joints` in __init__ (which must not touch hardware: it runs in the
    controller too), and write the methods. `configs/robots/*.yaml` names the class and its limits.

    features: cameras, state and action sizes, and the rate of the policy's actions (fps);
    joints: the names of what is commanded, in the order of `send`.
    """

    features: Features
    joints: tuple[str, ...]

    @abstractmethod
    def connect(self) -> None:
        """Open cameras and motors. Nothing moves. Raises OSError or ValueError when something is missing."""

    @abstractmethod
    def observe(self) -> Reading:
        """The newest reading. Called over and over; may wait for a sensor, never longer than 20 ms."""

    @abstractmethod
    def send(self, command: np.ndarray) -> None:
        """Have the motors go to joint positions (J,), which are legal. Returns at once.

        When no command comes for the robot's own timeout, it must stop by itself: say in the class
        how: the controller may be killed.
        """

    @abstractmethod
    def disconnect(self) -> None:
        """Stop, and release the hardware."""

    def target(self, action: np.ndarray, target: np.ndarray, reading: Reading) -> np.ndarray:
        """Where the joints should be (J,) one policy step after `target` (J,), by an action (A,).

        This default is for policies whose actions are joint positions.
        """
        return np.asarray(action, np.float64)

    def position(self, joints: np.ndarray) -> np.ndarray | None:
        """Joint positions (N, J) -> the hand's (N, 3) in metres, for the limits of the workspace; None: unknown."""
        return None
