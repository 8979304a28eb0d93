"""Reads LeRobotDataset v3.0 from disk with pyarrow and PyAV: numbers, instructions, every frame.

lerobot itself takes 14 CPU-seconds to import and decodes frame by frame at random; here each
video is decoded once from front to back. A test holds the result equal to LeRobotDataset's items.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vla.data.frames_writer import FOLDER, recorded_cameras
from vla.data.normalize import require_finite
from vla.data.video import frames_at
from vla.observation import ACTION, ENVIRONMENT_STATE, IMAGES, STATE

CODEBASE_VERSION = "v3."
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"  # lerobot's default


@dataclass(frozen=True)
class Numeric:
    """state (N, P), action (N, A) float32; starts, lengths (episodes,); task (N,) into tasks;
    environment_state (N, K) float32, None where the dataset has none.
    """

    state: np.ndarray
    action: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    task: np.ndarray
    tasks: list[str]
    environment_state: np.ndarray | None = None


def error(what: str, got: Any, expected: str, remedy: str) -> ValueError:
    return ValueError(f"{what} got: {got}. expected: {expected}. remedy: {remedy}.")


def select_cameras(names: Iterable[str], held: Iterable[str], root: Path) -> list[str]:
    """The names, sorted, all that are held when empty. Raises ValueError for one that is not."""
    held = sorted(held)
    names = sorted(set(names)) or held
    missing = [name for name in names if name not in held]
    if missing:
        raise error(
            f"Cameras not in the dataset in {root}.", missing, f"some of {held}",
            "correct data.cameras, or leave it empty for all",
        )  # fmt: skip
    return names


def download(repo_id: str, root: Path) -> None:
    """Fetch a dataset from the hub through lerobot; `root` appears complete or not at all."""
    from lerobot.datasets import LeRobotDataset

    unfinished = root.with_name(root.name + ".tmp")
    LeRobotDataset(repo_id, root=unfinished)
    unfinished.rename(root)


@dataclass(frozen=True)
class DatasetFolder:
    """A LeRobotDataset v3.0 in `root`; info is its meta/info.json."""

    root: Path
    info: dict[str, Any]

    @classmethod
    def open(cls, root: Path) -> DatasetFolder:
        """Raises FileNotFoundError or ValueError unless training could use the dataset."""
        path = root / "meta" / "info.json"
        if recorded_cameras(root / FOLDER):
            raise error(
                f"The dataset in {root} is a frame store.", "what record.format=frames writes",
                "a LeRobotDataset v3.0, which data.stream=true and lerobot's tools read",
                "set data.stream=false, or record with record.format=lerobot",
            )  # fmt: skip
        if not path.is_file():
            raise FileNotFoundError(
                f"No dataset. got: no file {path}. expected: a LeRobotDataset v3.0 in {root}. "
                "remedy: record one with scripts/record.py, or set data.root or data.repo_id."
            )
        dataset = cls(root, json.loads(path.read_text(encoding="utf-8")))
        version = str(dataset.info.get("codebase_version"))
        if not version.startswith(CODEBASE_VERSION):
            raise error(
                f"The dataset in {root} has another format.", version, "codebase_version v3.x",
                "convert it with lerobot's convert_dataset_v21_to_v30",
            )  # fmt: skip
        features, fps = dataset.info.get("features") or {}, dataset.info.get("fps")
        unsound = [key for key, feature in features.items() if not {"dtype", "shape"} <= set(feature)]
        if not features or unsound or not isinstance(fps, int | float) or fps <= 0:
            raise error(
                f"{path} is damaged.", f"fps {fps}, {len(features)} features, {unsound} without dtype or shape",
                "fps and features, each with dtype and shape", "copy or record the dataset again",
            )  # fmt: skip
        if not float(fps).is_integer():  # LeRobot writes no video at such a rate
            raise error(
                f"The dataset in {root} has a fractional rate.", f"fps {fps}", "a whole number of frames a second",
                "record at one, or round fps in meta/info.json where so small a change of speed does not matter",
            )  # fmt: skip
        for key in (STATE, ACTION):
            shape = dataset.info["features"].get(key, {}).get("shape")
            if shape is None or len(shape) != 1:
                raise error(
                    f"The dataset in {root} lacks a usable '{key}'.",
                    f"{key}: shape {shape} among {sorted(dataset.info['features'])}",
                    f"'{key}' of shape (D,)", "rename or add the column when recording the data",
                )  # fmt: skip
        if not dataset.cameras:
            raise error(
                f"The dataset in {root} has no camera.", sorted(dataset.info["features"]),
                f"at least one '{IMAGES}<camera>' of dtype video or image", "record with a camera",
            )  # fmt: skip
        if not dataset.info.get("total_frames"):
            raise error(f"The dataset in {root} is empty.", "0 frames", "at least one episode", "record some")
        return dataset

    @property
    def fps(self) -> int:
        return int(self.info["fps"])

    @cached_property
    def cameras(self) -> dict[str, str]:
        """Camera name -> key of its colour images; depth maps are not among them."""
        keys = {
            key
            for key, feature in self.info["features"].items()
            if feature["dtype"] in ("video", "image") and not is_depth(feature)
        }
        return {key.removeprefix(IMAGES).removeprefix("observation."): key for key in sorted(keys)}

    def select_cameras(self, names: Iterable[str]) -> list[str]:
        return select_cameras(names, self.cameras, self.root)

    def fingerprint(self) -> str:
        """Changes whenever a file of the dataset is added, removed, replaced or rewritten."""
        digest = hashlib.sha256((self.root / "meta" / "info.json").read_bytes())
        for folder in ("meta", "data", "videos", "images"):
            for path in sorted((self.root / folder).rglob("*")):
                if path.is_file():
                    status = path.stat()
                    digest.update(
                        f"{path.relative_to(self.root)} {status.st_size} {status.st_mtime_ns}\n".encode()
                    )
        return digest.hexdigest()

    @property
    def has_environment_state(self) -> bool:
        """Whether there is a column of what only a simulator knows, numbers in a row."""
        feature = self.info["features"].get(ENVIRONMENT_STATE, {"dtype": "", "shape": ()})
        return feature["dtype"].startswith("float") and len(feature["shape"]) == 1

    def _parquet(self, folder: str, columns: list[str]) -> Any:
        """These columns of all parquet files in a folder, as one table."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        paths = sorted((self.root / folder).glob("*/*.parquet"))
        tables = [pq.ParquetFile(path).read(columns) for path in paths]
        missing = [name for name in columns if not tables or any(name not in t.column_names for t in tables)]
        if missing:
            raise error(
                f"The dataset in {self.root} is incomplete.", f"{len(paths)} files in {folder}/, without {missing}",
                "parquet files that hold these columns", "copy, convert or record the dataset again",
            )  # fmt: skip
        # One writer's lists have a fixed length, another's have not: an episode appended to a merged dataset.
        return pa.concat_tables([table.cast(tables[0].schema) for table in tables])

    @cached_property
    def episodes(self) -> dict[str, np.ndarray]:
        """Episode metadata: column -> (episodes,), in the order of the frames."""
        columns = ["episode_index", "dataset_from_index", "dataset_to_index"]
        columns += [
            f"videos/{key}/{part}"
            for key in self.cameras.values()
            if self.info["features"][key]["dtype"] == "video"
            for part in ("chunk_index", "file_index", "from_timestamp")
        ]
        table = self._parquet("meta/episodes", columns)
        order = np.argsort(table["dataset_from_index"].to_numpy())
        return {column: table[column].to_numpy()[order] for column in columns}

    @cached_property
    def timestamps(self) -> np.ndarray:
        """Seconds since each frame's episode began, (N,)."""
        return self._parquet("data", ["timestamp"])["timestamp"].to_numpy().astype(np.float64)

    def numeric(self) -> Numeric:
        """All numbers. Raises ValueError when frames are missing or numbers are not finite."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        keys = [STATE, ACTION, *([ENVIRONMENT_STATE] if self.has_environment_state else [])]
        table = self._parquet("data", [*keys, "episode_index", "task_index"])
        starts = self.episodes["dataset_from_index"]
        lengths = self.episodes["dataset_to_index"] - starts
        n = self.info["total_frames"]
        episode = table["episode_index"].to_numpy()
        contiguous = len(table) == n and np.array_equal(starts, np.cumsum(lengths) - lengths)
        if not contiguous or not np.array_equal(episode, np.repeat(self.episodes["episode_index"], lengths)):
            raise error(
                f"The frames of {self.root} do not match its metadata.",
                f"{len(table)} rows, {lengths.sum()} frames in the episodes' metadata",
                f"{n} frames, episode after episode", "copy or record the dataset again",
            )  # fmt: skip
        arrays = {}
        for key in keys:
            column = table[key].combine_chunks()
            if pa.types.is_nested(column.type):  # (1,) is stored as plain numbers
                column = column.flatten()
            shape = (n, self.info["features"][key]["shape"][0])
            arrays[key] = column.to_numpy(zero_copy_only=False).reshape(shape).astype(np.float32)
            require_finite(key, arrays[key])
        tasks = pq.ParquetFile(self.root / "meta" / "tasks.parquet").read().to_pydict()
        text = tasks.get("task") or tasks["__index_level_0__"]
        # task_index counts rows of this table, as LeRobotDataset reads it
        return Numeric(
            arrays[STATE],
            arrays[ACTION],
            starts,
            lengths,
            table["task_index"].to_numpy().astype(np.int64),
            text,
            arrays.get(ENVIRONMENT_STATE),
        )

    def decode(self, cameras: list[str], targets: dict[str, Path]) -> None:
        """Write every frame of the cameras to one .npy each, (N, h, w, 3) uint8.

        Raises ValueError for a missing video, and for a frame of another size than info.json says.
        """
        n = self.info["total_frames"]
        self.require_videos(cameras)
        with tqdm(total=n * len(cameras), desc="frames", unit="frame", unit_scale=True) as bar:
            for name in cameras:
                key = self.cameras[name]
                shape, video = self.picture_shape(key), self.is_video(name)
                out = np.lib.format.open_memmap(targets[name], mode="w+", dtype=np.uint8, shape=(n, *shape))
                for row, image in self._video(key) if video else self._images(key):
                    if image.shape != shape:
                        raise error(
                            f"Camera '{name}' of {self.root} changes its size.", f"{image.shape} at frame {row}",
                            f"{shape}, as meta/info.json says", "record the dataset again, or correct meta/info.json",
                        )  # fmt: skip
                    out[row] = image
                    bar.update()
                del out  # writes the map to disk

    def is_video(self, camera: str) -> bool:
        return self.info["features"][self.cameras[camera]]["dtype"] == "video"

    def require_videos(self, cameras: Iterable[str]) -> None:
        """Raise ValueError unless the files of the cameras stored as video exist."""
        for name in filter(self.is_video, cameras):
            for path, _ in self.video_files(self.cameras[name]):
                if not path.is_file():
                    raise error("A video is missing.", f"no file {path}", "it", "copy the dataset again")

    def picture_shape(self, key: str) -> tuple[int, ...]:
        """(h, w, 3) of a camera's frames; info.json may put the channels first."""
        shape = tuple(self.info["features"][key]["shape"])
        return (*shape[1:], 3) if len(shape) == 3 and shape[0] == 3 and shape[2] != 3 else shape

    def _images(self, key: str) -> Iterator[tuple[int, np.ndarray]]:
        """Every frame of a camera stored as images: row, (h, w, 3) uint8."""
        import pyarrow.parquet as pq
        from PIL import Image

        row = 0
        for path in sorted((self.root / "data").glob("*/*.parquet")):
            for batch in pq.ParquetFile(path).iter_batches(batch_size=256, columns=[key]):
                for cell in batch.column(0).to_pylist():
                    source = io.BytesIO(cell["bytes"]) if cell["bytes"] else self.root / cell["path"]
                    with Image.open(source) as image:
                        yield row, np.asarray(image.convert("RGB"))
                    row += 1

    def video_files(self, key: str) -> Iterator[tuple[Path, np.ndarray]]:
        """The video files of a camera, each with the positions of its episodes."""
        files = np.stack([self.episodes[f"videos/{key}/{part}_index"] for part in ("chunk", "file")], axis=1)
        for chunk, file in np.unique(files, axis=0):
            path = self.info.get("video_path") or VIDEO_PATH
            path = path.format(video_key=key, chunk_index=chunk, file_index=file)
            yield self.root / path, np.flatnonzero((files == (chunk, file)).all(axis=1))

    def _video(self, key: str) -> Iterator[tuple[int, np.ndarray]]:
        """Every frame of a camera stored as video: row, (h, w, 3) uint8."""
        starts, ends = self.episodes["dataset_from_index"], self.episodes["dataset_to_index"]
        offset = self.episodes[f"videos/{key}/from_timestamp"]
        for path, inside in self.video_files(key):
            rows = np.concatenate([np.arange(starts[i], ends[i]) for i in inside])
            wanted = np.concatenate([self.timestamps[starts[i] : ends[i]] + offset[i] for i in inside])
            order = np.argsort(wanted, kind="stable")
            yield from zip(rows[order].tolist(), frames_at(path, wanted[order], self.fps), strict=True)


def is_depth(feature: dict[str, Any]) -> bool:
    info = feature.get("info") or {}
    return bool(info.get("is_depth_map") or info.get("video.is_depth_map"))
