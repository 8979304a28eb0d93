"""What grows outside the training step: evaluation with workers, the store with frames, and both on paper."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.common import Options, Row, markdown, row
from benchmarks.workloads import demonstrations, write_dataset
from vla.config import Job, load
from vla.data.frames import FrameStore
from vla.system import cores

if TYPE_CHECKING:
    from vla.policy import Policy

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SLOTS, EPISODES = 32, 32
FRAMES = (500, 1000, 2000, 4000)
PASSES = 10  # how often each frame is seen; the quick start's 6,000 steps of 64 see theirs 14 times


def evaluation_rows(options: Options, folder: Path) -> list[Row]:
    """The wall time of one evaluation on 1, 2, 4 ... workers, in turns."""
    from vla.evaluation.evaluate import evaluate

    job = load(Job, [], QUICKSTART)
    episodes = 2 if options.quick else EPISODES
    job = replace(job, output=str(folder), evaluate=replace(
        job.evaluate, episodes=episodes, slots=min(SLOTS, episodes), controls=False, videos=0, device=options.device,
    ))  # fmt: skip
    policy, kind = policy_of(job, options.device)
    numbers = [n for n in (1, 2, 4, 8, 16, 32) if n <= (2 if options.quick else max(2, cores()))]
    clocks: dict[int, list[Any]] = {n: [] for n in numbers}
    for turn in range(1 if options.quick else 3):
        shift = turn % len(numbers)
        for n in numbers[shift:] + numbers[:shift]:
            played = evaluate(policy, replace(job, evaluate=replace(job.evaluate, workers=n)), progress=False)
            clocks[n].append(played.clock)
    rows = []
    for n, runs in clocks.items():
        walls = [1e3 * clock.wall_s for clock in runs]
        env, decided = (
            np.median([getattr(c, part) / c.wall_s for c in runs]) for part in ("env_s", "policy_s")
        )
        rest = 1 - env - decided
        shares = {"renderer and physics": env, "policy": decided, "starting workers": rest}
        params = {"workers": n, "episodes": episodes, "slots": job.evaluate.slots, "policy": kind}
        rows.append(row("evaluation", params, walls, episodes) | {
            "env_steps_per_s": float(np.median([c.env_steps / c.wall_s for c in runs])),
            "bound": max(shares, key=lambda name: shares[name]),
            "evidence": ", ".join(f"{name} {share:.0%}" for name, share in shares.items()) + " of the wall time",
        })  # fmt: skip
    return rows


def policy_of(job: Job, device: str) -> tuple[Policy, str]:
    """The quick start's, where it was trained; else its network with random weights."""
    from vla.data.normalize import Statistics
    from vla.environment import make_env
    from vla.model.vla import VLA
    from vla.observation import ACTION, STATE
    from vla.policy import Policy

    if (Path(load(Job, [], QUICKSTART).output) / "checkpoints").is_dir():
        return Policy.load(load(Job, [], QUICKSTART).output, device), "the quick start's"
    env, features = make_env(job.env.id, job.env.kwargs)
    env.close()
    rng = np.random.default_rng(0)
    sizes = {STATE: features.state_dim, ACTION: features.action_dim}
    statistics = Statistics.of(
        {key: rng.uniform(-1, 1, (64, n)).astype(np.float32) for key, n in sizes.items()}
    )
    torch.manual_seed(0)
    return Policy(VLA(job.model, features, statistics).eval(), job, device), "random weights"


