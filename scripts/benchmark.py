"""Measure this machine: python scripts/benchmark.py attention|data [--quick]

attention: one layer of self-attention, projections included, of every kind the encoder offers and of
the written formula, forward and forward with backward, at growing sequence lengths. Takes ten
minutes on two cores and up to 12 GB.

data: training batches from the frame store and from LeRobot's reader, of images and videos; see
benchmark_data.py. Takes six minutes on two cores.

--quick checks in seconds that everything runs.

Prints a Markdown table and writes <output>/benchmark_<name>_<machine>.json with every sample taken.
The candidates take turns in every round, so that what else the machine does falls on all alike.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

Row = dict[str, Any]

# --- attention ---------------------------------------------------------------------------------

D_MODEL, N_HEADS = 256, 8
PEER = "full"
NAMES = {"formula": "formula", "full": "full (fused kernel)", "window": "window", "linformer": "linformer",
         "lsh": "lsh"}  # fmt: skip
PASSES = {"forward": "forward", "both": "forward + backward"}


def attention(quick: bool) -> tuple[list[Row], str]:
    """Time and peak memory of every kind of attention as the sequence grows."""
    lengths = (64,) if quick else (512, 1024, 2048, 4096, 8192)
    in_fresh_process(attention_memory, PEER, 64, "forward")  # fails now or not at all
    rows = []
    for length in lengths:
        kinds = {kind: attention_passes(kind, length) for kind in NAMES}
        for name in PASSES:
            times = take_turns({kind: passes[name] for kind, passes in kinds.items()}, 1 if quick else 7)
            for kind, samples in times.items():
                row = {"name": kind, "pass": name, "S": length, "params": attention_params(kind)}
                rows.append(row | timing(samples, times[PEER]) | {"peer": PEER})
    for row in rows:
        place = (row["name"], row["S"], row["pass"])
        peaks = [in_fresh_process(attention_memory, *place) for _ in range(1 if quick else 3)]
        row |= {"peak_memory_mb": statistics.median(peaks), "samples_memory_mb": peaks}
    return rows, attention_table(rows, lengths)


def attention_layer(kind: str, length: int) -> nn.Module:
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


def attention_params(kind: str) -> dict[str, Any]:
    """What a reader needs to repeat the measurement."""
    from vla.architecture import AttentionConfig

    config = AttentionConfig()
    used = {"window": ("window",), "linformer": ("rank",), "lsh": ("chunk", "hashes")}.get(kind, ())
    sizes = {"batch": 1, "d_model": D_MODEL, "n_heads": N_HEADS, "dtype": "float32"}
    return sizes | {name: getattr(config, name) for name in used}


def attention_passes(kind: str, length: int) -> dict[str, Callable[[], None]]:
    """What is measured: the layer called without gradients, and called and differentiated."""
    import torch

    from vla.device import resolve_device

    device = resolve_device("auto")
    layer = attention_layer(kind, length).to(device)
    x = torch.randn(1, length, D_MODEL, device=device, requires_grad=True)

    @torch.no_grad()
    def forward() -> None:
        layer(x, x)

    def both() -> None:
        layer(x, x).sum().backward()

    return {"forward": forward, "both": both}


def attention_memory(kind: str, length: int, name: str) -> float:
    """Peak memory of a pass above what the process held before, in MB."""
    attention_passes(kind, 64)[name]()  # the libraries load and start their threads
    return peak_memory_mb(attention_passes(kind, length)[name])


def attention_table(rows: list[Row], lengths: tuple[int, ...]) -> str:
    """Times (ratio to the fused kernel) and memory, a line for each length and pass."""
    cells = {(row["name"], row["pass"], row["S"]): row for row in rows}
    lines = ["| S | pass | " + " | ".join(NAMES.values()) + " |", "|---|---|" + "---|" * len(NAMES)]
    for name, title in PASSES.items():
        for length in lengths:
            found = [cells[kind, name, length] for kind in NAMES]
            times = [f"{1000 * row['median_s']:.1f} ms ({row['ratio_to_peer']:.2f}×)" for row in found]
            lines.append(f"| {length} | {title} | " + " | ".join(times) + " |")
    for name, title in PASSES.items():
        for length in lengths:
            memory = [f"{cells[kind, name, length]['peak_memory_mb']:.0f} MB" for kind in NAMES]
            lines.append(f"| {length} | {title} | " + " | ".join(memory) + " |")
    return "\n".join(lines)


# --- measuring ---------------------------------------------------------------------------------


def take_turns(candidates: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every candidate in every round, after one call each that does not count."""
    names = list(candidates)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        shift = turn % len(names)  # nobody always follows the same one
        for name in names[shift:] + names[:shift]:
            synchronise()
            start = time.perf_counter()
            candidates[name]()
            synchronise()
            if turn > 0:
                times[name].append(time.perf_counter() - start)
    return times


def timing(samples: list[float], peer: list[float]) -> Row:
    """Median, 10th and 90th percentile in seconds, and the median ratio to the peer in the same round."""
    tenths = statistics.quantiles(samples, n=10, method="inclusive") if len(samples) > 1 else samples * 9
    ratios = [own / other for own, other in zip(samples, peer, strict=True)]
    return {
        "median_s": statistics.median(samples),
        "p10_s": tenths[0],
        "p90_s": tenths[-1],
        "ratio_to_peer": statistics.median(ratios),
        "samples_s": samples,
    }


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result, from a process that has done nothing else."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_memory_mb(run: Callable[[], None]) -> float:
    """Most memory a call holds at once above what the process held before: on the GPU, else resident."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        synchronise()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    before = resident("VmRSS")
    run()
    return (resident("VmHWM") - before) / 1e6


def resident(entry: str) -> int:
    """VmRSS (now) or VmHWM (at most so far) of this process in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(rf"^{entry}:\s+(\d+) kB$", status, re.MULTILINE)[0])


# --- what there is to measure ------------------------------------------------------------------


def data(quick: bool) -> tuple[list[Row], str]:
    """Batches from the frame store against LeRobot's reader."""
    import benchmark_data

    return benchmark_data.data(quick)


BENCHMARKS: dict[str, Callable[[bool], tuple[list[Row], str]]] = {"attention": attention, "data": data}


def main(name: str, quick: bool, output: Path) -> None:
    """Run one benchmark, print its table and write its rows."""
    import torch

    from vla.provenance import machine, versions
    from vla.system import require_writable

    require_writable(output)
    where = machine()
    rows, table = BENCHMARKS[name](quick)
    label = where["gpu"] or f"{where['cores']}x {where['cpu']}"
    path = output / f"benchmark_{name}_{re.sub('[^a-z0-9]+', '_', label.lower()).strip('_')}.json"
    measured = {"benchmark": name, "machine": where | {"threads": torch.get_num_threads()},
                "versions": versions(), "rows": rows}  # fmt: skip
    path.write_text(json.dumps(measured, indent=1) + "\n")
    print(f"{table}\n\nbenchmark: {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=BENCHMARKS, help="what to measure")
    parser.add_argument("--quick", action="store_true", help="small and once: a check, not a measurement")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder of the JSON")
    arguments = parser.parse_args()
    try:
        main(arguments.name, arguments.quick, arguments.output)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"benchmark: {error}")
    except KeyboardInterrupt:
        sys.exit("benchmark: interrupted. Nothing was saved; the same command begins again.")
