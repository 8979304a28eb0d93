"""How cost grows: training with parameters, tokens, chunk and batch; evaluation with workers; a store with frames.

Each row names its bound and shows the evidence. A training step is bound by what would take most of its time
alone: launch, the step of a single sample less its own bytes and products, which is paid whatever the
batch; memory, the bytes that all operators read and write at the speed of a large copy (what
stays in a cache is cheaper, what is fused is not read); arithmetic, its products at the speed of a large one.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import flops
from benchmarks.common import Options, Row, markdown, milliseconds, row, without
from benchmarks.growth import evaluation_rows, on_paper, paper_table, store_rows
from benchmarks.workloads import QUICK, demonstrations, make_step, quiet, with_text
from vla.architecture import ImageConfig, ModelConfig
from vla.config import EvaluateConfig, Job, TrainConfig
from vla.data.frames import FrameStore
from vla.device import multiplies_in
from vla.model.vla import count_parameters


def sized(d: int, layers: tuple[int, int], width: int, depth: int) -> ModelConfig:
    """A network of width d, encoder and decoder layers, and an image transformer of width x depth."""
    return ModelConfig(
        size="base", d_model=d, n_heads=d // 64, d_ff=4 * d, n_encoder_layers=layers[0], n_decoder_layers=layers[1],
        image_width=width, image_depth=depth, image_heads=width // 64,
    )  # fmt: skip


# By what they are called; the rows tell the exact numbers.
NETWORKS = {
    "1 M": ModelConfig(size="tiny"), "5 M": sized(192, (4, 4), 192, 4), "12 M": ModelConfig(size="small"),
    "27 M": ModelConfig(size="base"), "60 M": sized(512, (6, 4), 384, 12), "120 M": sized(768, (6, 4), 512, 12),
    "300 M": sized(1024, (12, 6), 768, 12),
}  # fmt: skip
PIXELS, EPISODES = 128, 10
SECONDS = {"cpu": 10.0, "cuda": 6.0}  # of turns for one point
ROUNDS = (3, 20)


@dataclass(frozen=True)
class Point:
    """One training step that is measured. axis: what varies, value: to what."""

    axis: str
    value: str
    model: ModelConfig
    batch: int


def points(options: Options) -> Iterator[Point]:
    """What is measured on this kind of machine."""
    cuda = options.device != "cpu"
    if options.quick:
        small = replace(QUICK, image=ImageConfig(pixels=32))
        yield Point("parameters", "tiny", small, 4)
        yield Point("batch", "8", small, 8)
        return
    names = list(NETWORKS)[1:] if cuda else ["1 M", "5 M", "12 M", "27 M", "60 M"]
    base, batch = NETWORKS["27 M" if cuda else "1 M"], 256 if cuda else 32
    for name in names:
        yield Point("parameters", name, NETWORKS[name], batch if cuda else 8)
    for patch in (32, 16, 8, 4) if cuda else (32, 16, 8):
        image = ImageConfig(pixels=PIXELS, patch=patch)
        yield Point("image tokens", str((PIXELS // patch) ** 2), replace(base, image=image), batch // 2)
    for chunk in (4, 16, 64, 256) if cuda else (4, 16, 64):
        yield Point("chunk", str(chunk), replace(base, chunk_size=chunk, max_prefix=0), batch)
    for size in (1, 16, 64, 256, 1024, 4096) if cuda else (1, 4, 16, 64):
        yield Point("batch", str(size), base, size)


def run(options: Options) -> list[Row]:
    """The rows of every axis, and what they say about larger datasets."""
    torch.backends.cuda.matmul.allow_tf32 = True
    with TemporaryDirectory(prefix="vla-benchmark-") as folder, quiet():
        rows = training_rows(options, Path(folder))
        if not without("evaluation against workers", "mujoco", "gymnasium"):
            rows += evaluation_rows(options, Path(folder))
        if not without("the store against frames", "lerobot"):
            rows += store_rows(options, Path(folder))
    return rows + on_paper(rows, options.device)


def training_rows(options: Options, folder: Path) -> list[Row]:
    """A row for every point; one that does not fit into memory says so."""
    pixels = 32 if options.quick else PIXELS
    store = FrameStore.of_episodes(demonstrations(2 if options.quick else EPISODES, pixels), fps=10)
    kind = multiplies_in(torch.device(options.device), "auto")
    roofline = flops.measure_roofline(options.device, kind, options.quick)
    rows: list[Row] = []
    for point in points(options):
        params = {"axis": point.axis, "value": point.value, "batch": point.batch, "precision": kind}
        try:
            rows.append(measure(point, params, store, roofline, options, folder))
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if "memory" not in str(error).lower():
                raise
            rows.append({"name": "training", "params": params, "failed": "out of memory"})
        gc.collect()
        if options.device != "cpu":
            torch.cuda.empty_cache()
        print(f"{point.axis} {point.value}: {rows[-1].get('failed', rows[-1].get('bound'))}", flush=True)
    return rows


def measure(
    point: Point, params: Row, store: FrameStore, roofline: flops.Roofline, options: Options, folder: Path
) -> Row:
    """Steps of the batch and of one sample, in turns with a matrix product."""
    model = with_text(point.model, folder / "text")
    job = Job(
        model=model, train=TrainConfig(batch_size=point.batch), evaluate=EvaluateConfig(n_action_steps=1)
    )
    single = replace(job, train=replace(job.train, batch_size=1))
    work, alone = (work_of(each, store, options.device) for each in (job, single))
    steps = {"batch": make_step(job, store, options.device), "one": make_step(single, store, options.device)}
    product, product_flops = flops.matmul(options.device, params["precision"], 256 if options.quick else 0)
    numbers = {name: iter(range(10**9)) for name in steps}
    calls: dict[str, Any] = {
        name: lambda name=name: steps[name](next(numbers[name]), measure=False) for name in steps
    } | {"product": product}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(5):
            call()
    began, (least, most) = time.perf_counter(), (2, 2) if options.quick else ROUNDS
    seconds = SECONDS["cpu" if options.device == "cpu" else "cuda"]
    while len(times["batch"]) < least or (
        len(times["batch"]) < most and time.perf_counter() - began < seconds
    ):
        for name, call in calls.items():
            times[name].append(milliseconds(call))
    params["parameters"] = count_parameters(steps["batch"].model)
    found = row("training", params, times["batch"], point.batch)
    of_one = row("", {}, times["one"])["p50_ms"]
    fixed = max(0.0, of_one / 1e3 - max(roofline.estimates(alone).values()))
    name, evidence = flops.bound(work, roofline, fixed, found["p50_ms"] / 1e3)
    share = flops.utilisation(work.flops, times["batch"], product_flops, times["product"])
    return found | {
        "flops": work.flops, "bytes": work.bytes, "operators": work.operators, "utilisation": share, "bound": name,
        "evidence": evidence, "one_sample_ms": of_one, "samples_one_ms": times["one"],
    }  # fmt: skip


def work_of(job: Job, store: FrameStore, device: str) -> flops.Work:
    """Of a step that is launched operator by operator, which is what can be counted."""
    step = make_step(replace(job, train=replace(job.train, capture=False)), store, device)
    step(0, measure=False)  # the optimiser's state is made
    return flops.work_of(lambda: step(1, measure=False))


def table(rows: list[Row]) -> str:
    """Training, evaluation, the store, and the arithmetic for larger datasets."""
    parts = []
    training = [r for r in rows if r["name"] == "training"]
    header = ["", "", "parameters", "batch", "samples/s", "step p50", "n", "MFU", "bound", "evidence"]
    lines = []
    for r in training:
        p = r["params"]
        start = [p["axis"], p["value"]]
        if "failed" in r:
            lines.append([*start, "-", str(p["batch"]), *["-"] * 4, r["failed"], ""])
            continue
        size, speed = f"{p['parameters'] / 1e6:.1f} M", f"{r['items_per_s']:,.0f}"
        lines.append([*start, size, str(p["batch"]), speed, f"{r['p50_ms']:.2f} ms", str(r["n"]),
                      f"{r['utilisation']:.0%}", r["bound"], r["evidence"]])  # fmt: skip
    parts.append(markdown(header, lines))
    evaluation = [r for r in rows if r["name"] == "evaluation"]
    if evaluation:
        lines = [
            [str(r["params"]["workers"]), str(r["params"]["episodes"]), f"{r['p50_ms'] / 1e3:.1f} s",
             f"{r['env_steps_per_s']:,.0f}", str(r["n"]), r["bound"], r["evidence"]]
            for r in evaluation
        ]  # fmt: skip
        parts.append(
            markdown(["workers", "episodes", "wall time", "env steps/s", "n", "bound", "evidence"], lines)
        )
    stores = [r for r in rows if r["name"] == "store"]
    if stores:
        lines = [
            [f"{r['params']['frames']:,}", f"{r['p50_ms'] / 1000:.2f} s", f"{r['items_per_s']:,.0f}",
             f"{r['bytes_per_frame']:,.0f}", f"{r['video_bytes_per_frame']:,.0f}", r["bound"], r["evidence"]]
            for r in stores
        ]  # fmt: skip
        header = ["frames", "built in", "frames/s", "bytes a frame", "of video", "bound", "evidence"]
        parts.append(markdown(header, lines))
    return "\n\n".join([*parts, paper_table(rows)])
