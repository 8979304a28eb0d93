"""Training steps: ours as it is written, compiled, and as one CUDA graph; LeRobot's loop with the same network.

Everything a step needs is in its time: drawing and reading the batch (the peer decodes its videos), forward,
backward, clipping, the optimiser, the average. Same dataset, batch, network and precision. A large matrix
product takes its turns among them: it is what FLOPs utilisation is a share of.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import flops
from benchmarks.common import Options, Row, markdown, milliseconds, row, without
from benchmarks.workloads import QUICK, demonstrations, make_step, quiet, with_text, write_dataset
from vla.architecture import ImageConfig, ModelConfig
from vla.config import Job, TrainConfig, load
from vla.data.frames import FOLDER, FrameStore
from vla.device import multiplies_in
from vla.model.vla import count_parameters

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
BUILDING, MATMUL, PEER = "building the store", "matrix product", "LeRobot's loop"
WARM = 5  # steps before a candidate is measured: a CUDA graph is made in the fourth
SECONDS, ROUNDS = 60.0, (5, 30)  # of turns for one workload, and their number


@dataclass(frozen=True)
class Workload:
    """A network and its demonstrations. root: of the LeRobotDataset, None where there is none; compiled: whether
    torch.compile is tried too, which takes minutes on a CPU.
    """

    name: str
    job: Job
    store: FrameStore
    root: Path | None
    compiled: bool = False


@dataclass(frozen=True)
class Candidate:
    """`steps` calls in a turn, of which one sample is the mean; before and after: what is not measured."""

    call: Callable[[], Any]
    steps: int
    before: Callable[[], Any] = lambda: None
    after: Callable[[], Any] = lambda: None
    about: Row = field(default_factory=dict)
    close: Callable[[], Any] = lambda: None

    def turn(self) -> float:
        """Milliseconds of a step."""

        def steps() -> None:
            for _ in range(self.steps):
                self.call()

        self.before()
        took = milliseconds(steps)
        self.after()
        return took / self.steps


def run(options: Options) -> list[Row]:
    """The rows of every workload of this kind of machine."""
    # As LeRobot's trainer sets them for the whole process; ours has them too, then.
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    lerobot = not without("LeRobotDataset and its loop", "lerobot", "accelerate")
    rows: list[Row] = []
    with TemporaryDirectory(prefix="vla-benchmark-") as folder, quiet():
        for number, make in enumerate(workloads(options)):
            workload, built = make(Path(folder), lerobot)
            workload = replace(workload, compiled=number == 0 and not options.quick)
            rows += [*built, *measure(workload, options)]
    return rows


def workloads(options: Options) -> list[Callable[[Path, bool], tuple[Workload, list[Row]]]]:
    """What is measured here; each is made when its turn comes."""

    def on_the_spot(name: str, model: ModelConfig, batch: int, episodes: int) -> Callable[..., Any]:
        def make(folder: Path, lerobot: bool) -> tuple[Workload, list[Row]]:
            job = job_of(with_text(model, folder / "text"), batch)
            made = demonstrations(episodes, model.image.pixels)
            if not lerobot:
                return Workload(name, job, FrameStore.of_episodes(made, fps=10), None), []
            write_dataset(folder / "synthetic", made)
            return built(name, job, folder / "synthetic")

        return make

    def quickstart(folder: Path, lerobot: bool) -> tuple[Workload, list[Row]]:
        job = load(Job, [], QUICKSTART)
        root = folder / "quickstart"  # without its store, which is built here, and timed
        shutil.copytree(job.dataset_root, root, ignore=shutil.ignore_patterns(f"{FOLDER}*"))
        # LeRobot's trainer has no start_share: both draw evenly.
        job = replace(job, data=replace(job.data, start_share=0.0))
        return built("quick start, 64 px", job, root)

    if options.quick:
        return [on_the_spot("quick", replace(QUICK, image=ImageConfig(pixels=32)), 8, 2)]
    if options.device != "cpu":
        return [on_the_spot("base, 128 px", ModelConfig(size="base"), 256, 50)]
    small = on_the_spot("small, 128 px", ModelConfig(size="small"), 32, 20)
    if (load(Job, [], QUICKSTART).dataset_root / "meta").is_dir():
        return [quickstart, small]
    print("quick start: left out, needs its dataset (scripts/quickstart.sh)", flush=True)
    return [small]


def job_of(model: ModelConfig, batch: int) -> Job:
    return Job(model=model, train=TrainConfig(batch_size=batch))


def built(name: str, job: Job, root: Path) -> tuple[Workload, list[Row]]:
    """The workload, and how long its store took to build."""
    start = time.perf_counter()
    store = FrameStore.open_or_build(root)
    seconds = time.perf_counter() - start
    size = sum(x.nbytes for x in store.arrays().values())
    about = {"workload": name, "frames": len(store), "bytes": size}
    return Workload(name, job, store, root), [row(BUILDING, about, [1000 * seconds], len(store))]


def measure(workload: Workload, options: Options) -> list[Row]:
    """The rows of one workload: each way to train, then the matrix products."""
    job, device = workload.job, options.device
    batch, kind = job.train.batch_size, multiplies_in(torch.device(device), "auto")
    rows: list[Row] = []
    about = {"workload": workload.name, "batch": batch, "pixels": job.model.image.pixels,
             "chunk": job.model.chunk_size, "threads": torch.get_num_threads()} | counted(workload, device)  # fmt: skip
    candidates: dict[str, Candidate] = {}
    peaks = {precision: flops.matmul(device, precision, 256 if options.quick else 0)
             for precision in dict.fromkeys((kind, "fp32"))}  # fmt: skip
    for precision, (product, _) in peaks.items():
        candidates[f"{MATMUL}, {precision}"] = Candidate(product, 10, about={"precision": precision})
    loops = peers(workload, options, kind)
    makers = {name: lambda change=change: own(workload, device, change)
              for name, change in ours(device, kind, workload.compiled).items()} | loops  # fmt: skip
    try:
        for name, make in makers.items():
            try:
                start = time.perf_counter()
                candidate = make()
                candidate.before()
                for _ in range(WARM):
                    candidate.call()
                candidate.after()
                started = time.perf_counter() - start
                candidates[name] = replace(candidate, about=candidate.about | {"start_s": started})
            except Exception as error:  # no C++ compiler, no memory: the others are measured all the same
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                print(f"{workload.name}, {name}: left out, {reason}", flush=True)
                rows.append({"name": name, "params": about, "failed": reason})
        samples = turns(candidates, options)
    finally:
        for candidate in candidates.values():
            candidate.close()
    return rows + described(samples, candidates, about, {name: p[1] for name, p in peaks.items()}, device)


def counted(workload: Workload, device: str) -> Row:
    """Parameters that train, and floating-point operations of a step."""
    job = replace(workload.job, train=replace(workload.job.train, capture=False))
    step = make_step(job, workload.store, device)
    return {
        "parameters": count_parameters(step.model),
        "flops_per_step": flops.flops_of(lambda: step(0, measure=False)),
    }


def ours(device: str, kind: str, compiled: bool) -> dict[str, dict[str, Any]]:
    """Name -> what differs in train.*."""
    found: dict[str, dict[str, Any]] = {f"ours, {kind}": {"precision": kind}}
    found |= {"ours, fp32": {"precision": "fp32"}}
    if device != "cpu":
        found[f"ours, {kind}, eager"] = {"precision": kind, "capture": False}
    if compiled:
        found[f"ours, {kind}, compiled"] = {"precision": kind, "compile": True}
    return found


def own(workload: Workload, device: str, change: dict[str, Any]) -> Candidate:
    job = replace(workload.job, train=replace(workload.job.train, **change))
    step, number = make_step(job, workload.store, device), iter(range(10**9))
    about = {"precision": change["precision"], "capture": device != "cpu" and job.train.capture,
             "compile": job.train.compile}  # fmt: skip
    return Candidate(lambda: step(next(number), measure=False), 2 if device == "cpu" else 20, about=about)


def peers(workload: Workload, options: Options, kind: str) -> dict[str, Callable[[], Candidate]]:
    """LeRobot's loop without and with workers that decode ahead."""
    root = workload.root
    if not options.peers or root is None:
        return {}
    from vla.system import cores

    def make(workers: int) -> Candidate:
        from benchmarks.lerobot_loop import LeRobotLoop

        job = replace(workload.job, train=replace(workload.job.train, precision=kind))
        loop = LeRobotLoop(root, job, workload.store.features, options.device, workers)
        about = {"precision": kind, "workers": workers}
        return Candidate(loop.step, 1 if options.quick else 2, loop.resume, loop.pause, about, loop.close)

    numbers = (0, 1) if options.quick else (0, 2) if cores() < 8 else (0, 4, 8)
    return {f"{PEER}, {n} workers": lambda n=n: make(n) for n in numbers}


