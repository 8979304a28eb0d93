"""The data of a job, opened: a store, a stream, or a mixture of them; and the batches drawn from it."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from vla.checks import require
from vla.config import DataConfig, Job, MixConfig
from vla.data.frames import FrameStore
from vla.data.mixture import MixedData, Mixture
from vla.data.prefetch import Source
from vla.data.samples import Samples
from vla.data.stream import Stream, StreamedData
from vla.observation import Features

Data = FrameStore | StreamedData | MixedData


def open_data(job: Job) -> Data:
    """Raises ValueError or FileNotFoundError for what training could not use, before anything is decoded."""
    data = job.data
    if not data.mix:
        return open_one(
            data, MixConfig(str(job.dataset_root), data.repo_id, 1.0, data.cameras), data.cache_mb
        )
    total = sum(member.weight for member in data.mix.values())
    weights = {name: data.mix[name].weight / total for name in sorted(data.mix)}  # however YAML orders them
    members = {name: open_one(data, data.mix[name], data.cache_mb * share) for name, share in weights.items()}
    return MixedData(members, weights, job.model.image.pixels)


def open_one(data: DataConfig, member: MixConfig, cache_mb: float) -> FrameStore | StreamedData:
    if data.stream:
        return StreamedData.open(Path(member.root), member.repo_id, member.cameras, cache_mb)
    return FrameStore.open_or_build(member.root, member.repo_id, member.cameras)


def features_for(data: Data, dataset: str) -> Features:
    """What a policy for one dataset of a mixture sees. Raises ConfigError unless `dataset` names one."""
    members = data.members if isinstance(data, MixedData) else {"": data}
    require(
        dataset in members, "evaluate.dataset", dataset, f"one of {', '.join(members) or 'none'}, as in data.mix",
        "name the dataset whose robot is evaluated" if members.keys() - {""} else "leave it out, there is no data.mix",
    )  # fmt: skip
    return members[dataset].features


def samples_of(data: Data, job: Job, device: torch.device | str = "cpu") -> Source:
    """What a job's training draws from, for training on `device`. Raises ConfigError for too small a cache."""
    if not isinstance(data, MixedData):
        return samples_of_one(data, job, device, job.train.batch_size)
    return Mixture(
        data,
        {
            name: samples_of_one(member, job, "cpu", math.ceil(data.weights[name] * job.train.batch_size))
            for name, member in data.members.items()
        },
        device,
    )


def samples_of_one(
    data: FrameStore | StreamedData, job: Job, device: torch.device | str, batch_size: int
) -> Source:
    sizes, share = (job.model.chunk_size, job.model.n_obs_steps), job.data.start_share
    if isinstance(data, StreamedData):
        return Stream(data, *sizes, device, share, job.seed, batch_size)
    return Samples(data, *sizes, device, share)
