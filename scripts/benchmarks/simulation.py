"""The tabletop as recording and evaluation use it, with the quick start's and configs/tabletop.yaml's environment.

Rendering against a bare mujoco.Renderer with the same flags, scenes and states. Recording and evaluation in one
process, split into physics, rendering and policy by clocks around those calls; evaluation against gymnasium's vector
environments, which render every step, as LeRobot's evaluator does. Then the whole machine, by the number of
processes. The policies are of the configurations' sizes, with random weights: they cost what trained ones do.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import recording
from benchmarks.common import Options, Row, in_fresh_process, markdown, row, take_turns, without
from benchmarks.evaluating import evaluation

CONFIGS = {"quick start": "quickstart.yaml", "tabletop": "tabletop.yaml"}
BARE, PICTURES, OBSERVATION = "mujoco.Renderer", "Cameras.picture", "Tabletop's observation"


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    scenes: int = 10  # that are rendered
    states: int = 20  # of each
    slots: int = 4  # environments side by side, at least one per core
    rounds: int = 3  # in which every way to evaluate plays an episode in each slot
    windows: int = 5  # of one process per core
    seconds: float = 3.0  # a window
    episodes: int = 30  # that are recorded by one process
    shard: int = 40  # and by each of several


QUICK = Size(scenes=1, states=2, slots=2, rounds=1, windows=1, seconds=0.3, episodes=2, shard=1)


def run(options: Options) -> list[Row]:
    """The rows of both configurations."""
    import torch

    from vla.evaluation.pool import ONE_THREAD
    from vla.system import cores

    os.environ |= {"MUJOCO_GL": os.environ.get("MUJOCO_GL", "egl")} | dict.fromkeys(ONE_THREAD, "1")
    torch.set_num_threads(1)
    size, rows = QUICK if options.quick else Size(), []
    write = not without("writing what is recorded", "lerobot")
    processes = [1] if options.quick else counts(cores())
    for setting in CONFIGS:
        job = job_of(setting)
        rows += rendering(job, setting, size, options.peers)
        rows.append(recorded(job, setting, size, write))
        slots = max(size.slots, *processes)
        rows += evaluation(job, setting, slots, size.rounds, processes, options.device, options.peers)
        rows += recording.machine(job, setting, size.windows, size.seconds, processes)
        if write:
            rows += recording.to_disk(job, setting, size.shard, sorted({1, processes[-1]}))
        write &= not options.quick  # once is enough to see that it runs
    return rows


def job_of(setting: str) -> Any:
    """The job of a configuration. Without films: they are pictures for people."""
    from vla.config import Job, load

    job = load(Job, [str(Path(__file__).resolve().parents[2] / "configs" / CONFIGS[setting])])
    return replace(job, evaluate=replace(job.evaluate, videos=0, controls=False))


def counts(n: int) -> list[int]:
    """Numbers of processes: the powers of two below n, and n."""
    return sorted({2**i for i in range(20) if 2**i < n} | {n})


# --- rendering ----------------------------------------------------------------------------------


def rendering(job: Any, setting: str, size: Size, peers: bool) -> list[Row]:
    """All pictures of one observation: by a bare renderer, by ours, and within the observation."""
    import mujoco

    from vla.environment import make_env

    env, features = make_env(job.env.id, job.env.kwargs)
    table: Any = env.unwrapped
    renderer = mujoco.Renderer(table.model, table.pixels, table.pixels)
    for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
        renderer.scene.flags[flag] = False

    def bare(data: Any) -> dict[str, np.ndarray]:
        pictures = {}
        for camera in table.cameras:
            renderer.update_scene(data, camera)
            pictures[camera] = renderer.render()
        return pictures

    def ours(data: Any) -> dict[str, np.ndarray]:
        return {camera: table.view.picture(data, camera, table.pixels) for camera in table.cameras}

    def observe(data: Any) -> dict[str, np.ndarray]:
        table.data = data
        return table._observe()

    ways = (
        {BARE: bare, PICTURES: ours, OBSERVATION: observe}
        if peers
        else {PICTURES: ours, OBSERVATION: observe}
    )
    times: dict[str, list[float]] = {name: [] for name in ways}
    own = table.data
    for states in scenes(env, size):
        same = all(np.array_equal(bare(states[0])[c], ours(states[0])[c]) for c in table.cameras)
        if not same:
            raise RuntimeError(
                f"{setting}: got other pictures from Cameras than from mujoco.Renderer, expected equal ones. "
                "remedy: this is a defect; report it."
            )
        calls = {name: partial(next, in_turn(way, states)) for name, way in ways.items()}
        for name, samples in take_turns(calls, size.states, warm=2).items():
            times[name] += samples
        table.data = own
    renderer.close()
    env.close()
    params = {
        "setting": setting,
        "cameras": len(features.cameras),
        "pixels": table.pixels,
        "scenes": size.scenes,
    }
    against = {"peer": BARE, "peer_ms": times[BARE]} if peers else {}
    return [row(name, params, samples, params["cameras"], **against) for name, samples in times.items()]


def in_turn(way: Callable[[Any], Any], states: list[Any]) -> Iterator[Any]:
    """What a way to render makes of one state after another."""
    return (way(state) for state in cycle(states))


def scenes(env: Any, size: Size) -> Iterator[list[Any]]:
    """States of an episode that the expert plays, of one scene after another."""
    for seed in range(size.scenes):
        env.reset(seed=seed)
        states, ended = [], False
        while not ended and len(states) < size.states:
            states.append(copy.copy(env.unwrapped.data))
            _, _, terminated, truncated, _ = env.step(env.unwrapped.expert_action())
            ended = terminated or truncated
        yield states


def recorded(job: Any, setting: str, size: Size, write: bool) -> Row:
    """One core records, with what LeRobot's writer costs there."""
    found = in_fresh_process(recording.one_core, job, size.episodes, write)
    params = {"setting": setting, "episodes": size.episodes, "written": write}
    return row("recording", params, found.pop("samples_ms"), 1) | found


# --- tables -------------------------------------------------------------------------------------


def table(rows: list[Row]) -> str:
    """Rendering; the parts of a step in one process; the whole machine."""
    pictures, split_rows, machine = [], [], []
    for r in rows:
        where, times = [r["params"]["setting"], r["name"]], [f"{r['p50_ms']:.2f} ms", f"{r['p99_ms']:.2f} ms"]
        ratio = f"{r['ratio_to_peer']:.2f}× {r['peer']}" if "peer" in r else ""
        speed = f"{r['items_per_s']:,.0f}"
        if "scenes" in r["params"]:
            pictures.append([*where, *times, speed, ratio])
        elif "parts_ms" in r:
            parts = [f"{r['parts_ms'].get(part, 0):.2f}" for part in recording.COLUMNS]
            shown = r["calls"]["rendering"] / r["calls"]["steps"]
            split_rows.append([*where, speed, *parts, f"{shown:.2f}", ratio])
        else:
            machine.append([*where, times[0], speed, ratio])
    return "\n\n".join([
        markdown(["setting", "pictures of an observation", "p50", "p99", "pictures/s", "time against"], pictures),
        markdown(["setting", "one process", "steps/s", *[f"{c} ms" for c in recording.COLUMNS], "pictures a step",
                  "time against"], split_rows),
        markdown(["setting", "the machine", "a step", "steps/s", "time against"], machine),
    ])  # fmt: skip
