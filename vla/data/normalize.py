"""Statistics of a dataset's state and action, and the map to the model's units and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vla.observation import Features

CONSTANT = 1e-6  # below this spread a dimension is constant, and dividing by it would amplify noise


def require_finite(key: str, x: np.ndarray) -> None:
    """Raise ValueError naming the first row of `x` (N, ...) that holds NaN or infinity."""
    if np.isfinite(x).all():
        return
    finite = np.isfinite(x.reshape(len(x), -1)).all(axis=1)
    row = int(np.flatnonzero(~finite)[0])
    raise ValueError(
        f"'{key}' holds numbers that are not finite. got: row {row} = {x[row].tolist()} "
        f"({int((~finite).sum())} such rows of {len(x)}). expected: finite numbers. "
        "remedy: repair or drop the episode that holds that frame, and record it again."
    )


@dataclass(frozen=True)
class DimensionStatistics:
    """Per dimension, in robot units; q01 and q99 are the 1 % and 99 % quantiles."""

    mean: list[float]
    std: list[float]
    min: list[float]
    max: list[float]
    q01: list[float]
    q99: list[float]

    @classmethod
    def of(cls, x: np.ndarray) -> DimensionStatistics:
        """Exact statistics of x (N, D), accumulated in float64."""
        mean, std = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
        q01, q99 = np.quantile(x, (0.01, 0.99), axis=0)
        values = (mean, std, x.min(axis=0), x.max(axis=0), q01, q99)
        return cls(*(np.asarray(value, dtype=np.float64).tolist() for value in values))

    def padded(self, size: int) -> DimensionStatistics:
        """With dimensions added up to `size` in which everything is 0, in robot units and normalised."""
        return DimensionStatistics(*([*x, *[0.0] * (size - len(x))] for x in asdict(self).values()))


@dataclass(frozen=True)
class Statistics:
    """key ("observation.state", "action") -> statistics of its dimensions."""

    by_key: dict[str, DimensionStatistics]

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> Statistics:
        """Compute them over arrays (N, D). Raises ValueError when one is empty or not finite."""
        for key, x in arrays.items():
            if x.ndim != 2 or len(x) == 0:
                raise ValueError(
                    f"'{key}' cannot be summarised. got: shape {x.shape}. expected: (N, D) with N > 0. "
                    "remedy: check that the dataset holds frames."
                )
            require_finite(key, x)
        return cls({key: DimensionStatistics.of(x) for key, x in arrays.items()})

    def __getitem__(self, key: str) -> DimensionStatistics:
        return self.by_key[key]

    def save(self, path: str | Path) -> None:
        text = json.dumps({key: asdict(value) for key, value in self.by_key.items()}, indent=1)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls({key: DimensionStatistics(**value) for key, value in content.items()})


@dataclass(frozen=True)
class MixedStatistics:
    """Features and statistics of the datasets of a mixture, by name, in the order of Batch.source."""

    features: dict[str, Features]
    statistics: dict[str, Statistics]

    def __getitem__(self, key: str) -> list[DimensionStatistics]:
        """Of each dataset, padded to the largest."""
        each = [statistics[key] for statistics in self.statistics.values()]
        return [one.padded(max(len(x.mean) for x in each)) for one in each]

    def save(self, path: str | Path) -> None:
        content = {
            name: {
                "features": asdict(self.features[name]),
                "statistics": {key: asdict(value) for key, value in statistics.by_key.items()},
            }
            for name, statistics in self.statistics.items()
        }
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> MixedStatistics:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(
            {name: Features.of_json(one["features"]) for name, one in content.items()},
            {
                name: Statistics(
                    {key: DimensionStatistics(**value) for key, value in one["statistics"].items()}
                )
                for name, one in content.items()
            },
        )


# Normalised values are (x - centre) / spread.
MODES = {
    "mean_std": lambda s: (s.mean, s.std),
    "min_max": lambda s: (np.add(s.min, s.max) / 2, np.subtract(s.max, s.min) / 2),
    "quantiles": lambda s: (np.add(s.q01, s.q99) / 2, np.subtract(s.q99, s.q01) / 2),
}


class Normalizer(nn.Module):
    """Robot units to model units and back, along the last axis (..., D).

    mean_std gives zero mean and unit variance; min_max and quantiles give [-1, 1] (quantiles
    for the central 98 %). A constant dimension becomes 0. The buffers are not part of a
    checkpoint's weights: statistics travel in their own file.

    Of several datasets (a list, each with D dimensions) the buffers are (datasets, D), and
    `source` (B,) int64 says which one each of the samples (B, n, D) is of.
    """

    centre: Tensor
    spread: Tensor
    low: Tensor
    high: Tensor

    def __init__(
        self, statistics: DimensionStatistics | Sequence[DimensionStatistics], mode: str = "mean_std"
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(
                f"Unknown normalisation. got: {mode!r}. expected: one of {sorted(MODES)}. "
                "remedy: choose one of them."
            )
        several = [statistics] if isinstance(statistics, DimensionStatistics) else statistics
        centre, spread = np.moveaxis(np.array([MODES[mode](one) for one in several], np.float64), 1, 0)
        spread = np.where(spread < CONSTANT, 1.0, spread)
        low, high = [one.min for one in several], [one.max for one in several]
        for name, value in (("centre", centre), ("spread", spread), ("low", low), ("high", high)):
            tensor = torch.as_tensor(np.asarray(value), dtype=torch.float32)
            one = tensor[0] if isinstance(statistics, DimensionStatistics) else tensor
            self.register_buffer(name, one, persistent=False)

    @property
    def size(self) -> int:
        """D."""
        return self.low.shape[-1]

    def normalize(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        centre, spread = self._of(source)
        return (x - centre) / spread

    def unnormalize(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        centre, spread = self._of(source)
        return x * spread + centre

    def _of(self, source: Tensor | None) -> tuple[Tensor, Tensor]:
        """Centre and spread (D,) of the one dataset, or (B, 1, D) of each sample's."""
        if source is None:
            return self.centre, self.spread
        return self.centre[source][:, None], self.spread[source][:, None]

    def clip(self, x: Tensor) -> Tensor:
        """Hold robot units inside the range that the data covers."""
        return torch.minimum(torch.maximum(x, self.low), self.high)

    def clip_normalized(self, x: Tensor) -> Tensor:
        """`clip` for what is normalised already."""
        low, high = self.normalize(self.low), self.normalize(self.high)
        return torch.minimum(torch.maximum(x, low), high)
