"""Training batches from the frame store: one vectorised gather, no loader, no per-item Python."""

from __future__ import annotations

import warnings
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from vla.data.frames import FrameStore
from vla.observation import Batch

START_FRAMES = 3
SHARE_OF_DEVICE = 0.7  # of its free memory that frames may take; the rest is for training


def as_tensor(array: np.ndarray) -> Tensor:
    """A tensor over the same memory. Frames mapped from disk are read-only, and stay so by custom."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


class Samples:
    """Batches by frame number: history ends at the frame, the action chunk begins there.

    History is clamped at the episode's start. Chunks are clamped at its end, where
    `action_is_pad` is True. On a GPU all frames are resident when they fit; otherwise, and on
    the CPU, they are gathered from the memory-mapped store.
    """

    def __init__(
        self,
        store: FrameStore,
        chunk_size: int,
        n_obs_steps: int = 1,
        device: torch.device | str = "cpu",
        start_share: float = 0.0,
    ) -> None:
        self.device, self.store = torch.device(device), store
        self.options = (chunk_size, n_obs_steps)
        self.frames = self._home({name: as_tensor(x) for name, x in store.images.items()})
        self.state = as_tensor(store.state).to(self.device)  # (N, P)
        self.action = as_tensor(store.action).to(self.device)  # (N, A)
        privileged = store.environment_state
        self.environment_state = (
            None if privileged is None else as_tensor(privileged).to(self.device)
        )  # (N, K)
        self.task = as_tensor(store.task).to(self.device)  # (N,)
        self.first = as_tensor(store.first).to(self.device)  # (N,) the episode's first frame
        self.last = as_tensor(store.last).to(self.device)  # (N,) its last
        self.history = torch.arange(1 - n_obs_steps, 1, device=self.device)  # (T,)
        self.future = torch.arange(chunk_size, device=self.device)  # (H,)
        self.start_share = start_share
        begins = np.flatnonzero(np.arange(len(store)) - store.first < START_FRAMES)
        # Frames that begin an episode, where they are drawn.
        self.starts = as_tensor(begins).to(self.device if self.resident else "cpu")

    def __len__(self) -> int:
        return len(self.state)

    @property
    def resident(self) -> bool:
        """Whether frames lie on the training device, so that a CUDA graph can gather them."""
        return all(x.device.type == self.device.type for x in self.frames.values())

    def _home(self, frames: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.device.type != "cuda":
            return frames
        free, _ = torch.cuda.mem_get_info(self.device)
        if sum(x.nbytes for x in frames.values()) > SHARE_OF_DEVICE * free:
            return frames
        return {name: x.to(self.device) for name, x in frames.items()}

    def draw(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """Frame numbers (B,); torch's global generator when none is given.

        A share of `start_share` is uniform over the first START_FRAMES of all episodes, the rest
        over all frames. Later in an episode the hand already shows where it goes; at its start
        only the instruction does, so that is where following it is learned.
        """
        device = self.device if generator is None else generator.device
        n = round(batch_size * self.start_share)
        starts = torch.randint(len(self.starts), (n,), generator=generator, device=device)
        anywhere = torch.randint(len(self), (batch_size - n,), generator=generator, device=device)
        return torch.cat([self.starts[starts.to(self.starts.device)].to(device), anywhere])

    def batch(self, index: Tensor) -> Batch:
        """The batch of the frames `index` (B,) int64, on the training device."""
        index = index.to(self.device)
        seen = self.seen(index)  # (B, T)
        ahead = index[:, None] + self.future  # (B, H)
        last = self.last[index][:, None]
        return Batch(
            images={name: self._images(frames, seen) for name, frames in self.frames.items()},
            state=self.state[seen],
            task=self.task[index],
            action=self.action[torch.minimum(ahead, last)],
            action_is_pad=ahead > last,
            environment_state=None if self.environment_state is None else self.environment_state[index],
        )

    def seen(self, index: Tensor) -> Tensor:
        """The frames (B, T) that an observation at the frames `index` (B,) shows, oldest first."""
        return torch.maximum(index[:, None] + self.history, self.first[index][:, None])

    def gather(self, index: Tensor) -> Batch:
        """`batch`, but on the host whatever the training device."""
        return self.on_host.batch(index)

    @cached_property
    def on_host(self) -> Samples:
        return self if self.device.type == "cpu" else Samples(self.store, *self.options)

    def position(self) -> dict[str, Tensor]:
        """Where drawing stands beside its generator: nowhere, for it remembers nothing."""
        return {}

    def load_position(self, position: dict[str, Tensor]) -> None:
        """The inverse of `position`."""

    def close(self) -> None:
        """There is no thread to end."""

    def _images(self, frames: Tensor, seen: Tensor) -> Tensor:
        rows = frames.index_select(0, seen.flatten().to(frames.device))  # (B * T, h, w, 3)
        rows = rows.to(self.device).unflatten(0, seen.shape)
        return rows.permute(0, 1, 4, 2, 3)  # a view, (B, T, 3, h, w)
