"""Golden losses: the first steps of a fixed job. A change of these numbers must be meant.

python tests/test_golden.py     writes golden_losses.txt anew (from the root, PYTHONPATH=.)
"""

from __future__ import annotations

from pathlib import Path

import pytest
from toy_run import toy_job, toy_step

FILE = Path(__file__).with_name("golden_losses.txt")
HEADER = "# first losses of the job in test_golden.py; made by: PYTHONPATH=. python tests/test_golden.py\n"


def losses(steps: int = 5) -> list[float]:
    step = toy_step(toy_job(Path(), steps=100, lr=3e-3))
    return [step(i)["loss"].item() for i in range(steps)]


def test_losses_are_what_they_were() -> None:
    golden = [float(line) for line in FILE.read_text().splitlines() if not line.startswith("#")]
    assert len(golden) == 5
    assert losses() == pytest.approx(golden, rel=1e-3)  # fp32 on another CPU differs in the last bits


if __name__ == "__main__":
    FILE.write_text(HEADER + "".join(f"{loss:.6f}\n" for loss in losses()))
