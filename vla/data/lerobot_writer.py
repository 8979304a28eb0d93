"""How this project writes LeRobotDatasets v3.0: columns, video settings, and lerobot's traps avoided."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vla.observation import ACTION, ENVIRONMENT_STATE, IMAGES, STATE, Features

# Full chroma and no quantisation: the policy must see in training what it sees in evaluation. Measured
# on rendered scenes at 64 px (128 px): largest error 2 of 255 and 53 dB at 0.2 (0.3) ms and 2.0 (3.8) kB a
# frame. LeRobot's default, AV1 at 4:2:0, errs by up to 148 where colours meet (31 dB), at 1.5 (2.2) ms and
# 0.6 (1.1) kB. Codecs not named here keep lerobot's settings.
ENCODERS: dict[str, dict[str, Any]] = {"h264": {"pix_fmt": "yuv444p", "crf": 0, "preset": "ultrafast"}}
VIDEO_FILE_MB = 4  # lerobot rewrites the last file for every episode it appends
SHORTEST = 2  # frames; lerobot 0.6.1 computes no statistics of a video of one frame, and fails later


def dataset_features(
    features: Features, names: Mapping[str, Sequence[str]] | None = None, environment_state: int = 0
) -> dict[str, Any]:
    """The columns as LeRobotDataset.create takes them; names: of the entries of state and action, by key.

    LeRobot's viewer shows names, and lerobot-replay sends actions to a robot by them.
    environment_state: how many numbers of it there are; 0: no such column.
    """
    columns: dict[str, Any] = {
        IMAGES + name: {"dtype": "video", "shape": (*size, 3), "names": ["height", "width", "channels"]}
        for name, size in features.cameras.items()
    }
    for key, width in ((STATE, features.state_dim), (ACTION, features.action_dim)):
        own = list((names or {}).get(key, ())) or None
        columns[key] = {"dtype": "float32", "shape": (width,), "names": own}
    if environment_state:
        columns[ENVIRONMENT_STATE] = {"dtype": "float32", "shape": (environment_state,), "names": None}
    return columns


def create_dataset(
    root: Path, name: str, fps: int, columns: dict[str, Any], vcodec: str, episodes: int
) -> Any:
    """An empty LeRobotDataset in `root`, which must not exist, to add frames to.

    episodes: how many are kept in memory before their metadata is written.
    """
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets import LeRobotDataset

    return LeRobotDataset.create(
        repo_id=f"local/{name}",
        fps=fps,
        features=columns,
        root=root,
        use_videos=True,
        video_backend="pyav",
        streaming_encoding=True,
        # Frames come faster than they are encoded, and lerobot drops frames of a full queue.
        encoder_queue_maxsize=1_000_000,
        encoder_threads=1,  # the workers already fill the cores
        rgb_encoder=RGBEncoderConfig(vcodec=vcodec, **ENCODERS.get(vcodec, {})),
        video_files_size_in_mb=VIDEO_FILE_MB,
        metadata_buffer_size=episodes,
    )


class LeRobotShard:
    """One shard of demonstrations, as a LeRobotDataset of its own.

    names: as `dataset_features` takes them; episodes: how many it will hold.
    """

    def __init__(
        self,
        root: Path,
        features: Features,
        names: Mapping[str, Sequence[str]] | None,
        vcodec: str,
        episodes: int,
    ) -> None:
        self.root, self.features, self.names = root, features, names
        self.vcodec, self.episodes = vcodec, episodes
        self.dataset: Any = None

    def add(self, frames: list[dict[str, Any]]) -> None:
        """Append an episode."""
        if self.dataset is None:  # the first one tells how large the environment's state is
            columns = dataset_features(self.features, self.names, len(frames[0].get(ENVIRONMENT_STATE, ())))
            self.dataset = create_dataset(
                self.root, "demonstrations", self.features.fps, columns, self.vcodec, self.episodes
            )
        for frame in frames:
            self.dataset.add_frame(frame)
        self.dataset.save_episode()

    def close(self) -> None:
        self.dataset.finalize()


def join_datasets(shards: Sequence[Path], target: Path) -> None:
    """Join LeRobotDatasets, in order, without encoding again; begins anew where a killed call was."""
    from lerobot.datasets.aggregate import aggregate_datasets

    shutil.rmtree(target, ignore_errors=True)
    aggregate_datasets(
        repo_ids=["local/demonstrations"] * len(shards),
        aggr_repo_id="local/demonstrations",
        roots=list(shards),
        aggr_root=target,
        concatenate_videos=False,  # joining files one by one rewrites the first ones ever again
    )
