"""The work of a training step, counted, and how fast this machine can do such work: its roofline.

Counted: floating-point operations of matrix products and convolutions, forward and backward (a multiplication
and an addition are two), attention as its two products (four backward), whatever kernel computes it; bytes that
all operators read and write when each goes through memory on its own; and the operators. Measured: a large
matrix product and a large copy.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import milliseconds
from vla.device import multiplies_in

# Dense bf16 matrix products by the data sheet, FLOP/s, by a part of the GPU's name.
DATA_SHEET = {"H200": 989e12, "H100": 989e12}


@dataclass(frozen=True)
class Work:
    """Of one call: floating-point operations, bytes moved, operators that compute."""

    flops: float
    bytes: float
    operators: int


@dataclass(frozen=True)
class Roofline:
    """What the machine reaches: FLOP/s of a large matrix product, bytes/s of a large copy."""

    flops_per_s: float
    bytes_per_s: float

    def estimates(self, work: Work) -> dict[str, float]:
        """Seconds that each alone would need for this work."""
        return {"memory": work.bytes / self.bytes_per_s, "arithmetic": work.flops / self.flops_per_s}


class Traffic(TorchDispatchMode):
    """Counts operators that are no views, and the bytes of their inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.operators = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        written = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        viewed = all(any(shares(x, y) for y in read) for x in written)
        if func._schema.is_mutable or not (viewed or func.__name__.startswith("empty")):
            self.operators += 1
            self.bytes += sum(map(touched, read)) + sum(map(touched, written))
        return out


def shares(x: Tensor, y: Tensor) -> bool:
    """Whether one is a view of the other."""
    return x.untyped_storage()._cdata == y.untyped_storage()._cdata


def touched(x: Tensor) -> int:
    """Bytes in memory: what is expanded lies there once."""
    return x.element_size() * min(x.numel(), x.untyped_storage().nbytes() // max(1, x.element_size()))


def flops_of(call: Callable[[], Any]) -> float:
    """Floating-point operations of matrix products and convolutions in a call, and in the backward it runs.

    Attention is computed as written meanwhile: the counter does not know the CPU's fused kernel, and of the
    GPU's it counts the forward products that their backward computes again.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def work_of(call: Callable[[], Any]) -> Work:
    """Calls it twice, eagerly."""
    flops = flops_of(call)
    with Traffic() as traffic:
        call()
    return Work(flops, float(traffic.bytes), traffic.operators)


def matmul(device: str, precision: str, side: int = 0) -> tuple[Callable[[], Tensor], float]:
    """A square matrix product, large enough to be bound by arithmetic alone, and its FLOPs."""
    side = side or (8192 if device.startswith("cuda") else 2048)
    kind = multiplies_in(torch.device(device), precision)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return (lambda: torch.mm(a, b, out=out)), 2.0 * side**3


def measure_roofline(device: str, precision: str, quick: bool = False) -> Roofline:
    """The best of several: what the machine can do, not what it does on average."""
    multiply, flops = matmul(device, precision, 256 if quick else 0)
    x = torch.zeros(2**16 if quick else 2**28 if device.startswith("cuda") else 2**25, device=device)
    y = torch.empty_like(x)

    def best(call: Callable[[], Any]) -> float:
        call()
        return min(milliseconds(call) for _ in range(2 if quick else 8)) / 1e3

    return Roofline(flops / best(multiply), 2.0 * x.nbytes / best(lambda: y.copy_(x)))


def bound(work: Work, roofline: Roofline, fixed: float, seconds: float) -> tuple[str, str]:
    """What would take the largest share of the measured seconds alone, and the evidence in words.

    fixed: seconds that a step costs whatever the batch.
    """
    needed = {"launch": fixed} | roofline.estimates(work)
    name = max(needed, key=lambda key: needed[key])
    evidence = (
        f"of {1e3 * seconds:.2f} ms: {work.operators:,} operators {1e3 * needed['launch']:.2f}, "
        f"{work.bytes / 1e6:,.0f} MB {1e3 * needed['memory']:.2f}, "
        f"{work.flops / 1e9:,.1f} GFLOP {1e3 * needed['arithmetic']:.2f}"
    )
    return name, evidence


def utilisation(flops: float, times: list[float], matmul_flops: float, matmul_times: list[float]) -> float:
    """FLOP/s as a share of those of the matrix product in the same round, at the median."""
    shares = [flops / own / (matmul_flops / peak) for own, peak in zip(times, matmul_times, strict=True)]
    return statistics.median(shares)


def data_sheet(device: str) -> float | None:
    """Dense bf16 FLOP/s of this GPU by its data sheet, where it is known."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else ""
    return next((peak for part, peak in DATA_SHEET.items() if part in name), None)
