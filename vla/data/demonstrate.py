"""What one recording process does: the expert plays episodes, and a writer keeps them as one shard."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from vla.config import EnvConfig, RecordConfig
from vla.data.frames_writer import FOLDER, FrameShard, join_shards
from vla.data.lerobot_writer import SHORTEST, LeRobotShard, join_datasets
from vla.data.seeds import ATTEMPTS, attempt_seed, carries_noise, require_seeds, shard_episodes
from vla.environment import enable_images, enable_last_images, make_env, n_tasks
from vla.observation import ACTION, ENVIRONMENT_STATE, IS_SUCCESS, STATE, TASK, Features, camera_keys

SHARD = "shard.json"
LEAD_IN_HELD = 3  # steps that a random action of the lead-in is held


@dataclass(frozen=True)
class Recorded:
    """One kept episode: the seed of its scene, the price of getting it, and its instruction."""

    index: int
    seed: int
    attempts: int
    noise: bool
    frames: int
    steps: int  # environment steps, failed attempts included
    task: str = ""  # of recordings older than this field


@dataclass(frozen=True)
class Failed:
    """A worker's last message: what went wrong, for the user."""

    text: str


def make_environment(
    config: EnvConfig, lead_in: int = 0, environment_state: bool = False
) -> tuple[Any, Features]:
    """The environment and its sizes. Raises ValueError when it cannot demonstrate.

    lead_in: as `demonstrate` takes it; random actions need bounds to be drawn from.
    environment_state: whether it has to tell that.
    """
    env, features = make_env(config.id, config.kwargs)
    if not callable(getattr(env.unwrapped, "expert_action", None)):
        raise ValueError(
            f"{config.id} has no expert. got: no method expert_action(). "
            "expected: env.unwrapped.expert_action() -> (A,) float32. "
            "remedy: add it, or record the data another way."
        )
    if environment_state and not callable(getattr(env.unwrapped, "environment_state", None)):
        raise ValueError(
            f"{config.id} does not tell where things are. got: no method environment_state() with "
            "record.environment_state=true. expected: env.unwrapped.environment_state() -> (K,) float32. "
            "remedy: add it, or set record.environment_state=false."
        )
    bounds: Any = env.action_space
    if lead_in and not np.isfinite([bounds.low, bounds.high]).all():
        raise ValueError(
            f"{config.id} does not bound its actions, which random motion needs. got: {bounds} with "
            f"record.lead_in={lead_in}. expected: a Box with finite bounds. "
            "remedy: set record.lead_in=0, or bound the action space in a wrapper."
        )
    enable_last_images(env, False)  # what ends an episode is no frame
    return env, features


def demonstrate(
    env: Any,
    seed: int,
    noise: float,
    tail_steps: int,
    lead_in: int = 0,
    instruction: int = 0,
    environment_state: bool = False,
) -> tuple[list[dict[str, Any]] | None, int]:
    """One attempt: the frames if it succeeded, else None, and the number of steps it took.

    An episode shorter than SHORTEST shows nothing and counts as failed.

    The executed action carries Gaussian noise; the label is the expert's own, so that the data
    shows how to come back from where the noise led. Both are clipped to the action space.
    lead_in: at most so many steps of random motion come first and are not recorded: episodes then
    begin anywhere, and the way the hand moves does not give the instruction away.
    instruction: 0 is the scene's own, n its n-th alternative, counted around.
    environment_state: whether frames hold the environment's own.
    """
    rng = np.random.default_rng((seed, 1 + instruction))
    low, high = env.action_space.low, env.action_space.high
    led = int(rng.integers(lead_in + 1))
    enable_images(env, led == 0 and instruction == 0)  # only of what is recorded
    observation, info = env.reset(seed=seed)
    if instruction:
        choices = [None, *info.get("alternatives", [])]
        task = choices[instruction % len(choices)]
        enable_images(env, led == 0)
        observation, info = env.reset(seed=seed, options=None if task is None else {TASK: task})
    action = np.zeros_like(low)
    for step in range(led):
        if step % LEAD_IN_HELD == 0:
            action = rng.uniform(low, high).astype(np.float32)
        enable_images(env, step + 1 == led)  # only the last one begins the episode
        observation, _, terminated, truncated, info = env.step(action)
        if terminated or truncated:
            enable_images(env, True)
            return None, step + 1
    frames: list[dict[str, Any]] = []
    remaining: int | None = None  # steps to keep after the first success
    while remaining is None or remaining > 0:
        label = np.clip(np.asarray(env.unwrapped.expert_action(), np.float32), low, high)
        frame = {key: np.array(observation[key]) for key in [*camera_keys(observation), STATE]}
        if environment_state:
            frame[ENVIRONMENT_STATE] = np.array(env.unwrapped.environment_state(), np.float32)
        frames.append(frame | {ACTION: label, TASK: info[TASK]})
        executed = label + rng.normal(0, noise, label.shape) if noise else label
        observation, _, terminated, truncated, info = env.step(
            np.clip(executed, low, high).astype(np.float32)
        )
        if remaining is not None:
            remaining -= 1
        elif info[IS_SUCCESS]:
            remaining = tail_steps
        if terminated or truncated:
            break
    kept = remaining is not None and len(frames) >= SHORTEST
    return (frames if kept else None), led + len(frames)


