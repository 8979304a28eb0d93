"""Where a step's batches come from: gathered inside the step, or brought from the host ahead of it."""

from __future__ import annotations

import torch
from torch import Tensor

from vla.data.prefetch import Prefetch, Source
from vla.observation import Batch
from vla.training.state import set_generator

POSITION = "position."


class Feed:
    """Batches of a fixed size, drawn by `generator`, in tensors that a CUDA graph can read.

    Frames that lie on the training device are drawn and gathered by `take`, inside the step. Others are
    gathered by a thread ahead of time, and `advance` copies them to where `take` finds them.
    """

    def __init__(self, samples: Source, batch_size: int, generator: torch.Generator) -> None:
        self.samples, self.batch_size, self.generator = samples, batch_size, generator
        self.device = samples.device
        self.ahead = None if samples.resident else Prefetch(samples, batch_size, generator)
        self.here: tuple[Tensor, Batch] | None = None

    def advance(self) -> None:
        """Ahead of every step."""
        if self.ahead is None:
            return
        index, batch = self.ahead.next()
        if self.here is None or self.device.type == "cpu":
            self.here = index.to(self.device), batch.map(lambda x: x.to(self.device))
            return
        self.here[0].copy_(index, non_blocking=True)
        self.here[1].copy_(batch)

    def take(self) -> tuple[Tensor, Batch]:
        """The frames (B,) of this step and their batch."""
        if self.here is not None:
            return self.here
        index = self.samples.draw(self.batch_size, self.generator)
        return index, self.samples.batch(index)

    def state(self) -> dict[str, Tensor]:
        """Where drawing stands behind the batch that was taken last."""
        generator = self.ahead.generator_state if self.ahead else self.generator.get_state()
        position = self.ahead.position if self.ahead else self.samples.position()
        return {"random.samples": generator} | {POSITION + name: value for name, value in position.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`, before the first step."""
        set_generator(self.generator, state["random.samples"])
        saved = {k.removeprefix(POSITION): v for k, v in state.items() if k.startswith(POSITION)}
        self.samples.load_position(saved)

    def close(self) -> None:
        """End the threads."""
        if self.ahead is not None:
            self.ahead.close()
        self.samples.close()
