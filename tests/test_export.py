"""Exported folders: what is refused, what they are loaded by, and that they need no torch.

Equality with the checkpoint is in test_export_parity.py: tracing a network takes half a minute.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_export import TASKS, A, H, chunk_without_torch, hand_made, observe, trained

from vla.checks import ConfigError
from vla.export import export as making
from vla.export import formats
from vla.export.export import ExportError, export
from vla.export.formats import bf16_bits
from vla.export.load import load_policy
from vla.export.onnx_policy import OnnxPolicy
from vla.manifest import CheckpointError, read_manifest, seal
from vla.policy import Policy


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("export") / "run")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hand_made(tmp_path_factory.mktemp("made") / "onnx")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "onnx"))


@pytest.fixture(scope="module")
def policies(folder: Path, source: Path) -> tuple[OnnxPolicy, Policy]:
    return OnnxPolicy.load(folder, threads=1), Policy.load(source, "cpu")  # the toy job says fp32


@pytest.mark.parametrize(
    "name", ["config.yaml", "policy.onnx", "text.onnx", "tokenizer.json", "manifest.json"]
)
def test_a_flipped_bit_is_refused(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(
        CheckpointError, match=rf"export onnx: {name} is damaged. got: .*expected: .*remedy: "
    ):
        load_policy(copy)


def test_a_missing_file_and_a_wrong_version_are_refused(copy: Path, tmp_path: Path) -> None:
    manifest = read_manifest(copy)
    seal(copy, manifest | {"version": 99})
    with pytest.raises(CheckpointError, match="another version. got: 99. expected: 1. remedy: "):
        load_policy(copy)
    (copy / "text.onnx").unlink()
    with pytest.raises(CheckpointError, match="text.onnx is damaged. got: no such file"):
        load_policy(copy)
    with pytest.raises(CheckpointError, match="expected a folder with policy.onnx.*remedy: "):
        OnnxPolicy.load(tmp_path / "nowhere")


def wrong(**parts: Any) -> dict[str, Any]:
    return observe() | parts


@pytest.mark.parametrize(
    "asked",
    [
        wrong(images={}),
        wrong(images={"wrist": observe()["images"]["front"]}),
        wrong(images={"front": observe()["images"]["front"].astype(np.float32)}),
        wrong(images={"front": observe()["images"]["front"][:, 0]}),
        wrong(images={"front": observe()["images"]["front"].transpose(0, 1, 4, 2, 3)}),
        wrong(state=observe()["state"][:, :, :1]),
        wrong(state=np.full_like(observe()["state"], np.nan)),
        wrong(tasks=TASKS[:2]),
        wrong(tasks=[1, 2, 3]),
        wrong(prefix=np.zeros((3, H, A))),
        wrong(prefix=np.zeros((3, H, A)), prefix_length=np.array([0, 1, 3])),
        wrong(prefix=np.full((3, H, A), np.inf), prefix_length=np.array([0, 1, 0])),
    ],
)
def test_what_does_not_fit_is_refused_in_the_same_words(
    policies: tuple[OnnxPolicy, Policy], asked: dict[str, Any]
) -> None:
    messages = []
    for policy in policies:
        with pytest.raises(ValueError, match="got: .*expected: .*remedy: ") as error:
            policy.predict_chunk(**asked)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_images_of_another_size_are_refused(policies: tuple[OnnxPolicy, Policy]) -> None:
    asked = wrong(images={"front": observe()["images"]["front"][:, :, :16]})
    assert policies[1].predict_chunk(**asked).shape == (3, H, A)  # a checkpoint resizes
    with pytest.raises(
        ValueError, match=r"height and width of camera front. got: \(16, 32\). expected: \(32, 32\)"
    ):
        policies[0].predict_chunk(**asked)


def test_an_export_runs_without_torch(folder: Path, tmp_path: Path) -> None:
    chunk = chunk_without_torch(folder, observe(2), tmp_path)
    np.testing.assert_array_equal(chunk, np.full((2, H, A), 0.25, np.float32))  # hand made: the prefix


def test_checkpoints_load_through_the_same_door(source: Path, folder: Path) -> None:
    assert isinstance(load_policy(source.parent.parent, "cpu"), Policy)
    assert isinstance(load_policy(folder), OnnxPolicy)


@pytest.mark.parametrize("worst", [2e-3, np.nan])
def test_an_export_that_is_not_equal_is_refused(
    monkeypatch: pytest.MonkeyPatch, source: Path, folder: Path, tmp_path: Path, worst: float
) -> None:
    def write(policy: Policy, format: str, partial: Path) -> None:
        for name in ("policy.onnx", "text.onnx", "tokenizer.json"):
            shutil.copy2(folder / name, partial)

    monkeypatch.setattr(making, "write", write)
    monkeypatch.setattr(making, "parity", lambda *_: {"max_of_range": worst})
    with pytest.raises(
        ExportError, match="not its checkpoint's equal. got: .*expected: at most 1e-03.*remedy: "
    ):
        export(source, "onnx", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert (
        export(source, "onnx-int8", tmp_path / "out")["format"] == "onnx-int8"
    )  # says so, is not held to it
    with pytest.raises(ExportError):  # an earlier export stays when the new one fails
        export(source, "onnx", tmp_path / "out")
    assert read_manifest(tmp_path / "out")["format"] == "onnx-int8"


def test_what_cannot_be_exported_is_explained(
    monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="--format: got 'gguf', expected one of onnx, onnx-bf16"):
        export(source, "gguf", tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(ExportError, match="with other files in it, expected a new folder.*remedy: "):
        export(source, "onnx", tmp_path / "mine")

    def fails(*_: Any) -> None:
        raise RuntimeError("data-dependent shape")

    monkeypatch.setattr(making, "trace_policy", fails)
    with pytest.raises(
        ExportError, match=r"the policy cannot be exported. got: RuntimeError \(data-dep.*remedy: "
    ):
        export(source, "onnx", tmp_path / "out")
    monkeypatch.setattr(formats.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"got no g\+\+ .*expected a C\+\+ compiler.*remedy: "):
        export(source, "aoti", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_bf16_is_the_nearest(x: float) -> None:
    import torch

    want = torch.tensor([x]).bfloat16().view(torch.uint16).numpy()
    assert bf16_bits(np.array([x], np.float32)).tolist() == want.tolist()


def test_onnx_runtime_still_cannot_multiply_in_bf16() -> None:
    """The reason why onnx-bf16 computes in float32; when this fails, it need not."""
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(name, TensorProto.BFLOAT16, [2, 2]) for name in "abc"]
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "g", ends[:2], ends[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
