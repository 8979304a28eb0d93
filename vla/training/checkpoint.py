"""Checkpoints: a folder that holds everything a policy needs, and proves it is intact.

    step_00001000/
        config.yaml          the whole job
        features.json        cameras, state and action sizes of the data
        statistics.json      normalisation; of a mixture datasets.json, features and statistics of each
        model.safetensors    the averaged weights, adapters merged, which the policy runs
        text/                tokenizer and text encoder, as transformers reads them
        training.safetensors live and frozen weights, optimiser, average, random states: for --resume
        manifest.json        sha256 of every file above and of the manifest itself, and the step

A folder is written under another name and renamed, so that one which exists is complete.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vla.checks import flat
from vla.config import ConfigError, Job, ModelConfig, dump, load
from vla.data.normalize import MixedStatistics, Statistics
from vla.manifest import MANIFEST, CheckpointError, read_manifest, seal, verify
from vla.model.cut import cut
from vla.model.lora import is_adapted, merged
from vla.model.vla import VLA
from vla.observation import Features

__all__ = [
    "MANIFEST", "CheckpointError", "checkpoints", "find", "load_features", "load_job", "load_model",
    "load_statistics", "load_training", "pretrained_folders", "read_manifest", "require_features", "require_same",
    "save", "verify", "write_manifest",
]  # fmt: skip

# What decides how training goes on, beside the model, the data and the seed.
COURSE = ("batch_size", "lr", "init", "warmup_steps", "weight_decay", "betas", "grad_clip", "ema_decay",
          "precision")  # fmt: skip
STATISTICS, DATASETS = "statistics.json", "datasets.json"


def save(
    folder: Path, step: int, job: Job, model: VLA, statistics: Statistics | MixedStatistics,
    weights: dict[str, Tensor], training: dict[str, Tensor], keep: int,
) -> Path:  # fmt: skip
    """Write checkpoint `step` into `folder` and delete all but the newest `keep`.

    weights: the averaged trainable weights by name; frozen image weights are added here. A frozen
    text encoder lies in text/, linked from the previous checkpoint; a tuned one is among the
    weights, and text/ says how it is built.
    """
    final = folder / f"step_{step:08d}"
    partial = folder / f".{final.name}.partial"
    for killed in folder.glob(".step_*.partial"):
        shutil.rmtree(killed)
    partial.mkdir(parents=True)
    older = checkpoints(folder)
    write(partial, job, model, statistics, weights, older[-1] / "text" if older else None)
    save_file({n: t.cpu().contiguous() for n, t in training.items()}, partial / "training.safetensors")
    write_manifest(partial, step)
    for path in [*partial.rglob("*"), partial]:
        _sync(path)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _sync(folder)
    for path in checkpoints(folder)[:-keep]:
        shutil.rmtree(path)
    return final


def write(
    folder: Path, job: Job, model: VLA, statistics: Statistics | MixedStatistics, weights: dict[str, Tensor],
    text: Path | None,
) -> None:  # fmt: skip
    """Write what a policy needs, all but the manifest, into an empty folder.

    weights: as in `save`; text: where this very text encoder lies already, to be linked from there.
    """
    (folder / "config.yaml").write_text(dump(job))
    (folder / "features.json").write_text(json.dumps(dataclasses.asdict(model.features), indent=2))
    statistics.save(folder / (DATASETS if isinstance(statistics, MixedStatistics) else STATISTICS))
    if text:
        shutil.copytree(text, folder / "text", copy_function=_link)
    else:
        model.text.save(folder / "text")
    save_file(_deployed(model, weights, job.model), folder / "model.safetensors")


def write_manifest(path: Path, step: int) -> None:
    """Seal a checkpoint's folder: the hash of every file in it, and of what the manifest says itself."""
    seal(path, {"step": step})


