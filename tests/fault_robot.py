"""A robot that writes down every command it gets, and whose sensors fail when a test says so.

    RECORDS   what a row of the command log is: number, time, command (J,)

Joints go where they are told at once. Its own timeout: after `timeout_s` without a command it holds, and
counts that.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from vla.control.robot import Reading, Robot
from vla.observation import Features

PIXELS = 32


def record(n: int) -> np.dtype:
    """A row of the log for n joints. number: of the controller's command, by its count; 0: begun anew, at rest."""
    return np.dtype([("number", "i8"), ("time", "f8"), ("command", "f8", n)])


class FaultRobot(Robot):
    """A reading's pictures count up, unless frozen; its state is the joints.

    faults: a file with a JSON object, changed while the robot runs (the test replaces it as a whole):
      freeze: [cameras] whose picture repeats, stamped anew     unstamped: [cameras] whose stamps stop
      nan: joints are not numbers     stall: observe does not return     raise: observe raises
    """

    def __init__(
        self,
        log: str,
        faults: str,
        n: int = 7,
        cameras: tuple[str, ...] = ("front", "wrist"),
        timeout_s: float = 0.1,
    ) -> None:
        self.features = Features(dict.fromkeys(cameras, (PIXELS, PIXELS)), n, n, 10)
        self.joints = tuple(f"joint{i}" for i in range(1, n + 1))
        self.log, self.file, self.timeout_s = log, Path(faults), timeout_s

    def connect(self) -> None:
        self.out = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.faults: dict[str, Any] = {}
        self.changed = 0
        self.readings = self.commands = self.timeouts = 0
        self.held_after_ms: float | None = None
        self.scene: int | None = None
        self.images: dict[str, np.ndarray] = {}
        self.stamps: dict[str, float] = {}
        self.at = np.zeros(len(self.joints))
        self._write(0, self.at)

    def disconnect(self) -> None:
        os.close(self.out)

    def reset(self, seed: int) -> dict[str, Any]:
        """Stand somewhere else, at rest."""
        self.at = np.full(len(self.joints), 0.01 * (seed % 10))
        self.scene = seed
        self._write(0, self.at)
        return {"task": "swing", "limit_s": 1.0}

    def send(self, command: np.ndarray) -> None:
        # Which one it is only the host knows: on a busy machine the newest command overtakes others.
        self._write(sys._getframe(1).f_locals["self"].commands.number, command)
        self.commands += 1
        self.held_after_ms = None
        self.at = command

    def observe(self) -> Reading:
        self._look_for_faults()
        while self.faults.get("stall"):
            time.sleep(0.005)
            self._look_for_faults()
        if self.faults.get("raise"):
            raise OSError("the test's fault")
        now = time.monotonic()
        self._hold(now)
        self.readings += 1
        for i, name in enumerate(self.features.cameras):
            if name not in self.faults.get("freeze", ()) or name not in self.images:
                self.images[name] = np.full((PIXELS, PIXELS, 3), (self.readings + i) % 251, np.uint8)
            if name not in self.faults.get("unstamped", ()) or name not in self.stamps:
                self.stamps[name] = now
        joints = np.full_like(self.at, np.nan) if self.faults.get("nan") else self.at
        report = {"commands": self.commands, "timeouts": self.timeouts, "held_after_ms": self.held_after_ms,
                  "pid": os.getpid(), "scene": self.scene, "faults": sorted(self.faults)}  # fmt: skip
        return Reading(dict(self.images), dict(self.stamps), self.at.astype(np.float32), joints, now, report)

    def _hold(self, now: float) -> None:
        """The robot's own timeout. A real arm would brake; this one stands wherever it was told last."""
        if self.commands and self.held_after_ms is None and now - self.sent > self.timeout_s:
            self.timeouts += 1
            self.held_after_ms = 1000 * (now - self.sent)

    def _look_for_faults(self) -> None:
        try:
            changed = os.stat(self.file).st_mtime_ns
        except FileNotFoundError:
            return
        if changed != self.changed:
            self.faults, self.changed = json.loads(self.file.read_text()), changed

    def _write(self, number: int, command: np.ndarray) -> None:
        row = np.zeros(1, record(len(self.joints)))
        self.sent = time.monotonic()
        row["number"], row["time"], row["command"] = number, self.sent, command
        os.write(self.out, row.tobytes())
