"""A checkpoint as a policy: uint8 images, raw state and a sentence in, robot units out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vla.config import Job
from vla.device import autocast, resolve_device
from vla.inputs import Inputs, fit
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
        self.inputs = Inputs(
            model.features, job.model.chunk_size, job.model.n_obs_steps,
            model.actions.longest_prefix, int(job.model.camera_dropout > 0),
        )  # fmt: skip

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

    @property
    def max_prefix(self) -> int:
        """How many committed actions a chunk can continue."""
        return self.model.actions.longest_prefix

    @property
    def model_sha256(self) -> str:
        """Of the weights in its checkpoint. Raises ValueError for a policy that came from none."""
        if self.checkpoint is None:
            raise ValueError("policy: got no checkpoint, expected one. remedy: load it with Policy.load.")
        return checkpoint.read_manifest(self.checkpoint)["sha256"]["model.safetensors"]

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
        self.inputs.check(images, state, tasks, prefix, prefix_length)
        every, absent = self.inputs.complete(images)
        observation = Observation(
            images={name: self._tensor(image).permute(0, 1, 4, 2, 3) for name, image in every.items()},
            state=self._tensor(state).float(),
            text=self.text(list(tasks)),
            absent=self._tensor(absent) if absent.any() else None,
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

    def require_cameras(self, got: set[str]) -> None:
        """Raise ValueError unless the policy can act by these cameras: all, or all but one after camera_dropout."""
        self.inputs.require_cameras(got)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)
