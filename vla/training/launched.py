"""A rank among several, connected to the others by accelerate; see vla/training/ranks.py."""

from __future__ import annotations

import copy
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from vla.config import ConfigError, TrainConfig, require
from vla.device import resolve_device
from vla.training.ranks import Ranks, Share, require_even
from vla.training.ranks import whole as one_piece

TIMEOUT = timedelta(minutes=10)  # for a rank that hangs; rank 0 may write or build for that long
GRACE_S = 10.0  # in which the launcher sees which rank ended first, and ends the others


class Launched(Ranks):
    """One of several processes.

    A batch is split evenly. Raises ConfigError when that cannot be, or the device is not there for each.
    """

    def __init__(self, device: str, train: TrainConfig | None) -> None:
        self.count, self.index = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
        self.beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        require_even(self.count, train)
        self.sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        own = resolve_device(device)
        require(
            own.index is None, "device", device, "auto, cpu or cuda: each of several ranks has a GPU of its own",
            "leave the number out",
        )  # fmt: skip
        place = int(os.environ.get("LOCAL_RANK", 0))
        if own.type == "cuda":
            require(
                self.beside <= torch.cuda.device_count(), "ranks", self.beside,
                f"at most one for each of the {torch.cuda.device_count()} GPUs here", "launch fewer",
            )  # fmt: skip
            own = torch.device("cuda", place)
        super().__init__(own)
        self.accelerator = self._connect()

    def _connect(self) -> Any:
        try:
            from accelerate import Accelerator
            from accelerate.utils import (
                DistributedDataParallelKwargs,
                DistributedType,
                FullyShardedDataParallelPlugin,
                InitProcessGroupKwargs,
            )
        except ImportError as error:
            raise ConfigError(
                "ranks", self.count, "1, as the package accelerate is not installed",
                'pip install "vla[ranks]", or start the script with python',
            ) from error  # fmt: skip
        require(
            not self.sharded or os.environ.get("FSDP_VERSION") == "2", "FSDP_VERSION",
            os.environ.get("FSDP_VERSION", "1"), "2", "accelerate launch --use_fsdp --fsdp_version=2",
        )  # fmt: skip
        # Every rank has read the same weights when they are sharded: none needs to be sent them.
        plugin = FullyShardedDataParallelPlugin(cpu_ram_efficient_loading=False) if self.sharded else None
        accelerator = Accelerator(
            cpu=self.device.type == "cpu",
            device_placement=False,  # all lies where it belongs
            mixed_precision="no",  # train.precision says
            fsdp_plugin=plugin,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=TIMEOUT),
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            ],
        )
        if plugin is not None and self.device.type == "cpu":  # accelerate shards on accelerators only
            accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
        return accelerator

    def prepare(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, unused: Sequence[nn.Module] = ()
    ) -> nn.Module:
        if self.sharded:
            self.accelerator.state.fsdp_plugin.ignored_modules = list(unused)
        # Of 1x1 convolutions: their two layouts are the same memory, but torch compares the numbers.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        prepared, _ = self.accelerator.prepare(module, optimizer)
        return prepared

    def share(self, samples: Any) -> Any:
        return Share(samples, self)

    def without_sync(self, module: nn.Module) -> AbstractContextManager[None]:
        return self.accelerator.no_sync(module)

    def sum[T: Tensor | dict[str, Tensor]](self, tensors: T) -> T:
        return self.accelerator.reduce(tensors, "sum")

    def gather[T](self, objects: Sequence[T]) -> list[T]:
        from accelerate.utils import gather_object

        return gather_object(list(objects))

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def reseed(self, seed: int, step: int) -> None:
        if not self.main:  # rank 0 goes on with the state that its checkpoint holds
            torch.manual_seed(((seed + 1) * 1_000_003 + step) * self.count + self.index)

    def twin[T: nn.Module](self, model: T) -> T:
        return copy.deepcopy(model).cpu() if self.sharded and self.main else model

    def fill(self, twin: nn.Module, model: nn.Module) -> None:
        if self.sharded:
            state = self.whole(model.state_dict())
            if self.main:
                twin.load_state_dict(state)

    def whole(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pieces = {}
        for name, tensor in tensors.items():  # one after the other, so that no GPU has to hold them all
            tensor = one_piece(tensor)
            if self.main:
                pieces[name] = tensor.cpu() if self.sharded else tensor
        return pieces

    def __str__(self) -> str:
        kind = "sharded by FSDP2" if self.sharded else "DDP"
        return f"{self.count} ranks on {self.device.type}, {kind}"

    @contextmanager
    def together(self, name: str, remedy: Callable[[], str]) -> Iterator[None]:
        """An error that all ranks meet is told once, by rank 0; one of a single rank by that one. When a
        rank is lost, ranks 0 and 1 say what to do: it may be the other.
        """

        def say(got: str) -> None:
            if self.index <= 1:
                print(
                    f"\n{name}: rank {self.index} of {self.count} cannot go on alone. got: {got}. expected: all ranks "
                    "to the end. remedy: see in the launcher's report below which ended first, and how; "
                    f"{remedy()}.", file=sys.stderr, flush=True,
                )  # fmt: skip

        try:
            with last_words(lambda: say("SIGTERM from the launcher")) as spoken:
                try:
                    yield
                    self.wait()
                    self.accelerator.end_training()
                except BaseException:
                    spoken.set()
                    raise
        except Exception as error:
            lost = is_connection(error)
            if lost:
                say(str(error).strip().splitlines()[0].rstrip("."))
            if lost or not self.main:
                time.sleep(GRACE_S)
            if lost:
                raise SystemExit(1) from error
            raise


def connected(device: str, train: TrainConfig | None) -> Launched:
    """This process's rank; its errors are those of all, and told once."""
    try:
        return Launched(device, train)
    except ConfigError:
        if os.environ["RANK"] != "0":  # which says it
            time.sleep(GRACE_S)
        raise


@contextmanager
def last_words(say: Callable[[], None]) -> Iterator[threading.Event]:
    """Say something when this process is told to end, unless the event is set, and end.

    A handler in Python would have to wait until a call to the other ranks returns; this does not.
    """
    spoken, (read, write) = threading.Event(), os.pipe()
    os.set_blocking(write, False)

    def watch() -> None:
        while number := os.read(read, 1):
            if number[0] == signal.SIGTERM:
                if not spoken.is_set():
                    say()
                os._exit(128 + signal.SIGTERM)
        os.close(read)

    before = signal.signal(signal.SIGTERM, lambda *_: None)  # so that its number is written there
    signal.set_wakeup_fd(write)
    threading.Thread(target=watch, name="last words", daemon=True).start()
    try:
        yield spoken
    finally:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, before)
        os.close(write)


def is_connection(error: Exception) -> bool:
    """Whether another rank, not this one, is what failed: gloo says so in words only."""
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )
