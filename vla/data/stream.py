"""Batches of a dataset larger than memory: its episodes, decoded as they are needed into a ring of frames.

    F frames of the ring   G positions in a block of the order, R blocks in its window (order.py)

Images of F frames are in memory, whatever the dataset's length; its numbers (states, actions, and 32
bytes a frame) all are. Threads decode whole episodes in the order's row to position modulo F, ahead of
the draws, and wait before they overwrite what may still be drawn. Which frames a step draws follows from
the seed and the draws before it, never from who was faster, so a resumed run is exact.
"""

from __future__ import annotations

import math
import os
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vla.checks import require
from vla.data.episodes import EpisodeReader
from vla.data.frames import FrameStore, spans
from vla.data.lerobot_v3 import DatasetFolder, download
from vla.data.normalize import Statistics
from vla.data.order import RESIDENCE, Order
from vla.data.samples import START_FRAMES, Samples
from vla.observation import Batch, Features

AHEAD = 4  # blocks of the ring beside the window, so that decoding need not wait for every draw
THREADS = 8  # that decode, at most; fewer on a machine with fewer cores


@dataclass(frozen=True)
class StreamedData:
    """A LeRobotDataset whose images stay where they are; everything else of a FrameStore is here.

    numbers: a store without images; cache: bytes of decoded frames in memory.
    """

    reader: EpisodeReader
    numbers: FrameStore
    cache: int

    @classmethod
    def open(cls, root: Path, repo_id: str, cameras: tuple[str, ...], cache_mb: float) -> StreamedData:
        """Raises ValueError or FileNotFoundError as FrameStore.open_or_build does, and for too small a cache."""
        if repo_id and not root.exists():
            download(repo_id, root)
        dataset = DatasetFolder.open(root)
        names, numeric = dataset.select_cameras(cameras), dataset.numeric()
        first, last = spans(numeric.starts, numeric.lengths)
        numbers = FrameStore(
            {}, numeric.state, numeric.action, first, last, numeric.task, numeric.tasks, dataset.fps
        )
        data = cls(EpisodeReader(dataset, names), numbers, int(cache_mb * 1e6))
        longest = int(data.lengths.max())
        require(
            data.capacity >= 2 * longest, "data.cache_mb", cache_mb,
            f"{2 * longest * data.frame_bytes / 1e6:.1f} at least, two of the longest episode in {root} "
            f"({longest} frames of {data.frame_bytes:,} bytes)", "allow more, or record shorter episodes",
        )  # fmt: skip
        return data

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def n_episodes(self) -> int:
        return self.numbers.n_episodes

    @property
    def tasks(self) -> list[str]:
        return self.numbers.tasks

    @property
    def features(self) -> Features:
        cameras = {name: (h, w) for name, (h, w, _) in self.reader.shapes.items()}
        return replace(self.numbers.features, cameras=cameras)

    def statistics(self) -> Statistics:
        """Exact ones: they need no image."""
        return self.numbers.statistics()

    @property
    def lengths(self) -> np.ndarray:
        return np.asarray(self.reader.ends - self.reader.starts, np.int64)

    @property
    def frame_bytes(self) -> int:
        """Of one frame of all cameras."""
        return sum(int(np.prod(shape)) for shape in self.reader.shapes.values())

    @property
    def capacity(self) -> int:
        """How many frames the cache holds."""
        return self.cache // self.frame_bytes


