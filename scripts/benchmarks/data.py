"""Training batches from the frame store, from a stream and from LeRobot's reader.

The same recorded frames of the tabletop, stored as images (PNG in parquet), as LeRobot's default video (AV1) and
as this project's (H.264), are read at random in batches, each with chunks of actions: by the frame store, and by
LeRobotDataset through torch's DataLoader, as LeRobot's trainer reads, without workers and with two. Every
process computes on one thread, as workers do. The stream (data.stream) holds half of the frames and decodes in threads
of its own; like the workers it has the machine to itself, for whole passes of the data. The items of a batch are
compared in the same run, and one that differs ends it without a number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.common import Options, Row, markdown, milliseconds, row

Samples = dict[str, list[float]]

STORE, STREAM, PEER, BUILDING = "frame store", "stream", "LeRobotDataset", "building the store"
STORAGES = {"images": "", "video, AV1": "libsvtav1", "video, H.264": "h264"}  # name -> codec
EPISODE = 100  # frames
OFTEN = 10  # batches of the store in a turn; one of LeRobot's takes longer than all of them
WORKERS = 2
STEADY = 2  # batches of a turn with workers, after one each that fills their queues
TOLERANCE = {"torchcodec": 2}  # of 255: its conversion to RGB is not PyAV's, with which the store decodes


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    pixels: tuple[int, ...] = (128, 224)
    chunks: tuple[int, ...] = (16, 50)
    batch: int = 32
    episodes: int = 10
    rounds: tuple[int, int] = (8, 60)  # at least and at most, as `seconds` allow
    seconds: float = 15.0  # of turns without workers
    worker_rounds: int = 3


QUICK = Size(pixels=(64,), chunks=(4,), batch=4, episodes=1, rounds=(2, 2), worker_rounds=1)


def run(options: Options) -> list[Row]:
    """Building times and batches of every storage, size and chunk."""
    import torch

    torch.set_num_threads(1)
    size, rows = QUICK if options.quick else Size(), []
    with TemporaryDirectory(prefix="vla-benchmark-") as folder:
        for pixels in size.pixels:
            frames = record(pixels, size.episodes)
            for storage in STORAGES:
                root = Path(folder) / f"{pixels} {storage}"
                write(root, storage, frames, pixels)
                rows += measure(root, {"storage": storage, "pixels": pixels}, size)
    return rows


def measure(root: Path, what: Row, size: Size) -> list[Row]:
    """The rows of one dataset."""
    from vla.data.frames import FrameStore

    start = time.perf_counter()
    store = FrameStore.open_or_build(root)
    built = 1000 * (time.perf_counter() - start)
    rows = [row(BUILDING, what | {"frames": len(store)}, [built], len(store))]
    decoders = ["PIL"] if what["storage"] == "images" else available_decoders()
    peer = f"{PEER}, {decoders[-1]}"  # torchcodec where it loads, which is what LeRobot takes then
    datasets = {
        chunk: {decoder: lerobot_reader(root, decoder, chunk, store.fps) for decoder in decoders}
        for chunk in size.chunks
    }
    # First: LeRobot keeps torchcodec's decoders open, and forked workers would share their files with this process.
    samples = {chunk: with_workers(readers, size) for chunk, readers in datasets.items()}
    for chunk, apart in samples.items():
        apart[STREAM] = streamed(root, store, chunk, size)
    for chunk, readers in datasets.items():
        notes = {STORE: {}, STREAM: {"threads": 1, "largest_difference": 0}}
        for decoder, reader in readers.items():
            difference = largest_difference(store, reader, chunk, size.batch, TOLERANCE.get(decoder, 0))
            note = {"decoder": f"{decoder} {version_of(decoder)}", "largest_difference": difference}
            notes |= {f"{PEER}, {decoder}": note, f"{PEER}, {decoder}, {WORKERS} workers": note}
        times_by_name = alternate(store, readers, chunk, size) | samples[chunk]
        for name, times in times_by_name.items():
            params = what | {"chunk": chunk, "batch": size.batch} | notes[name]
            against = beside(name, times, times_by_name[peer])
            rows.append(row(name, params, times, size.batch, peer, against))
    return rows


def beside(name: str, times: list[float], peer: list[float]) -> list[float]:
    """The peer's sample for each of a candidate's.

    Of the same round where both took turns, in which the store had OFTEN of them; workers and the stream, which ran
    apart, are held against the peer's median.
    """
    if "workers" in name or name == STREAM:
        return [float(np.median(peer))] * len(times)
    return [sample for sample in peer for _ in range(len(times) // len(peer))]


def record(pixels: int, episodes: int) -> list[list[dict[str, Any]]]:
    """Episodes of EPISODE frames on the tabletop, the arm moved at random."""
    from vla.environment import make_env
    from vla.observation import ACTION, STATE, TASK

    kwargs = {"skills": ["press"], "cameras": ["front"], "pixels": pixels, "max_steps": EPISODE + 1}
    env, _ = make_env("envs:Tabletop-v0", kwargs)
    rng, recorded = np.random.default_rng(0), []
    for seed in range(episodes):
        observation, info = env.reset(seed=seed)
        frames, action = [], np.zeros(5, np.float32)
        for step in range(EPISODE):
            if step % 5 == 0:
                action = rng.uniform(-1, 1, 5).astype(np.float32)
            image, state = observation["observation.images.front"], observation[STATE]
            frames.append(
                {
                    "observation.images.front": image.copy(),
                    STATE: state.copy(),
                    ACTION: action,
                    TASK: info["task"],
                }
            )
            observation = env.step(action)[0]
        recorded.append(frames)
    env.close()
    return recorded


def write(root: Path, storage: str, episodes: list[list[dict[str, Any]]], pixels: int) -> None:
    """The episodes as a LeRobotDataset, by its own API."""
    from vla.data.lerobot_writer import create_dataset, dataset_features
    from vla.observation import ACTION, STATE, Features

    first = episodes[0][0]
    features = Features({"front": (pixels, pixels)}, len(first[STATE]), len(first[ACTION]), fps=10)
    columns = dataset_features(features)
    if storage == "images":
        columns["observation.images.front"]["dtype"] = "image"
    dataset = create_dataset(root, "benchmark", 10, columns, STORAGES[storage] or "h264", len(episodes))
    for frames in episodes:
        for frame in frames:
            dataset.add_frame(dict(frame))
        dataset.save_episode()
    dataset.finalize()


def available_decoders() -> list[str]:
    """LeRobot's, those that load here; torchcodec needs FFmpeg's libraries."""
    from lerobot.utils.import_utils import get_safe_default_video_backend

    return sorted({"pyav", get_safe_default_video_backend()})


def version_of(decoder: str) -> str:
    return metadata.version({"PIL": "pillow", "pyav": "av"}.get(decoder, decoder))


def lerobot_reader(root: Path, decoder: str, chunk: int, fps: int) -> Any:
    """A LeRobotDataset as LeRobot's trainer makes it for a policy that predicts `chunk` actions."""
    from lerobot.datasets import LeRobotDataset

    deltas = {"action": [i / fps for i in range(chunk)]}
    backend = "pyav" if decoder == "PIL" else decoder
    return LeRobotDataset(
        "local/benchmark", root=root, delta_timestamps=deltas, video_backend=backend, return_uint8=True
    )


