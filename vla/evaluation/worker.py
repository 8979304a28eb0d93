"""The environment's side of an evaluation: a process that hosts some of the slots.

Commands come through a pipe; observations and actions lie in memory shared with the evaluator,
one row per slot. A worker knows nothing of policies. It imports no torch, and the environment
is imported here only, never in the evaluator's process.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from vla.evaluation.episodes import Episode
from vla.evaluation.slot import Progress, Setup, Sight, Slot, Unsuitable
from vla.observation import Features


@dataclass(frozen=True)
class Layout:
    """The arrays a worker shares with the evaluator: name -> (file, shape, dtype)."""

    arrays: dict[str, tuple[Path, tuple[int, ...], str]]

    def attach(self) -> dict[str, np.ndarray]:
        return {
            name: np.memmap(path, dtype, "r+", shape=shape)
            for name, (path, shape, dtype) in self.arrays.items()
        }


@dataclass(frozen=True)
class Opened:
    """What a worker's environments turned out to be. n_tasks: of each split it has opened; see environment.py."""

    features: Features
    n_tasks: dict[str, int]


@dataclass(frozen=True)
class Failure:
    """Why a worker gave up. refused: the user's own mistake, said in `message`; else a crash."""

    refused: bool
    message: str
    episode: Episode | None


class Host:
    """The slots of one worker and the commands they answer to."""

    def __init__(self, setup: Setup) -> None:
        first = next(iter(setup.splits))
        n_tasks: dict[str, int] = {}
        if 0 in setup.slots and len(setup.splits) > 1:  # one worker is enough
            n_tasks = look_at_splits(setup)
        self.slots = {number: Slot(setup, first) for number in setup.slots}
        slot = next(iter(self.slots.values()))
        self.opened = Opened(slot.features, {first: slot.n_tasks} | n_tasks)
        self.at: Episode | None = None  # the episode worked on, for the error message
        self.episodes: dict[int, Episode] = {}

    def attach(self, layout: Layout) -> None:
        arrays = layout.attach()
        for number, slot in self.slots.items():
            slot.attach(arrays, number)

    def begin(self, episodes: dict[int, Episode]) -> dict[int, Sight]:
        self.episodes |= episodes
        return {number: self._at(number).begin(episode) for number, episode in episodes.items()}

    def advance(self, numbers: dict[int, None]) -> dict[int, Progress]:
        return {number: self._at(number).advance() for number in numbers}

    def end(self, numbers: dict[int, None]) -> dict[int, Path | None]:
        return {number: self._at(number).end() for number in numbers}

    def _at(self, number: int) -> Slot:
        self.at = self.episodes[number]
        return self.slots[number]


def look_at_splits(setup: Setup) -> dict[str, int]:
    """Open every split's environment once, so that a mistake in the last shows before the first is played.

    Returns the number of tasks of each. Raises ValueError, naming the split, for one that cannot be used or
    differs from the first.
    """
    features: dict[str, Features] = {}
    n_tasks: dict[str, int] = {}
    for split in setup.splits:
        try:
            slot = Slot(setup, split)
        except ValueError as error:
            raise ValueError(f"Split {split!r}: {error}") from None
        except Exception as error:
            error.add_note(f"This was split {split!r}.")
            raise
        slot.close()
        features[split], n_tasks[split] = slot.features, slot.n_tasks
        expected = next(iter(features.values()))
        if slot.features != expected:
            raise ValueError(
                f"Split {split!r} does not fit the first. got: {slot.features}. expected: {expected}. "
                "remedy: give all of evaluate.splits the same cameras, resolutions, sizes and rate."
            )
    return n_tasks


def serve(connection: Connection) -> None:
    """Answer the evaluator's (command, argument) until it hangs up."""
    host: Host | None = None
    while True:
        try:
            command, argument = connection.recv()
        except (EOFError, ConnectionError):  # the evaluation is over, or its process gone
            break
        try:
            if host is None:
                host = Host(argument)
                reply: Any = host.opened
            else:
                reply = getattr(host, command)(argument)
        except Exception as error:
            refused = isinstance(error, Unsuitable) or (host is None and isinstance(error, ValueError))
            message = str(error) if refused else traceback.format_exc()
            reply = Failure(refused, message, host.at if host else None)
        try:
            connection.send(reply)
        except ConnectionError:  # it went while we worked
            break
    for slot in host.slots.values() if host else ():
        slot.close()


def main(descriptor: int) -> None:
    """The worker process; `descriptor` is its end of the pipe."""
    with Connection(descriptor) as connection:
        serve(connection)
