"""The formats: from traced programs to files.

    onnx        float32, run by ONNX Runtime
    onnx-bf16   its weights stored in bfloat16, half the size; computed in float32
    onnx-int8   the policy's matrix products in 8 bits (weights per channel, activations by their range)
    aoti        the policy as machine code of this kind of processor, run by torch; the package keeps
                the compiler's paths of the machine that built it

Computing in bfloat16 is out of reach on ONNX Runtime's CPU provider: 1.31 has no MatMul, Add or
Softmax for it ("NOT_IMPLEMENTED"; a test watches for the day it has). The text encoder stays float32 in
onnx-int8: it runs once per instruction, so nothing is gained there but error.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.export import ExportedProgram

POLICY, TEXT, PACKAGE = "policy.onnx", "text.onnx", "policy.pt2"
WEIGHTED = {"MatMul": 1, "Gemm": 1, "Conv": 1, "Gather": 0}  # which input holds the weights


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the exporters' remarks, which say nothing about the user's network."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def write_onnx(program: ExportedProgram, path: Path, inputs: list[str], output: str) -> None:
    """A traced program as ONNX, its weights within up to 2 GB, beside it above."""
    with quietly():
        made = torch.onnx.export(
            program, dynamo=True, input_names=inputs, output_names=[output], verbose=False
        )
    assert made is not None
    for node in made.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces with the paths of this machine, a sixth of a small policy's size
        for value in node.outputs:
            value.metadata_props.clear()
    made.model.graph.metadata_props.clear()
    made.model.metadata_props.clear()
    made.save(path)


def store_bf16(path: Path) -> None:
    """Round the weights of matrix products, convolutions and embeddings to bfloat16, in place.

    Statistics, limits and biases stay float32: they carry the robot's units. A cast behind each weight
    is folded when a session begins, so that speed is that of float32.
    """
    model = onnx.load(path)
    graph = model.graph
    found = {n.input[i] for n in graph.node if (i := WEIGHTED.get(n.op_type)) is not None}
    casts = []
    for weight in graph.initializer:
        if weight.name in found and weight.data_type == TensorProto.FLOAT and len(weight.dims) > 1:
            name, bits = weight.name, bf16_bits(numpy_helper.to_array(weight))
            stored = helper.make_tensor(
                name + ".bf16", TensorProto.BFLOAT16, list(weight.dims), bits.tobytes(), raw=True
            )
            weight.CopyFrom(stored)
            casts.append(helper.make_node("Cast", [stored.name], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, path)


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """float32 -> the upper halves of its bits, rounded to the nearest, to even at a tie; uint16."""
    bits = np.ascontiguousarray(x, "<f4").view("<u4")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def quantise_int8(path: Path) -> None:
    """Weights of matrix products in 8 bits, their activations quantised as they come, in place."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(path)
    del model.graph.value_info[
        :
    ]  # torch's exporter leaves shapes of folded transposes, which the quantiser refuses
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, quietly():
        made = Path(folder) / path.name
        quantize_dynamic(
            model,
            made,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
        )
        made.replace(path)


def require_compiler() -> None:
    """Raise ValueError without the C++ compiler that AOTInductor calls."""
    if shutil.which("g++") is None:
        raise ValueError(
            "export: got no g++ on the PATH, expected a C++ compiler for --format=aoti. "
            "remedy: install one (apt-get install g++), or take --format=onnx, which needs none."
        )


def compile_aoti(program: ExportedProgram, path: Path) -> None:
    """Machine code by AOTInductor, with as many threads as torch has when it runs, not when it is built."""
    with quietly(), torch.no_grad():
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs={"cpp.dynamic_threads": True}
        )


def keep(path: Path) -> None:
    """The graph as it is."""


# What is done to policy.onnx and to text.onnx after they were written.
FORMATS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    "onnx": (keep, keep),
    "onnx-bf16": (store_bf16, store_bf16),
    "onnx-int8": (quantise_int8, keep),
    "aoti": (keep, keep),
}
