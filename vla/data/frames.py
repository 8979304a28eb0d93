"""The frame store: a LeRobotDataset decoded once into uint8 arrays, memory-mapped beside it.

Random access into videos costs milliseconds a sample, a memory map 0.01. The store lies in
`<dataset>/frames/`, holds exactly what LeRobotDataset's own items hold, and is built anew when
the dataset changes. Opening and building it does not import lerobot; `vla.data.lerobot_v3`
reads the format. What record.format=frames writes is a store without a LeRobotDataset beside it.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vla.data.frames_writer import FOLDER, INDEX, VERSION, read_index, recorded_cameras, spans, write_index
from vla.data.lerobot_v3 import DatasetFolder, download, select_cameras
from vla.data.normalize import Statistics, require_finite
from vla.observation import ACTION, ENVIRONMENT_STATE, IMAGES, STATE, Features


@dataclass(frozen=True)
class Episode:
    """One demonstration of n frames.

    images: camera -> (n, h, w, 3) uint8; state: (n, P); action: (n, A); task: the instruction;
    environment_state: (n, K), what only a simulator knows, where it was recorded.
    """

    images: Mapping[str, np.ndarray]
    state: np.ndarray
    action: np.ndarray
    task: str
    environment_state: np.ndarray | None = None


@dataclass(frozen=True)
class FrameStore:
    """All N frames of a dataset, episode after episode.

    images: camera -> (N, h, w, 3) uint8; state: (N, P) float32; action: (N, A) float32;
    first, last: (N,) int64, the first and last frame of a frame's episode; task: (N,) int64,
    an index into tasks, the instructions; fps: frames a second; environment_state: (N, K) float32,
    what only a simulator knows, None where it was not recorded.
    """

    images: dict[str, np.ndarray]
    state: np.ndarray
    action: np.ndarray
    first: np.ndarray
    last: np.ndarray
    task: np.ndarray
    tasks: list[str]
    fps: int
    environment_state: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.state)

    @property
    def n_episodes(self) -> int:
        return int((self.first == np.arange(len(self))).sum())

    @property
    def features(self) -> Features:
        cameras = {name: (x.shape[1], x.shape[2]) for name, x in self.images.items()}
        return Features(cameras, self.state.shape[1], self.action.shape[1], self.fps)

    def statistics(self) -> Statistics:
        """Exact statistics of state, action and environment state, where there is one.

        Raises ValueError when one is not finite.
        """
        return Statistics.of(self.vectors())

    def vectors(self) -> dict[str, np.ndarray]:
        """key -> (N, D) float32."""
        privileged = {} if self.environment_state is None else {ENVIRONMENT_STATE: self.environment_state}
        return {STATE: self.state, ACTION: self.action} | privileged

    @classmethod
    def of_episodes(cls, episodes: Iterable[Episode], fps: int) -> FrameStore:
        """A store in memory, straight from recorded arrays, without a dataset on disk.

        Raises ValueError when there is no episode, when episodes differ in shape, when some have an
        environment state and others not, or when a number is not finite.
        """
        episodes = list(episodes)
        if not episodes:
            raise ValueError("No episodes. got: an empty list. expected: at least one. remedy: record some.")
        tasks = sorted({episode.task for episode in episodes})
        lengths = np.array([len(episode.state) for episode in episodes])
        first, last = spans(np.cumsum(lengths) - lengths, lengths)
        privileged = [e.environment_state for e in episodes if e.environment_state is not None]
        store = cls(
            images={
                name: np.concatenate([episode.images[name] for episode in episodes])
                for name in sorted(episodes[0].images)
            },
            state=np.concatenate([episode.state for episode in episodes]).astype(np.float32),
            action=np.concatenate([episode.action for episode in episodes]).astype(np.float32),
            first=first,
            last=last,
            task=np.repeat([tasks.index(episode.task) for episode in episodes], lengths),
            tasks=tasks,
            fps=fps,
            environment_state=np.concatenate(privileged).astype(np.float32) if privileged else None,
        )
        store.check()
        return store

    def check(self) -> None:
        """Raise ValueError unless all arrays cover the same frames with finite numbers."""
        lengths = {name: len(x) for name, x in self.arrays().items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(
                f"The frames do not fit together. got: lengths {lengths}. expected: one length. "
                "remedy: give every episode as many images as states and actions."
            )
        for key, x in self.vectors().items():
            require_finite(key, x)

    def arrays(self) -> dict[str, np.ndarray]:
        numeric = {name: getattr(self, name) for name in ("state", "action", "first", "last", "task")}
        if self.environment_state is not None:
            numeric["environment_state"] = self.environment_state
        return numeric | {IMAGES + name: x for name, x in self.images.items()}

    @classmethod
    def open_or_build(cls, root: str | Path, repo_id: str = "", cameras: Iterable[str] = ()) -> FrameStore:
        """The store in `root`: what record.format=frames wrote there, or that of a LeRobotDataset,
        built first when it is missing or stale.

        repo_id: where lerobot downloads the dataset from when root does not exist;
        cameras: names without prefix, all when empty.
        Raises ValueError or FileNotFoundError, before decoding anything, for whatever training
        could not use: missing keys or cameras, another format version, numbers that are not finite.
        """
        root = Path(root)
        if repo_id and not root.exists():
            download(repo_id, root)
        folder = root / FOLDER
        if recorded := recorded_cameras(folder):
            return cls.open(folder, select_cameras(cameras, recorded, root))
        dataset = DatasetFolder.open(root)
        names = dataset.select_cameras(cameras)
        with open(root / f"{FOLDER}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one builder at a time; released when its process ends
            stored = stored_cameras(folder, dataset)
            if not set(names) <= set(stored):
                build(dataset, sorted({*names, *stored}), folder)  # whoever uses the others keeps them
            return cls.open(folder, names)  # before another builder may replace it

    @classmethod
    def open(cls, folder: str | Path, cameras: Iterable[str] = ()) -> FrameStore:
        """Map a built store; cameras: names without prefix, all when empty."""
        folder = Path(folder)
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))

        def read(name: str) -> np.ndarray:
            return np.load(folder / f"{name}.npy")

        return cls(
            images={
                name: np.load(folder / f"{IMAGES}{name}.npy", mmap_mode="r")
                for name in (list(cameras) or index["cameras"])
            },
            **{name: read(name) for name in ("state", "action", "first", "last", "task")},
            tasks=index["tasks"],
            fps=index["fps"],
            environment_state=read("environment_state") if index.get("environment_state") else None,
        )


def stored_cameras(folder: Path, dataset: DatasetFolder) -> list[str]:
    """The cameras of the store in `folder`; none when it is missing or of another state of the dataset."""
    index = read_index(folder)
    if index is None:
        return []
    # A store may be older than the reading of this column.
    complete = index.get("environment_state", False) == dataset.has_environment_state
    current = index["version"] == VERSION and index["fingerprint"] == dataset.fingerprint()
    return index["cameras"] if complete and current else []


def build(dataset: DatasetFolder, cameras: list[str], folder: Path) -> None:
    """Decode the dataset into `folder`, which appears complete or not at all."""
    fingerprint = dataset.fingerprint()  # before reading: a change meanwhile must show
    numeric = dataset.numeric()
    first, last = spans(numeric.starts, numeric.lengths)
    unfinished = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    arrays = {
        "state": numeric.state,
        "action": numeric.action,
        "task": numeric.task,
        "first": first,
        "last": last,
    }
    if numeric.environment_state is not None:
        arrays["environment_state"] = numeric.environment_state
    for name, x in arrays.items():
        np.save(unfinished / f"{name}.npy", x)
    dataset.decode(cameras, {name: unfinished / f"{IMAGES}{name}.npy" for name in cameras})
    write_index(unfinished, fingerprint, cameras, numeric.tasks, dataset.fps, "environment_state" in arrays)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
