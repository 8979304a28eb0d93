"""The training and scaling benchmarks: the counts, the arithmetic, and that they run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from load_script import SCRIPTS
from torch import nn
from torch.nn import functional as F
from toy_run import toy_job, toy_model, toy_step

if str(SCRIPTS) not in sys.path:
    sys.path.append(str(SCRIPTS))

from benchmarks import flops, growth, scaling, training  # pyright: ignore[reportMissingImports]
from benchmarks.common import Options  # pyright: ignore[reportMissingImports]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """FLOPs of every linear layer, convolution and attention, by their formulas."""
    found: list[float] = []
    attend = F.scaled_dot_product_attention

    def count(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x = inputs[0] if inputs else output
        if isinstance(module, nn.Linear):
            one = 2.0 * x.numel() * module.out_features
        elif isinstance(module, nn.Conv2d):
            one = 2.0 * output.numel() * module.in_channels * module.kernel_size[0] * module.kernel_size[1]
        else:
            return
        # Forward, the weight's gradient, and the input's where anything before it learns.
        found.append(one * (3 if x.requires_grad else 2))

    def attention(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(3 * 2 * 2.0 * q.numel() * k.shape[-2])
        return attend(q, k, v, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    handle = nn.modules.module.register_module_forward_hook(count)
    yield found
    handle.remove()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_flops_are_those_of_the_formulas(tmp_path: Path, products: list[float], precision: str) -> None:
    step = toy_step(toy_job(tmp_path, toy_model(dropout=0.0), precision=precision))
    products.clear()  # of the instructions, encoded once
    assert flops.flops_of(lambda: step(0, measure=False)) == sum(products)
    assert sum(products) > 1e6


def test_bytes_and_operators_are_of_what_computes() -> None:
    x, y = torch.zeros(100, 10), torch.zeros(10)

    def call() -> None:
        (x.t()[:, :50].add(y[:, None]))  # the addition reads half of x and y, and writes as much

    with flops.Traffic() as traffic:
        call()
    assert traffic.operators == 1
    assert traffic.bytes == 4 * (500 + 10 + 500)


def test_the_bound_is_what_takes_most() -> None:
    roofline = flops.Roofline(flops_per_s=1e9, bytes_per_s=1e8)
    work = flops.Work(flops=1e6, bytes=1e6, operators=7)  # 1 ms of arithmetic, 10 ms of memory
    assert flops.bound(work, roofline, 0.005, 0.02)[0] == "memory"
    assert flops.bound(work, roofline, 0.011, 0.02)[0] == "launch"
    assert flops.bound(replace(work, flops=1e8), roofline, 0.005, 0.2)[0] == "arithmetic"
    _, evidence = flops.bound(work, roofline, 0.005, 0.02)
    assert evidence == "of 20.00 ms: 7 operators 5.00, 1 MB 10.00, 0.0 GFLOP 1.00"


def test_utilisation_is_of_the_product_in_the_same_round() -> None:
    assert flops.utilisation(10.0, [1.0, 2.0, 4.0], 40.0, [1.0, 2.0, 4.0]) == 0.25
    assert flops.utilisation(10.0, [1.0, 1.0, 1.0], 10.0, [0.5, 0.1, 0.9]) == 0.5


def test_a_turn_is_the_mean_of_its_steps_without_what_surrounds_them() -> None:
    calls: list[str] = []
    candidate = training.Candidate(
        lambda: calls.append("step"), 3, lambda: calls.append("before"), lambda: calls.append("after")
    )
    assert candidate.turn() >= 0
    assert calls == ["before", "step", "step", "step", "after"]


def test_on_paper_every_number_follows_from_the_rows() -> None:
    params = {"axis": "batch", "batch": 8, "parameters": 10**6, "precision": "bf16"}
    rows = [
        {"name": "training", "params": params, "items_per_s": 100.0},
        {"name": "training", "params": params | {"batch": 64}, "items_per_s": 1000.0},
        {"name": "training", "params": params | {"batch": 512}, "failed": "out of memory"},
        {"name": "store", "params": {"frames": 100, "pixels": 128}, "cores_s": 1.0,
         "bytes_per_frame": 5e4, "video_bytes_per_frame": 1e4},
    ]  # fmt: skip
    ten_million, billion = growth.on_paper(rows, "cpu")
    assert ten_million["store_bytes"] == 5e11
    assert ten_million["build_core_hours"] == pytest.approx(1e5 / 3600)
    assert billion["train_hours"] == pytest.approx(growth.PASSES * 1e6 / 3600)
    assert billion["read_bytes_per_s"] == 5e7
    assert not billion["fits"]
    assert "1,000 samples/s, as measured at batch 64" in " ".join(billion["assumptions"])
    assert "1,000,000,000" in growth.paper_table([ten_million, billion])
    assert growth.on_paper(rows[:3], "cpu") == []


def test_a_point_that_needs_too_much_memory_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(scaling, "measure", fail)
    rows = scaling.training_rows(Options(True, "cpu", tmp_path, False), tmp_path)
    assert {row["failed"] for row in rows} == {"out of memory"}
    assert "out of memory" in scaling.table(rows)


def test_networks_are_as_large_as_they_are_called() -> None:
    for name, config in scaling.NETWORKS.items():
        # Of encoder, decoder and image transformer; embeddings, stem and projections come on top.
        d, width = config.d_model, config.image_width
        blocks = 12 * (config.n_encoder_layers + 0) * d**2 + 16 * config.n_decoder_layers * d**2
        if name != "1 M":  # whose feed-forward layers are narrower
            assert (blocks + 12 * config.image_depth * width**2) / 1e6 == pytest.approx(
                float(name[:-2]), rel=0.25
            )


def run(what: str, output: Path) -> tuple[list[dict[str, Any]], str]:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "benchmark.py"), what, "--quick", "--device=cpu", "--output", str(output)],
        capture_output=True, text=True, timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MUJOCO_GL": "egl"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [path] = output.glob(f"benchmark_{what}_*.json")
    return json.loads(path.read_text())["rows"], done.stdout


@pytest.mark.slow
def test_training_is_measured_beside_lerobots_loop(tmp_path: Path) -> None:
    rows, printed = run("training", tmp_path)
    loops = {row["name"]: row for row in rows if "utilisation" in row}
    peers = {name for name in loops if name.startswith("LeRobot's loop")}
    assert len(peers) == 2
    assert any(name.startswith("ours") for name in loops)
    for row in loops.values():
        assert row["peer"] in peers
        assert row["items_per_s"] == pytest.approx(1000 * row["params"]["batch"] / row["p50_ms"])
        assert 0 < row["utilisation"] < 1.5
        assert row["name"] in printed
    [built] = [row for row in rows if row["name"] == "building the store"]
    assert built["params"]["frames"] == 200


@pytest.mark.slow
def test_growth_is_measured(tmp_path: Path) -> None:
    rows, printed = run("scaling", tmp_path)
    assert {row["name"] for row in rows} == {"training", "evaluation", "store", "on paper"}
    for row in rows:
        if row["name"] != "on paper":
            assert row["bound"]
            assert row["evidence"] in printed
