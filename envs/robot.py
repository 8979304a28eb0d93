"""The tabletop as a robot: joints are commanded at the controller's rate, physics runs in a process of its own.

Demonstrations' actions move the hand's commanded pose at 10 Hz; `target` is that rule, from joints to
joints. The physics, the cameras' settings and the predicates are the environment's.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import mujoco
import numpy as np

from envs import arm
from envs.scene import SUBSTEPS, TIMESTEP
from envs.simulated import EPSILON, Simulated
from envs.tabletop import CAMERAS, STATE_DIM, Tabletop, choice
from vla.control.robot import Reading
from vla.observation import Features

FPS = 10
TURNS = np.pi  # radians: what every joint of the arm can do either way
STOPS = 0.002  # metres that the gripper may be told to press beyond its stops


class TabletopRobot(Simulated):
    """joints: the arm's seven in radians, then "gripper": how far each finger is from the middle, in metres.

    Its own timeout: see Simulated; the gripper stays as it was told.
    """

    joints = (*arm.JOINTS, "gripper")
    period = TIMESTEP
    range = np.array([[-TURNS] * 7 + [-STOPS], [TURNS] * 7 + [arm.OPENING + STOPS]])

    def __init__(
        self,
        camera_fps: float = 30.0,
        timeout_s: float = 0.2,
        realtime: bool = True,
        seed: int = 0,
        **table: Any,
    ) -> None:
        """table: what the environment takes; see Tabletop. seed: of the first scene.
        Raises TypeError for an unknown argument; other mistakes in `table` show when it connects.
        """
        super().__init__(camera_fps, timeout_s, realtime, seed)
        bound = inspect.signature(Tabletop).bind(**table)
        bound.apply_defaults()
        chosen = bound.arguments
        side = int(chosen["pixels"])
        self.table = table
        self.features = Features(
            cameras=dict.fromkeys(choice("cameras", chosen["cameras"], CAMERAS), (side, side)),
            state_dim=STATE_DIM if chosen["commanded"] else STATE_DIM - 4, action_dim=5, fps=FPS,
        )  # fmt: skip

    def target(self, action: np.ndarray, target: np.ndarray, reading: Reading) -> np.ndarray:
        """Tabletop's rule: from the pose that `target` is, leashed to the hand, by an action in [-1, 1]."""
        action = np.clip(np.asarray(action, np.float64), -1.0, 1.0)
        position, yaw = arm.forward(target[:7])
        commanded, turned = arm.advance(position, float(yaw), reading.state[:3].astype(np.float64), action)
        return np.append(arm.inverse(commanded, turned), arm.opening(action[4]))

    def position(self, joints: np.ndarray) -> np.ndarray:
        return arm.forward(joints[:, :7])[0]

    def disconnect(self) -> None:
        self.env.close()

    @property
    def pose(self) -> tuple[np.ndarray, float, float]:
        """What is commanded now: the hand's position (3,) in metres, its yaw, the gripper in [-1, 1]."""
        position, yaw = arm.forward(self.commanded[:7])
        return position, float(yaw), 2 * float(self.commanded[7]) / arm.OPENING - 1

    def move(self, action: np.ndarray) -> None:
        """The environment's step: an action (5,) in [-1, 1], spread over the 0.1 s from now on.

        An action before they are over goes on from where the hand has been sent by now: what is left of the
        earlier one is dropped, so that actions at a higher rate are the same velocity. For those who drive the
        robot without a controller.
        """
        self.catch_up()
        self._look()
        now = self._clock()
        began, start, end = self._motion
        part = (now - began) * FPS
        start = start + (end - start) * part if part < 1 - EPSILON else self.commanded
        hand = self.env.world.hand.astype(np.float32)
        end = self.target(action, start, Reading({}, {}, hand, start, now))
        self._motion = now, start, end
        parts = np.arange(2, SUBSTEPS + 2, 2)[:, None] / SUBSTEPS
        path = start + (end - start) * parts
        path[:, 7] = end[7]  # fingers are told at once
        self.follow(path, 2 * TIMESTEP)

    def expert_action(self) -> np.ndarray:
        """(5,) float32: what the expert would do now, for demonstrations and tests. Privileged."""
        self._tell()
        return self.env.expert_action()

    # -- physics -------------------------------------------------------------------------------

    def _build(self) -> None:
        self.env = Tabletop(**self.table)
        self._places = [int(self.env.model.joint(name).qposadr[0]) for name in arm.JOINTS]
        self.env.images_enabled = False  # cameras have a rate of their own here

    def _reset(self, seed: int, task: str | None) -> dict[str, Any]:
        _, info = self.env.reset(seed=seed, options={"task": task})
        self._success = self._failure = False
        self._motion = (-math.inf, np.zeros(8), np.zeros(8))  # of `move`: when it began, from where, to where
        return dict(
            task=info["task"], alternatives=info["alternatives"], limit_s=self.env.limit / FPS, skill=info["skill"]
        )  # fmt: skip

    def _start(self) -> np.ndarray:
        return np.append(self.env.data.ctrl[self.env.arm_servos], arm.OPENING)

    def _hold(self) -> np.ndarray:
        return np.append(self._joints()[:7], self._command[7])

    def _tick(self, command: np.ndarray) -> None:
        env = self.env
        env.data.ctrl[env.arm_servos], env.data.ctrl[env.finger_servos] = command[:7], command[7]
        mujoco.mj_step(env.model, env.data)
        if (self._ticks + 1) % SUBSTEPS == 0 and not (self._success or self._failure):
            mujoco.mj_forward(env.model, env.data)
            env.world.moved()
            self._success, self._failure = env.judge()

    def _look(self) -> None:
        """Poses alone: mj_forward would warm-start the solver, and how often one looks would change the motion."""
        mujoco.mj_kinematics(self.env.model, self.env.data)
        mujoco.mj_comPos(self.env.model, self.env.data)
        mujoco.mj_camlight(self.env.model, self.env.data)

    def _picture(self, camera: str) -> np.ndarray:
        return self.env.view.picture(self.env.data, camera, self.env.pixels)

    def _tell(self) -> None:
        """Tell the environment which pose is commanded."""
        position, yaw = arm.forward(self._command[:7])
        self.env.adopt(position, float(yaw), 2 * self._command[7] / arm.OPENING - 1)

    def _state(self) -> np.ndarray:
        self._tell()
        return self.env.state()

    def _joints(self) -> np.ndarray:
        env = self.env
        return np.append(env.data.qpos[self._places], env.world.opening)

    def _judged(self) -> dict[str, Any]:
        return dict(
            success=self._success, failure=self._failure, task=self.env.task, steps=self._ticks // SUBSTEPS
        )
