"""The benchmark of inference: that the peer is the same network, and that every row says what it is."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from load_script import SCRIPTS
from torch import nn


@pytest.fixture
def inference(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from benchmarks import inference

    return inference


def copy_weights(ours: Any, theirs: Any) -> None:
    """Of one attention module of ours into torch.nn's."""
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key_value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key_value.bias]))
        theirs.out_proj.load_state_dict(ours.out.state_dict())


def test_the_peer_is_the_same_network(inference: ModuleType) -> None:
    paths = sys.modules["benchmarks.inference_paths"]
    ours, theirs = paths.network("quick"), paths.torch_network("quick")
    assert paths.parameters(ours) == paths.parameters(theirs) < sum(p.numel() for p in ours.parameters())
    for mine, peer in zip(ours.encoder.layers, theirs.encoder.layers.layers, strict=True):
        copy_weights(mine.attention, peer.self_attn)
        copy_rest(mine, peer, ("around_attention", "around_feed_forward"))
    for mine, peer in zip(ours.decoder.layers, theirs.decoder.layers.layers, strict=True):
        copy_weights(mine.attention, peer.self_attn)
        copy_weights(mine.cross_attention, peer.multihead_attn)
        copy_rest(mine, peer, ("around_attention", "around_cross_attention", "around_feed_forward"))
    for part in ("encoder", "decoder"):
        getattr(theirs, part).layers.norm.load_state_dict(getattr(ours, part).norm.state_dict())
    chunks = [paths.call(paths.policy(m, "cpu", "fp32", "eager"), "quick")() for m in (ours, theirs)]
    np.testing.assert_allclose(*chunks, atol=1e-5)


def copy_rest(mine: Any, peer: Any, norms: tuple[str, ...]) -> None:
    """Feed-forward and norms of a layer."""
    peer.linear1.load_state_dict(mine.feed_forward.up.state_dict())
    peer.linear2.load_state_dict(mine.feed_forward.out.state_dict())
    for number, name in enumerate(norms, 1):
        norm: nn.Module = getattr(mine, name).norm
        getattr(peer, f"norm{number}").load_state_dict(norm.state_dict())


def test_every_row_says_what_it_is(
    inference: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from benchmarks.common import Options

    monkeypatch.setattr(inference, "FORMATS", ())
    monkeypatch.setattr(inference, "without", lambda *_: True)
    rows = inference.run(Options(True, "cpu", tmp_path, True))
    by_name = {row["name"]: row for row in rows}
    stepwise = "ours, autoregressive with cache, eager"
    assert sorted(by_name) == sorted(["ours, eager fp32", "ours, eager", stepwise, "torch.nn.Transformer"])
    for row in rows:
        assert row["params"]["parameters"] > 1e5
        assert (row["params"]["pixels"], row["params"]["batch"], row["n"]) == (32, 1, 2)
    peers = {name: row.get("peer") for name, row in by_name.items()}
    assert peers == {
        "ours, eager fp32": "torch.nn.Transformer",
        "ours, eager": "torch.nn.Transformer",
        stepwise: "ours, eager",
        "torch.nn.Transformer": None,
    }
    table = inference.table(rows).splitlines()
    assert len(table) == 2 + len(rows)
    assert "× torch.nn.Transformer" in table[2]


@pytest.mark.slow
def test_exports_are_measured_too(inference: ModuleType, tmp_path: Path) -> None:
    from benchmarks.common import Options

    rows = inference.run(Options(True, "cpu", tmp_path, False))
    assert {"ours, onnx", "ours, onnx-bf16", "ours, onnx-int8"} < {row["name"] for row in rows}


def test_a_start_is_two_rows_of_fresh_processes(
    inference: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def fresh(function: Any, *arguments: Any) -> tuple[float, dict[str, float]]:
        asked.append((function, arguments))
        return 3.0 / len(asked), {"load": 1.0, "warm_up": 1.0 / len(asked)}

    monkeypatch.setattr(inference, "in_fresh_process", fresh)
    rows = inference.starts("quick", "cpu", tmp_path)
    assert [row["p50_ms"] for row in rows] == [3000.0, 1500.0]
    assert asked[0] == asked[1]  # the same cache, empty and then filled
    assert asked[0][0] is inference.start_seconds
    assert (tmp_path / "run").is_dir()
