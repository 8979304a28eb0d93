"""The simulated tabletop arm as a LeRobot robot: physics in real time, scene after scene, each one judged.

An action is one step of the environment's, spread over the 0.1 s that follow it, and is therefore a velocity:
who sends actions more often than ten times a second cuts each one short, and the hand is as fast as before.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from lerobot.robots import Robot
from lerobot.utils.decorators import check_if_already_connected, check_if_not_connected

from envs.experts import towards
from envs.lerobot_plugin.config_arm import TabletopArmConfig, fitting
from envs.robot import FPS, TabletopRobot
from envs.tabletop import ACTION_NAMES, STATE_DIM, state_names
from vla.control.robot import Reading

logger = logging.getLogger(__name__)

POSE = ("x.pos", "y.pos", "z.pos", "sin_yaw.pos", "cos_yaw.pos", "gripper.pos")
KEYS = ("delta_x", "delta_y", "delta_z")  # of keyboard_ee, and "gripper" where it is used
LATE_S = 0.02  # later than this after the end of the last action: the arm stood still meanwhile
CUE = "Recording episode"  # what lerobot-record and lerobot-rollout's episodic strategy say when one begins

CONNECTED: list[TabletopArm] = []  # of this process, for who teaches with an arm's own expert


class Cues(logging.Handler):
    """Hears what LeRobot tells the person who stands beside the robot, of which the log has a copy.

    pending: an episode begins and nobody has asked; heard: there are episodes at all.
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.pending = self.heard = False

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith(CUE):
            self.pending = self.heard = True


@dataclass
class Trial:
    """One scene. began: steps that had passed when the first action came, None before; ended: seconds on the
    robot's clock; rests_until: seconds on that clock.
    """

    seed: int
    task: str
    limit: float  # seconds
    rests_until: float = -math.inf
    began: int | None = None
    steps: int = 0
    outcome: str | None = None
    ended: float = math.inf


class Uncalibrated:
    """What LeRobot asks of every device, for those that have nothing to calibrate and nothing to set."""

    _connected = False

    @property
    def is_connected(self) -> bool:
        return self._connected

    @property
    def is_calibrated(self) -> bool:
        return True

    def calibrate(self) -> None:
        """A simulation is what it says."""

    def configure(self) -> None:
        """Nothing to set."""


