"""What a policy takes, checked before it computes: the same rules for a checkpoint and for its export.

    B batch   T n_obs_steps   H chunk_size   A action_dim   P state_dim   C cameras

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla.observation import Features


@dataclass(frozen=True)
class Inputs:
    """The sizes of a policy's inputs.

    max_prefix: the longest committed prefix it can continue; may_miss: how many cameras it does
    without; fixed_size: images must have the sizes of `features`, nothing resizes them.
    """

    features: Features
    chunk_size: int
    n_obs_steps: int
    max_prefix: int
    may_miss: int = 0
    fixed_size: bool = False

    def check(
        self,
        images: dict[str, np.ndarray],
        state: np.ndarray,
        tasks: Sequence[str],
        prefix: np.ndarray | None,
        prefix_length: np.ndarray | None,
    ) -> None:
        """Raise ValueError unless they fit; shapes as in Policy.predict_chunk."""
        features, b, t = self.features, len(tasks), self.n_obs_steps
        self.require_cameras(set(images))
        for name, image in images.items():
            fit(f"type of camera {name}", str(image.dtype), "uint8")
            got = (*image.shape[:2], "h", "w", image.shape[4]) if image.ndim == 5 else image.shape
            fit(f"shape of camera {name}", got, (b, t, "h", "w", 3))
            if self.fixed_size:
                fit(f"height and width of camera {name}", image.shape[2:4], features.cameras[name])
        fit("shape of the state", state.shape, (b, t, features.state_dim))
        fit("numbers in the state", "all finite" if np.isfinite(state).all() else "not finite", "all finite")
        fit("type of the tasks", {type(task).__name__ for task in tasks} - {"str"} or {"str"}, {"str"})
        if prefix is None and prefix_length is None:
            return
        if prefix is None or prefix_length is None:
            raise ValueError(
                "The committed prefix does not fit. got: only one of prefix and prefix_length. "
                "expected: both or none. remedy: pass the actions and how many of them count."
            )
        fit("shape of the prefix", prefix.shape, (b, self.chunk_size, features.action_dim))
        fit("shape of prefix_length", prefix_length.shape, (b,))
        within = bool(((prefix_length >= 0) & (prefix_length <= self.max_prefix)).all())
        lengths = f"0 … {self.max_prefix}, as trained (model.max_prefix)"
        fit("prefix_length", lengths if within else prefix_length.tolist(), lengths)
        read = np.arange(self.chunk_size) < prefix_length[:, None]  # (B, H)
        finite = bool(np.isfinite(prefix[read]).all())
        fit("numbers in the prefix", "all finite" if finite else "not finite", "all finite")

    def require_cameras(self, got: set[str]) -> None:
        """Raise ValueError unless the policy can act by these cameras: all, or all but one after camera_dropout."""
        expected, may_miss = set(self.features.cameras), self.may_miss
        if got and got < expected and len(expected - got) > may_miss:
            raise ValueError(
                f"The policy cannot do without {may_miss + 1} of its cameras. got: {sorted(got)}. expected: "
                f"{sorted(expected)}{', or all but one' if may_miss else ''}. remedy: show it more cameras"
                f"{'' if may_miss else ', or train one with model.camera_dropout=0.2, which then does without one'}."
            )
        if not got or not got <= expected:
            fit("cameras", sorted(got), sorted(expected))

    def complete(self, images: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The images with a black one for each missing camera, and which are missing, (B, C) bool."""
        names = sorted(self.features.cameras)
        some = next(iter(images.values()))  # (B, T, h, w, 3)
        every = {}
        for name in names:
            size = self.features.cameras[name] if self.fixed_size else some.shape[2:4]
            every[name] = images[name] if name in images else np.zeros((*some.shape[:2], *size, 3), np.uint8)
        return every, np.tile([name not in images for name in names], (len(some), 1))


def fit(what: str, got: Any, expected: Any) -> None:
    """Raise ValueError unless got is what the policy takes."""
    if got != expected:
        raise ValueError(
            f"The observation does not fit the policy: {what}. got: {got}. expected: {expected}. "
            "remedy: see policy.features and policy.n_obs_steps, and Policy.predict_chunk for the shapes."
        )
