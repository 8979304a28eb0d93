"""Batches from several datasets, drawn by weight: other cameras, resolutions, sizes of state and action in each.

Samples carry which dataset they are of (Batch.source), which normalises them by its own statistics.
Cameras are the union by name; a dataset that lacks one shows black there and says so (Batch.absent).
States and actions are padded with zeros to the largest. The rate must be one: an action is a motion in
a frame's time, and at another rate it would mean another motion.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vla.checks import require
from vla.data.frames import FrameStore
from vla.data.normalize import MixedStatistics
from vla.data.prefetch import Source
from vla.data.stream import StreamedData
from vla.observation import Batch, Features


@dataclass(frozen=True)
class MixedData:
    """Datasets by name. weights: of each, all adding up to 1; pixels: what pictures of a camera are resized to
    (height and width) where its datasets have them in several sizes.

    Raises ConfigError when they run at different rates.
    """

    members: Mapping[str, FrameStore | StreamedData]
    weights: Mapping[str, float]
    pixels: int

    def __post_init__(self) -> None:
        rates = {name: member.features.fps for name, member in self.members.items()}
        require(
            len(set(rates.values())) == 1, "data.mix", rates, "datasets of one rate (fps)",
            "leave one out, or resample it: an action at another rate is another motion",
        )  # fmt: skip

    def __len__(self) -> int:
        return sum(map(len, self.members.values()))

    @property
    def n_episodes(self) -> int:
        return sum(member.n_episodes for member in self.members.values())

    @property
    def tasks(self) -> list[str]:
        """Each instruction once, in order of appearance."""
        return list(dict.fromkeys(task for member in self.members.values() for task in member.tasks))

    @property
    def features(self) -> Features:
        """The union of cameras and the largest sizes."""
        each = [member.features for member in self.members.values()]
        sizes: dict[str, set[tuple[int, int]]] = {}
        for features in each:
            for name, size in features.cameras.items():
                sizes.setdefault(name, set()).add(size)
        resized = (self.pixels, self.pixels)
        cameras = {name: found.pop() if len(found) == 1 else resized for name, found in sorted(sizes.items())}
        state, action = max(f.state_dim for f in each), max(f.action_dim for f in each)
        return Features(cameras, state, action, each[0].fps)

    def statistics(self) -> MixedStatistics:
        members = self.members.items()
        return MixedStatistics({n: m.features for n, m in members}, {n: m.statistics() for n, m in members})


class Mixture:
    """The interface of Samples; frame numbers count through the datasets, one after the other.

    samples: of each dataset, on the host.
    """

    def __init__(
        self, data: MixedData, samples: Mapping[str, Source], device: torch.device | str = "cpu"
    ) -> None:
        self.data, self.device = data, torch.device(device)
        self.samples = [samples[name] for name in data.members]
        self.features = data.features
        weights = torch.tensor([data.weights[name] for name in data.members], dtype=torch.float64)
        self.until = weights.cumsum(0) / weights.sum()  # (datasets,)
        lengths = torch.tensor([len(member) for member in data.members.values()])
        self.begin = lengths.cumsum(0) - lengths  # (datasets,) number of the first frame of each
        tasks = {task: i for i, task in enumerate(data.tasks)}
        self.tasks = [
            torch.tensor([tasks[task] for task in member.tasks]) for member in data.members.values()
        ]
        cameras = sorted(self.features.cameras)
        lacks = [
            [name not in member.features.cameras for name in cameras] for member in data.members.values()
        ]
        self.lacks = torch.tensor(lacks)  # (datasets, C)

    def __len__(self) -> int:
        return len(self.data)

    @property
    def resident(self) -> bool:
        """Never on a GPU, where a mixture is gathered ahead of time."""
        return self.device.type == "cpu" and all(samples.resident for samples in self.samples)

    def draw(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """Frame numbers (B,) on the CPU, in random order.

        Of each dataset its weight's share of the batch, rounded up or down to whole samples at random.
        """
        places = torch.arange(batch_size, dtype=torch.float64) + torch.rand(
            (), generator=generator, dtype=torch.float64
        )
        source = torch.bucketize(places / batch_size, self.until[:-1], right=True)  # (B,)
        counts = torch.bincount(source, minlength=len(self.samples)).tolist()
        drawn = [
            samples.draw(n, generator) + begin
            for samples, n, begin in zip(self.samples, counts, self.begin, strict=True)
            if n
        ]
        return torch.cat(drawn)[torch.randperm(batch_size, generator=generator)]

    def batch(self, index: Tensor) -> Batch:
        """The batch of the frames `index` (B,), on the training device."""
        return self.gather(index).map(lambda x: x.to(self.device))

    def gather(self, index: Tensor) -> Batch:
        """`batch`, on the host."""
        index = index.cpu()
        source = torch.bucketize(index, self.begin, right=True) - 1  # (B,)
        parts = {i: (source == i).nonzero()[:, 0] for i in range(len(self.samples))}
        batches = {
            i: self._widened(self.samples[i].gather(index[rows] - self.begin[i]), i)
            for i, rows in parts.items()
            if len(rows)
        }
        order = torch.cat([parts[i] for i in batches]).argsort()

        def joined(tensors: list[Tensor]) -> Tensor:
            return torch.cat(tensors)[order]

        each = list(batches.values())
        return Batch(
            {name: joined([b.images[name] for b in each]) for name in each[0].images},
            *(joined([getattr(b, n) for b in each]) for n in ("state", "task", "action", "action_is_pad")),
            absent=self.lacks[source],
            source=source,
        )

    def _widened(self, batch: Batch, i: int) -> Batch:
        """A batch of dataset i in the mixture's sizes and words."""
        shape = batch.state.shape[:2]  # B, T
        images = {}
        for name, size in self.features.cameras.items():
            if name in batch.images:
                images[name] = resized(batch.images[name], size)
            else:
                images[name] = torch.zeros((*shape, 3, *size), dtype=torch.uint8)
        state = F.pad(batch.state, (0, self.features.state_dim - batch.state.shape[2]))
        action = F.pad(batch.action, (0, self.features.action_dim - batch.action.shape[2]))
        return Batch(images, state, self.tasks[i][batch.task], action, batch.action_is_pad)

    def position(self) -> dict[str, Tensor]:
        """Where the streams among the datasets stand, by the datasets' names."""
        named = zip(self.data.members, self.samples, strict=True)
        return {f"{name}.{key}": x for name, samples in named for key, x in samples.position().items()}

    def load_position(self, position: dict[str, Tensor]) -> None:
        """The inverse of `position`."""
        for name, samples in zip(self.data.members, self.samples, strict=True):
            own = {k.removeprefix(f"{name}."): x for k, x in position.items() if k.startswith(f"{name}.")}
            samples.load_position(own)

    def close(self) -> None:
        for samples in self.samples:
            samples.close()


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, T, 3, h, w) uint8 -> (B, T, 3, *size), as the model resizes, but rounded to whole numbers."""
    if tuple(images.shape[-2:]) == size:
        return images
    x = F.interpolate(images.flatten(0, 1).float(), size, mode="bilinear", antialias=True)
    return x.round().clamp(0, 255).to(torch.uint8).unflatten(0, images.shape[:2])
