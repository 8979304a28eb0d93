"""Batches gathered ahead of their step, by a thread, in memory that a GPU can copy from on its own."""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vla.observation import Batch


class Source(Protocol):
    """What can be drawn from: vla.data.samples.Samples, vla.data.stream.Stream, vla.data.mixture.Mixture.

    gather: `batch`, but on the host whatever the training device; position, load_position: where it stands, as
    tensors, beside the generator's; close: end its threads.
    """

    device: torch.device

    def __len__(self) -> int: ...
    @property
    def resident(self) -> bool: ...
    def draw(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor: ...
    def gather(self, index: Tensor) -> Batch: ...
    def batch(self, index: Tensor) -> Batch: ...
    def position(self) -> dict[str, Tensor]: ...
    def load_position(self, position: dict[str, Tensor]) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Ready:
    """A batch, and what to save so that a resumed run draws the one behind it next."""

    index: Tensor
    batch: Batch
    generator: Tensor
    position: dict[str, Tensor]


class Prefetch:
    """Draws and gathers on the host, `depth` batches ahead of whoever calls `next`.

    The thread begins with the first `next`: until then generator and samples may be set to a saved state.
    From then on both are the thread's, and only `generator_state` and `position` say where to go on.
    """

    def __init__(self, samples: Source, batch_size: int, generator: torch.Generator, depth: int = 2) -> None:
        if generator.device.type != "cpu":
            raise ValueError(
                f"The generator is on the wrong device. got: {generator.device}. expected: cpu, where batches are "
                "drawn ahead of time. remedy: make it with torch.Generator('cpu')."
            )
        self.samples, self.batch_size, self.generator = samples, batch_size, generator
        self.pin = torch.cuda.is_available()
        self.ready: queue.Queue[Ready | BaseException] = queue.Queue(depth)
        self.ended = threading.Event()
        self.thread: threading.Thread | None = None
        self.last: Ready | None = None
        self.error: BaseException | None = None

    def next(self) -> tuple[Tensor, Batch]:
        """Frame numbers (B,) and their batch, on the host, pinned where there is a GPU.

        Raises what drawing or gathering raised, at this and every later call.
        """
        if self.error is not None:
            raise self.error
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
            self.thread.start()
        ready = self.ready.get()
        if isinstance(ready, BaseException):
            self.error = ready
            raise ready
        self.last = ready
        return ready.index, ready.batch

    @property
    def generator_state(self) -> Tensor:
        """The generator's, behind the draw of the batch that was handed out last."""
        return self.generator.get_state() if self.last is None else self.last.generator

    @property
    def position(self) -> dict[str, Tensor]:
        """The samples' `position()`, likewise."""
        return self.samples.position() if self.last is None else self.last.position

    def close(self) -> None:
        """End the thread; batches that were not handed out are dropped. The samples are not closed."""
        self.ended.set()
        while self.thread is not None and self.thread.is_alive():
            try:
                self.ready.get_nowait()
            except queue.Empty:
                self.thread.join(0.01)

    def _run(self) -> None:
        try:
            while not self.ended.is_set():
                index = self.samples.draw(self.batch_size, self.generator)
                generator, position = self.generator.get_state(), self.samples.position()
                batch = self.samples.gather(index)
                if self.pin:
                    index, batch = index.pin_memory(), batch.map(Tensor.pin_memory)
                self.ready.put(Ready(index, batch, generator, position))
        except BaseException as error:  # raised again by `next`
            self.ready.put(error)