class TabletopArm(Uncalibrated, Robot):
    """observation: the state's entries as "<name>.pos", in the policy's order and units, and the cameras.
    action: the environment's five numbers in [-1, 1], "x.vel" … "gripper.pos".

    It also takes the two other actions that LeRobot's commands may send: a pose, which is an observation's
    ".pos" entries (the way back to the start at the end of lerobot-rollout); the hand goes there at an action's full
    speed at most. And "delta_x", "delta_y", "delta_z", "gripper" of `--teleop.type=keyboard_ee`, in the directions
    of the front camera's picture.

    A scene ends with success, with failure (something else was done), or when its time since the first
    action is over. It stays for rest_s, then comes the next one, in which the arm rests for rest_s as well: what is
    left of a policy's chunk is about the last one. Where LeRobot records in episodes, it is every episode that has
    a scene of its own instead. LeRobot has no way to tell a robot so, but tells the person beside it: see Cues.

    When actions stop, the robot's own timeout holds the arm (see Simulated). Physics lives in this process: time
    in which it is neither observed nor driven for more than half a second is skipped.
    """

    config_class = TabletopArmConfig
    name = "tabletop"

    def __init__(self, config: TabletopArmConfig) -> None:
        super().__init__(config)
        self.config = config
        self.robot = TabletopRobot(camera_fps=config.camera_fps, seed=config.seed, **config.kwargs)
        features = self.robot.features
        self.cameras = dict(features.cameras)  # LeRobot counts them
        self._state = state_names(features.state_dim == STATE_DIM)
        self._sent: float | None = None  # when the last action of this scene came

    # -- what LeRobot asks ---------------------------------------------------------------------

    @property
    def observation_features(self) -> dict[str, Any]:
        return dict.fromkeys(self._state, float) | {n: (*size, 3) for n, size in self.cameras.items()}

    @property
    def action_features(self) -> dict[str, type]:
        return dict.fromkeys(ACTION_NAMES, float)

    @check_if_already_connected
    def connect(self, calibrate: bool = True) -> None:
        self.robot.connect()
        self._trials: list[Trial] = []
        self._actions = self._late = self._held = 0
        self._intervals: list[float] = []
        self._cues = Cues()
        logging.getLogger().addHandler(self._cues)
        self._begin(self.config.seed)
        self.robot.observe()  # the first picture takes long
        self._connected = True
        CONNECTED.append(self)

    @check_if_not_connected
    def get_observation(self) -> dict[str, Any]:
        reading = self.robot.observe()
        self._judge(reading)
        due, self._cues.pending = self._cues.pending and self._trial.began is not None, False
        over = self._trial.outcome is not None and reading.stamp - self._trial.ended >= self.config.rest_s
        if due or (over and not self._cues.heard):
            self._held += reading.report["timeouts"]
            self._begin(self._trial.seed + 1, rests=not due)
            reading = self.robot.observe()
        return dict(zip(self._state, map(float, reading.state), strict=True)) | reading.images

    @check_if_not_connected
    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        """What was done, as an action of `action_features`. Raises ValueError for unknown, missing or not finite
        entries.
        """
        wanted = np.clip(self._read(action), -1.0, 1.0)
        now = time.monotonic()
        if now < self._trial.rests_until:
            return self._named(self._still())
        if self._sent is not None:
            self._intervals.append(now - self._sent)
            self._late += now - self._sent > 1 / FPS + LATE_S
        elif self._trial.began is None:
            self._trial.began = self._trial.steps
        self._sent = now
        self._actions += 1
        self.robot.move(wanted)
        return self._named(wanted)

    @check_if_not_connected
    def disconnect(self) -> None:
        self._held += self.robot.observe().report["timeouts"]
        self.robot.disconnect()
        self._connected = False
        CONNECTED.remove(self)
        logging.getLogger().removeHandler(self._cues)
        outcomes = [trial.outcome for trial in self._trials if trial.began is not None]
        ended = [outcome for outcome in outcomes if outcome is not None]
        rate = f", one every {1e3 * np.median(self._intervals):.0f} ms" if self._intervals else ""
        logger.info(
            f"tabletop: {ended.count('success')} of {len(ended)} scenes with success, "
            f"{len(outcomes) - len(ended)} not finished; {self._actions} actions{rate}, {self._late} late; "
            f"held by its own timeout {self._held} times."
        )

    def expert_action(self) -> dict[str, float]:
        """What the environment's expert does now; nothing in a scene that has ended, nor while the arm rests."""
        idle = self._trial.outcome is not None or time.monotonic() < self._trial.rests_until
        return self._named(self._still() if idle else self.robot.expert_action())

    # -- scenes --------------------------------------------------------------------------------

    def _begin(self, seed: int, rests: bool = False) -> None:
        seed, scene = fitting(self.robot.reset, seed, self.config.task)
        until = time.monotonic() + self.config.rest_s if rests else -math.inf
        self._trial = Trial(seed, scene["task"], scene["limit_s"], until)
        self._trials.append(self._trial)
        self._sent = None
        logger.info(f"tabletop scene {seed}: {scene['task']}")

    def _judge(self, reading: Reading) -> None:
        trial, report = self._trial, reading.report
        trial.steps = report["steps"]
        if trial.outcome is not None:
            return
        if report["task"] != trial.task:  # two sentences, and the first is done
            trial.task = report["task"]
            logger.info(f"tabletop scene {trial.seed}: {trial.task}")
        seconds = 0.0 if trial.began is None else (trial.steps - trial.began) / FPS
        if report["success"]:
            trial.outcome = "success"
        elif report["failure"]:
            trial.outcome = "failure, something else was done,"
        elif seconds >= trial.limit:
            trial.outcome = "no success"
        else:
            return
        trial.ended = reading.stamp
        outcomes = [t.outcome for t in self._trials]
        logger.info(
            f"tabletop scene {trial.seed}: {trial.outcome} after {seconds:.1f} s "
            f"({outcomes.count('success')} of {len(outcomes)} so far)"
        )

    # -- actions -------------------------------------------------------------------------------

    def _named(self, action: np.ndarray) -> dict[str, float]:
        return dict(zip(ACTION_NAMES, map(float, action), strict=True))

    def _still(self) -> np.ndarray:
        return np.array([0.0, 0.0, 0.0, 0.0, self.robot.pose[2]])

    def _read(self, action: dict[str, Any]) -> np.ndarray:
        """(5,) from any of the three kinds of actions."""
        if any(name in action for name in KEYS):
            kind, required, allowed = "deltas", KEYS, {*KEYS, "gripper"}
        elif any(name in action for name in POSE[:5]):
            kind, required, allowed = "a pose", POSE, {*self._state, *ACTION_NAMES}
        else:
            kind, required, allowed = "an action", ACTION_NAMES, {*ACTION_NAMES}
        for name in (*required, *action):
            if name not in action or name not in allowed:
                raise ValueError(
                    f"action: got {'an unknown' if name in action else 'no'} {name!r}, expected {kind} of "
                    f"{', '.join(required)}. remedy: send all of them and nothing else."
                )
            if not math.isfinite(action[name]):
                raise ValueError(
                    f"action[{name!r}]: got {float(action[name])}, expected a finite number. "
                    "remedy: check what the policy or the teleoperator puts out."
                )
        value = {name: float(number) for name, number in action.items()}
        if kind == "an action":
            return np.array([value[name] for name in ACTION_NAMES])
        position, yaw, grip = self.robot.pose
        if kind == "deltas":  # up in the picture is towards the robot, right is right
            grip += value.get("gripper", 1.0) - 1  # 0 closes, 1 leaves it, 2 opens
            return np.array([value["delta_y"], -value["delta_x"], value["delta_z"], 0.0, grip])
        wanted = np.array([value[name] for name in POSE[:3]])
        turn = math.atan2(value["sin_yaw.pos"], value["cos_yaw.pos"])
        return towards(position, yaw, wanted, turn, value["gripper.pos"])
