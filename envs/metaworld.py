"""Meta-World's fifty tasks by LeRobot's protocol: one camera, four numbers of state, 500 steps, ever-success.

What differs from LeRobot's own environment (lerobot_metaworld.py has that one): the first picture and the first
state are those of the new scene, any size of image, no reset by itself, and pictures as render.py makes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from envs.metaworld_scene import MetaworldScene
from envs.metaworld_tasks import chosen, instruction
from envs.render import Cameras, check_preset
from vla.observation import ACTION, IMAGES, IS_SUCCESS, STATE, TASK

CAMERA = "corner2"  # as LeRobot and datasets call it
# Meta-World's own camera with the pose to which LeRobot moves "corner2", (0.75, 0.075, 0.7): the same picture.
MOVED = "corner4"
FPS = 80
NAMES = {
    STATE: ("x.pos", "y.pos", "z.pos", "gripper.pos"),
    ACTION: ("x.vel", "y.vel", "z.vel", "gripper.effort"),
}


class Metaworld(gym.Env[dict[str, Any], np.ndarray]):
    """One task after the other: a scene's seed says which, and loads it where it is another than before.

    Seeds that leave the same remainder by n_tasks are scenes of the same task; loading one takes up to a second.
    action (4,): how far the hand's target moves, in centimetres (3), and the gripper's effort (-1 opens, 1
    closes), at 80 Hz. Larger ones are clipped.
    observation.state (4,): position of the hand in metres (3), opening of the gripper (0 to 1 for 0 to 10 cm).
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}

    def __init__(
        self,
        tasks: str | Sequence[str] = "mt50",
        pixels: int = 128,
        preset: str = "fast",
        instructions: str = "distinct",
        max_steps: int = 500,
        render_pixels: int = 256,
        render_mode: str | None = "rgb_array",
    ) -> None:
        """tasks: "mt50", a tier ("easy", "medium", "hard", "very_hard") or names; preset: of render.py, "default" is
        how Meta-World and LeRobot draw; instructions: "distinct", or "lerobot", where push and push-back share one;
        max_steps: an episode's length; render_pixels: side of render()'s picture.
        Raises ValueError for a wrong choice.
        """
        self.tasks = chosen(tasks)
        self.n_tasks = len(self.tasks)
        self.sentences = {name: instruction(name, instructions) for name in self.tasks}
        for name, value in (("pixels", pixels), ("render_pixels", render_pixels), ("max_steps", max_steps)):
            if value < 1:
                raise ValueError(
                    f"{name}: got {value!r}, expected a positive number. remedy: correct {name}."
                )
        check_preset(preset)
        self.preset, self.max_steps = preset, int(max_steps)
        self.pixels, self.render_pixels, self.render_mode = int(pixels), int(render_pixels), render_mode
        self.images_enabled = True
        self.images_at_end = True  # whether the observation that ends an episode shows a new picture
        self.scene: MetaworldScene | None = None
        image = gym.spaces.Box(0, 255, (self.pixels, self.pixels, 3), np.uint8)
        state = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
        self.observation_space = gym.spaces.Dict({IMAGES + CAMERA: image, STATE: state})
        self.action_space = gym.spaces.Box(-1.0, 1.0, (4,), np.float32)
        self.feature_names = NAMES
        self._image = np.zeros((self.pixels, self.pixels, 3), np.uint8)

    # -- episode ---------------------------------------------------------------------------

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """A new scene of the task `tasks[seed % n_tasks]`; the seed alone decides both.

        options["task"]: the sentence to follow, which has to be the task's. Raises ValueError for another one.
        """
        super().reset(seed=seed)
        seed = int(self.np_random.integers(2**31)) if seed is None else seed
        name = self.tasks[seed % self.n_tasks]
        told = (options or {}).get("task")
        if told not in (None, self.sentences[name]):
            raise ValueError(
                f"options['task']: got {told!r}, expected {self.sentences[name]!r}, the only one of {name}. "
                "remedy: another seed has another task."
            )
        if self.scene is None or self.scene.task != name:
            self.close()
            self.scene = MetaworldScene(name)
            self.view = Cameras(self.scene.model, self.preset)
        self.scene.reset(seed)
        self._steps, self._success = 0, False
        return self._observe(self.scene), self._info(self.scene)

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """One frame of 12.5 ms. Raises ValueError for an action that is not four finite numbers: MuJoCo would go on
        with garbage.
        """
        action = np.asarray(action)
        if action.shape != (4,) or not np.isfinite(action).all():
            raise ValueError(
                f"action: got {action!r}, expected 4 finite numbers in [-1, 1]. remedy: check the policy's output."
            )
        scene = self._playing
        scene.step(np.clip(action, -1.0, 1.0).astype(np.float32))  # as LeRobot's: to the last bit
        self._steps += 1
        self._success = self._success or scene.success
        truncated = self._steps >= self.max_steps
        shown = self.images_at_end or not truncated
        return self._observe(scene, shown), float(scene.success), False, truncated, self._info(scene)

    def render(self) -> np.ndarray:
        """(render_pixels, render_pixels, 3) uint8 of the same view, for videos; no policy sees it."""
        return self._picture(self._playing, self.render_pixels)

    def close(self) -> None:
        if self.scene is not None:
            self.view.close()
            self.scene.env.close()
        self.scene = None

    def expert_action(self) -> np.ndarray:
        """(4,) float32 in [-1, 1]: what Meta-World's scripted expert would do now. Privileged."""
        return self._playing.expert_action()

    def environment_state(self) -> np.ndarray:
        """(9,) float32 in metres: the first thing, the second (zeros where there is none), the goal. Privileged."""
        return self._playing.things()

    # -- inside ----------------------------------------------------------------------------

    @property
    def _playing(self) -> MetaworldScene:
        if self.scene is None:
            raise RuntimeError("Metaworld: got no scene, expected one. remedy: call reset first.")
        return self.scene

    def _picture(self, scene: MetaworldScene, pixels: int) -> np.ndarray:
        """Meta-World's cameras hang upside down."""
        return self.view.picture(scene.data, MOVED, pixels)[::-1, ::-1].copy()

    def _observe(self, scene: MetaworldScene, shown: bool = True) -> dict[str, np.ndarray]:
        """State and picture; without `images_enabled` or `shown`, the picture of an earlier observation."""
        if self.images_enabled and shown:
            self._image = self._picture(scene, self.pixels)
        return {IMAGES + CAMERA: self._image.copy(), STATE: scene.observation[:4].astype(np.float32)}

    def _info(self, scene: MetaworldScene) -> dict[str, Any]:
        """IS_SUCCESS: of any step so far, since success can be lost again."""
        told = self.sentences[scene.task]
        return {TASK: told, IS_SUCCESS: self._success, "skill": scene.task, "alternatives": []}
