"""Episodes of a LeRobotDataset, each decoded on its own: what streaming reads."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vla.data.lerobot_v3 import DatasetFolder, error
from vla.data.video import frames_at

Group = tuple[Path, int, int]  # a parquet file, a row group of it, and the first frame there


class EpisodeReader:
    """The frames of one episode, for several threads at once. Raises ValueError when a video file is missing."""

    def __init__(self, dataset: DatasetFolder, cameras: list[str]) -> None:
        dataset.require_videos(cameras)
        self.dataset, self.cameras = dataset, cameras
        self.shapes = {name: dataset.picture_shape(dataset.cameras[name]) for name in cameras}
        self.starts, self.ends = (dataset.episodes[f"dataset_{part}_index"] for part in ("from", "to"))
        self.seconds = dataset.timestamps
        self.files: dict[str, list[Path]] = {}
        for name in filter(dataset.is_video, cameras):
            paths = dict.fromkeys(range(len(self.starts)), Path())
            for path, inside in dataset.video_files(dataset.cameras[name]):
                paths |= dict.fromkeys(inside.tolist(), path)
            self.files[name] = list(paths.values())
        self.groups = [] if len(self.files) == len(cameras) else row_groups(dataset.root)

    def frames(self, camera: str, episode: int) -> Iterator[np.ndarray]:
        """Every frame (h, w, 3) uint8 of an episode.

        Raises ValueError naming file and episode when one cannot be read or has another size.
        """
        count, shape = 0, self.shapes[camera]
        path = self.files[camera][episode] if camera in self.files else self.dataset.root / "data"
        try:
            for image in (
                self._video(camera, episode) if camera in self.files else self._images(camera, episode)
            ):
                if image.shape != shape:
                    raise ValueError(f"a frame of {image.shape}, and not {shape} as meta/info.json says")
                yield image
                count += 1
            if count < self.ends[episode] - self.starts[episode]:
                raise ValueError("no more frames")
        except Exception as cause:  # whatever FFmpeg, pillow or pyarrow make of a damaged file
            raise error(
                f"Episode {episode} of {self.dataset.root} cannot be read (camera '{camera}').",
                f"{path}, frame {count} of {self.ends[episode] - self.starts[episode]}: "
                f"{' '.join(str(cause).split())}",
                "a file that can be decoded from the episode's first frame to its last",
                "copy the dataset again, or record it anew without that episode",
            ) from cause  # fmt: skip

    def _video(self, camera: str, episode: int) -> Iterator[np.ndarray]:
        offset = self.dataset.episodes[f"videos/{self.dataset.cameras[camera]}/from_timestamp"][episode]
        wanted = self.seconds[self.starts[episode] : self.ends[episode]] + offset
        return frames_at(self.files[camera][episode], wanted, self.dataset.fps, seek=True)

    def _images(self, camera: str, episode: int) -> Iterator[np.ndarray]:
        import pyarrow.parquet as pq
        from PIL import Image

        first, end, key = self.starts[episode], self.ends[episode], self.dataset.cameras[camera]
        begins = [begin for _, _, begin in self.groups]
        start = int(np.searchsorted(begins, first, "right")) - 1
        for path, group, begin in self.groups[start : int(np.searchsorted(begins, end, "left"))]:
            column = pq.ParquetFile(path).read_row_group(group, columns=[key]).column(0)
            for cell in column[max(0, first - begin) : end - begin].to_pylist():
                source = io.BytesIO(cell["bytes"]) if cell["bytes"] else self.dataset.root / cell["path"]
                with Image.open(source) as image:
                    yield np.asarray(image.convert("RGB"))


def row_groups(root: Path) -> list[Group]:
    """Of all data files, in the order of the frames. LeRobot writes one for each episode."""
    import pyarrow.parquet as pq

    groups, begin = [], 0
    for path in sorted((root / "data").glob("*/*.parquet")):
        metadata = pq.ParquetFile(path).metadata
        for group in range(metadata.num_row_groups):
            groups.append((path, group, begin))
            begin += metadata.row_group(group).num_rows
    return groups
