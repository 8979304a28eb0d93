"""How long one observation takes to become a chunk: python scripts/latency.py CHECKPOINT [EXPORT ...]

The checkpoint in float32 and in the device's own precision, and every exported folder, one observation at a time,
copies to the device and back included, instruction known. All take turns in every round, so that what else the
machine does falls on all alike. Prints a Markdown table; --results writes every sample.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.common import markdown, row, take_turns

from vla.export.load import is_export, load_policy
from vla.provenance import machine, versions
from vla.system import require_writable

WARM = 20  # calls that do not count


def main(checkpoint: str, exports: list[str], n: int, threads: int, device: str) -> dict[str, Any]:
    """Samples of every candidate. Raises ValueError for a folder that is none."""
    import torch

    from vla.policy import Policy
    from vla.training.checkpoint import find, load_model

    if threads:
        torch.set_num_threads(threads)
    model, trained, _ = load_model(find(checkpoint))
    policies: dict[str, Any] = {}
    for precision in ("fp32", "auto"):
        job = replace(trained, train=replace(trained.train, precision=precision))
        name = f"torch, {precision if precision == 'fp32' else 'own precision'}"
        policies[name] = Policy(model, job, device)
    for folder in exports:
        if not is_export(Path(folder)):
            raise ValueError(
                f"export: got {folder!r}, expected a folder by scripts/export.py. remedy: export first."
            )
        policies[Path(folder).name] = load_policy(folder, device, threads)
    samples = take_turns({name: call(policy) for name, policy in policies.items()}, n, WARM)
    first = next(iter(samples))
    rows = [
        row(name, {"threads": threads}, times, peer=first, peer_ms=samples[first]) | {"max_ms": max(times)}
        for name, times in samples.items()
    ]
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


def table(result: dict[str, Any]) -> str:
    names = ("p50_ms", "p99_ms", "p999_ms", "max_ms")
    lines = [
        [
            r["name"],
            *[f"{r[name]:.2f} ms" if name in r else "" for name in names],
            f"{r['ratio_to_peer']:.2f}×",
        ]
        for r in result["rows"]
    ]
    return markdown(["path", "p50", "p99", "p99.9", "max", "against the first"], lines)


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
