"""Two processes on the CPU train as one does, under DDP and FSDP2, and continue each other's checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ranked import play
from safetensors.torch import load_file
from toy_run import text_folder

from vla.training import checkpoint

pytestmark = pytest.mark.slow

TESTS = Path(__file__).resolve().parent
LAUNCHERS = {"ddp": {}, "fsdp": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}}
# What each run departs from the toy job in.
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "parts": {"train": {"accumulate": 2}},
    "all flags": {"train": {"accumulate": 2, "compile": True}, "model": {"checkpointing": True}},
    "tuned": {"frozen": False, "model": {"checkpointing": True}},
}
LONG = {"train": {"steps": 60}}
NOISE = ("key_value.bias", "qkv.bias")  # biases of keys have no gradient but rounding, which Adam blows up


def port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def launch(*arguments: str, ranks: int = 2, **environment: str) -> subprocess.Popen[str]:
    """torchrun, in a session of its own, its output in pipes."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    command += [f"--master-port={port()}", *arguments]
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths} | environment
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True, cwd=TESTS.parent,
    )  # fmt: skip


def finished(process: subprocess.Popen[str], seconds: float = 300) -> str:
    """What a launcher that must succeed wrote to stderr."""
    try:
        _, errors = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors
    return errors


def dies(process: subprocess.Popen[str], seconds: float) -> str:
    """What a launcher that must fail, within this time, wrote to stderr; none of its processes may be left."""
    left = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    try:
        _, errors = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert psutil.wait_procs(left, timeout=5)[1] == [], errors
    return errors


