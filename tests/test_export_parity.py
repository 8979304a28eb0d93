"""Exported folders equal their checkpoints: every network, every format, by the scripts too."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_export import TASKS, A, H, chunk_without_torch, observe, span, trained, two_cameras
from toy_run import toy_store

from vla.checks import ConfigError
from vla.export import formats
from vla.export.export import export
from vla.export.load import load_policy
from vla.export.onnx_policy import OnnxPolicy
from vla.export.parity import parity
from vla.manifest import CheckpointError, read_manifest, seal
from vla.policy import Policy
from vla.training import checkpoint

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("export") / "run")


@pytest.fixture(scope="module")
def folder(source: Path) -> Path:
    made = source.parent.parent / "exports" / "onnx"
    made.parent.mkdir()
    export(source, "onnx", made)
    return made


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "onnx"))


@pytest.fixture(scope="module")
def policies(folder: Path, source: Path) -> tuple[OnnxPolicy, Policy]:
    return OnnxPolicy.load(folder, threads=1), Policy.load(source, "cpu")  # the toy job says fp32


def assert_equal(got: OnnxPolicy, want: Policy, **asked: Any) -> np.ndarray:
    chunk = got.predict_chunk(**asked)
    assert chunk.dtype == np.float32
    assert (np.abs(chunk - want.predict_chunk(**asked)) / span()).max() < 1e-4
    return chunk


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("committed", [0, 1, 2])
def test_an_export_equals_its_checkpoint(
    policies: tuple[OnnxPolicy, Policy], batch: int, committed: int
) -> None:
    asked = observe(batch)
    free = assert_equal(*policies, **asked)
    prefix = np.random.default_rng(0).uniform(-3, 3, (batch, H, A)).astype(np.float32)
    prefix[:, committed:] = np.nan  # nobody reads them
    chunk = assert_equal(*policies, **asked, prefix=prefix, prefix_length=np.full(batch, committed))
    np.testing.assert_array_equal(chunk[:, :committed], prefix[:, :committed])  # beyond the limits too
    assert np.allclose(chunk[:, committed:], free[:, committed:]) == (committed == 0)
    assert (chunk[:, committed:] >= toy_store().action.min(0)).all()
    assert (chunk[:, committed:] <= toy_store().action.max(0)).all()


def test_each_robot_has_its_own_words_and_prefix(policies: tuple[OnnxPolicy, Policy]) -> None:
    asked, exported = observe(), policies[0]
    prefix = np.random.default_rng(1).uniform(-1, 1, (3, H, A))  # float64 is taken
    length = np.array([2, 0, 1])
    together = assert_equal(*policies, **asked, prefix=prefix, prefix_length=length)
    other = exported.predict_chunk(
        asked["images"], asked["state"], ["reach green", *TASKS[1:]], prefix, length
    )
    assert not np.allclose(other[0], together[0])
    np.testing.assert_allclose(other[1:], together[1:], atol=1e-6)


def test_features_are_those_of_the_text_cache(policies: tuple[OnnxPolicy, Policy]) -> None:
    exported, policy = policies
    texts = ["", "reach red", TASKS[1], "unknown words"]
    x, pad = exported.text(texts)
    want = policy.text(texts)
    np.testing.assert_array_equal(pad, want.pad.numpy())
    np.testing.assert_allclose(x, want.x.numpy(), atol=1e-5)
    assert x.shape[1] == 16  # a multiple of 8, of the longest
    asked, before = observe(), dict(exported.text.features)
    exported.predict_chunk(**asked)
    assert all(exported.text.features[text] is x for text, x in before.items())
    with pytest.raises(ConfigError) as mine:
        exported.text(["reach " * 40])
    with pytest.raises(ConfigError) as theirs:
        policy.text(["reach " * 40])
    assert str(mine.value) == str(theirs.value)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30))
def test_any_words_become_the_same_tokens(text: str) -> None:
    exported, policy = loaded()
    tokens = policy.model.text.tokenize([text])
    assert exported.text.tokenize(text) == tokens.x[0, ~tokens.pad[0]].tolist()


_loaded: list[tuple[OnnxPolicy, Policy]] = []


@pytest.fixture(autouse=True)
def _remember(policies: tuple[OnnxPolicy, Policy]) -> None:
    _loaded[:] = [policies]


def loaded() -> tuple[OnnxPolicy, Policy]:
    """The policies for hypothesis, which takes no fixtures of a function."""
    return _loaded[0]


def test_what_an_export_says_of_itself(policies: tuple[OnnxPolicy, Policy], folder: Path) -> None:
    exported, policy = policies
    for name in ("features", "chunk_size", "n_obs_steps", "max_prefix", "inputs"):
        if name != "inputs":
            assert getattr(exported, name) == getattr(policy, name)
    assert exported.inputs == dataclasses.replace(policy.inputs, fixed_size=True)
    assert exported.model_sha256 == hashlib.sha256((folder / "policy.onnx").read_bytes()).hexdigest()
    manifest = exported.manifest
    assert manifest["format"] == "onnx"
    assert manifest["source"]["weights_sha256"] == policy.model_sha256
    assert 0 <= manifest["parity"]["max_of_range"] <= 1e-4
    assert manifest["parity"]["observations"] >= 32
    assert {p.name for p in folder.iterdir()} == {*manifest["sha256"], "manifest.json"}
    for name in ("policy.onnx", "text.onnx"):  # nothing of the machine that made it
        assert str(ROOT).encode() not in (folder / name).read_bytes()
    names = [graph_input.name for graph_input in exported.session.get_inputs()]
    assert names == manifest["inputs"]["names"]
    assert checkpoint.load_job(folder).model == policy.job.model


def test_parity_notices_other_weights_and_nan(policies: tuple[OnnxPolicy, Policy], source: Path) -> None:
    exported, policy = policies
    statistics = checkpoint.load_model(source)[2]

    class Changed:
        def __init__(self, value: float) -> None:
            self.value = value

        def predict_chunk(self, *asked: Any) -> np.ndarray:
            chunk = policy.predict_chunk(*asked)
            chunk[:, -1, 0] += self.value
            return chunk

    assert parity(exported, policy, statistics)["max_of_range"] < 1e-4
    assert parity(exported, Changed(0.1 * span()[0]), statistics)["max_of_range"] == pytest.approx(
        0.1, abs=1e-3
    )
    assert np.isnan(parity(exported, Changed(np.nan), statistics)["max_of_range"])


def test_bf16_halves_the_weights(folder: Path, source: Path, copy: Path) -> None:
    for name in ("policy.onnx", "text.onnx"):
        formats.store_bf16(copy / name)
    kinds = {w.data_type for w in onnx.load(copy / "policy.onnx").graph.initializer}
    assert onnx.TensorProto.BFLOAT16 in kinds
    seal(copy, read_manifest(copy) | {"format": "onnx-bf16"})
    found = parity(OnnxPolicy.load(copy), Policy.load(source, "cpu"), checkpoint.load_model(source)[2])
    assert 1e-6 < found["max_of_range"] < 0.05
    for name in ("policy.onnx", "text.onnx"):
        assert weights_bytes(copy / name) < 0.6 * weights_bytes(folder / name)


def weights_bytes(path: Path) -> int:
    return sum(len(w.raw_data) for w in onnx.load(path).graph.initializer)


def test_int8_is_close(source: Path, copy: Path) -> None:
    formats.quantise_int8(copy / "policy.onnx")
    kinds = {node.op_type for node in onnx.load(copy / "policy.onnx").graph.node}
    assert "MatMulInteger" in kinds
    seal(copy, read_manifest(copy) | {"format": "onnx-int8"})
    found = parity(OnnxPolicy.load(copy), Policy.load(source, "cpu"), checkpoint.load_model(source)[2])
    assert 1e-6 < found["max_of_range"] < 0.3
    assert found["mean_of_range"] < 0.03


def test_the_real_graph_runs_without_torch(
    policies: tuple[OnnxPolicy, Policy], folder: Path, tmp_path: Path
) -> None:
    asked, prefix = observe(2), np.full((2, H, A), 0.25)
    want = policies[1].predict_chunk(**asked, prefix=prefix, prefix_length=np.ones(2, int))
    np.testing.assert_allclose(chunk_without_torch(folder, asked, tmp_path), want, atol=1e-5)


@pytest.mark.parametrize(
    "model",
    [
        {"decoding": "autoregressive", "head": "gmm", "n_obs_steps": 2},
        {"head": "bins", "fusion": "cross"},
        {"head": "flow", "flow_steps": 2},
    ],
    ids=lambda model: "-".join(map(str, model.values())),
)
def test_other_networks(tmp_path: Path, model: dict[str, Any]) -> None:
    source = trained(tmp_path / "run", **model)
    export(source, "onnx", tmp_path / "onnx")
    exported, policy = OnnxPolicy.load(tmp_path / "onnx", 1), Policy.load(source, "cpu")
    for batch in (1, 3):
        asked = observe(batch, policy.n_obs_steps)
        assert_equal(exported, policy, **asked)
        prefix = np.random.default_rng(0).uniform(-1, 1, (batch, H, A)).astype(np.float32)
        for committed in range(policy.max_prefix + 1):
            length = np.full(batch, committed)
            chunk = assert_equal(exported, policy, **asked, prefix=prefix, prefix_length=length)
            np.testing.assert_array_equal(chunk[:, :committed], prefix[:, :committed])


def test_a_camera_may_be_missing_and_images_are_resized(tmp_path: Path) -> None:
    store = two_cameras()
    source = trained(tmp_path / "run", store, camera_dropout=0.3)
    export(source, "onnx", tmp_path / "onnx")
    exported, policy = OnnxPolicy.load(tmp_path / "onnx", 1), Policy.load(source, "cpu")
    asked = observe(3, store=store)
    both = exported.predict_chunk(**asked)
    np.testing.assert_allclose(both, policy.predict_chunk(**asked), atol=1e-5)
    for name in ("front", "wrist"):
        alone = asked | {"images": {name: asked["images"][name]}}
        chunk = exported.predict_chunk(**alone)
        np.testing.assert_allclose(chunk, policy.predict_chunk(**alone), atol=1e-5)
        assert not np.allclose(chunk, both, atol=1e-4)


def test_aoti_equals_its_checkpoint(source: Path, tmp_path: Path) -> None:
    """Without a compiler the script says so instead; with one, the package is as good as the network."""
    if shutil.which("g++") is None:
        with pytest.raises(ValueError, match=r"got no g\+\+ .*remedy: "):
            export(source, "aoti", tmp_path / "aoti")
        return
    export(source, "aoti", tmp_path / "aoti")
    exported, policy = load_policy(tmp_path / "aoti"), Policy.load(source, "cpu")
    assert type(exported).__name__ == "AotiPolicy"
    for batch in (1, 3):
        assert_equal(exported, policy, **observe(batch))  # type: ignore[arg-type]
    manifest = read_manifest(tmp_path / "aoti")
    seal(tmp_path / "aoti", manifest | {"cpu_capability": "ABACUS"})
    with pytest.raises(CheckpointError, match="another processor. got: .*expected: ABACUS.*remedy: "):
        load_policy(tmp_path / "aoti")


def test_an_export_is_made_and_evaluated_by_the_scripts(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "scripts/export.py", str(source), f"--output={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "parity:" in done.stdout
    options = ["--evaluate.episodes=2", "--evaluate.controls=false", "--evaluate.videos=0"]
    command = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), str(out), *options]
    done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "evaluation" / "evaluation.json").read_text())
    assert result["n_episodes"] == 2
    load_policy(out)  # what lies beside the sealed files does not matter
    (out / "policy.onnx").write_bytes(b"")
    done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert "policy.onnx is damaged" in done.stderr
    assert "Traceback" not in done.stderr