def largest_difference(store: Any, reader: Any, chunk: int, batch: int, tolerance: int = 0) -> int:
    """Of a batch's pixels, out of 255. Raises RuntimeError unless they are within the tolerance, and all else equal."""
    import torch

    from vla.data.samples import Samples

    index = torch.randperm(len(store), generator=torch.Generator().manual_seed(0))[:batch]
    index[-1] = len(store) - 1  # a chunk that is padding but for its first action
    ours, largest = Samples(store, chunk).batch(index), 0
    for number, i in enumerate(index.tolist()):
        item = reader[i]
        picture = item["observation.images.front"]
        if picture.is_floating_point():  # of images, whatever return_uint8 says
            picture = (picture * 255).round().to(torch.uint8)
        largest = max(largest, int((ours.images["front"][number, 0].int() - picture.int()).abs().max()))
        same = {
            "observation.state": torch.equal(ours.state[number, 0], item["observation.state"]),
            "action": torch.equal(ours.action[number], item["action"]),
            "action_is_pad": torch.equal(ours.action_is_pad[number], item["action_is_pad"]),
            "task": store.tasks[int(ours.task[number])] == item["task"],
            "image": largest <= tolerance,
        }
        if not all(same.values()):
            unequal = [key for key, equal in same.items() if not equal]
            raise RuntimeError(
                f"items: got another {unequal} at frame {i} (pixels differ by {largest}), expected equal items. "
                "remedy: this is a defect; report it."
            )
    return largest


def loader(reader: Any, batch: int, workers: int = 0) -> Iterator[Any]:
    """Batches at random for ever, as LeRobot's trainer takes them."""
    import torch

    sampler = torch.utils.data.RandomSampler(reader, replacement=True, num_samples=10**9)
    return iter(torch.utils.data.DataLoader(reader, batch, sampler=sampler, num_workers=workers))


