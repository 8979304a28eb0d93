"""One layer of self-attention, projections included, of every kind the encoder offers and of the written formula.

Forward, and forward with backward, at growing sequence lengths: time, and peak memory in a fresh process.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.common import Options, Row, in_fresh_process, markdown, peak_memory_mb, row, take_turns

if TYPE_CHECKING:
    from torch import Tensor, nn

D_MODEL, N_HEADS = 256, 8
PEER = "full"
NAMES = {"formula": "formula", "full": "full (fused kernel)", "window": "window", "linformer": "linformer",
         "lsh": "lsh"}  # fmt: skip
PASSES = {"forward": "forward", "both": "forward + backward"}


def run(options: Options) -> list[Row]:
    """A row for every kind, length and pass."""
    lengths = (64,) if options.quick else (512, 1024, 2048, 4096, 8192)
    in_fresh_process(memory_mb, PEER, 64, "forward", options.device)  # fails now or not at all
    rows = []
    for length in lengths:
        kinds = {kind: passes(kind, length, options.device) for kind in NAMES}
        for way in PASSES:
            rounds, warm = (1, 1) if options.quick else (7, 1)
            times = take_turns({kind: kinds[kind][way] for kind in NAMES}, rounds, warm)
            rows += [
                row(kind, params(kind, length, way), samples, peer=PEER, peer_ms=times[PEER])
                for kind, samples in times.items()
            ]
    for measured in rows:
        place = (measured["name"], measured["params"]["S"], measured["params"]["pass"], options.device)
        peaks = [in_fresh_process(memory_mb, *place) for _ in range(1 if options.quick else 3)]
        measured |= {"peak_memory_mb": statistics.median(peaks), "samples_memory_mb": peaks}
    return rows


def layer(kind: str, length: int) -> nn.Module:
    """The layer of this kind; `formula` writes out what `full` leaves to torch's fused kernel."""
    import torch

    from vla.architecture import AttentionConfig
    from vla.model.long_attention import ATTENTIONS, FullAttention

    class Formula(FullAttention):
        """softmax(Q Kᵀ / √d) V with the (S, S) matrices in memory."""

        def attend(self, q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None, causal: bool) -> Tensor:
            return (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1) @ v

    torch.manual_seed(0)
    config = AttentionConfig("full" if kind == "formula" else kind)
    return ({"formula": Formula} | ATTENTIONS)[kind](D_MODEL, N_HEADS, 0.0, config, length)


def params(kind: str, length: int, way: str) -> dict[str, Any]:
    """What a reader needs to repeat the measurement."""
    from vla.architecture import AttentionConfig

    config = AttentionConfig()
    used = {"window": ("window",), "linformer": ("rank",), "lsh": ("chunk", "hashes")}.get(kind, ())
    sizes = {"pass": way, "S": length, "batch": 1, "d_model": D_MODEL, "n_heads": N_HEADS, "dtype": "float32"}
    return sizes | {name: getattr(config, name) for name in used}


def passes(kind: str, length: int, device: str) -> dict[str, Callable[[], None]]:
    """What is measured: the layer called without gradients, and called and differentiated."""
    import torch

    module = layer(kind, length).to(device)
    x = torch.randn(1, length, D_MODEL, device=device, requires_grad=True)

    @torch.no_grad()
    def forward() -> None:
        module(x, x)

    def both() -> None:
        module(x, x).sum().backward()

    return {"forward": forward, "both": both}


def memory_mb(kind: str, length: int, way: str, device: str) -> float:
    """Peak memory of a pass above what the process held before, in MB."""
    passes(kind, 64, device)[way]()  # the libraries load and start their threads
    return peak_memory_mb(passes(kind, length, device)[way], device)


def table(rows: list[Row]) -> str:
    """Times (ratio to the fused kernel) and memory, a line for each length and pass."""
    cells = {(r["name"], r["params"]["pass"], r["params"]["S"]): r for r in rows}
    lengths = sorted({length for _, _, length in cells})
    lines = []
    for show in (
        lambda r: f"{r['p50_ms']:.1f} ms ({r['ratio_to_peer']:.2f}×)",
        lambda r: f"{r['peak_memory_mb']:.0f} MB",
    ):
        for way, title in PASSES.items():
            for length in lengths:
                lines.append([str(length), title, *(show(cells[kind, way, length]) for kind in NAMES)])
    return markdown(["S", "pass", *NAMES.values()], lines)
