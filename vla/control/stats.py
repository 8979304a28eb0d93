"""What the loop took: every sample kept, percentiles when asked. Times in milliseconds."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np

QUANTILES = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
SERIES = {
    "lateness": "of a tick behind its deadline",
    "duration": "of a tick's work",
    "latency": "from the camera's stamp to the first command of the chunk that was made from it",
}


class Stats:
    """Samples of a run. An hour at 100 Hz is 3 MB."""

    def __init__(self) -> None:
        self.samples = {name: array("f") for name in SERIES}
        self.missed = 0

    def add(self, name: str, seconds: float) -> None:
        self.samples[name].append(1000 * seconds)

    def recent(self, name: str, count: int) -> dict[str, float]:
        """Percentiles and maximum of the last `count` samples in ms; empty when there are none."""
        return summary(np.array(self.samples[name][-count:]))

    def summary(self) -> dict[str, Any]:
        """Of all samples: n, p50, p99, p999 and max in ms by series, and the ticks that were left out."""
        return {f"{name}_ms": summary(values) for name, values in self.arrays().items()} | {
            "missed": self.missed
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """The raw samples in ms."""
        return {name: np.array(values) for name, values in self.samples.items()}


def summary(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    found = dict(zip(QUANTILES, np.quantile(values, list(QUANTILES.values())).tolist(), strict=True))
    return {"n": len(values)} | {k: round(v, 4) for k, v in (found | {"max": float(values.max())}).items()}