def _link(source: str, target: str) -> None:
    try:
        os.link(os.path.realpath(source), target)  # a hub's cache holds symbolic links
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _deployed(model: VLA, weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """What a policy of `config` needs beside text/, under the names of the network that acts."""
    live: dict[str, Tensor] = model.state_dict()
    averaged = {live[n].data_ptr(): w for n, w in weights.items()}  # by place: T5 has two names for one
    state = merged(model, {n: averaged.get(t.data_ptr(), t) for n, t in live.items()})
    tuned = not config.text.frozen or is_adapted(config, "text")
    state = {n: t for n, t in state.items() if tuned or not n.startswith("text.encoder.")}
    state = {n: t for n, t in state.items() if not n.startswith("auxiliary.")}  # which only trains
    return {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in state.items()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    return sorted(p for p in folder.glob("step_*") if (p / MANIFEST).is_file())


def find(path: str | Path) -> Path:
    """A checkpoint's folder, given itself, its parent, or a run's output (the newest one there).

    A run may be LeRobot's too, whose steps hold the checkpoint's folder under the name pretrained_model.
    Raises CheckpointError when there is none.
    """
    path = Path(path)
    for folder in pretrained_folders(path):
        if (folder / MANIFEST).is_file():
            return folder
    for folder in (path, path / "checkpoints"):
        if found := checkpoints(folder):
            return found[-1]
    raise CheckpointError(
        f"checkpoint: got {str(path)!r}, expected a folder with {MANIFEST}, or one with checkpoints/step_* in it, or "
        "of lerobot-train with --policy.type=vla. remedy: train first (scripts/train.py), or correct the path."
    )


def pretrained_folders(path: Path) -> list[Path]:
    """The folder itself, and where LeRobot's layout would have the policy of a step or of a run, the newest first."""
    return [path, path / "pretrained_model", *_of_lerobot(path), *_of_lerobot(path / "checkpoints")]


def _of_lerobot(folder: Path) -> list[Path]:
    """Where a run of lerobot-train keeps its checkpoints, the newest first: steps are numbers."""
    steps = [path for path in folder.glob("*/pretrained_model") if path.parent.name.isdecimal()]
    return sorted(steps, key=lambda path: int(path.parent.name), reverse=True)


def load_model(path: Path, dataset: str = "") -> tuple[VLA, Job, Statistics]:
    """Rebuild the network with its averaged weights, on the CPU, from this folder alone.

    Low-rank adapters are merged and the auxiliary head is left out: job.model says what it was trained with.
    dataset: of a mixture, whose cameras, sizes and statistics the network has; the job is then that
    dataset's too. Raises CheckpointError when the folder is damaged, and unless `dataset` is one of its own.
    """
    verify(path)
    job, statistics, features = load_job(path), load_statistics(path), load_features(path)
    plain = job.model.deployed
    model = rebuild(path, job, plain, features, statistics)
    if isinstance(statistics, Statistics):
        require_name(path, dataset, [])
        return model.eval(), job, statistics
    require_name(path, dataset, list(statistics.features))
    own, cameras = statistics.features[dataset], statistics.features[dataset].cameras
    if len(cameras) == 1:  # without it the policy is blind
        job = dataclasses.replace(job, model=dataclasses.replace(job.model, camera_dropout=0.0))
        plain = dataclasses.replace(plain, camera_dropout=0.0)
    alone = VLA(plain, own, statistics.statistics[dataset], text_folder=path / "text")
    alone.load_state_dict(cut(model.state_dict(), plain, features, own))
    return alone.eval(), job, statistics.statistics[dataset]


def require_name(path: Path, dataset: str, names: list[str]) -> None:
    """Raise CheckpointError unless it is one of a mixture's datasets, or none where there is no mixture."""
    if dataset not in (names or [""]):
        raise CheckpointError(
            f"checkpoint {path.name}: got dataset {dataset!r}, expected "
            + (f"one of {', '.join(names)}, which it was trained on. remedy: say which one's robot it is to act "
               "for, by --evaluate.dataset=<name> (train, evaluate, explain), --dataset=<name> (export, serve) or "
               "Policy.load(…, dataset=<name>)."
               if names else "none, for it was trained on one dataset. remedy: leave it out.")
        )  # fmt: skip


def rebuild(
    path: Path, job: Job, config: ModelConfig, features: Features, statistics: Statistics | MixedStatistics
) -> VLA:
    """A network with the weights that a checkpoint deploys, on the CPU; `path` is verified already.

    job: the checkpoint's own; config: its network without adapters, or one with the same weights.
    Raises CheckpointError when the weights are of another network.
    """
    model = VLA(config, features, statistics, text_folder=path / "text")
    wanted = {(n, tuple(t.shape)) for n, t in _deployed(model, {}, job.model).items()}
    weights = load_file(path / "model.safetensors")
    got = {(n, tuple(t.shape)) for n, t in weights.items()}
    if wanted != got:
        missing, extra = sorted(wanted - got)[:3], sorted(got - wanted)[:3]
        raise CheckpointError(
            f"checkpoint {path.name}: weights of another network. got: unknown {extra}, missing {missing}. "
            "expected: the names and shapes of this version. remedy: load it with the version that wrote it."
        )
    model.load_state_dict(weights, strict=False)
    return model


def load_training(path: Path) -> tuple[int, dict[str, Tensor]]:
    """The step and the state to resume from."""
    verify(path)
    return read_manifest(path)["step"], load_file(path / "training.safetensors")


def load_job(path: Path) -> Job:
    """The job that a checkpoint was trained by. Raises CheckpointError when this version cannot read it."""
    try:
        return load(Job, [], path=path / "config.yaml")
    except SystemExit as error:
        raise CheckpointError(
            f"checkpoint {path.name}: config.yaml is of another version. got: {error}. expected: this version's "
            "fields. remedy: load it with the version that wrote it, named in its first line."
        ) from None


def load_statistics(path: Path) -> Statistics | MixedStatistics:
    if (path / DATASETS).is_file():
        return MixedStatistics.load(path / DATASETS)
    return Statistics.load(path / STATISTICS)


def load_features(path: Path) -> Features:
    return Features.of_json(json.loads((path / "features.json").read_text()))


def require_features(path: Path, features: Features) -> None:
    """Raise ValueError unless a dataset delivers what the checkpoint was trained on."""
    load_features(path).require(features, f"The dataset to resume {path.name} with")


def require_same(path: Path, job: Job) -> None:
    """Raise ConfigError unless going on with `job` continues the training of a checkpoint.

    Model, data, seed and what COURSE names must be the same. Other fields may differ; more
    `steps` stretch the cosine of the learning rate.
    """
    before, now = _course(load_job(path)), _course(job)
    changed = [name for name in {**now, **before} if now.get(name) != before.get(name)]
    if changed:
        raise ConfigError(
            ", ".join(changed),
            ", ".join(str(now.get(name)) for name in changed),
            ", ".join(str(before.get(name)) for name in changed) + f" as in checkpoint {path.name}",
            f"resume with the same configuration ({' '.join(f'--{name}={before.get(name)}' for name in changed)}), or "
            "choose another output",
        )


def _course(job: Job) -> dict[str, Any]:
    train = {name: getattr(job.train, name) for name in COURSE}
    data = dataclasses.asdict(job.data)
    for places in (data, *data["mix"].values()):
        del places["root"], places["repo_id"]  # a dataset may move; its statistics tell whether it changed
    if not job.data.stream:
        del data["cache_mb"]
    parts = {"model": dataclasses.asdict(job.model), "data": data, "train": train}
    return {"seed": job.seed} | flat(parts)