def turns(candidates: dict[str, Candidate], options: Options) -> dict[str, list[float]]:
    """Milliseconds of a step of every candidate in every round, as many rounds as the time allows."""
    names, rounds, turn = list(candidates), 2, 0
    samples: dict[str, list[float]] = {name: [] for name in names}
    while turn < rounds:
        began = time.perf_counter()
        shift = turn % len(names)  # nobody always follows the same one
        for name in names[shift:] + names[:shift]:
            samples[name].append(candidates[name].turn())
        if turn == 0 and not options.quick:
            least, most = ROUNDS
            rounds = min(most, max(least, int(SECONDS / (time.perf_counter() - began))))
        turn += 1
    return samples


def described(
    samples: dict[str, list[float]],
    candidates: dict[str, Candidate],
    about: Row,
    peaks: dict[str, float],
    device: str,
) -> list[Row]:
    """Rows with samples/s, FLOPs utilisation, and the ratio to the fastest of the peer's settings."""
    peer = min(
        (name for name in samples if name.startswith(PEER)),
        key=lambda name: sorted(samples[name])[len(samples[name]) // 2],
        default="",
    )
    rows = []
    for name, times in samples.items():
        own = candidates[name].about
        precision = own["precision"]
        if name.startswith(MATMUL):
            params = {"workload": about["workload"]} | own | {"flops": peaks[precision]}
            made = row(name, params, times)
            rows.append(made | {"flops_per_s": 1e3 * peaks[precision] / made["p50_ms"]})
            continue
        made = row(name, about | own, times, about["batch"], peer, samples[peer] if peer else None)
        work, product = about["flops_per_step"], samples[f"{MATMUL}, {precision}"]
        made["utilisation"] = flops.utilisation(work, times, peaks[precision], product)
        sheet = flops.data_sheet(device)
        if sheet and precision == "bf16":
            made["utilisation_of_data_sheet"] = 1e3 * work / made["p50_ms"] / sheet
        rows.append(made)
    return rows


def table(rows: list[Row]) -> str:
    """A line for each way to train, with its share of the peer's time; then what building the stores took."""
    header = [
        "workload",
        "parameters",
        "batch",
        "loop",
        "samples/s",
        "step p50",
        "p99",
        "n",
        "time / peer's",
        "MFU",
    ]
    lines = []
    for r in rows:
        if "batch" not in r["params"]:
            continue
        p = r["params"]
        start = [p["workload"], f"{p['parameters'] / 1e6:.1f} M", str(p["batch"]), r["name"]]
        if "failed" in r:
            lines.append([*start, r["failed"], *["-"] * 5])
            continue
        ratio = f"{r['ratio_to_peer']:.3f}" if "ratio_to_peer" in r else "-"
        sheet = r.get("utilisation_of_data_sheet")
        share = f"{r['utilisation']:.0%}" + (f" ({sheet:.0%} of the data sheet)" if sheet else "")
        lines.append([*start, f"{r['items_per_s']:,.0f}", f"{r['p50_ms']:.1f} ms", f"{r['p99_ms']:.1f} ms",
                      str(r["n"]), ratio, share])  # fmt: skip
    parts = [markdown(header, lines)]
    products = [[r["params"]["workload"], r["name"], f"{r['flops_per_s'] / 1e12:.3g} TFLOP/s"]
                for r in rows if "flops_per_s" in r]  # fmt: skip
    parts.append(markdown(["workload", "MFU is a share of", "at the median"], products))
    stores = [
        [r["params"]["workload"], f"{r['params']['frames']:,}", f"{r['params']['bytes'] / 1e6:,.0f} MB",
         f"{r['p50_ms'] / 1000:.1f} s", f"{r['items_per_s']:,.0f}"]
        for r in rows if r["name"] == BUILDING
    ]  # fmt: skip
    if stores:
        parts.append(markdown(["building the store", "frames", "size", "took", "frames/s"], stores))
    return "\n\n".join(parts)
