"""Meta-World's Sawyer as a robot in real time: the mocap's position and the gripper's effort are commanded.

Meta-World's `step` is one frame of 12.5 ms, moves the mocap by a centimetre at most, and is the physics here.
Its images are not: those of a second environment in one process can be black, so render.py draws. Of the
camera "corner2" Meta-World's pictures are upside down; here they are upright.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from envs.metaworld_scene import MetaworldScene
from envs.render import Cameras
from envs.simulated import Simulated
from vla.control.robot import Reading
from vla.observation import Features

FPS = 80
STEP = 0.01  # metres of a full action, and the most that the mocap moves in a frame
LOWEST, HIGHEST = (-0.5, 0.4, 0.05), (0.5, 1.0, 0.5)  # the mocap's box in most tasks
SPARE = 0.01  # commands may be rounded beyond their limits; Meta-World clips them
CAMERA = "corner2"


class MetaworldRobot(Simulated):
    """joints: x, y, z of the mocap that the hand is welded to, in metres; "gripper": effort, -1 opens, 1 closes.

    state (4,): the hand's position in metres, and how far the fingers are apart (0 to 1 for 0 to 10 cm).
    action (4,): of Meta-World. Success is of any frame, as it can be lost again.
    Its own timeout: see Simulated; the gripper's effort stays, or it would drop things.
    """

    joints = ("x", "y", "z", "gripper")
    period = 1 / FPS

    def __init__(
        self,
        task: str = "reach-v3",
        sentence: str = "",
        pixels: int = 128,
        camera_fps: float = 30.0,
        timeout_s: float = 0.2,
        realtime: bool = True,
        seed: int = 0,
        lowest: Sequence[float] = LOWEST,
    ) -> None:
        """task: of Meta-World; sentence: the instruction, by default the task's name in words; lowest: x, y, z of
        the task's mocap box, where it is not the usual one.
        """
        super().__init__(camera_fps, timeout_s, realtime, seed)
        self.lowest, self.highest = np.array(lowest, np.float64), np.array(HIGHEST)
        self.range = np.array([[*self.lowest - SPARE, -1 - SPARE], [*self.highest + SPARE, 1 + SPARE]])
        self.task, self.pixels = task, pixels
        self.sentence = sentence or task.removesuffix("-v3").replace("-", " ")
        self.features = Features({CAMERA: (pixels, pixels)}, state_dim=4, action_dim=4, fps=FPS)

    def target(self, action: np.ndarray, target: np.ndarray, reading: Reading) -> np.ndarray:
        """Meta-World's rule: of its box too, or a target outside of it would have to come all the way back."""
        action = np.clip(np.asarray(action, np.float64), -1.0, 1.0)
        return np.append(np.clip(target[:3] + STEP * action[:3], self.lowest, self.highest), action[3])

    def position(self, joints: np.ndarray) -> np.ndarray:
        return joints[:, :3]

    def disconnect(self) -> None:
        self.view.close()
        self.scene.env.close()

    def expert_action(self) -> np.ndarray:
        """(4,) float32 in [-1, 1]: what Meta-World's scripted expert would do now. Privileged."""
        return self.scene.expert_action()

    # -- physics -------------------------------------------------------------------------------

    def _build(self) -> None:
        """Raises ValueError for a task that there is not, or that has another box."""
        self.scene = MetaworldScene(self.task)
        env = self.scene.env
        if not np.allclose([*env.mocap_low, *env.mocap_high], [*self.lowest, *self.highest]):
            raise ValueError(
                f"lowest: got {self.lowest.tolist()}, expected {env.mocap_low.tolist()} for {self.task}. "
                "remedy: set lowest, and the limits with it."
            )
        self.view = Cameras(self.scene.model)

    def _reset(self, seed: int, task: str | None) -> dict[str, Any]:
        if task not in (None, self.sentence):
            raise ValueError(
                f"task: got {task!r}, expected {self.sentence!r}. remedy: another scene has others."
            )
        self.scene.reset(seed)
        self._success = False
        limit_s = self.scene.env.max_path_length / FPS
        return dict(task=self.sentence, alternatives=[], limit_s=limit_s, skill=self.task)

    def _start(self) -> np.ndarray:
        return np.append(np.clip(self.scene.data.mocap_pos[0], self.lowest, self.highest), -1.0)

    def _hold(self) -> np.ndarray:
        hand = self.scene.env.get_endeff_pos()
        return np.append(np.clip(hand, self.lowest, self.highest), self._command[3])

    def _tick(self, command: np.ndarray) -> None:
        way = (command[:3] - self.scene.data.mocap_pos[0]) / STEP
        self.scene.step(np.append(way, command[3]))
        self._success = self._success or self.scene.success

    def _look(self) -> None:
        """Every step of Meta-World ends with mj_forward."""

    def _picture(self, camera: str) -> np.ndarray:
        return self.view.picture(self.scene.data, camera, self.pixels)[::-1, ::-1].copy()

    def _state(self) -> np.ndarray:
        return self.scene.observation[:4].astype(np.float32)

    def _joints(self) -> np.ndarray:
        return np.append(self.scene.data.mocap_pos[0], self._command[3])

    def _judged(self) -> dict[str, Any]:
        return dict(success=self._success, failure=False, task=self.sentence, steps=self._ticks)
