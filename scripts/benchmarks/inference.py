"""One observation in, one chunk of actions out, copies to the device and back included: every path, and the peers.

Networks of three sizes with random weights, on one robot's uint8 pictures; the instruction is known, as it is after
the first call. ACT has no instruction. On a GPU the paths that are fast are measured again among themselves, often
enough for p99.9, and how long a restart takes is measured in fresh processes.
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Options, Row, in_fresh_process, markdown, row, take_turns, without
from benchmarks.inference_paths import (
    SCENES,
    Call,
    call,
    exports,
    lerobot_act,
    network,
    observation,
    parameters,
    policy,
    saved,
    torch_network,
)
from vla.compiling import CACHE

PEER, PARALLEL, STEPWISE = "torch.nn.Transformer", "ours", "ours, autoregressive with cache"
FORMATS = ("onnx", "onnx-bf16", "onnx-int8", "aoti")
OFTEN = 3000  # calls of each fast path on a GPU
WARM = 6  # rounds before they count: three run, one captures


def run(options: Options) -> list[Row]:
    """A row for every scene, number of threads and path; on a GPU two for starting."""
    scenes = ["quick"] if options.quick else [scene for scene in SCENES if scene != "quick"]
    if options.device == "cpu":
        with tempfile.TemporaryDirectory(prefix="vla-benchmark-") as folder:
            return [found for scene in scenes for found in on_cpu(scene, options, Path(folder))]
    rows = [found for scene in scenes for found in on_gpu(scene, options)]
    if without("starting from a checkpoint", "draccus"):
        return rows
    with tempfile.TemporaryDirectory(prefix="vla-benchmark-") as folder:
        return rows + starts(scenes[min(1, len(scenes) - 1)], options.device, Path(folder))


# --- the processor -----------------------------------------------------------------------------


def on_cpu(scene: str, options: Options, folder: Path) -> list[Row]:
    """The exports and torch.compile for the first scene only: minutes to make, and the robot's size."""
    whole = scene in ("small", "quick")
    rounds = {"quick": 2, "small": 150, "27 M": 40}.get(scene, 10)
    found: list[Row] = []
    whole = whole and not without("exports", "draccus", "onnx", "onnxruntime", "onnxscript")
    made = exports(scene, folder, FORMATS[: 3 if options.quick else 4]) if whole else {}
    before = torch.get_num_threads()
    for threads in (1, os.cpu_count() or 1) if whole and not options.quick else (before,):
        torch.set_num_threads(threads)
        calls, sizes = candidates(scene, options, ("eager", "compiled") if scene == "small" else ("eager",))
        for name, path in made.items():
            calls[f"ours, {name}"], sizes[f"ours, {name}"] = (
                exported(scene, path, threads),
                sizes["ours, eager"],
            )
        times = measure(calls, rounds)
        found += rows_of(scene, threads, times, sizes)
    torch.set_num_threads(before)
    return found


def exported(scene: str, path: Path, threads: int) -> Call:
    from vla.export.load import load_policy

    return call(load_policy(path, threads=threads), scene)


# --- a GPU -------------------------------------------------------------------------------------


def on_gpu(scene: str, options: Options) -> list[Row]:
    """All paths beside their peers; then the fast ones alone, whose percentiles want many calls."""
    calls, sizes = candidates(scene, options, ("eager", "graph", "compiled"))
    rows = rows_of(scene, 0, measure(calls, 2 if options.quick else 200), sizes)
    fast = {name: each for name, each in calls.items() if name.endswith(("graph", "compiled"))}
    often = measure(fast, 2 if options.quick else OFTEN)
    for number, found in enumerate(rows):
        if (name := found["name"]) in often:
            ratio = {key: found[key] for key in ("peer", "ratio_to_peer") if key in found}
            rows[number] = row(name, found["params"], often[name]) | ratio
    return rows


def starts(scene: str, device: str, folder: Path) -> list[Row]:
    """From a new process to a policy that answers, compiled: where nothing is on disk, and again."""
    checkpoint = saved(scene, folder / "run")
    rows = []
    for name in ("start, nothing compiled before", "start, compiled before"):
        seconds, parts = in_fresh_process(
            start_seconds, str(checkpoint), scene, device, str(folder / "cache")
        )
        rows.append(row(name, {"scene": scene, "seconds": parts}, [1000 * seconds]))
    return rows


