"""Many processes that train one network, on the GPUs of one machine or of several.

`torchrun` or `accelerate launch` starts them, and accelerate connects them: DDP, or FSDP2 where it is asked
for (`accelerate launch --use_fsdp --fsdp_version=2`). They are ranks 0 … count - 1; each handles its part of
every batch, and rank 0 alone writes. A process that nobody launched so is on its own: the same calls do
nothing then, and accelerate is not imported. Neither is torch, by what needs only `Ranks`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from vla.config import TrainConfig, require

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from vla.observation import Batch


class Ranks:
    """One process on its own.

    index, count: which of how many ranks this is; beside: how many of them are on this machine;
    main: whether it writes; sharded: whether each rank holds a part of every weight (FSDP2);
    device: where this rank computes; None where nothing needs to know.
    """

    index, count, beside, sharded = 0, 1, 1, False

    def __init__(self, device: Any = None) -> None:
        self.device: torch.device = device

    @property
    def main(self) -> bool:
        return self.index == 0

    def prepare(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, unused: Sequence[nn.Module] = ()
    ) -> nn.Module:
        """The module whose forward is to be called; parameters and optimiser are changed in their places.

        unused: modules in it that its forward does not call, whose weights stay whole.
        """
        return module

    def part(self, batch: int) -> slice:
        """The samples of a batch that are this rank's."""
        size = batch // self.count
        return slice(self.index * size, (self.index + 1) * size)

    def share(self, samples: Any) -> Any:
        """`samples` that gather this rank's part of the frames they are given."""
        return samples

    def without_sync(self, module: nn.Module) -> AbstractContextManager[None]:
        """Backward passes whose gradients are added up among the ranks by a later one."""
        return nullcontext()

    def sum[T: Tensor | dict[str, Tensor]](self, tensors: T) -> T:
        """Over all ranks."""
        return tensors

    def gather[T](self, objects: Sequence[T]) -> list[T]:
        """Those of all ranks, in the order of ranks, on every rank."""
        return list(objects)

    def wait(self) -> None:
        """Until all ranks are here."""

    def reseed(self, seed: int, step: int) -> None:
        """Have each rank draw dropout of its own, from a state that a run resumed at `step` finds again."""

    def twin[T: nn.Module](self, model: T) -> T:
        """What rank 0 saves: of a network that will be sharded a copy, which `fill` fills; else itself."""
        return model

    def fill(self, twin: nn.Module, model: nn.Module) -> None:
        """Bring a twin up to date with its network."""

    def whole(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors in one piece, by name, on rank 0."""
        return tensors

    def print(self, message: object) -> None:
        """Once, however many ranks say it."""
        if self.main:
            print(message, flush=True)

    def __str__(self) -> str:
        return str(self.device)

    def mine[T](self, items: Sequence[T]) -> list[T]:
        """Every count-th, which `gather` brings back in another order."""
        return list(items[self.index :: self.count])

    @contextmanager
    def together(self, name: str, remedy: Callable[[], str]) -> Iterator[None]:
        """What all ranks do; ends when the last one has ended.

        name: the script's, for errors; remedy: what to do when a rank is lost.
        """
        yield


class Share:
    """Samples of which a rank gathers its part; all ranks draw the same frames. Else as vla.data.samples.Samples."""

    def __init__(self, samples: Any, ranks: Ranks) -> None:
        self.samples, self.ranks = samples, ranks

    def __getattr__(self, name: str) -> Any:
        return getattr(self.samples, name)

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, index: Tensor) -> Batch:
        return self.samples.batch(index[self.ranks.part(len(index))])

    def gather(self, index: Tensor) -> Batch:
        return self.samples.gather(index[self.ranks.part(len(index))])


def start(device: str, train: TrainConfig | None = None) -> Ranks:
    """This process's rank. Raises ConfigError, before anything is loaded, for a job that does not fit their number.

    device: as configured; of several ranks each takes a GPU of its own. train: when they train.
    """
    if launched():
        from vla.training.launched import connected

        return connected(device, train)
    from vla.device import resolve_device

    return Ranks(resolve_device(device))


def launched() -> bool:
    """Whether this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def require_even(count: int, train: TrainConfig | None) -> None:
    if train is not None:
        require(
            train.batch_size % (count * train.accumulate) == 0, "train.batch_size", train.batch_size,
            f"a multiple of {count * train.accumulate}, {count} ranks times train.accumulate={train.accumulate}",
            "it is the batch of one step over all ranks; change it, or their number",
        )  # fmt: skip


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, in one piece, on every rank; all ranks must ask for it."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def laid_out(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, the same on every rank, sharded as another of its shape is."""
    if not hasattr(other, "full_tensor") or tensor.shape != other.shape:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(other, DTensor)
    tensor = tensor.to(other.device, other.dtype)
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)
