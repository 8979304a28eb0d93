"""The one place that owns render settings, for recording and evaluation alike.

"fast" has no shadows, reflections or multisampling: on software EGL they cost ten times the
rest. "full" is for pictures that people look at. "default" leaves everything as the model and MuJoCo say, which is
how Meta-World's own renderer draws.
"""

from __future__ import annotations

import atexit
import functools
import weakref

import mujoco
import numpy as np

PRESETS: dict[str, dict[str, int]] = {
    "fast": dict(shadow=False, reflection=False, samples=0, slices=20),
    "full": dict(shadow=True, reflection=True, samples=8, slices=64),
    "default": {},
}


def check_preset(preset: str) -> None:
    """Raise ValueError for a preset that there is not."""
    if preset not in PRESETS:
        raise ValueError(
            f"render preset: got {preset!r}, expected one of {', '.join(PRESETS)}. remedy: use 'fast'."
        )


class Cameras:
    """Pictures of one model at any resolution; a renderer is made at its first use and kept."""

    def __init__(self, model: mujoco.MjModel, preset: str = "fast") -> None:
        check_preset(preset)
        self.settings = PRESETS[preset]
        self.model = model
        if self.settings:  # all are read when a renderer is made, not afterwards
            quality = model.vis.quality
            quality.offsamples = self.settings["samples"]
            quality.numslices, quality.numstacks = self.settings["slices"], self.settings["slices"] // 2
            quality.numquads = 1  # with the slices, three quarters of the time at 64 pixels
            quality.shadowsize = 4096 if self.settings["shadow"] else 0
        self._renderers: dict[int, mujoco.Renderer] = {}

    def picture(self, data: mujoco.MjData, camera: str, pixels: int) -> np.ndarray:
        """(pixels, pixels, 3) uint8; a fresh array."""
        renderer = self._renderer(pixels)
        renderer.update_scene(data, camera)
        return renderer.render()

    def geoms(self, data: mujoco.MjData, camera: str, pixels: int) -> np.ndarray:
        """(pixels, pixels) int32: which geom each pixel of a picture shows, -1 where it shows none."""
        renderer = self._renderer(pixels)
        renderer.enable_segmentation_rendering()
        try:
            renderer.update_scene(data, camera)
            seen = renderer.render()  # (pixels, pixels, 2): id and type
        finally:
            renderer.disable_segmentation_rendering()
        return np.where(seen[..., 1] == int(mujoco.mjtObj.mjOBJ_GEOM), seen[..., 0], -1)

    def _renderer(self, pixels: int) -> mujoco.Renderer:
        renderer = self._renderers.get(pixels)
        if renderer is None:
            self.model.vis.global_.offwidth = max(self.model.vis.global_.offwidth, pixels)
            self.model.vis.global_.offheight = max(self.model.vis.global_.offheight, pixels)
            renderer = self._renderers[pixels] = self._make(pixels)
            _ALIVE.add(self)
            _close_at_exit()
            if self.settings:
                renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = self.settings["shadow"]
                renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = self.settings["reflection"]
        return renderer

    def _make(self, pixels: int) -> mujoco.Renderer:
        try:
            return mujoco.Renderer(self.model, pixels, pixels)
        except (mujoco.FatalError, AttributeError, ImportError) as error:
            raise RuntimeError(
                f"No OpenGL for rendering. got: {error}. expected: a display, or MUJOCO_GL=egl set before mujoco is "
                "imported. remedy: import envs before mujoco; on a bare Debian: apt-get install "
                "--no-install-recommends libegl1 libopengl0 libgl1-mesa-dri."
            ) from error

    def close(self) -> None:
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()


_ALIVE: weakref.WeakSet[Cameras] = weakref.WeakSet()


@functools.cache
def _close_at_exit() -> None:
    """Called behind the first renderer, so that this runs before mujoco's hook tears EGL down."""
    atexit.register(lambda: [cameras.close() for cameras in list(_ALIVE)])
