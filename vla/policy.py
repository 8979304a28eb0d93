"""A checkpoint as a policy: uint8 images, raw state and a sentence in, robot units out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla.config import Job
from vla.device import autocast, resolve_device
from vla.model.text import TextCache
from vla.model.vla import VLA
from vla.observation import IMAGES, STATE, Features, Observation, camera_keys
from vla.training import checkpoint


class Policy:
    """Runs a network in closed loop; the features of each instruction are computed once.

    chunk_size (H), n_obs_steps (T) and features (cameras, state and action sizes) say what
    goes in and what comes out.
    """

    def __init__(
        self, model: VLA, job: Job, device: str = "auto", checkpoint_folder: Path | None = None
    ) -> None:
        self.device = resolve_device(device)
        self.model = model.to(self.device).eval()
        self.job, self.checkpoint = job, checkpoint_folder
        self.text = TextCache(model.text)

    @classmethod
    def load(cls, path: str | Path, device: str = "auto") -> Policy:
        """Load a checkpoint's folder, or the newest one of a run's output folder.

        Raises CheckpointError when it is missing, damaged or of another network.
        """
        path = checkpoint.find(path)
        model, job, _ = checkpoint.load_model(path)
        return cls(model, job, device, path)

    @property
    def features(self) -> Features:
        return self.model.features

    @property
    def chunk_size(self) -> int:
        return self.job.model.chunk_size

    @property
    def n_obs_steps(self) -> int:
        return self.job.model.n_obs_steps

    @torch.inference_mode()
    def predict_chunk(
        self,
        images: dict[str, np.ndarray],
        state: np.ndarray,
        tasks: Sequence[str],
        prefix: np.ndarray | None = None,
        prefix_length: np.ndarray | None = None,
    ) -> np.ndarray:
        """Predict the next H actions for B robots at once.

        images: camera -> (B, T, h, w, 3) uint8, oldest first; a policy trained with camera_dropout
        does without one of its cameras; state: (B, T, P) in robot units;
        tasks: B instructions; prefix: (B, H, A) actions already committed, of which the first
        prefix_length (B,) count. Returns (B, H, A) float32 in robot units, inside the limits of
        the demonstrations; committed actions come back unchanged in their places.
        Raises ValueError when something does not fit the network.
        """
        self._check(images, state, tasks, prefix, prefix_length)
        images, absent = self._complete(images)
        observation = Observation(
            images={name: self._tensor(image).permute(0, 1, 4, 2, 3) for name, image in images.items()},
            state=self._tensor(state).float(),
            text=self.text(list(tasks)),
            absent=absent,
        )
        committed = None if prefix is None else self._tensor(prefix).float()
        length = None if prefix_length is None else self._tensor(prefix_length)
        with autocast(self.device, self.job.train.precision):
            chunk = self.model.predict_chunk(observation, committed, length)
        return chunk.float().cpu().numpy()

    def predict(self, observation: dict[str, np.ndarray], task: str) -> np.ndarray:
        """The next chunk (H, A) from one observation with LeRobot's keys, for n_obs_steps = 1.

        observation: `observation.images.<camera>` (h, w, 3) uint8 and `observation.state` (P,).
        """
        fit("keys of the observation", STATE if STATE in observation else sorted(observation), STATE)
        images = {key.removeprefix(IMAGES): observation[key][None, None] for key in camera_keys(observation)}
        return self.predict_chunk(images, np.asarray(observation[STATE])[None, None], [task])[0]

    def _check(
        self,
        images: dict[str, np.ndarray],
        state: np.ndarray,
        tasks: Sequence[str],
        prefix: np.ndarray | None,
        prefix_length: np.ndarray | None,
    ) -> None:
        features, b, t = self.features, len(tasks), self.n_obs_steps
        self.require_cameras(set(images))
        for name, image in images.items():
            fit(f"type of camera {name}", str(image.dtype), "uint8")
            got = (*image.shape[:2], "h", "w", image.shape[4]) if image.ndim == 5 else image.shape
            fit(f"shape of camera {name}", got, (b, t, "h", "w", 3))
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
        longest = self.model.actions.longest_prefix
        within = bool(((prefix_length >= 0) & (prefix_length <= longest)).all())
        lengths = f"0 … {longest}, as trained (model.max_prefix)"
        fit("prefix_length", lengths if within else prefix_length.tolist(), lengths)
        read = np.arange(self.chunk_size) < prefix_length[:, None]  # (B, H)
        finite = bool(np.isfinite(prefix[read]).all())
        fit("numbers in the prefix", "all finite" if finite else "not finite", "all finite")

    def require_cameras(self, got: set[str]) -> None:
        """Raise ValueError unless the policy can act by these cameras: all, or all but one after camera_dropout."""
        expected = set(self.features.cameras)
        may_miss = int(self.job.model.camera_dropout > 0)
        if got and got < expected and len(expected - got) > may_miss:
            raise ValueError(
                f"The policy cannot do without {may_miss + 1} of its cameras. got: {sorted(got)}. expected: "
                f"{sorted(expected)}{', or all but one' if may_miss else ''}. remedy: show it more cameras"
                f"{'' if may_miss else ', or train one with model.camera_dropout=0.2, which then does without one'}."
            )
        if not got or not got <= expected:
            fit("cameras", sorted(got), sorted(expected))

    def _complete(self, images: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], Tensor | None]:
        """The images with a black one for each missing camera, and (B, C) bool where one is missing."""
        names = sorted(self.features.cameras)
        if len(images) == len(names):
            return images, None
        black = np.zeros_like(next(iter(images.values())))
        absent = torch.tensor([name not in images for name in names], device=self.device)
        return {name: images.get(name, black) for name in names}, absent.expand(len(black), -1)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)


def fit(what: str, got: Any, expected: Any) -> None:
    """Raise ValueError unless got is what the policy takes."""
    if got != expected:
        raise ValueError(
            f"The observation does not fit the policy: {what}. got: {got}. expected: {expected}. "
            "remedy: see policy.features and policy.n_obs_steps, and Policy.predict_chunk for the shapes."
        )
