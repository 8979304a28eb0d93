"""Comparisons with a reference that keep how far apart the two were.

`pytest --parity=results/parity.json` writes them down, a row for each system and reference.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MEASURED: dict[tuple[str, str], dict[str, Any]] = {}


def parity(system: str, reference: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Assert that no element differs by more than `tolerance`; remembers the largest difference seen."""
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)
    difference = (got.double() - expected.double()).abs().amax().item() if got.numel() else 0.0
    row = MEASURED.setdefault((system, reference), {"largest_difference": 0.0, "comparisons": 0})
    row["largest_difference"] = max(row["largest_difference"], difference)
    row["comparisons"] += 1
    row |= {"tolerance": tolerance, "dtype": str(got.dtype).removeprefix("torch.")}


def write(path: Path) -> None:
    """The rows as JSON, in the order of their names, with what they were measured with."""
    from vla.provenance import machine, versions

    rows = [{"system": s, "reference": r} | row for (s, r), row in sorted(MEASURED.items())]
    content = {"machine": machine(), "versions": versions(), "rows": rows}
    path.write_text(json.dumps(content, indent=1) + "\n")


def table() -> list[str]:
    """The rows in Markdown."""
    lines = ["| system | reference | largest difference | in |", "|---|---|---|---|"]
    for (system, reference), row in sorted(MEASURED.items()):
        lines.append(f"| {system} | {reference} | {row['largest_difference']:.0e} | {row['dtype']} |")
    return lines
