"""What simulated robots have in common: physics against a clock, their own timeout, cameras that take their time.

Physics advances in whole periods up to now, and each period takes the last command that had arrived by
then, so that neither rendering nor a late thread changes what a command does. A command is held until the
next one comes, as a servo drive does.
"""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections import deque
from typing import Any

import numpy as np

from vla.control.robot import Reading, Robot

MOST_S = 0.5  # what a robot that was not looked after catches up with at once; older time is skipped
EPSILON = 1e-9  # seconds: rounding


class Simulated(Robot):
    """A robot of MuJoCo in real time, or in lockstep for tests and sweeps.

    When no command comes for timeout_s, the servos hold the joints where they are then, until a command
    comes again. Commands that are not finite or outside of `range` are refused.
    In lockstep (realtime=False) the time is `now`, which the caller may set before `connect`, and passes by
    `advance` only; everything happens in the caller's process.

    Reading.report: success and failure (of the scene, kept until the next), task, scene (its seed), steps
    judged, and counts of timeouts, commands, refused; held_after_ms: how long after the last command the
    last timeout held; skipped_s: time that physics did not live through.
    Subclasses set period (seconds of one `_tick`) and range (2, J), and write the methods with a `_`.
    """

    period: float
    range: np.ndarray

    def __init__(self, camera_fps: float, timeout_s: float, realtime: bool, seed: int) -> None:
        for name, value, good in (
            ("camera_fps", camera_fps, camera_fps > 0),
            ("timeout_s", timeout_s, timeout_s > 0),
        ):
            if not good:
                raise ValueError(
                    f"{name}: got {value!r}, expected a positive number. remedy: correct {name}."
                )
        self.camera_fps, self.timeout_s, self.realtime, self.seed = camera_fps, timeout_s, realtime, seed
        self.now = 0.0
        self._inbox: deque[tuple[float, np.ndarray]] = deque()  # filled by another thread than emptied

    # -- Robot ---------------------------------------------------------------------------------

    def connect(self) -> None:
        self._build()
        self.reset(self.seed)

    def reset(self, seed: int, task: str | None = None) -> dict[str, Any]:
        """A new scene: its task, alternatives, and limit_s, after which an evaluation gives up.

        task: a sentence to follow instead. Raises ValueError when it means nothing there.
        """
        answer = self._reset(seed, task)
        self._inbox.clear()
        self._origin, self._ticks, self._frame = self._clock(), 0, -1
        self._command, self._heard, self._holding = self._start(), math.inf, False
        self._images: dict[str, np.ndarray] = {}
        self._stamp = self._origin
        self._counts = dict(timeouts=0, commands=0, refused=0)
        self._report: dict[str, Any] = dict(scene=seed, held_after_ms=None, skipped_s=0.0)
        return answer

    def send(self, command: np.ndarray) -> None:
        self._receive(command, self._clock())

    def follow(self, path: np.ndarray, dt: float) -> None:
        """Commands (N, J) that arrive dt seconds apart, the first one now; what is left of an earlier path is
        dropped. Only for the thread that observes.
        """
        now = self._clock()
        while self._inbox and self._inbox[-1][0] > now:
            self._inbox.pop()
        for i, command in enumerate(path):
            self._receive(command, now + i * dt)

    @property
    def commanded(self) -> np.ndarray:
        """(J,) the command that holds now."""
        due = [command for time, command in self._inbox if time <= self._clock() + EPSILON]
        return (due or [self._command])[-1]

    def catch_up(self) -> None:
        """Let physics live through the time up to now, as `observe` does. In lockstep it has already."""
        if self.realtime:
            self._advance(self._clock())

    def observe(self) -> Reading:
        self.catch_up()
        at = self._origin + self._ticks * self.period
        self._look()
        frame = math.floor((at - self._origin) * self.camera_fps + EPSILON)
        if frame > self._frame:
            self._images = {name: self._picture(name) for name in self.features.cameras}
            self._frame, self._stamp = frame, at
        return Reading(
            images=dict(self._images), stamps=dict.fromkeys(self._images, self._stamp), state=self._state(),
            joints=self._joints(), stamp=at, report=self._report | self._counts | self._judged(),
        )  # fmt: skip

    def advance(self, dt: float) -> None:
        """Lockstep: let dt seconds pass."""
        self.now += dt
        self._advance(self.now)

    # -- inside --------------------------------------------------------------------------------

    def _clock(self) -> float:
        return time.monotonic() if self.realtime else self.now

    def _receive(self, command: np.ndarray, when: float) -> None:
        command = np.array(command, np.float64)
        low, high = self.range
        if command.shape != low.shape or not ((command >= low) & (command <= high)).all():  # False for NaN
            self._counts["refused"] += 1
            return
        self._counts["commands"] += 1
        self._inbox.append((when, command))

    def _advance(self, now: float) -> None:
        behind = now - self._origin - self._ticks * self.period
        if behind > MOST_S and self.realtime:
            self._origin += behind - MOST_S
            self._report["skipped_s"] += behind - MOST_S
        while (at := self._origin + self._ticks * self.period) + self.period <= now + EPSILON:
            while self._inbox and self._inbox[0][0] <= at + EPSILON:
                self._heard, self._command = self._inbox.popleft()
                self._holding = False
            if at - self._heard > self.timeout_s - EPSILON and not self._holding:
                self._holding = True
                self._command = self._hold()
                self._counts["timeouts"] += 1
                self._report["held_after_ms"] = round(1e3 * (at - self._heard), 1)
            self._tick(self._command)
            self._ticks += 1

    @abstractmethod
    def _build(self) -> None:
        """Make the simulation."""

    @abstractmethod
    def _reset(self, seed: int, task: str | None) -> dict[str, Any]:
        """A new scene."""

    @abstractmethod
    def _start(self) -> np.ndarray:
        """The command (J,) that keeps a new scene's arm where it is."""

    @abstractmethod
    def _hold(self) -> np.ndarray:
        """The command (J,) that keeps the arm where it is now."""

    @abstractmethod
    def _tick(self, command: np.ndarray) -> None:
        """One period of physics."""

    @abstractmethod
    def _look(self) -> None:
        """Have poses follow the joints, without leaving a trace in the physics."""

    @abstractmethod
    def _picture(self, camera: str) -> np.ndarray:
        """(h, w, 3) uint8."""

    @abstractmethod
    def _state(self) -> np.ndarray:
        """(P,) float32, as the policy was trained with."""

    @abstractmethod
    def _joints(self) -> np.ndarray:
        """(J,) measured."""

    @abstractmethod
    def _judged(self) -> dict[str, Any]:
        """success, failure, task, steps."""
