"""Scripted episodes of a simulated robot under control: scene, instruction, and what became of it. A console's part."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vla.control.console import Begin, Instruct, Status

PATIENCE_S = 30.0  # without progress: something is broken
MORE_TIME = 1.5  # than an evaluation's limit: waits and holds are part of real time


@dataclass(frozen=True)
class Trial:
    """One episode. seconds: from the instruction to the end; holds: how often the arm held meanwhile."""

    seed: int
    task: str
    success: bool
    failure: bool
    seconds: float
    steps: int
    holds: int


class Trials:
    """Feed it every Status; it says what to order next, and keeps the rows.

    The instruction is the scene's own. An episode ends with success, with failure, or when its time is over.
    """

    def __init__(self, episodes: int, seed: int) -> None:
        self.seeds = iter(range(seed, seed + episodes))
        self.rows: list[Trial] = []
        self.seed: int | None = None
        self.task = ""
        self.done = False
        self._steps = -1
        self.began, self.steps, self.holds, self.changed = 0.0, 0, 0, time.monotonic()

    def see(self, status: Status) -> Iterator[Any]:
        """Orders that follow from a status. Raises TimeoutError when nothing moves on."""
        if status.steps != self._steps:
            self._steps, self.changed = status.steps, status.time
        if status.time - self.changed > PATIENCE_S:
            raise TimeoutError(
                f"The trials do not go on. got: {status.state} ({status.reason}) for {PATIENCE_S:.0f} s. expected: an "
                "episode that ends. remedy: see the reason; a robot without success in its report cannot be scored."
            )
        if self.seed is not None and "error" in status.scene:
            raise ValueError(
                f"The robot has no scenes to try. got: {status.scene['error']}. remedy: a simulated robot."
            )
        if self.seed is None:
            yield from self._next(status)
        elif not self.task:
            ready = status.robot.get("scene") == status.scene.get("seed") == self.seed
            if ready and status.state in ("READY", "HOLD"):
                self.task, self.began, self.steps = str(status.scene["task"]), status.time, status.steps
                yield Instruct(self.task)
        else:
            self.holds += sum(after == "HOLD" for _, _, _, after, _ in status.events)
            won, lost = bool(status.robot.get("success")), bool(status.robot.get("failure"))
            seconds = status.time - self.began
            if won or lost or seconds > MORE_TIME * float(status.scene.get("limit_s", PATIENCE_S)):
                steps = status.steps - self.steps
                self.rows.append(Trial(self.seed, self.task, won, lost, round(seconds, 2), steps, self.holds))
                yield from self._next(status)

    def _next(self, status: Status) -> Iterator[Any]:
        self.seed, self.task, self.holds, self.changed = next(self.seeds, None), "", 0, status.time
        self.done = self.seed is None
        if self.seed is not None:
            yield Begin(self.seed)
