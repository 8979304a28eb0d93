"""A checkpoint as a policy: uint8 images, raw state and a sentence in, robot units out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from vla.captured import WARM
from vla.checks import one_of
from vla.config import Job
from vla.device import resolve_device
from vla.fast_policy import ABSENT, LAUNCHES, PREFIX, PREFIX_LENGTH, Shape, StaticCall, deployed
from vla.inputs import Inputs, fit
from vla.model.text import TextCache
from vla.model.vla import VLA
from vla.observation import IMAGES, STATE, Features, Tokens, camera_keys
from vla.training import checkpoint

SHAPES = 8  # of calls, whose buffers and graphs are kept; the oldest makes room
COMPILED = 4  # of them at most: each takes as long as the first


class Policy:
    """Runs a network in closed loop; the features of each instruction are computed once.

    chunk_size (H), n_obs_steps (T) and features (cameras, state and action sizes) say what
    goes in and what comes out. One call at a time: all of a shape share their buffers.

    launch: how the network is run, see vla.fast_policy.LAUNCHES. `graph` makes the first calls of a shape
    on a GPU slow (a shape: robots, sizes of pictures), `compiled` also takes 20 s and more for each of the first
    few shapes where this machine never compiled them: call `warm_up` before a robot waits.
    Raises ConfigError for another launch or device.
    """

    def __init__(
        self, model: VLA, job: Job, device: str = "auto", checkpoint_folder: Path | None = None,
        launch: str = "graph",
    ) -> None:  # fmt: skip
        one_of("launch", launch, LAUNCHES)
        self.device = resolve_device(device)
        compiles = self.device.type == "cuda"
        self.launch = launch if launch != "auto" else "compiled" if compiles else "eager"
        self.precision = job.train.precision
        self.model = deployed(model, self.device, self.precision)
        self.job, self.checkpoint = job, checkpoint_folder
        self.text = TextCache(model.text)
        self.calls: dict[Shape, StaticCall] = {}
        self.told: tuple[list[str], Tokens] | None = None  # the newest instructions and their features
        self.compiled = 0
        self.inputs = Inputs(
            model.features, job.model.chunk_size, job.model.n_obs_steps,
            model.actions.longest_prefix, int(job.model.camera_dropout > 0),
        )  # fmt: skip

    @classmethod
    def load(cls, path: str | Path, device: str = "auto", launch: str = "graph", dataset: str = "") -> Policy:
        """Load a checkpoint's folder, or the newest one of a run's output folder.

        dataset: of a mixture, whose statistics, cameras and sizes the policy acts with.
        Raises CheckpointError when it is missing, damaged or of another network, and unless a mixture's
        dataset is named.
        """
        path = checkpoint.find(path)
        model, job, _ = checkpoint.load_model(path, dataset)
        return cls(model, job, device, path, launch)

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
        if prefix is None or prefix_length is None:
            prefix = np.zeros((len(tasks), self.chunk_size, self.features.action_dim), np.float32)
            prefix_length = np.zeros(len(tasks), np.int64)
        inputs = {IMAGES + name: image for name, image in every.items()}
        inputs |= {STATE: state, PREFIX: prefix, PREFIX_LENGTH: prefix_length, ABSENT: absent}
        text = self._text(list(tasks))
        call = self._call(
            Shape(len(tasks), self._words(text), tuple(every[n].shape[2:4] for n in sorted(every)))
        )
        call.tell(text)
        return call(inputs)

    def warm_up(self, batch_size: int = 1) -> None:
        """Calls that do not count, on black pictures of the cameras' own sizes: what the first ones of a shape
        prepare is there when a robot asks.
        """
        features, b, t = self.features, batch_size, self.n_obs_steps
        images = {name: np.zeros((b, t, *size, 3), np.uint8) for name, size in features.cameras.items()}
        for _ in range(1 if self.device.type == "cpu" else WARM + 1):
            self.predict_chunk(images, np.zeros((b, t, features.state_dim), np.float32), [""] * b)

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

    def _text(self, tasks: list[str]) -> Tokens:
        """Of the instructions; the same object as long as they do not change."""
        if self.told is None or self.told[0] != tasks:
            self.told = tasks, self.text(tasks)
        return self.told[1]

    def _words(self, text: Tokens) -> int:
        """The tokens an instruction is padded to (L): where a shape is expensive, all that there may be."""
        cheap = self.launch == "eager" or (self.launch == "graph" and self.device.type == "cpu")
        return text.x.shape[1] if cheap else self.job.model.text.max_tokens

    def _call(self, shape: Shape) -> StaticCall:
        """The call of this shape, made when it is new."""
        if shape not in self.calls:
            if len(self.calls) == SHAPES:
                del self.calls[next(iter(self.calls))]
            launch = "graph" if self.compiled == COMPILED else self.launch
            self.compiled += launch == "compiled"
            self.calls[shape] = StaticCall(self.model, self.precision, self.device, shape, launch)
        return self.calls[shape]
