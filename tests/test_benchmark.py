"""The benchmark's arithmetic, and that it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from load_script import load_script

SCRIPT = Path(__file__).parent.parent / "scripts" / "benchmark.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_script("benchmark")


def test_timing_is_of_the_samples_and_of_the_peer_in_the_same_round(benchmark: ModuleType) -> None:
    row = benchmark.timing([1.0, 2.0, 30.0], [2.0, 1.0, 10.0])
    assert row["median_s"] == 2.0
    assert row["p10_s"] == pytest.approx(1.2)
    assert row["p90_s"] == pytest.approx(24.4)
    assert row["ratio_to_peer"] == 2.0
    assert row["samples_s"] == [1.0, 2.0, 30.0]
    assert benchmark.timing([4.0], [2.0])["p90_s"] == 4.0


def test_candidates_take_turns_and_the_first_call_does_not_count(benchmark: ModuleType) -> None:
    calls: list[str] = []
    times = benchmark.take_turns({name: lambda name=name: calls.append(name) for name in "abc"}, 2)
    assert "".join(calls) == "abc" + "bca" + "cab"
    assert {name: len(samples) for name, samples in times.items()} == {"a": 2, "b": 2, "c": 2}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_what_a_call_held_at_once(benchmark: ModuleType) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def run() -> None:
        for _ in range(3):
            torch.ones(80, 10**6, dtype=torch.uint8, device=device)  # one at a time

    assert 75 < benchmark.peak_memory_mb(run) < 120


def test_the_formula_is_the_fused_kernel(benchmark: ModuleType) -> None:
    x = torch.randn(1, 20, benchmark.D_MODEL)
    formula, full = (benchmark.attention_layer(kind, 20) for kind in ("formula", "full"))
    assert type(formula) is not type(full)
    torch.testing.assert_close(formula(x, x), full(x, x))


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_attention_is_measured(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "attention", "--quick", "--output", str(tmp_path)],
        capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [path] = tmp_path.glob("benchmark_attention_*.json")
    assert str(path) in done.stdout
    measured = json.loads(path.read_text())
    assert measured["machine"]["threads"] == 1
    assert measured["versions"]["torch"] == torch.__version__.partition("+")[0]
    rows = {(row["name"], row["pass"]): row for row in measured["rows"]}
    kinds = {"formula", "full", "window", "linformer", "lsh"}
    assert set(rows) == {(kind, way) for kind in kinds for way in ("forward", "both")}
    for (kind, _), row in rows.items():
        assert row["peer"] == "full"
        assert row["median_s"] > 0
        assert (row["ratio_to_peer"] == 1.0) == (kind == "full")
        assert row["peak_memory_mb"] >= 0
        assert f"{row['ratio_to_peer']:.2f}×" in done.stdout
