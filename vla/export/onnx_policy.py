"""An exported folder as a policy, with the interface of vla.policy.Policy and without torch.

B batch   T n_obs_steps   H chunk_size   A action_dim   P state_dim
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from vla.export.features import TextFeatures, TextSizes, session
from vla.inputs import Inputs
from vla.manifest import CheckpointError, read_manifest, verify
from vla.observation import Features

VERSION = 1  # of the folder's layout and the graph's inputs


class ExportedPolicy(ABC):
    """What all exported folders share: checked inputs, cached text features, the manifest."""

    def __init__(self, folder: Path, threads: int) -> None:
        """Raises CheckpointError when the folder is damaged or of another kind."""
        hashes = verify(folder, "export")
        self.manifest = read_manifest(folder, "export")
        if self.manifest.get("version") != VERSION:
            raise CheckpointError(
                f"export {folder.name}: of another version. got: {self.manifest.get('version')}. "
                f"expected: {VERSION}. remedy: export the checkpoint again with this version."
            )
        sizes: dict[str, Any] = self.manifest["inputs"]
        cameras = {name: (size[0], size[1]) for name, size in sizes["features"]["cameras"].items()}
        features = Features(**(sizes["features"] | {"cameras": cameras}))
        rest = {name: sizes[name] for name in ("chunk_size", "n_obs_steps", "max_prefix", "may_miss")}
        self.checkpoint, self.inputs = folder, Inputs(features, fixed_size=True, **rest)
        self.text = TextFeatures(folder, TextSizes(**sizes["text"]), threads)
        self.model_sha256 = hashes[self.graph]

    graph: str  # the policy's file

    @classmethod
    def load(cls, folder: str | Path, threads: int = 0) -> Self:
        """Load a folder that scripts/export.py wrote. threads: of the processor; 0: the runtime's choice.

        Raises CheckpointError when it is missing, damaged or of another kind.
        """
        folder = Path(folder)
        if not (folder / cls.graph).is_file():
            raise CheckpointError(
                f"export: got {str(folder)!r}, expected a folder with {cls.graph}. "
                "remedy: export a checkpoint first (scripts/export.py), or correct the path."
            )
        return cls(folder, threads)

    @property
    def features(self) -> Features:
        return self.inputs.features

    @property
    def chunk_size(self) -> int:
        return self.inputs.chunk_size

    @property
    def n_obs_steps(self) -> int:
        return self.inputs.n_obs_steps

    @property
    def max_prefix(self) -> int:
        """How many committed actions a chunk can continue."""
        return self.inputs.max_prefix

    def require_cameras(self, got: set[str]) -> None:
        """Raise ValueError unless the policy can act by these cameras: all, or all but one after camera_dropout."""
        self.inputs.require_cameras(got)

    def predict_chunk(
        self,
        images: dict[str, np.ndarray],
        state: np.ndarray,
        tasks: Sequence[str],
        prefix: np.ndarray | None = None,
        prefix_length: np.ndarray | None = None,
    ) -> np.ndarray:
        """Predict the next H actions for B robots at once; everything as in vla.policy.Policy.predict_chunk,
        but that images must have the sizes in `features`. Raises ValueError when something does not fit.
        """
        self.inputs.check(images, state, tasks, prefix, prefix_length)
        every, absent = self.inputs.complete(images)
        text, pad = self.text(list(tasks))
        if prefix is None or prefix_length is None:
            prefix = np.zeros((len(tasks), self.chunk_size, self.features.action_dim), np.float32)
            prefix_length = np.zeros(len(tasks), np.int64)
        feeds = {f"images.{name}": every[name] for name in sorted(every)} | {
            "state": np.asarray(state, np.float32), "text": text, "text_pad": pad,
            "prefix": np.asarray(prefix, np.float32), "prefix_length": np.asarray(prefix_length, np.int64),
        }  # fmt: skip
        if self.inputs.may_miss:
            feeds["absent"] = absent
        return self.run({name: np.ascontiguousarray(x) for name, x in feeds.items()})

    @abstractmethod
    def run(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        """The graph's inputs by name, in its order -> the chunk (B, H, A) float32."""


class OnnxPolicy(ExportedPolicy):
    """policy.onnx on ONNX Runtime's CPU provider."""

    graph = "policy.onnx"

    def __init__(self, folder: Path, threads: int = 0) -> None:
        super().__init__(folder, threads)
        self.session = session(folder / self.graph, threads)

    def run(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        return np.asarray(self.session.run(None, feeds)[0])