def record_episode(
    env: Any, config: EnvConfig, record: RecordConfig, index: int
) -> tuple[list[dict[str, Any]], Recorded]:
    """Try until the expert succeeds. Raises RuntimeError after ATTEMPTS failures."""
    tasks = n_tasks(env)
    noisy = carries_noise(record, index, tasks)
    noise, told = record.noise if noisy else 0.0, index % record.instructions_per_scene
    steps = 0
    for attempt in range(ATTEMPTS):
        seed = attempt_seed(record, index, attempt, tasks)
        frames, taken = demonstrate(
            env, seed, noise, record.tail_steps, record.lead_in, told, record.environment_state
        )
        steps += taken
        if frames is not None:
            task = frames[0][TASK]
            return frames, Recorded(index, seed, attempt + 1, noisy, len(frames), steps, task)
    raise RuntimeError(
        f"The expert of {config.id} failed. got: {ATTEMPTS} failed attempts at episode {index}, "
        f"the first with seed {attempt_seed(record, index, 0)}. expected: a success. "
        "remedy: watch that seed, or lower record.noise."
    )


def write_shard(
    env: Any,
    features: Features,
    config: EnvConfig,
    record: RecordConfig,
    shard: int,
    parts: Path,
    report: Connection,
) -> None:
    """Record one shard in the form of record.format; it appears complete or not at all."""
    if record.format == "lerobot":
        importlib.import_module("lerobot.datasets")  # takes long, once for each process
    start = time.perf_counter()
    unfinished = parts / f"shard_{shard:05d}.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)  # of a killed run
    if record.format == "frames":
        writer = FrameShard(unfinished, features)
    else:
        names = getattr(env.unwrapped, "feature_names", None)
        writer = LeRobotShard(unfinished, features, names, record.vcodec, record.shard_episodes)
    episodes = []
    for index in shard_episodes(record, shard, n_tasks(env)):
        frames, recorded = record_episode(env, config, record, index)
        writer.add(frames)
        episodes.append(asdict(recorded))
        report.send(recorded)
    writer.close()
    summary = {"seconds": time.perf_counter() - start, "episodes": episodes}
    (unfinished / SHARD).write_text(json.dumps(summary), encoding="utf-8")
    os.rename(unfinished, parts / f"shard_{shard:05d}")


def merge_shards(parts: Path, n_shards: int, target: Path, form: str = "lerobot") -> None:
    """Join finished shards, in order, to the dataset `target`; form: as record.format."""
    shards = [parts / f"shard_{shard:05d}" for shard in range(n_shards)]
    if form == "lerobot":
        return join_datasets(shards, target)
    summaries = [json.loads((shard / SHARD).read_text(encoding="utf-8")) for shard in shards]
    episodes = [[(e["frames"], e["task"]) for e in summary["episodes"]] for summary in summaries]
    join_shards(shards, episodes, target / FOLDER)


def silence(log: Path) -> None:
    """Send this process's output to a file: encoders and libraries write to the terminal as they like."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def work(config: EnvConfig, record: RecordConfig, parts: Path, log: Path, orders: Connection) -> None:
    """A worker process: obey shard numbers and a merge's target, report episodes, end on None.

    Reports a Recorded for each episode, the order itself when it is done, or a Failed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    silence(log)
    env = None
    try:
        # First: it may fail, and importing lerobot takes long.
        env, features = make_environment(config, record.lead_in, record.environment_state)
        require_seeds(record, n_tasks(env))
        if record.format == "lerobot":
            importlib.import_module("datasets").disable_progress_bars()
        while (order := orders.recv()) is not None:
            if isinstance(order, int):
                write_shard(env, features, config, record, order, parts, orders)
            else:
                n_shards, target = order
                merge_shards(parts, n_shards, target, record.format)
            orders.send(order)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        pass  # the parent is gone
    except Exception as error:
        traceback.print_exc()
        orders.send(Failed(f"{type(error).__name__}: {error}"))
    finally:
        if env is not None:
            env.close()
