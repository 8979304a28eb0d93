"""Records demonstrations of a gymnasium environment's own expert: a LeRobotDataset v3.0, or a frame store.

Worker processes record shards of episodes into `<root>.parts/`; a finished shard is renamed to
its place, so a killed run continues with the shards it lacks. In the end the shards become
`<root>`, complete or not at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vla.config import EnvConfig, RecordConfig
from vla.data.demonstrate import SHARD, Failed, Recorded, work
from vla.data.seeds import require_seeds, shard_episodes
from vla.system import cores

SUMMARY = Path("meta") / "recording.json"
# What fields that came later were in recordings that do not name them.
EARLIER = {"format": "lerobot", "environment_state": False}
# Processes share the cores, so each gets one; libraries read these when they are imported.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "SVT_LOG": "1"}


@dataclass(frozen=True)
class Recording:
    """What was recorded, and what it took; `<root>/meta/recording.json`.

    content: the configuration behind it; episodes: one `Recorded` each, with its seed;
    seconds: wall time of the run that finished; worker_seconds: of all processes and runs;
    steps include failed attempts, frames are those kept.
    """

    content: dict[str, Any]
    frames: int
    attempts: int
    success_rate: float
    steps: int
    seconds: float
    worker_seconds: float
    steps_per_worker_second: float
    episodes: list[dict[str, Any]]

    @classmethod
    def load(cls, root: Path) -> Recording:
        return cls(**json.loads((root / SUMMARY).read_text(encoding="utf-8")))

    def __str__(self) -> str:
        return (
            f"{len(self.episodes)} episodes, {self.frames} frames, {self.attempts} attempts "
            f"({self.success_rate:.1%} succeeded), {self.seconds:.0f} s"
        )


def record_demonstrations(root: Path, env: EnvConfig, record: RecordConfig) -> Recording:
    """Record `record.episodes` successful episodes into `root`, or what a killed run left of them.

    Returns at once when the dataset is there. Raises ValueError when what is there was recorded
    with another configuration, RuntimeError when a worker fails.
    """
    require_seeds(record)
    wanted = content(env, record)
    parts = root.with_name(root.name + ".parts")
    if done := finished(root, parts, wanted):
        return done
    parts.mkdir(parents=True, exist_ok=True)
    with alone(parts):  # another recorder may have finished before the lock was ours
        return finished(root, parts, wanted) or record_parts(root, parts, env, record, wanted)


def finished(root: Path, parts: Path, wanted: dict[str, Any]) -> Recording | None:
    """The recording in `root`, or None when nothing is there. Raises ValueError when something else is."""
    if (root / SUMMARY).is_file():
        done = Recording.load(root)
        require_same(done.content, wanted, root)
        shutil.rmtree(parts, ignore_errors=True)  # of a run killed after its last step
        return done
    if root.exists() and any(root.iterdir()):
        raise ValueError(
            f"The dataset's place is taken. got: {root}, without {SUMMARY}. expected: nothing there. "
            "remedy: set data.root or output to another folder, or move that one away."
        )
    return None


def record_parts(
    root: Path, parts: Path, env: EnvConfig, record: RecordConfig, wanted: dict[str, Any]
) -> Recording:
    start = time.perf_counter()
    config = parts / "config.json"
    if config.is_file() and any(
        parts.glob("shard_?????")
    ):  # what is finished must not be mixed with other data
        require_same(json.loads(config.read_text(encoding="utf-8")), wanted | sharding(record), parts)
    else:
        shutil.rmtree(parts / "merged", ignore_errors=True)  # of another configuration
        unfinished = config.with_suffix(".tmp")
        unfinished.write_text(json.dumps(wanted | sharding(record)), encoding="utf-8")
        unfinished.rename(config)

    merged = parts / "merged"
    n_shards = -(-record.episodes // record.shard_episodes)
    run_workers(parts, env, record, n_shards, merged)
    summary = summarise(parts, n_shards, env, record, time.perf_counter() - start)
    (merged / SUMMARY).parent.mkdir(exist_ok=True)
    (merged / SUMMARY).write_text(json.dumps(asdict(summary), indent=1) + "\n", encoding="utf-8")
    merged.rename(root)
    shutil.rmtree(parts)
    return summary


def content(env: EnvConfig, record: RecordConfig) -> dict[str, Any]:
    """The part of the configuration that decides what the dataset holds, as JSON gives it back."""
    fields = asdict(record)
    for name in ("workers", "shard_episodes"):
        del fields[name]
    return json.loads(json.dumps(asdict(env) | fields))


def sharding(record: RecordConfig) -> dict[str, Any]:
    return {"shard_episodes": record.shard_episodes}


def require_same(found: dict[str, Any], wanted: dict[str, Any], where: Path) -> None:
    found = EARLIER | found
    different = sorted(name for name in wanted if found.get(name) != wanted[name])
    if different:
        raise ValueError(
            f"{where} was recorded with another configuration. got: "
            + ", ".join(f"{name}={found.get(name)!r}" for name in different)
            + ". expected: "
            + ", ".join(f"{name}={wanted[name]!r}" for name in different)
            + f". remedy: remove {where} to record again, or set output or data.root to another folder."
        )


@contextlib.contextmanager
def alone(parts: Path) -> Iterator[None]:
    """Hold the folder against a second recorder; the lock ends with this process, however it ends."""
    with open(parts / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"{parts} is being recorded. got: a lock held by another process. expected: one recorder. "
                "remedy: wait for it, or end it."
            ) from None
        yield


@contextlib.contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables for the processes started meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@dataclass
class Worker:
    """A recording process, the pipe to it, its log, and what it is at."""

    process: BaseProcess
    pipe: Connection
    log: Path
    order: Any = None

    @classmethod
    def start(cls, env: EnvConfig, record: RecordConfig, parts: Path, number: int) -> Worker:
        context = multiprocessing.get_context("spawn")  # forking would copy OpenGL and thread state
        pipe, theirs = context.Pipe()
        log = parts / f"worker_{number}.log"
        # datasets leaves a copy of every file it reads in its cache
        with environment(ENVIRONMENT | {"HF_DATASETS_CACHE": str(parts / "cache")}):
            process = context.Process(target=work, args=(env, record, parts, log, theirs), daemon=True)
            process.start()
        theirs.close()  # so that the worker's death shows as the end of the pipe
        return cls(process, pipe, log)

    def give(self, order: Any) -> None:
        self.order = order
        with contextlib.suppress(BrokenPipeError):  # shows when receiving
            self.pipe.send(order)

    def receive(self) -> Any:
        """The next message. Raises RuntimeError when the worker failed or died."""
        what = f"shard {self.order}" if isinstance(self.order, int) else "the merge of all shards"
        try:
            message = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(10)
            message = Failed(
                f"its process died with exit code {self.process.exitcode}; it wrote:\n{tail(self.log)}"
            )
        if isinstance(message, Failed):
            raise RuntimeError(
                f"Recording {what} failed: {message.text} (log: {self.log}). "
                "What is finished is kept: mend the cause and run the command again."
            )
        return message


def tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else ""


def run_workers(parts: Path, env: EnvConfig, record: RecordConfig, n_shards: int, merged: Path) -> None:
    """Record the missing shards in parallel, then merge all of them into `merged`."""
    shards = [shard for shard in range(n_shards) if not (parts / f"shard_{shard:05d}").exists()]
    missing = sum(len(shard_episodes(record, shard)) for shard in shards)
    n_workers = max(1, min(record.workers or cores(), len(shards)))
    workers: list[Worker] = []
    bar = tqdm(total=record.episodes, initial=record.episodes - missing, desc="record", unit="episode")
    bar.set_postfix_str("starting workers")
    start: float | None = None
    steps = 0

    def show(episode: Recorded) -> None:
        nonlocal start, steps
        if start is None:  # the clock starts with the first episode: importing lerobot takes long
            start = time.perf_counter()
        else:
            steps += episode.steps
            bar.set_postfix_str(f"{steps / (time.perf_counter() - start):.0f} steps/s", refresh=False)
        bar.update()

    try:
        workers += [Worker.start(env, record, parts, number) for number in range(n_workers)]
        obey(workers, shards, show)
        bar.set_postfix_str("merging shards")
        obey(workers[:1], [(n_shards, merged)], show)
        for worker in workers:
            worker.give(None)
            worker.process.join(30)
    finally:
        bar.close()
        for worker in workers:
            worker.process.kill()
            worker.process.join()


def obey(workers: list[Worker], orders: list[Any], show: Callable[[Recorded], None]) -> None:
    """Have the workers carry out the orders, one at a time each."""
    waiting = deque(orders)
    busy: dict[Any, Worker] = {}
    for worker in workers[: len(orders)]:
        worker.give(waiting.popleft())
        busy[worker.pipe] = worker
    while busy:
        for pipe in wait(list(busy)):
            worker = busy[pipe]
            message = worker.receive()
            if isinstance(message, Recorded):
                show(message)
            elif waiting:
                worker.give(waiting.popleft())
            else:
                del busy[pipe]


def summarise(parts: Path, n_shards: int, env: EnvConfig, record: RecordConfig, seconds: float) -> Recording:
    shards = [
        json.loads((parts / f"shard_{shard:05d}" / SHARD).read_text(encoding="utf-8"))
        for shard in range(n_shards)
    ]
    episodes = [Recorded(**episode) for shard in shards for episode in shard["episodes"]]
    attempts, steps = sum(e.attempts for e in episodes), sum(e.steps for e in episodes)
    worker_seconds = sum(shard["seconds"] for shard in shards)
    return Recording(
        content=content(env, record),
        frames=sum(e.frames for e in episodes),
        attempts=attempts,
        success_rate=len(episodes) / attempts,
        steps=steps,
        seconds=round(seconds, 2),
        worker_seconds=round(worker_seconds, 2),
        steps_per_worker_second=round(steps / worker_seconds, 1),
        episodes=[asdict(e) for e in episodes],
    )
