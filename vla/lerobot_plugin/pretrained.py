"""The folder pretrained_model of a LeRobot checkpoint: read, checked, written.

    pretrained_model/
        config.yaml, features.json, statistics.json, model.safetensors, text/, manifest.json
                            a checkpoint of this project (vla/training/checkpoint.py), sealed
        live.safetensors    with an average: the weights that training goes on with; sealed too
        config.json, policy_preprocessor.json, policy_postprocessor.json, train_config.json
                            LeRobot's own, which its commands rewrite; not sealed

So `Policy.load` reads it as it is.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import snapshot_download
from lerobot.configs import PreTrainedConfig

from vla.checks import flat, require
from vla.config import ModelConfig
from vla.data.normalize import DimensionStatistics, Statistics
from vla.lerobot_plugin.configuration_vla import VLAConfig
from vla.observation import ACTION, IMAGES, STATE, Features
from vla.training import checkpoint

LIVE = "live.safetensors"
# What changes no weight of the network and not what they mean: these may differ from the checkpoint's.
FREE = {
    "dropout", "prefix_probability", "camera_dropout", "checkpointing", "feed_forward_chunks", "flow_steps",
    "image.frozen", "image.pretrained", "image.lr_multiplier", "text.frozen", "text.lr_multiplier", "text.encoder",
    "size",
}  # fmt: skip


def fetch(name: str | Path, **options: Any) -> Path:
    """A folder on this machine: `name` itself, or a hub name, of which every file is downloaded.

    options: of huggingface_hub.snapshot_download. Raises FileNotFoundError when there is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(str(name), **options))
    except (OSError, ValueError) as error:  # no network, no such repository, not a repository's name
        raise FileNotFoundError(
            f"policy.path: got {str(name)!r} ({error}), expected a folder pretrained_model or a hub name. "
            "remedy: correct the path, or go online."
        ) from error


def read_config(folder: Path) -> VLAConfig:
    """The policy's own configuration. Raises FileNotFoundError or ConfigError when it is not one of ours."""
    _require_type(folder)
    config = PreTrainedConfig.from_pretrained(folder)
    assert isinstance(config, VLAConfig)
    return config


def _require_type(folder: Path) -> None:
    path = folder / "config.json"
    if not path.is_file():
        ours = (folder / checkpoint.MANIFEST).is_file()
        remedy = (
            f"python scripts/convert.py {folder} NEW_FOLDER" if ours else "name its folder pretrained_model"
        )
        raise FileNotFoundError(
            f"policy.path: got {folder} without config.json, expected a checkpoint in LeRobot's layout. "
            f"remedy: {remedy}."
        )
    got = json.loads(path.read_text(encoding="utf-8")).get("type")
    require(got == "vla", "type", got, f"vla in {path}", "load it with --policy.path, which finds its class")


def require_fit(folder: Path, config: VLAConfig) -> None:
    """Raise ConfigError or CheckpointError unless a policy of `config` can take the folder's weights."""
    _require_type(folder)
    checkpoint.verify(folder)
    saved = checkpoint.load_job(folder).model.deployed
    before, now = (flat(dataclasses.asdict(model)) for model in (saved, config.architecture))
    for name in sorted(now.keys() - FREE, key=lambda name: (name.count("."), name)):
        require(
            now[name] == before[name], f"policy.{name}", now[name],
            f"{before[name]}, as the weights in {folder} have it",
            f"leave out --policy.{name}, or train another network without --policy.path",
        )  # fmt: skip
    features, got = checkpoint.load_features(folder), config.features(1)
    for name in sorted({*features.cameras, *got.cameras}):
        require(
            name in got.cameras and name in features.cameras, f"policy.input_features.{IMAGES}{name}",
            sorted(got.cameras), f"the cameras {sorted(features.cameras)}",
            "rename the data's cameras with --rename_map, or choose a checkpoint of these cameras",
        )  # fmt: skip
    for field_name, mine, theirs in (
        (f"policy.input_features.{STATE}", got.state_dim, features.state_dim),
        (f"policy.output_features.{ACTION}", got.action_dim, features.action_dim),
    ):
        require(
            mine == theirs, field_name, (mine,), f"shape {(theirs,)}, as the weights in {folder} have it",
            "use the data, environment and checkpoint that belong together",
        )  # fmt: skip


def statistics_of(stats: Mapping[str, Any] | None, config: ModelConfig, features: Features) -> Statistics:
    """Those of state and action from LeRobot's `dataset.meta.stats`.

    Without quantiles, which older datasets lack and only normalization=quantiles reads, the limits
    stand in for them. Raises ConfigError naming what is missing.
    """
    by_key = {}
    for key, size in ((STATE, features.state_dim), (ACTION, features.action_dim)):
        row = dict((stats or {}).get(key) or {})
        if config.normalization != "quantiles":
            row = {"q01": row.get("min"), "q99": row.get("max")} | row
        names = [f.name for f in dataclasses.fields(DimensionStatistics)]
        columns = {
            name: np.asarray(row.get(name), dtype=np.float64).ravel()
            for name in names
            if row.get(name) is not None
        }
        missing = [name for name in names if name not in columns or len(columns[name]) != size]
        require(
            not missing, f"dataset_stats.{key}", sorted(columns),
            f"{', '.join(missing)} of {size} numbers each among them",
            "recompute the dataset's statistics with lerobot-edit-dataset, choose --policy.normalization=mean_std if "
            "only q01 and q99 are missing, or load trained weights by --policy.path",
        )  # fmt: skip
        by_key[key] = DimensionStatistics(**{name: columns[name].tolist() for name in names})
    return Statistics(by_key)


def replace_sealed(partial: Path, folder: Path) -> None:
    """Move a sealed checkpoint's files into `folder`, over those of an earlier one, the manifest last.

    LeRobot writes the rest of the folder, so that it cannot be renamed as a whole: until the manifest
    is there the checkpoint is none.
    """
    (folder / checkpoint.MANIFEST).unlink(missing_ok=True)
    for path in sorted(partial.iterdir(), key=lambda path: path.name == checkpoint.MANIFEST):
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    partial.rmdir()


def instructions(dataset_meta: Any) -> Sequence[str] | None:
    """Those of a LeRobotDataset; None without one. A text encoder from scratch learns its words from them."""
    return None if dataset_meta is None else [str(task) for task in dataset_meta.tasks.index]


def warn_of_another_rate(features: Features, saved: Features) -> None:
    if features.fps != saved.fps:
        logging.warning(
            f"fps: got {features.fps}, expected {saved.fps}, at which the weights were trained: an action of one "
            "rate means another motion at the other. remedy: train long enough for it to learn that, or use data "
            "of its rate."
        )


def require_sizes(dataset_meta: Any, saved: Features) -> None:
    """Raise ConfigError unless a dataset's state is as long as the weights know it. LeRobot compares cameras alone."""
    if dataset_meta is None:
        return
    got = tuple(dataset_meta.features[STATE]["shape"]) if STATE in dataset_meta.features else None
    require(
        got == (saved.state_dim,), f"policy.input_features.{STATE}", got,
        f"shape {(saved.state_dim,)}, as the weights have it", "use data and checkpoint that belong together",
    )  # fmt: skip


def sharded() -> NotImplementedError:
    """FSDP gathers weights for LeRobot's checkpoints, but not the average, which is what acts."""
    return NotImplementedError(
        "policy: got weights that FSDP shards, expected whole ones on every process. "
        "remedy: train with DDP, accelerate's default for several processes."
    )
