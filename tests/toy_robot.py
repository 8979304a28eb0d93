"""A robot of two joints that goes where it is told at once, and fails on demand."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np

from vla.control.robot import Reading, Robot
from vla.observation import Features


class ToyRobot(Robot):
    """Its reading tells what was sent: joints are the last command, the report has when it came and how often.

    Its own timeout: it counts a timeout, and stays. The camera's picture is filled with the number of
    the reading, so that a torn one shows.
    """

    joints = ("slide", "gripper")

    def __init__(
        self,
        pixels: int = 8,
        fails: str = "",
        observe_s: float = 0.0,
        timeout_s: float = 0.1,
        report: dict[str, Any] | None = None,
        delivers: int = 0,
    ) -> None:
        """fails: the method that raises; observe_s: how long a reading takes; delivers: other pixels than promised."""
        self.features = Features({"front": (pixels, pixels)}, state_dim=3, action_dim=2, fps=10)
        self.fails, self.observe_s, self.timeout_s = fails, observe_s, timeout_s
        self.extra, self.side = report or {}, delivers or pixels

    def connect(self) -> None:
        self._maybe_fail("connect")
        self.command, self.sent_at = np.zeros(2), time.monotonic()
        self.readings = self.commands = self.timeouts = 0
        self.delay_ms: list[float] = []
        self.held_after_ms: float | None = None

    def observe(self) -> Reading:
        self._maybe_fail("observe" if self.readings else "")
        time.sleep(self.observe_s)
        self.readings += 1
        now = time.monotonic()
        if self.commands and self.held_after_ms is None and now - self.sent_at > self.timeout_s:
            self.timeouts += 1
            self.held_after_ms = 1e3 * (now - self.sent_at)
        picture = np.full((self.side, self.side, 3), self.readings % 256, np.uint8)
        report = dict(readings=self.readings, commands=self.commands, timeouts=self.timeouts, pid=os.getpid(),
                      held_after_ms=self.held_after_ms, **self.extra)  # fmt: skip
        return Reading(
            {"front": picture}, {"front": now}, np.full(3, self.readings, np.float32), self.command, now, report
        )  # fmt: skip

    def send(self, command: np.ndarray) -> None:
        """The second joint may carry the time that a test sends at."""
        self._maybe_fail("send")
        now = time.monotonic()
        self.command, self.sent_at, self.held_after_ms = command, now, None
        self.commands += 1
        self.delay_ms.append(1e3 * (now - command[1]))

    def disconnect(self) -> None:
        self._maybe_fail("disconnect")

    def delays(self) -> list[float]:
        """Milliseconds from each command's second number to its arrival."""
        return self.delay_ms

    def reset(self, seed: int) -> dict[str, int]:
        if seed < 0:
            raise ValueError(f"seed: got {seed}, expected 0 or more. remedy: count up.")
        self.command = np.full(2, float(seed))
        return {"seed": seed}

    def _maybe_fail(self, where: str) -> None:
        if where and where == self.fails:
            raise OSError(f"the toy's {where} was to fail")


class NoRobot:
    """Not a subclass of Robot."""
