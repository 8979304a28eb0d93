"""Statistics of a dataset's state and action, and the map to the model's units and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

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
    """

    centre: Tensor
    spread: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, statistics: DimensionStatistics, mode: str = "mean_std") -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(
                f"Unknown normalisation. got: {mode!r}. expected: one of {sorted(MODES)}. "
                "remedy: choose one of them."
            )
        centre, spread = (np.asarray(value, dtype=np.float64) for value in MODES[mode](statistics))
        spread = np.where(spread < CONSTANT, 1.0, spread)
        for name, value in (
            ("centre", centre), ("spread", spread), ("low", statistics.min), ("high", statistics.max),
        ):  # fmt: skip
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float32), persistent=False)

    def normalize(self, x: Tensor) -> Tensor:
        return (x - self.centre) / self.spread

    def unnormalize(self, x: Tensor) -> Tensor:
        return x * self.spread + self.centre

    def clip(self, x: Tensor) -> Tensor:
        """Hold robot units inside the range that the data covers."""
        return torch.minimum(torch.maximum(x, self.low), self.high)

    def clip_normalized(self, x: Tensor) -> Tensor:
        """`clip` for what is normalised already."""
        low, high = self.normalize(self.low), self.normalize(self.high)
        return torch.minimum(torch.maximum(x, low), high)