class Stream:
    """The interface of Samples: every frame once a pass, in a shuffle as wide as 0.8 of the cache.

    The share `start_share` of a batch is uniform over those frames of the window that begin an episode, and
    comes on top of the pass. `batch` and `gather` take what was drawn last: older frames may be overwritten.
    """

    resident = False

    def __init__(
        self,
        data: StreamedData,
        chunk_size: int,
        n_obs_steps: int = 1,
        device: torch.device | str = "cpu",
        start_share: float = 0.0,
        seed: int = 0,
        batch_size: int = 64,
    ) -> None:
        self.data, self.device, self.start_share = data, torch.device(device), start_share
        self.numbers = Samples(data.numbers, chunk_size, n_obs_steps)
        self.history, longest = n_obs_steps - 1, int(data.lengths.max())
        passes = 3 * len(data) + 2 * batch_size  # a longer ring of a short dataset mixes no better
        self.frames = min(data.capacity, passes + longest + self.history)
        self.room = self.frames - longest - self.history  # positions that draws may need at a time
        span = (
            batch_size + math.ceil(8 * math.sqrt(batch_size)) + 8
        )  # of a batch's draws: as many, but for chance
        block = (self.room - span) // (RESIDENCE + AHEAD)
        # A window must hold the start of an episode where those are drawn on their own.
        least = max(1, math.ceil(longest / (RESIDENCE + 1))) if start_share > 0 else 1
        needed = (longest + self.history + span + least * (RESIDENCE + AHEAD)) * data.frame_bytes / 1e6
        require(
            block >= least, "data.cache_mb", round(data.cache / 1e6, 1), f"{needed:.1f} at least for batches of "
            f"{batch_size}, the longest episode ({longest} frames) and data.start_share={start_share}",
            "allow more, or set a smaller train.batch_size",
        )  # fmt: skip
        self.order = Order(data.lengths, np.minimum(data.lengths, START_FRAMES), block, seed)
        self.ring = {
            name: torch.empty((self.frames, *shape), dtype=torch.uint8)
            for name, shape in data.reader.shapes.items()
        }
        self.threads: list[threading.Thread] = []
        self.changed = threading.Condition()
        self._stand_at(0, 0)

    def __len__(self) -> int:
        return len(self.data)

    def draw(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """Frame numbers (B,) on the CPU; waits until they are decoded.

        Raises ValueError when an episode cannot be read, and when the cache is too small for the batch.
        """
        n = round(batch_size * self.start_share)
        begin, positions = self._take(batch_size - n or batch_size)
        low, (earliest, high) = self.order.window(begin)[0], self.order.window(self.block)
        require(
            high - low <= self.room, "data.cache_mb", round(self.data.cache / 1e6, 1),
            f"room for a draw of {batch_size}, which reaches over {high - low} frames, not {self.room}",
            "allow more, or draw fewer at a time",
        )  # fmt: skip
        self._wait(low - self.history, high)
        if n:
            few, many = self.order.starts_before(earliest), self.order.starts_before(high)
            starts = self.order.starts_at(torch.randint(few, many, (n,), generator=generator).numpy())
            positions = np.concatenate([starts, positions[: batch_size - n]])
        return torch.from_numpy(self.order.frames(positions))

    def batch(self, index: Tensor) -> Batch:
        """The batch of the frames `index` (B,), on the training device."""
        return self.gather(index).map(lambda x: x.to(self.device))

    def gather(self, index: Tensor) -> Batch:
        """`batch`, on the host. Raises ValueError for frames that were not drawn last."""
        batch = self.numbers.batch(index)
        seen = self.numbers.seen(index.cpu())  # (B, T)
        slots = torch.from_numpy(self._slots(seen.numpy())).flatten()  # (B * T,)
        images = {
            name: ring.index_select(0, slots).unflatten(0, seen.shape).permute(0, 1, 4, 2, 3)
            for name, ring in self.ring.items()
        }
        return replace(batch, images=images)

    def position(self) -> dict[str, Tensor]:
        """Where the next draw begins in the order."""
        return {"stream": torch.tensor([self.block, self.offset])}

    def load_position(self, position: dict[str, Tensor]) -> None:
        """Go on where `position` was taken. Raises ValueError when it is not a stream's."""
        require("stream" in position, "data.stream", True, "false, as in the run to go on with")
        self.close()
        self._stand_at(*position["stream"].tolist())

    def close(self) -> None:
        """End the threads; the next draw starts them again."""
        with self.changed:
            self.ended.set()
            self.changed.notify_all()
        for thread in self.threads:
            thread.join()
        self._stand_at(self.block, self.offset)

    def _stand_at(self, block: int, offset: int) -> None:
        self.block, self.offset = block, offset
        self.drawn = self.order.drawn(block)  # the positions of this block
        self.low = max(0, self.order.window(block)[0] - self.history)  # positions from here on are needed
        self.floor = self.low  # before it nothing is written: its places are those of later frames already
        self.next = self.order.episode_at(self.low)  # the episode of the row that is decoded next
        self.written = self.order.episode(self.next)[1]  # positions before this one are decoded
        self.beyond: dict[int, int] = {}  # episodes decoded behind that: first and last + 1 position
        self.place = np.full(self.data.n_episodes, -1, np.int64)  # position where each was decoded to last
        self.error: BaseException | None = None
        self.ended, self.threads = threading.Event(), []

    def _take(self, n: int) -> tuple[int, np.ndarray]:
        """The block of the first of the next n positions, and those."""
        taken: list[np.ndarray] = []
        begin = None
        while n > 0:
            some = self.drawn[self.offset : self.offset + n]
            if len(some):
                begin = self.block if begin is None else begin
                taken.append(some)
                self.offset, n = self.offset + len(some), n - len(some)
            else:
                self.block, self.offset = self.block + 1, 0
                self.drawn = self.order.drawn(self.block)
        return self.block if begin is None else begin, np.concatenate(taken)

    def _wait(self, low: int, high: int) -> None:
        """Until positions low … high - 1 are decoded; those before low may be overwritten."""
        if not self.threads:
            count = min(THREADS, max(1, (os.cpu_count() or 2) - 1))
            self.threads = [
                threading.Thread(target=self._decode, name="decode", daemon=True) for _ in range(count)
            ]
            for thread in self.threads:
                thread.start()
        with self.changed:
            self.low = max(0, low)
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.error is not None or self.written >= high)
            if self.error is not None:
                raise self.error

    def _decode(self) -> None:
        """One thread: takes the next episode of the row, waits for its room, decodes it."""
        try:
            while True:
                with self.changed:
                    episode, begin = self.order.episode(self.next)
                    self.next += 1
                    end = begin + int(self.data.lengths[episode])
                    self.changed.wait_for(lambda end=end: self._over() or end <= self.low + self.frames)
                    if self._over():
                        return
                self._write(episode, begin)
                with self.changed:
                    self.place[episode] = max(begin, self.place[episode])
                    self.beyond[begin] = end
                    while self.written in self.beyond:
                        self.written = self.beyond.pop(self.written)
                    self.changed.notify_all()
        except BaseException as error:  # raised again where frames are drawn
            with self.changed:
                self.error = self.error or error
                self.changed.notify_all()

    def _over(self) -> bool:
        return self.ended.is_set() or self.error is not None

    def _write(self, episode: int, begin: int) -> None:
        for name, ring in self.ring.items():
            frames = ring.numpy()
            for i, image in enumerate(self.data.reader.frames(name, episode)):
                if self.ended.is_set():
                    return
                if begin + i >= self.floor:
                    frames[(begin + i) % self.frames] = image

    def _slots(self, frames: np.ndarray) -> np.ndarray:
        """Where in the ring the frames (B, T) are."""
        episode = np.searchsorted(self.order.first, frames, "right") - 1
        position = self.place[episode] + frames - self.order.first[episode]
        if (self.place[episode] < 0).any() or position.min() < self.low:
            raise ValueError(
                f"Frames that are not in memory. got: {len(frames)} of which {frames[position < self.low][:3]}. "
                "expected: those that were drawn last. remedy: gather a batch before the next one is drawn."
            )
        return position % self.frames
