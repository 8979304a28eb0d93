"""How long one observation takes to become a chunk: python scripts/latency.py CHECKPOINT [EXPORT ...]

The checkpoint in float32 and in the device's own precision, and every exported folder, one observation at a time,
copies to the device and back included, instruction known. All take turns in every round, so that what else the
machine does falls on all alike. Prints a Markdown table; --results writes every sample.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vla.export.load import is_export, load_policy
from vla.provenance import machine, versions
from vla.system import require_writable

WARM = 20  # calls that do not count


def main(checkpoint: str, exports: list[str], n: int, threads: int, device: str) -> dict[str, Any]:
    """Samples of every candidate. Raises ValueError for a folder that is none."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    policies = {}
    for precision in ("fp32", "auto"):
        policy: Any = load_policy(checkpoint, device, threads)
        policy.job = replace(policy.job, train=replace(policy.job.train, precision=precision))
        policies[f"torch, {precision if precision == 'fp32' else 'own precision'}"] = policy
    for folder in exports:
        if not is_export(Path(folder)):
            raise ValueError(
                f"export: got {folder!r}, expected a folder by scripts/export.py. remedy: export first."
            )
        policies[Path(folder).name] = load_policy(folder, device, threads)
    samples = take_turns({name: call(policy) for name, policy in policies.items()}, n)
    rows = [{"name": name, **figures(times), "samples_ms": times} for name, times in samples.items()]
    peer = rows[0]["p50_ms"]
    for row in rows:
        row |= {"ratio_to_peer": row["p50_ms"] / peer, "peer": rows[0]["name"]}
    parameters = sum(p.numel() for p in policies["torch, fp32"].model.parameters())
    return {
        "checkpoint": Path(checkpoint).name, "params": parameters, "threads": threads, "n": n, "device": device,
        "machine": machine(), "versions": versions(), "rows": rows,
    }  # fmt: skip


def call(policy: Any) -> Callable[[], None]:
    """One call of a policy with an observation of its sizes."""
    rng, f, t = np.random.default_rng(0), policy.features, policy.n_obs_steps
    images = {name: rng.integers(0, 256, (1, t, *size, 3), np.uint8) for name, size in f.cameras.items()}
    state = np.zeros((1, t, f.state_dim), np.float32)
    return lambda: policy.predict_chunk(images, state, ["press the red button"])


def take_turns(candidates: dict[str, Callable[[], None]], n: int) -> dict[str, list[float]]:
    """Milliseconds of every candidate in every round."""
    names = list(candidates)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(WARM + n):
        shift = turn % len(names)  # nobody always follows the same one
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            candidates[name]()
            if turn >= WARM:
                times[name].append(1000 * (time.perf_counter() - start))
    return times


def figures(times: list[float]) -> dict[str, float]:
    q = np.quantile(times, [0.99, 0.999])
    return {
        "n": len(times),
        "p50_ms": statistics.median(times),
        "p99_ms": q[0],
        "p999_ms": q[1],
        "max_ms": max(times),
    }


def table(result: dict[str, Any]) -> str:
    lines = ["| path | p50 | p99 | p99.9 | max | against the first |", "|---|---|---|---|---|---|"]
    for r in result["rows"]:
        ms = " | ".join(f"{r[name]:.2f} ms" for name in ("p50_ms", "p99_ms", "p999_ms", "max_ms"))
        lines.append(f"| {r['name']} | {ms} | {r['ratio_to_peer']:.2f}× |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("exports", nargs="*")
    parser.add_argument("--n", type=int, default=1000, help="rounds")
    parser.add_argument("--threads", type=int, default=1, help="of every candidate; 0: its own choice")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--results", type=Path, help="a JSON file to write")
    a = parser.parse_args()
    try:
        if a.results:
            require_writable(a.results.parent)
        result = main(a.checkpoint, a.exports, a.n, a.threads, a.device)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"latency: {error}")
    print(table(result))
    if a.results:
        a.results.write_text(json.dumps(result, indent=1) + "\n")