def store_rows(options: Options, folder: Path) -> list[Row]:
    """Building the store of a LeRobotDataset (videos), the larger the dataset the longer."""
    pixels, rows = 32 if options.quick else 128, []
    for frames in (100, 200) if options.quick else FRAMES:
        root = folder / f"frames {frames}"
        write_dataset(root, demonstrations(frames // 100, pixels))
        videos = sum(path.stat().st_size for path in (root / "videos").rglob("*.mp4"))
        start, cpu = time.perf_counter(), time.process_time()
        store = FrameStore.open_or_build(root)
        seconds, busy = time.perf_counter() - start, time.process_time() - cpu
        size = sum(x.nbytes for x in store.arrays().values())
        params = {"frames": len(store), "pixels": pixels}
        rows.append(row("store", params, [1000 * seconds], len(store)) | {
            "cores_s": busy, "bytes_per_frame": size / len(store), "video_bytes_per_frame": videos / len(store),
            "bound": "video decoder" if busy > 0.5 * seconds else "disk",
            "evidence": f"{busy:.2f} s of processor in {seconds:.2f} s; one process, {cores()} cores",
        })  # fmt: skip
    return rows


def on_paper(rows: list[Row], device: str) -> list[Row]:
    """10 M and 1 B frames by the rates of these rows. Every assumption is in the row."""
    measured = [r for r in rows if r["name"] == "training" and "failed" not in r]
    stores = [r for r in rows if r["name"] == "store"]
    if not measured or not stores:
        return []
    built = stores[-1]
    fastest = max((r for r in measured if r["params"]["axis"] == "batch"), key=lambda r: r["items_per_s"])
    rate, params = fastest["items_per_s"], fastest["params"]
    memory = torch.cuda.get_device_properties(device).total_memory if device != "cpu" else 0
    held = 0.7 * memory or main_memory()
    found = []
    for frames in (10**7, 10**9):
        size = frames * built["bytes_per_frame"]
        found.append({
            "name": "on paper", "params": {"frames": frames},
            "assumptions": [
                f"one camera of {built['params']['pixels']} px, {built['bytes_per_frame']:,.0f} bytes a frame in the "
                f"store and {built['video_bytes_per_frame']:,.0f} in lossless video, as measured",
                f"{built['cores_s'] / built['params']['frames'] * 1e3:.2f} ms of a core to decode a frame, as measured",
                f"{rate:,.0f} samples/s, as measured at batch {params['batch']} with "
                f"{params['parameters'] / 1e6:.1f} M parameters in {params['precision']}, whatever the dataset's size",
                f"{PASSES} samples of each frame",
                "n devices train n times as fast (not measured)",
                f"{held / 1e9:,.0f} GB for frames on this machine: "
                + ("0.7 of the GPU's memory" if memory else "its main memory"),
            ],
            "store_bytes": size, "video_bytes": frames * built["video_bytes_per_frame"],
            "build_core_hours": frames * built["cores_s"] / built["params"]["frames"] / 3600,
            "fits": bool(size <= held),
            "train_hours": PASSES * frames / rate / 3600,
            "read_bytes_per_s": rate * built["bytes_per_frame"],
            "machines_for_a_day": int(np.ceil(PASSES * frames / rate / 86400)),
        })  # fmt: skip
    return found


def main_memory() -> float:
    """Bytes of main memory."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def paper_table(rows: list[Row]) -> str:
    """The arithmetic, and what it assumes."""
    found = [r for r in rows if r["name"] == "on paper"]
    if not found:
        return "On paper: nothing, for want of the store's rates (needs lerobot)."
    lines = [
        [f"{r['params']['frames']:,}", f"{r['store_bytes'] / 1e12:,.2f} TB", f"{r['video_bytes'] / 1e12:,.2f} TB",
         f"{r['build_core_hours']:,.0f}", "yes" if r["fits"] else "no", f"{r['train_hours']:,.0f}",
         f"{r['read_bytes_per_s'] / 1e6:,.0f} MB/s", f"{r['machines_for_a_day']:,}"]
        for r in found
    ]  # fmt: skip
    header = ["frames", "store", "video", "core hours to build", "fits in memory", "hours to train",
              "to be read", "such machines to train in a day"]  # fmt: skip
    return "\n\n".join([markdown(header, lines), "Assumed: " + "; ".join(found[0]["assumptions"]) + "."])
