"""Faults that are timed: how long the controller took to respond, and where that is written down.

`pytest -m "slow or not slow" tests/test_faults*.py --faults=results/faults.json` repeats every one of them and
writes a row for each.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

REPETITIONS = 5  # where they are written down
MEASURED: dict[str, dict[str, Any]] = {}


def timed(fault: str, response: str, expected_ms: float, ms: float, late_ms: float = 0.0) -> None:
    """Assert that a response came in time, and remember it. late_ms: what the machine itself was late."""
    row = MEASURED.setdefault(fault, {"response": response, "expected_ms": expected_ms, "samples_ms": []})
    row["samples_ms"].append(round(ms, 1))
    limit = expected_ms + late_ms
    assert 0 <= ms <= limit, f"{fault}: got {response} after {ms:.0f} ms, expected within {limit:.0f} ms"


def write(path: Path) -> None:
    """The rows as JSON, in the order in which they were measured."""
    from vla.provenance import machine, versions

    rows = []
    for fault, row in MEASURED.items():
        samples = row["samples_ms"]
        figures = {
            "n": len(samples),
            "worst_ms": max(samples),
            "median_ms": round(statistics.median(samples), 1),
        }
        rows.append({"fault": fault} | row | figures)
    content = {"machine": machine(), "versions": versions(), "rows": rows}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def table() -> list[str]:
    """The rows in Markdown."""
    lines = ["| fault | response | within | worst of n |", "|---|---|---|---|"]
    for fault, row in MEASURED.items():
        worst = f"{max(row['samples_ms']):.0f} ms of {len(row['samples_ms'])}"
        lines.append(f"| {fault} | {row['response']} | {row['expected_ms']:.0f} ms | {worst} |")
    return lines
