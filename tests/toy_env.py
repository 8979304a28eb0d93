"""A small world for tests: a dot that walks to the coloured target named by its instruction.

It follows the whole environment protocol and draws itself with numpy alone. The three targets
stand on an arc in a shuffled order, so no colour can be guessed from its place. Its id is
`toy_env:Toy-v0`, with tests/ on the PYTHONPATH (pytest puts it there). `ToyPolicy` masters it.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from vla.observation import Features

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230)}
PHRASINGS = ("go to the {} target", "reach {}")
SPEED = 0.15  # distance of one step at full action
REACHED = 0.2  # distance at which a target counts as reached
FPS = 10


class ToyEnv(gym.Env):
    """State: (x, y) in [-1, 1]. Action: velocity in [-1, 1]. Reaching a wrong target ends the episode."""

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": FPS}

    def __init__(
        self,
        render_mode: str | None = None,
        pixels: int = 32,
        cameras: tuple[str, ...] = ("front",),
        phrasing: int | None = None,
    ) -> None:
        self.render_mode, self.pixels, self.cameras = render_mode, pixels, tuple(cameras)
        self.phrasing, self.images_enabled = phrasing, True
        image = gym.spaces.Box(0, 255, (pixels, pixels, 3), np.uint8)
        spaces: dict[str, gym.Space] = {f"observation.images.{name}": image for name in self.cameras}
        spaces["observation.state"] = gym.spaces.Box(-2, 2, (2,), np.float32)
        self.observation_space = gym.spaces.Dict(spaces)
        self.action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
        self.images = np.zeros((pixels, pixels, 3), np.uint8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        angles = np.radians([30, 90, 150]) + self.np_random.uniform(-0.15, 0.15, 3)
        radii = self.np_random.uniform(0.9, 1.2, 3)
        places = np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None] + (0, -0.6)
        self.targets = dict(zip(self.np_random.permutation(list(COLOURS)).tolist(), places, strict=True))
        self.position = np.array([self.np_random.uniform(-0.1, 0.1), -0.7])
        self.goal = str(self.np_random.choice(list(COLOURS)))
        drawn = int(self.np_random.integers(len(PHRASINGS)))
        self.words = PHRASINGS[drawn if self.phrasing is None else self.phrasing]
        self.task = self.words.format(self.goal)
        if options and "task" in options:
            self.task = options["task"]
            self.goal = next(colour for colour in COLOURS if colour in self.task.split())
        return self._observe(), self._info(False)

    def step(self, action: np.ndarray) -> Any:
        self.position = np.clip(self.position + SPEED * np.clip(action, -1, 1), -1, 1)
        touched = [c for c, place in self.targets.items() if np.linalg.norm(place - self.position) < REACHED]
        success = self.goal in touched
        return self._observe(), float(success), bool(touched), False, self._info(success)

    def expert_action(self) -> np.ndarray:
        """A stateless expert: straight to the target."""
        way = self.targets[self.goal] - self.position
        return (way / max(SPEED, float(np.linalg.norm(way)))).astype(np.float32)

    def render(self) -> np.ndarray:
        return self._draw(4 * self.pixels)

    def _info(self, success: bool) -> dict[str, Any]:
        others = [self.words.format(colour) for colour in sorted(COLOURS) if colour != self.goal]
        return {"task": self.task, "is_success": success, "skill": "reach", "alternatives": others}

    def _observe(self) -> dict[str, np.ndarray]:
        if self.images_enabled:
            self.images = self._draw(self.pixels)
        observation = {f"observation.images.{name}": self.images.copy() for name in self.cameras}
        return {**observation, "observation.state": self.position.astype(np.float32)}

    def _draw(self, pixels: int) -> np.ndarray:
        y, x = np.mgrid[1 : -1 : pixels * 1j, -1 : 1 : pixels * 1j]
        image = np.full((pixels, pixels, 3), 235, np.uint8)
        for colour, place in self.targets.items():
            image[np.hypot(x - place[0], y - place[1]) < REACHED] = COLOURS[colour]
        image[np.hypot(x - self.position[0], y - self.position[1]) < 0.1] = 20
        return image


class ToyPolicy:
    """A scripted policy that solves the toy from pixels: straight to the target of the colour it was told.

    Told nothing, or not reading (`reads=False`), it goes to the leftmost target.
    """

    features = Features({"front": (32, 32)}, state_dim=2, action_dim=2, fps=FPS)

    def __init__(self, chunk_size: int = 4, n_obs_steps: int = 1, reads: bool = True) -> None:
        self.chunk_size, self.n_obs_steps, self.reads = chunk_size, n_obs_steps, reads

    def predict_chunk(self, images: dict[str, np.ndarray], state: np.ndarray, tasks: list[str]) -> np.ndarray:
        scenes = zip(images["front"][:, -1], state[:, -1], tasks, strict=True)
        return np.stack([self._walk(*scene) for scene in scenes]).astype(np.float32)

    def _walk(self, image: np.ndarray, position: np.ndarray, task: str) -> np.ndarray:
        axis = np.linspace(-1, 1, len(image))
        places = {}
        for colour, rgb in COLOURS.items():
            rows, columns = np.nonzero((image == rgb).all(-1))
            if len(rows):
                places[colour] = np.array([axis[columns].mean(), -axis[rows].mean()])  # y points up
        if not places:  # a slot that has not shown anything yet
            return np.zeros((self.chunk_size, 2))
        named = [places[colour] for colour in task.split() if self.reads and colour in places]
        target = named[0] if named else min(places.values(), key=lambda place: place[0])
        walk = []
        for _ in range(self.chunk_size):
            way = target - position
            walk.append(way / max(SPEED, np.linalg.norm(way)))
            position = position + SPEED * walk[-1]
        return np.stack(walk)


if "Toy-v0" not in gym.registry:  # the module may be imported twice in one process
    gym.register("Toy-v0", entry_point=ToyEnv, max_episode_steps=30)
