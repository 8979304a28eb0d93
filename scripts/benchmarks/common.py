"""What all benchmarks share: candidates that take turns, the row each leaves behind, memory, and their tables."""

from __future__ import annotations

import multiprocessing
import re
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What a benchmark is asked for.

    quick: small and once, a check that everything runs. device: `cpu` or `cuda`, resolved.
    output: where results lie. peers: whether others are measured beside ours.
    """

    quick: bool
    device: str
    output: Path
    peers: bool


def take_turns(
    candidates: dict[str, Callable[[], Any]], rounds: int, warm: int = 2
) -> dict[str, list[float]]:
    """Milliseconds of every candidate in every round; before them `warm` rounds that do not count."""
    names = list(candidates)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warm + rounds):
        shift = turn % len(names)  # nobody always follows the same one
        for name in names[shift:] + names[:shift]:
            took = milliseconds(candidates[name])
            if turn >= warm:
                times[name].append(took)
    return times


def milliseconds(call: Callable[[], Any]) -> float:
    """How long a call takes, with what it leaves to the GPU."""
    synchronise()
    start = time.perf_counter()
    call()
    synchronise()
    return 1000 * (time.perf_counter() - start)


def row(
    name: str,
    params: dict[str, Any],
    samples_ms: list[float],
    items: int = 0,
    peer: str = "",
    peer_ms: list[float] | None = None,
) -> Row:
    """What a candidate's samples say, and the samples.

    items: how many things one call handles. peer_ms: the peer's samples of the same rounds; ratio_to_peer is
    the median of own / peer within a round: a ratio of times, below 1 where the candidate is faster.
    """
    p50, p99, p999 = np.quantile(samples_ms, (0.5, 0.99, 0.999)).tolist()
    found: Row = {"name": name, "params": params, "n": len(samples_ms), "p50_ms": p50, "p99_ms": p99}
    if len(samples_ms) >= 1000:  # below, it would be the slowest sample
        found["p999_ms"] = p999
    if items:
        found["items_per_s"] = 1000 * items / p50
    if peer_ms is not None:
        ratios = [own / other for own, other in zip(samples_ms, peer_ms, strict=True)]
        found |= {"peer": peer, "ratio_to_peer": statistics.median(ratios)}
    return found | {"samples_ms": [round(sample, 4) for sample in samples_ms]}


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A table."""
    cells = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def synchronise(device: Any = None) -> None:
    """Wait for the GPU (`device`, or the current one), where this process uses one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized() and "cpu" not in str(device):
        torch.cuda.synchronize(device)


def without(peer: str, *packages: str) -> bool:
    """Whether a peer must be left out because packages are missing, which is said in a line."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        print(f"{peer}: left out, needs {', '.join(missing)}", flush=True)
    return bool(missing)


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result, from a process that has done nothing else."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_memory_mb(call: Callable[[], Any], device: str) -> float:
    """Most memory a call holds at once above what there was before: of the GPU, else of the process."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronise(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    before = resident("VmRSS")
    call()
    return (resident("VmHWM") - before) / 1e6


def resident(entry: str) -> int:
    """VmRSS (now) or VmHWM (at most so far) of this process in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(rf"^{entry}:\s+(\d+) kB$", status, re.MULTILINE)[0])
