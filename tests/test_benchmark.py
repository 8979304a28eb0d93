"""The benchmark's arithmetic, and that it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from load_script import load_script
from test_data import make_store

from vla.data.samples import Samples

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


def items(chunk: int) -> list[dict[str, Any]]:
    """What LeRobotDataset would give for the store of test_data."""
    store = make_store()
    batch = Samples(store, chunk).batch(torch.arange(len(store)))
    return [
        {
            "observation.images.front": batch.images["front"][i, 0].clone(), "action": batch.action[i].clone(),
            "observation.state": batch.state[i, 0], "action_is_pad": batch.action_is_pad[i],
            "task": store.tasks[int(batch.task[i])],
        }
        for i in range(len(store))
    ]  # fmt: skip


def test_readers_that_give_other_items_are_not_timed() -> None:
    data, store = load_script("benchmark_data"), make_store()
    assert data.largest_difference(store, items(4), 4, len(store)) == 0
    floats = [
        item | {"observation.images.front": item["observation.images.front"] / 255} for item in items(4)
    ]
    assert data.largest_difference(store, floats, 4, len(store)) == 0
    other = items(4)
    other[-1]["observation.images.front"] ^= 1
    assert (
        data.largest_difference(store, other, 4, 2, tolerance=1) == 1
    )  # the last frame is always among them
    with pytest.raises(RuntimeError, match=r"\['image'\] at frame 15 \(pixels differ by 1\).*remedy"):
        data.largest_difference(store, other, 4, 2)
    other[-1]["action"] += 1e-7
    with pytest.raises(RuntimeError, match=r"\['action', 'image'\]"):
        data.largest_difference(store, other, 4, 2)


def measure(name: str, output: Path) -> tuple[list[dict[str, Any]], str]:
    """The rows and the printed table of a quick run."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), name, "--quick", "--output", str(output)],
        capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1", "SVT_LOG": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [path] = output.glob(f"benchmark_{name}_*.json")
    assert str(path) in done.stdout
    measured = json.loads(path.read_text())
    assert measured["machine"]["threads"] == 1
    assert measured["versions"]["torch"] == torch.__version__.partition("+")[0]
    return measured["rows"], done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_attention_is_measured(tmp_path: Path) -> None:
    measured, printed = measure("attention", tmp_path)
    rows = {(row["name"], row["pass"]): row for row in measured}
    kinds = {"formula", "full", "window", "linformer", "lsh"}
    assert set(rows) == {(kind, way) for kind in kinds for way in ("forward", "both")}
    for (kind, _), row in rows.items():
        assert row["peer"] == "full"
        assert row["median_s"] > 0
        assert (row["ratio_to_peer"] == 1.0) == (kind == "full")
        assert row["peak_memory_mb"] >= 0
        assert f"{row['ratio_to_peer']:.2f}×" in printed


@pytest.mark.slow
def test_reading_data_is_measured(tmp_path: Path) -> None:
    measured, printed = measure("data", tmp_path)
    read = [row for row in measured if "median_ms" in row]
    built = [row for row in measured if row["name"] == "building the store"]
    assert {row["storage"] for row in read} == {row["storage"] for row in built}
    assert len({row["storage"] for row in read}) == len(built) == 3
    for row in built:
        assert row["frames_per_s"] == pytest.approx(row["frames"] / row["seconds"])
    for row in read:
        assert row["n"] == len(row["samples_ms"]) > 0
        assert row["samples_per_s"] == pytest.approx(1000 * row["batch"] / row["median_ms"])
        [peer] = [p for p in read if (p["name"], p["storage"]) == (row["peer"], row["storage"])]
        assert row["ratio_to_peer"] == pytest.approx(row["samples_per_s"] / peer["samples_per_s"])
        assert row.get("decoder", "").startswith("torchcodec") or row.get("largest_difference", 0) == 0
        assert f"{row['ratio_to_peer']:.2f}×" in printed
    names = {row["name"] for row in read if row["storage"] == "images"}
    assert names == {"frame store", "LeRobotDataset, PIL", "LeRobotDataset, PIL, 2 workers"}
