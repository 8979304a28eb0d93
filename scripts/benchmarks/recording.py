"""The recording half of `simulation`: a core and its parts, one process per core, datasets by several workers."""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.common import Row, row
from benchmarks.parts import LEFT_OVER, PARTS, Parts, of_environment

COLUMNS = (*PARTS, LEFT_OVER)
WARM = 2  # episodes that do not count
PATIENCE_S = 300.0  # for the processes to begin together


def pin(number: int) -> None:
    """Keep this process, and the threads it will start, on one core."""
    with suppress(AttributeError):  # Linux only
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {allowed[number % len(allowed)]})


def one_core(job: Any, episodes: int, write: bool) -> Row:
    """Record as a worker does, on one core; milliseconds a step of every episode, and of every part of it."""
    from vla.data.demonstrate import make_environment, record_episode, silence

    pin(0)
    with TemporaryDirectory(prefix="vla-benchmark-") as folder:
        silence(Path(folder) / "log")  # encoders talk
        env, features = make_environment(job.env, job.record.lead_in)
        table: Any = env.unwrapped
        dataset: Any = new_dataset(Path(folder), env, features, job) if write else None
        writes = [(dataset, "add_frame"), (dataset, "save_episode")] if write else []
        samples, steps, frames, seconds = [], 0, 0, 0.0
        parts = Parts()
        for index in range(episodes + WARM):
            if index == WARM:
                parts = Parts()
            calls = {"policy": [(table, "expert_action")], "writing": writes} | of_environment()
            with parts.around(**calls):
                start = time.perf_counter()
                shown, kept = record_episode(env, job.env, job.record, index)
                for frame in shown if write else ():
                    dataset.add_frame(frame)
                if write:
                    dataset.save_episode()
                took = time.perf_counter() - start
            if index >= WARM:
                samples.append(1000 * took / kept.steps)
                steps, frames, seconds = steps + kept.steps, frames + kept.frames, seconds + took
        if write:
            dataset.finalize()
        env.close()
    calls = dict(parts.calls) | {"steps": steps, "frames": frames}
    return {"samples_ms": samples, "parts_ms": parts.per(steps, seconds), "calls": calls}


def new_dataset(folder: Path, env: Any, features: Any, job: Any) -> Any:
    """What the recorder writes into."""
    from vla.data.lerobot_writer import create_dataset, dataset_features

    columns = dataset_features(features, env.unwrapped.feature_names)
    return create_dataset(folder / "dataset", "benchmark", features.fps, columns, job.record.vcodec, 100)


def machine(job: Any, setting: str, windows: int, seconds: float, counts: list[int]) -> list[Row]:
    """One process per core, 1 to N of them, in which experts play and every step is rendered; nothing is written."""
    times: dict[int, list[float]] = {}
    for n in counts:
        context = multiprocessing.get_context("spawn")
        with context.Manager() as manager, ProcessPoolExecutor(n, context) as pool:
            barrier = manager.Barrier(n, timeout=PATIENCE_S)
            futures = [pool.submit(play, number, job, windows, seconds, barrier) for number in range(n)]
            steps = [sum(window) for window in zip(*(future.result() for future in futures), strict=True)]
        times[n] = [1000 * seconds / all_steps for all_steps in steps]
    one = counts[0]
    return [
        row(f"experts, {n} processes", {"setting": setting, "processes": n, "window_s": seconds}, samples, 1,
            f"experts, {one} processes", times[one])
        for n, samples in times.items()
    ]  # fmt: skip


def play(number: int, job: Any, windows: int, seconds: float, barrier: Any) -> list[int]:
    """Steps of every window, which all processes begin together."""
    from vla.data.demonstrate import make_environment

    pin(number)
    env, _ = make_environment(job.env)
    table: Any = env.unwrapped
    seed, steps, ended = number, [0] * (1 + windows), True
    for window in range(1 + windows):
        barrier.wait()
        end = time.perf_counter() + (seconds if window else min(1.0, seconds))  # the first does not count
        while time.perf_counter() < end:
            if ended:
                env.reset(seed=seed)
                seed += os.cpu_count() or 1
            _, _, terminated, truncated, _ = env.step(table.expert_action())
            ended = terminated or truncated
            steps[window] += 1
    env.close()
    return steps[1:]


def to_disk(job: Any, setting: str, shard: int, counts: list[int]) -> list[Row]:
    """scripts/record.py with 1 to N workers, a shard each: milliseconds a step while they write."""
    from vla.data.record import record_demonstrations

    times: dict[int, list[float]] = {}
    for n in counts:
        with TemporaryDirectory(prefix="vla-benchmark-") as folder:
            record = replace(job.record, episodes=n * shard, shard_episodes=shard, workers=n)
            done = record_demonstrations(Path(folder) / "dataset", job.env, record)
        times[n] = [1000 * done.worker_seconds / done.steps / n]
    one = counts[0]
    return [
        row(f"dataset, {n} workers", {"setting": setting, "workers": n, "episodes": n * shard}, samples, 1,
            f"dataset, {one} workers", times[one])
        for n, samples in times.items()
    ]  # fmt: skip
