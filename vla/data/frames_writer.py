"""Writes frame stores: demonstrations straight into arrays, with numpy and nothing else.

A store is a folder that `vla.data.frames` opens:

    observation.images.<camera>.npy  (N, h, w, 3) uint8
    state.npy  action.npy            (N, P) and (N, A) float32
    environment_state.npy            (N, K) float32, where it was recorded
    first.npy  last.npy  task.npy    (N,) int64
    store.json                       cameras, instructions, rate; of which dataset it is a copy, if of one

Recording processes append episodes to shards, which hold the same bytes without a header. Joining
them copies file after file and removes what was copied, so that neither memory nor disk ever
holds the frames twice; a killed join goes on where it was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla.observation import ACTION, ENVIRONMENT_STATE, IMAGES, STATE, TASK, Features

VERSION = 1
FOLDER = "frames"
INDEX = "store.json"
COLUMNS = "columns.json"
NUMBERS = {
    STATE: "state",
    ACTION: "action",
    ENVIRONMENT_STATE: "environment_state",
}  # key -> name of the file
BLOCK = 2**24  # bytes copied at a time


def write_index(
    folder: Path,
    fingerprint: str | None,
    cameras: Sequence[str],
    tasks: list[str],
    fps: int,
    privileged: bool,
) -> None:
    """Complete a store. fingerprint: of the dataset that it is a copy of, None: it is the dataset.

    privileged: whether it has an environment_state.
    """
    index: dict[str, Any] = {
        "version": VERSION,
        "fingerprint": fingerprint,
        "cameras": list(cameras),
        "tasks": tasks,
        "fps": fps,
    }
    if privileged:  # without one the file is what it was before there were any
        index["environment_state"] = True
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def read_index(folder: Path) -> dict[str, Any] | None:
    """The store.json of a store; None where there is none."""
    path = folder / INDEX
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def recorded_cameras(folder: Path) -> list[str]:
    """The cameras of a store that is the dataset itself; none of a copy of a LeRobotDataset's frames.

    Raises ValueError when another version of this project wrote it, for it cannot be built anew.
    """
    index = read_index(folder)
    if index is None or index["fingerprint"] is not None:
        return []
    if index["version"] != VERSION:
        raise ValueError(
            f"The frame store in {folder} has another format. got: version {index['version']}. "
            f"expected: version {VERSION}. remedy: record the dataset again."
        )
    return index["cameras"]


def spans(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last frame of the episode that each frame belongs to, both (N,) int64."""
    starts, lengths = np.asarray(starts, np.int64), np.asarray(lengths, np.int64)
    return np.repeat(starts, lengths), np.repeat(starts + lengths - 1, lengths)


class FrameShard:
    """One shard of demonstrations, appended episode by episode: `<name>.raw` for each array, and columns.json."""

    def __init__(self, root: Path, features: Features) -> None:
        root.mkdir()
        self.root, self.fps = root, features.fps
        self.columns: dict[str, Any] = {}  # name -> dtype and shape of a row

    def add(self, frames: list[dict[str, Any]]) -> None:
        """Append an episode. Raises ValueError when a number is not finite, or an array changes its shape."""
        for key in frames[0].keys() - {TASK}:
            x = np.stack([frame[key] for frame in frames])
            if not key.startswith(IMAGES):
                x = x.astype(np.float32)
                if not np.isfinite(x).all():
                    raise ValueError(
                        f"'{key}' holds numbers that are not finite. got: {x[~np.isfinite(x).all(1)][0].tolist()}. "
                        "expected: finite numbers. remedy: correct the environment."
                    )
            name = NUMBERS.get(key, key)
            row = [x.dtype.str, list(x.shape[1:])]
            if self.columns.setdefault(name, row) != row:
                raise ValueError(
                    f"'{key}' changes from episode to episode. got: {row}. expected: {self.columns[name]}. "
                    "remedy: give it one shape and type in every scene of the environment."
                )
            with (self.root / f"{name}.raw").open("ab") as file:
                x.tofile(file)

    def close(self) -> None:
        text = json.dumps({"fps": self.fps, "columns": self.columns})
        (self.root / COLUMNS).write_text(text, encoding="utf-8")


def join_shards(shards: Sequence[Path], episodes: Sequence[Sequence[tuple[int, str]]], folder: Path) -> None:
    """Make the store `folder` of shards, in order, and remove their frames. Goes on where a killed call was.

    episodes: of each shard, the length and the instruction of each. Raises ValueError when shards
    do not fit together, or when frames are missing.
    """
    described = [json.loads((shard / COLUMNS).read_text(encoding="utf-8")) for shard in shards]
    for shard, description in zip(shards, described, strict=True):
        if description != described[0]:
            raise ValueError(
                f"{shard} does not fit {shards[0]}. got: {description}. expected: {described[0]}. "
                f"remedy: remove {shards[0].parent} and record again."
            )
    folder.mkdir(parents=True, exist_ok=True)
    rows = [sum(length for length, _ in some) for some in episodes]
    columns = described[0]["columns"]
    for name, (dtype, shape) in columns.items():
        join(
            [shard / f"{name}.raw" for shard in shards], rows, folder / f"{name}.npy", np.dtype(dtype), shape
        )
    flat = [episode for some in episodes for episode in some]
    tasks = sorted({task for _, task in flat})
    lengths = np.array([length for length, _ in flat])
    first, last = spans(np.cumsum(lengths) - lengths, lengths)
    task = np.repeat(np.array([tasks.index(task) for _, task in flat], np.int64), lengths)
    for name, x in (("first", first), ("last", last), ("task", task)):
        np.save(folder / f"{name}.npy", x)
    cameras = sorted(name.removeprefix(IMAGES) for name in columns if name.startswith(IMAGES))
    write_index(folder, None, cameras, tasks, described[0]["fps"], NUMBERS[ENVIRONMENT_STATE] in columns)


def join(pieces: list[Path], rows: list[int], target: Path, dtype: np.dtype, shape: list[int]) -> None:
    """Append raw files of so many rows to one .npy, removing each when it is in; a missing one is in already."""
    fresh, size = not target.exists(), dtype.itemsize * int(np.prod(shape))
    with target.open("w+b" if fresh else "r+b") as file:
        whole = {"descr": dtype.str, "fortran_order": False, "shape": (sum(rows), *shape)}
        np.lib.format.write_array_header_1_0(file, whole)
        end = file.tell()
        for piece, n in zip(pieces, rows, strict=True):
            begin, end = end, end + n * size
            if not piece.exists() and not fresh:
                continue
            if not piece.exists() or piece.stat().st_size != n * size:
                raise ValueError(
                    f"Recorded frames are missing. got: {piece.stat().st_size if piece.exists() else 'no file'} "
                    f"at {piece}. expected: {n * size} bytes. remedy: remove {piece.parents[1]} and record again."
                )
            file.seek(begin)
            with piece.open("rb") as source:
                shutil.copyfileobj(source, file, BLOCK)
            file.flush()  # before the only other copy goes
            piece.unlink()