def start_seconds(checkpoint: str, scene: str, device: str, cache: str) -> tuple[float, dict[str, float]]:
    """Seconds since this process began, and since the load and the warm-up did. Runs in a process of its own."""
    os.environ[CACHE] = cache
    from vla.policy import Policy

    began = time.perf_counter()
    loaded = Policy.load(checkpoint, device, "compiled")
    then = time.perf_counter()
    loaded.warm_up()
    call(loaded, scene)()
    now = time.perf_counter()
    ticks = float(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    age = float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    return age, {"load": round(then - began, 2), "warm_up": round(now - then, 2)}


# --- both --------------------------------------------------------------------------------------


def candidates(
    scene: str, options: Options, launches: tuple[str, ...]
) -> tuple[dict[str, Call], dict[str, dict[str, Any]]]:
    """Calls by name, and what each of them is."""
    model = network(scene)
    device, ours = options.device, parameters(model)
    made = {"ours, eager fp32": (policy(model, device, "fp32", "eager"), ours)}
    for launch in launches:
        made[f"{PARALLEL}, {launch}"] = policy(model, device, "auto", launch), ours
    stepwise = network(scene, "autoregressive")
    for launch in launches[:1] if device == "cpu" else launches[1:]:
        made[f"{STEPWISE}, {launch}"] = policy(stepwise, device, "auto", launch), parameters(stepwise)
    if options.peers:
        made[PEER] = policy(torch_network(scene), device, "auto", "eager"), ours
    calls = {name: call(each, scene) for name, (each, _) in made.items()}
    sizes = {name: {"parameters": n} for name, (_, n) in made.items()}
    if options.peers and not without("LeRobot's ACT", "lerobot", "torchvision"):
        for name, autocast in (("LeRobot ACT, fp32", False), ("LeRobot ACT, autocast", True)):
            calls[name], n = lerobot_act(scene, device, autocast)
            sizes[name] = {"parameters": n}
    return calls, sizes


def measure(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every call in every round. What the garbage collector need not look at is taken from it
    before, as a program that controls a robot would.
    """
    for each in calls.values():
        for _ in range(WARM):
            each()
    gc.collect()
    gc.freeze()
    try:
        return take_turns(calls, rounds)
    finally:
        gc.unfreeze()


def rows_of(
    scene: str, threads: int, times: dict[str, list[float]], sizes: dict[str, dict[str, Any]]
) -> list[Row]:
    """A row for every candidate. Its peer is the same network with torch.nn's layers; of decoding step by step,
    the pass that decodes all at once, launched alike.
    """
    images, _ = observation(scene)
    seen = {"cameras": len(images), "pixels": next(iter(images.values())).shape[2], "batch": 1}
    seen |= {"threads": threads} if threads else {}
    rows = []
    for name, samples in times.items():
        peer = name.replace(STEPWISE, PARALLEL) if name.startswith(STEPWISE) else PEER
        compared = {"peer": peer, "peer_ms": times[peer]} if peer in times and peer != name else {}
        rows.append(row(name, {"scene": scene} | seen | sizes[name], samples, **compared))
    return rows


def table(rows: list[Row]) -> str:
    """A line for every row."""
    lines = []
    for r in rows:
        p = r["params"]
        where = p["scene"] + (f", {p['threads']} thread{'s' * (p['threads'] > 1)}" if "threads" in p else "")
        figures = [f"{r[name]:.2f} ms" if name in r else "" for name in ("p50_ms", "p99_ms", "p999_ms")]
        ratio = f"{r['ratio_to_peer']:.2f}× {r['peer']}" if "peer" in r else ""
        size = f"{p['parameters'] / 1e6:.1f} M" if "parameters" in p else ""
        lines.append([where, r["name"], size, *figures, ratio])
    return markdown(["network", "path", "parameters", "p50", "p99", "p99.9", "time against"], lines)