def alternate(store: Any, readers: dict[str, Any], chunk: int, size: Size) -> Samples:
    """Milliseconds of batches in this process: the store's and each reader's, in turns."""
    from vla.data.samples import Samples as Batches

    batches = Batches(store, chunk)
    candidates: dict[str, tuple[Callable[[], Any], int]] = {
        STORE: (lambda: batches.batch(batches.draw(size.batch)), OFTEN)
    }
    for decoder, reader in readers.items():
        iterator = loader(reader, size.batch)
        candidates[f"{PEER}, {decoder}"] = (lambda iterator=iterator: next(iterator), 1)
    samples: Samples = {name: [] for name in candidates}
    names, rounds, turn = list(candidates), 1, 0
    while turn < rounds:
        began = time.perf_counter()
        shift = turn % len(names)  # nobody always follows the same one
        for name in names[shift:] + names[:shift]:
            call, times = candidates[name]
            for _ in range(times):
                samples[name].append(milliseconds(call))
        if turn == 0:  # does not count, but for how many there will be
            least, most = size.rounds
            rounds += min(most, max(least, math.floor(size.seconds / (time.perf_counter() - began))))
            samples = {name: [] for name in candidates}
        turn += 1
    return samples


def with_workers(readers: dict[str, Any], size: Size) -> Samples:
    """Milliseconds a batch of each reader with workers, one sample a turn: they work while nobody else does."""
    samples: Samples = {f"{PEER}, {decoder}, {WORKERS} workers": [] for decoder in readers}
    for _ in range(size.worker_rounds):
        for decoder, reader in readers.items():
            iterator = loader(reader, size.batch, WORKERS)
            for _ in range(WORKERS):
                next(iterator)
            took = milliseconds(lambda iterator=iterator: [next(iterator) for _ in range(STEADY)])
            samples[f"{PEER}, {decoder}, {WORKERS} workers"].append(took / STEADY)
            del iterator  # ends the workers
    return samples


def streamed(root: Path, store: Any, chunk: int, size: Size) -> list[float]:
    """Milliseconds a batch of a stream, one sample for a pass; the first one, which fills its cache, does not count.

    Raises RuntimeError when its batches are not the store's.
    """
    import torch

    from vla.data.samples import Samples as Batches
    from vla.data.stream import Stream, StreamedData

    frame = sum(images[0].nbytes for images in store.images.values())
    held = max(len(store) // 2, 3 * EPISODE)
    stream = Stream(StreamedData.open(root, "", (), held * frame / 1e6), chunk, batch_size=size.batch)
    generator, batches = torch.Generator().manual_seed(0), Batches(store, chunk)
    samples = []
    try:
        count = -(-len(store) // size.batch)
        for turn in range(1 + size.worker_rounds):
            took = milliseconds(
                lambda: [stream.batch(stream.draw(size.batch, generator)) for _ in range(count)]
            )
            samples += [took / count] if turn else []
        index = stream.draw(size.batch, generator)
        mine, other = ([*b.images.values(), b.state, b.action, b.action_is_pad, b.task]
                       for b in (stream.batch(index), batches.batch(index)))  # fmt: skip
        if not all(torch.equal(a, b) for a, b in zip(mine, other, strict=True)):
            raise RuntimeError(
                "items: got another batch from the stream than from the store, expected equal ones. remedy: this is a "
                "defect; report it."
            )
    finally:
        stream.close()
    return samples


def table(rows: list[Row]) -> str:
    """A line for each way to read, held against LeRobot's reader in one process; then the building."""
    read, built = [], []
    for r in rows:
        p = r["params"]
        where = [p["storage"], str(p["pixels"])]
        if r["name"] == BUILDING:
            seconds, speed = f"{r['p50_ms'] / 1000:.2f}", f"{r['items_per_s']:,.0f}"
            built.append([*where, str(p["frames"]), seconds, speed])
        else:
            times = [f"{r['items_per_s']:,.0f}", f"{r['p50_ms']:.2f} ms", f"{r['p99_ms']:.2f} ms"]
            read.append(
                [*where, str(p["chunk"]), r["name"], *times, str(r["n"]), f"{1 / r['ratio_to_peer']:,.2f}×"]
            )
    header = ["storage", "px", "chunk", "reader", "samples/s", "batch p50", "p99", "n",
              "as fast as LeRobot's"]  # fmt: skip
    return (
        f"{markdown(header, read)}\n\n{markdown(['building', 'px', 'frames', 'seconds', 'frames/s'], built)}"
    )
