"""Checkpoints of this project to LeRobot's layout and back, without a change to any weight.

The folder pretrained_model holds a checkpoint of ours as it is (pretrained.py), so that converting is
copying, and an output changes in no bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from vla.checks import require
from vla.lerobot_plugin import pretrained
from vla.lerobot_plugin.configuration_vla import VLAConfig
from vla.lerobot_plugin.processor_vla import make_vla_pre_post_processors
from vla.training import checkpoint

CONFIG = "config.json"  # LeRobot's, which a checkpoint that comes from there keeps for the way back
# Of a checkpoint what a policy needs; what else it holds is for going on with its training.
DEPLOYED = ("config.yaml", "features.json", "statistics.json", "model.safetensors", "text")


def to_lerobot(source: Path, folder: Path) -> Path:
    """Write `folder` as a pretrained_model of the checkpoint in `source`, for LeRobot's --policy.path.

    Raises CheckpointError when the checkpoint is missing or damaged, ConfigError when `folder` exists.
    """

    def configure(partial: Path) -> None:
        if (source / CONFIG).is_file():  # it comes from there: its own names of cameras, its hub name
            config = pretrained.read_config(source)
        else:
            config = VLAConfig.of(checkpoint.load_job(source), checkpoint.load_features(source), device="cpu")
        config.device = "cpu"  # the same files on every machine; LeRobot's commands put their own device in
        for pipeline in make_vla_pre_post_processors(config):
            pipeline.save_pretrained(partial)
        config.device = None  # the best one of the machine that loads it
        config.save_pretrained(partial)

    return _write(source, folder, configure)


def from_lerobot(source: Path, folder: Path) -> Path:
    """Write `folder` as a checkpoint of this project of LeRobot's pretrained_model in `source`.

    Raises like `to_lerobot`, and FileNotFoundError or ConfigError when `source` is of another policy.
    """
    pretrained.read_config(source)
    return _write(source, folder, lambda partial: shutil.copy2(source / CONFIG, partial))


def _write(source: Path, folder: Path, add: Callable[[Path], object]) -> Path:
    """The deployed files of `source`, sealed, and what `add` writes beside them; all of it or nothing."""
    require(
        not folder.exists(), "folder", str(folder), "a folder that does not exist yet", "choose another name"
    )
    checkpoint.verify(source)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in DEPLOYED:
        copy = shutil.copytree if (source / name).is_dir() else shutil.copy2
        copy(source / name, partial / name)
    checkpoint.write_manifest(partial, checkpoint.read_manifest(source)["step"])
    add(partial)
    partial.rename(folder)
    return folder
