"""LeRobot's own Meta-World environment, unmodified, behind the interface of ours: for comparison, not for speed.

A checkpoint's number through it shows what the differences of metaworld.py are worth: the picture of the scene
before as the first one, MuJoCo's default drawing at 480 pixels, an end at the first success. It renders at every
step and at its own reset after a success, whether anybody looks or not; that cannot be helped from outside.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from envs.metaworld import CAMERA, FPS, NAMES
from envs.metaworld_tasks import chosen
from vla.observation import IMAGES, IS_SUCCESS, STATE, TASK

SIDE = 480  # pixels of its picture, whatever it is asked for
STEPS = 500  # of its episodes


class LeRobotMetaworld(gym.Env[dict[str, Any], np.ndarray]):
    """As Metaworld: tasks in turns by seed, the same action, state and seeds' scenes; sentences as published.

    Its expert is not asked: it sees no goal.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}

    def __init__(
        self, tasks: str | Sequence[str] = "mt50", pixels: int = 128, render_mode: str | None = "rgb_array"
    ) -> None:
        """tasks: as Metaworld takes them; pixels: to which its 480 are averaged by area.

        Raises ValueError for a wrong choice, ModuleNotFoundError without lerobot or Meta-World.
        """
        self.tasks = chosen(tasks)
        self.n_tasks = len(self.tasks)
        if not 1 <= pixels <= SIDE:
            raise ValueError(f"pixels: got {pixels!r}, expected 1 to {SIDE}. remedy: correct pixels.")
        self.pixels, self.render_mode = int(pixels), render_mode
        self._make = _lerobots()
        self.env: Any = None
        image = gym.spaces.Box(0, 255, (self.pixels, self.pixels, 3), np.uint8)
        state = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
        self.observation_space = gym.spaces.Dict({IMAGES + CAMERA: image, STATE: state})
        self.action_space = gym.spaces.Box(-1.0, 1.0, (4,), np.float32)
        self.feature_names = NAMES
        self._shares = shares(SIDE, self.pixels)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """Its reset of the task `tasks[seed % n_tasks]`. Raises ValueError for options["task"], which it has not."""
        super().reset(seed=seed)
        seed = int(self.np_random.integers(2**31)) if seed is None else seed
        name = self.tasks[seed % self.n_tasks]
        with warnings.catch_warnings():  # of metaworld's and gymnasium's dependencies
            warnings.simplefilter("ignore")
            if self.env is None or self.env.task != name:
                self.close()
                self.env = self._make(task=name, obs_type="pixels_agent_pos")
            told = (options or {}).get("task")
            if told not in (None, self.env.task_description):
                raise ValueError(
                    f"options['task']: got {told!r}, expected {self.env.task_description!r}, the only one of {name}. "
                    "remedy: another seed has another task."
                )
            self._look()
            seen, info = self.env.reset(seed=seed)
        return self._observation(seen), self._info(info)

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """Its step: terminates at success, truncates after 500. Raises ValueError for an action that is not four
        finite numbers.
        """
        action = np.asarray(action, np.float32)
        if action.shape != (4,) or not np.isfinite(action).all():
            raise ValueError(
                f"action: got {action!r}, expected 4 finite numbers in [-1, 1]. remedy: check the policy's output."
            )
        self._look()
        seen, reward, terminated, truncated, info = self.env.step(action)
        return self._observation(seen), float(reward), terminated, truncated, self._info(info)

    def render(self) -> np.ndarray:
        """(480, 480, 3) uint8: what it saw last."""
        return self._seen

    def close(self) -> None:
        if self.env is None:
            return
        if (viewer := self._look()) is not None:
            viewer.con.free()  # in its own context, or what is collected later deletes another one's textures
        with warnings.catch_warnings():  # gymnasium ends GLFW, which was never begun
            warnings.simplefilter("ignore")
            self.env.close()
        self.env = None

    def _look(self) -> Any:
        """Its renderer, if there is one yet, in whose OpenGL context all that follows draws.

        gymnasium leaves current whichever was made last, and of two environments in a process one turns black.
        """
        inner = self.env._env
        viewer = None if inner is None else inner.mujoco_renderer._viewers.get("rgb_array")
        if viewer is not None:
            viewer.make_context_current()
        return viewer

    def _observation(self, seen: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self._seen = seen["pixels"]
        image = average(self._seen, self._shares)
        return {IMAGES + CAMERA: image, STATE: seen["agent_pos"].astype(np.float32)}

    def _info(self, info: dict[str, Any]) -> dict[str, Any]:
        told, name = self.env.task_description, self.env.task
        return {TASK: told, IS_SUCCESS: info["is_success"], "skill": name, "alternatives": []}


def _lerobots() -> Any:
    """LeRobot's class; importing it takes seconds."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from lerobot.envs.metaworld import MetaworldEnv
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"LeRobot's Meta-World: got {error}, expected lerobot and metaworld. "
            "remedy: pip install '.[lerobot,metaworld]', or evaluate in envs:Metaworld-v0.",
            name=error.name,
        ) from None
    return MetaworldEnv


def shares(before: int, after: int) -> np.ndarray:
    """(after, before) float32: how much of each new pixel every old one makes up, along one axis."""
    edges = np.arange(after + 1) * before / after
    old = np.arange(before)
    overlap = np.minimum(edges[1:, None], old + 1) - np.maximum(edges[:-1, None], old)
    return (np.maximum(overlap, 0) * after / before).astype(np.float32)


def average(image: np.ndarray, share: np.ndarray) -> np.ndarray:
    """A square picture (n, n, 3) uint8 by area averaging to (m, m, 3) uint8; share: (m, n)."""
    small = np.einsum("in,njc->ijc", share, image, optimize=True)
    small = np.einsum("jn,inc->ijc", share, small, optimize=True)
    return np.rint(small).astype(np.uint8)