def sober(folder: Path) -> str:
    """The toy's text encoder without dropout of its own."""
    shutil.copytree(text_folder(), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all runs: one/<run>, ddp/<run>, fsdp/<run>."""
    root = tmp_path_factory.mktemp("ranks")
    text = sober(root / "text")

    def run(where: str, name: str, **options: Any) -> dict[str, Any]:
        return {"output": str(root / where / name), "text": text, **options}

    for name, options in RUNS.items():
        play(run("one", name, **options | {"train": options.get("train", {}) | {"compile": False}}))
    for where, environment in LAUNCHERS.items():
        runs = [run(where, name, **options) for name, options in RUNS.items()]
        runs += [run(where, "taken over", after=str(root / "one" / "plain" / "step_00000010"))]
        loud = {"model": {"dropout": 0.1}}
        runs += [run(where, "loud", **loud)]
        runs += [run(where, "loud again", **loud, after=str(root / where / "loud" / "step_00000010"))]
        runs += [run(where, "long", **LONG)] if where == "ddp" else []
        finished(launch("tests/ranked.py", json.dumps(runs), **environment))
        play(run(where, "given back", after=str(root / where / "plain" / "step_00000010")))
    return root


def require_close(mine: Path, theirs: Path) -> None:
    """Losses, gradients and final weights agree up to rounding."""
    for a, b in zip(metrics_of(mine), metrics_of(theirs), strict=True):
        for name in ("loss", "grad_norm", "action_error"):
            assert a[name] == pytest.approx(b[name], rel=1e-5), (a["step"], name)
    for file in ("model.safetensors", "training.safetensors"):
        a, b = (load_file(checkpoint.find(run) / file) for run in (mine, theirs))
        assert {n: (t.shape, t.dtype) for n, t in a.items()} == {n: (t.shape, t.dtype) for n, t in b.items()}
        for name in a:
            if not name.endswith(NOISE) and name != "random.torch":
                torch.testing.assert_close(
                    a[name], b[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
                )


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]


def require_equal(mine: Path, theirs: Path) -> None:
    a, b = (load_file(checkpoint.find(run) / "training.safetensors") for run in (mine, theirs))
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("where", LAUNCHERS)
def test_two_ranks_train_as_one_process_does(played: Path, where: str, name: str) -> None:
    require_close(played / where / name, played / "one" / name)
    rows = metrics_of(played / where / name)
    assert [row["step"] for row in rows] == [*range(1, 21)]  # each once: rank 0 alone writes


@pytest.mark.parametrize("name", ["taken over", "given back"])
@pytest.mark.parametrize("where", LAUNCHERS)
def test_a_checkpoint_continues_on_any_number_of_ranks(played: Path, where: str, name: str) -> None:
    require_close(played / where / name, played / "one" / "plain")


@pytest.mark.parametrize("where", LAUNCHERS)
def test_a_resumed_run_draws_the_same_dropout_on_every_rank(played: Path, where: str) -> None:
    require_equal(played / where / "loud again", played / where / "loud")


def test_a_killed_rank_ends_the_job_and_it_resumes(played: Path, tmp_path: Path) -> None:
    run = {"output": str(tmp_path / "run"), "text": str(played / "text"), **LONG}
    process = launch("tests/ranked.py", json.dumps([run]))
    first = tmp_path / "run" / "checkpoints" / "step_00000010"
    while not first.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    [victim] = [p for p in psutil.Process(process.pid).children() if p.environ().get("RANK") == "1"]
    victim.kill()
    start = time.monotonic()
    errors = dies(process, 40)
    print(f"the job ended {time.monotonic() - start:.1f} s after its rank")
    assert "ranked: rank 0 of 2 cannot go on alone. got: " in errors
    assert "remedy: see in the launcher's report below which ended first, and how; resume." in errors
    assert "Signal 9 (SIGKILL)" in errors
    assert "rank      : 1" in errors
    finished(launch("tests/ranked.py", json.dumps([run | {"resume": True}])))
    require_equal(tmp_path / "run", played / "ddp" / "long")


def test_a_launcher_that_is_told_to_end_ends_its_ranks(tmp_path: Path) -> None:
    run = {"output": str(tmp_path / "run"), "text": text_folder(), "train": {"steps": 100_000}}
    process = launch("tests/ranked.py", json.dumps([run]))
    while not (tmp_path / "run" / "checkpoints" / "step_00000010").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.terminate()
    assert "ranked: rank 0 of 2 cannot go on alone. got: SIGTERM from the launcher" in dies(process, 40)


def test_an_error_of_all_ranks_is_told_once(tmp_path: Path) -> None:
    """Weights that are not finite, on both ranks at the same step."""
    train = {"lr": 1e30, "warmup_steps": 0, "grad_clip": 1e30}
    run = {"output": str(tmp_path / "run"), "text": text_folder(), "train": train}
    errors = dies(launch("tests/ranked.py", json.dumps([run])), 120)
    assert errors.count("ranked: got") == 1, errors


def test_a_batch_that_cannot_be_split_is_refused_first(tmp_path: Path) -> None:
    run = {
        "output": str(tmp_path / "run"),
        "text": text_folder(),
        "train": {"batch_size": 10, "accumulate": 5},
    }
    run["train"]["batch_size"] = 15
    errors = dies(launch("tests/ranked.py", json.dumps([run])), 120)
    assert errors.count("ranked: train.batch_size: got 15, expected a multiple of 10, 2 ranks times") == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_evaluation_is_spread_over_the_ranks(played: Path, tmp_path: Path) -> None:
    """The same episodes, rows, controls and films as of one process; slots are what each rank has."""
    path = checkpoint.find(played / "one" / "plain")
    results = []
    for ranks in (1, 2):
        output = tmp_path / str(ranks)
        options = [f"--output={output}", "--evaluate.episodes=8", "--evaluate.slots=4", "--evaluate.videos=4"]
        finished(launch("scripts/evaluate.py", str(path), *options, ranks=ranks))
        results.append(json.loads((output / "evaluation.json").read_text()))
        films = {film.name for film in (output / "videos").iterdir()}
        assert films == {Path(row["video"]).name for row in results[-1]["episodes"] if row["video"]}
        assert films
    one, two = results
    assert two["episodes"] == one["episodes"]
    assert two["time"]["env_steps"] == one["time"]["env_steps"]
    assert {row["control"] for row in one["episodes"]} == {"standard", "counterfactual", "shuffled", "blank"}
