"""A simulated robot for lockstep: two joints that are x and y, and a goal that a sentence names. No MuJoCo."""

from __future__ import annotations

from typing import Any

import numpy as np

from vla.control.robot import Reading, Robot
from vla.observation import Features

TASKS = {"go right": 0.5, "go left": -0.5}


class LockstepArm(Robot):
    """An action is a step of 5 cm at most in x and y. Success: within 2 cm of the named side; failure: of the other."""

    joints = ("x", "y")

    def __init__(self, realtime: bool = False, pixels: int = 32) -> None:
        self.features = Features({"front": (pixels, pixels)}, state_dim=2, action_dim=2, fps=10)
        self.now, self.pictures = 0.0, 0

    def connect(self) -> None:
        self.reset(0)

    def disconnect(self) -> None: ...

    def reset(self, seed: int) -> dict[str, Any]:
        self.at = np.array([0.0, 0.01 * (seed % 10)])
        self.task, self.other = sorted(TASKS)[:: 1 if seed % 2 else -1]
        return {"task": self.task, "alternatives": [self.other], "limit_s": 4.0}

    def send(self, command: np.ndarray) -> None:
        self.at = np.array(command)

    def advance(self, dt: float) -> None:
        self.now += dt

    def observe(self) -> Reading:
        self.pictures += 1
        height, width = self.features.cameras["front"]
        picture = np.full((height, width, 3), self.pictures % 251, np.uint8)
        near = {task: abs(self.at[0] - x) < 0.02 for task, x in TASKS.items()}
        report = {"success": near[self.task], "failure": near[self.other]}
        return Reading(
            {"front": picture}, {"front": self.now}, self.at.astype(np.float32), self.at, self.now, report
        )

    def target(self, action: np.ndarray, target: np.ndarray, reading: Reading) -> np.ndarray:
        return target + 0.05 * np.clip(action, -1, 1)


class SidePolicy:
    """Goes to the named side. `asked` keeps the tasks and prefixes it was given."""

    features = LockstepArm().features
    chunk_size, n_obs_steps, max_prefix = 8, 1, 4

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def predict_chunk(
        self, images: dict[str, np.ndarray], state: np.ndarray, tasks: list[str],
        prefix: np.ndarray | None = None, prefix_length: np.ndarray | None = None,
    ) -> np.ndarray:  # fmt: skip
        length = 0 if prefix is None or prefix_length is None else int(prefix_length[0])
        self.asked.append((tasks[0], length))
        at, chunk = state[0, -1, 0], np.zeros((1, 8, 2), np.float32)
        for i in range(8):
            if i < length and prefix is not None:
                chunk[0, i] = prefix[0, i]
            else:
                chunk[0, i, 0] = np.clip((TASKS[tasks[0]] - at) / 0.05, -1, 1)
            at += 0.05 * chunk[0, i, 0]
        return chunk
