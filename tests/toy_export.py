"""Exported folders for the tests: helpers around toy checkpoints, and a folder without a network in it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer
from toy_run import text_folder, toy_job, toy_model, toy_store

from vla.data.frames import Episode, FrameStore
from vla.manifest import seal
from vla.training.loop import train

ROOT = Path(__file__).resolve().parents[1]
H, A = 4, 2
TASKS = ["reach red", "go to the blue target now please and then reach the green one", "reach red"]


def two_cameras() -> FrameStore:
    """The toy's demonstrations with a second camera of another size."""
    store = toy_store()
    n = 12
    images = {"front": store.images["front"][:n], "wrist": 255 - store.images["front"][:n, :24, 8:]}
    return FrameStore.of_episodes([Episode(images, store.state[:n], store.action[:n], TASKS[0])], fps=10)


def trained(folder: Path, store: FrameStore | None = None, **model: Any) -> Path:
    """A checkpoint after one step."""
    return train(toy_job(folder, toy_model(**model), steps=1), store or toy_store())


def observe(n: int = 3, steps: int = 1, store: FrameStore | None = None) -> dict[str, Any]:
    store = store or toy_store()
    index = np.arange(n)[:, None] * 3 + np.arange(steps)
    return {
        "images": {name: frames[index] for name, frames in store.images.items()},
        "state": store.state[index],
        "tasks": TASKS[:n],
    }


def span() -> np.ndarray:
    return toy_store().action.max(0) - toy_store().action.min(0)


def hand_made(folder: Path) -> Path:
    """A folder as scripts/export.py writes it, for the toy's features, in a hundredth of the time.

    Its text encoder is a table of vectors; its policy answers with the prefix, whatever it sees.
    """
    folder.mkdir(parents=True)
    Tokenizer.from_file(f"{text_folder()}/tokenizer.json").save(str(folder / "tokenizer.json"))
    table = numpy_helper.from_array(
        np.random.default_rng(0).normal(size=(99, 16)).astype(np.float32), "table"
    )
    text = {"ids": (TensorProto.INT64, [1, "L"]), "pad": (TensorProto.BOOL, [1, "L"])}
    node = helper.make_node("Gather", ["table", "ids"], ["features"])
    save(folder / "text.onnx", node, text, {"features": [1, "L", 16]}, [table])
    policy = {
        "images.front": (TensorProto.UINT8, ["B", 1, 32, 32, 3]), "state": (TensorProto.FLOAT, ["B", 1, 2]),
        "text": (TensorProto.FLOAT, ["B", "L", 16]), "text_pad": (TensorProto.BOOL, ["B", "L"]),
        "prefix": (TensorProto.FLOAT, ["B", H, A]), "prefix_length": (TensorProto.INT64, ["B"]),
    }  # fmt: skip
    save(
        folder / "policy.onnx",
        helper.make_node("Identity", ["prefix"], ["chunk"]),
        policy,
        {"chunk": ["B", H, A]},
    )
    (folder / "config.yaml").write_text("seed: 0\n")
    features = {"cameras": {"front": [32, 32]}, "state_dim": 2, "action_dim": A, "fps": 10}
    sizes = {"chunk_size": H, "n_obs_steps": 1, "max_prefix": 2, "may_miss": 0}
    words = {"width": 16, "max_tokens": 32, "multiple": 8, "pad": 0, "end": 0}
    seal(folder, {"version": 1, "format": "onnx", "inputs": {"features": features, "text": words, **sizes}})
    return folder


def chunk_without_torch(folder: Path, asked: dict[str, Any], scratch: Path) -> np.ndarray:
    """What a fresh process predicts for `asked`; it must not have imported any of what training needs."""
    np.savez(scratch / "asked.npz", state=asked["state"], **asked["images"])
    program = f"""
import sys
import numpy as np
from vla.export.load import load_policy
policy, asked = load_policy({str(folder)!r}, threads=1), np.load({str(scratch / "asked.npz")!r})
images = {{name: asked[name] for name in policy.features.cameras}}
prefix = np.full(({len(asked["tasks"])}, policy.chunk_size, policy.features.action_dim), 0.25)
length = np.ones(len(prefix), int)
chunk = policy.predict_chunk(images, asked["state"], {asked["tasks"]!r}, prefix, length)
np.save({str(scratch / "chunk.npy")!r}, chunk)
print(sorted({{"torch", "timm", "transformers", "lerobot", "onnx"}} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
    return np.load(scratch / "chunk.npy")


def save(path: Path, node: Any, inputs: dict[str, Any], outputs: dict[str, Any], weights: Any = ()) -> None:
    """A graph of one node."""
    ins = [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()]
    outs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()]
    graph = helper.make_graph([node], "toy", ins, outs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
