"""The robot in a process of its own: it senses and moves at its pace, whatever the controller is doing.

This is the controller's side; host.py is the robot's. The interpreter is a fresh one, in a session of its own
(Ctrl-C reaches the controller alone). Readings and commands lie in shared memory (shared.py), a byte in a
pipe wakes the robot for every command, and questions go through another pipe.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np

from vla.checks import require
from vla.control.config import RobotConfig
from vla.control.robot import Reading, Robot
from vla.control.shared import Newest
from vla.observation import Features

HUNG_S = 5.0  # a robot that neither answers nor ends is given up
REPORT_BYTES = 4096
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "LP_NUM_THREADS")


class RobotError(RuntimeError):
    """The robot raised, or its process died."""


def load_robot(config: RobotConfig) -> Robot:
    """The robot that `module:Class` names, not connected.

    Raises ConfigError when there is none, or when limits and joints do not fit.
    """
    module, _, name = config.id.partition(":")
    try:
        cls: Any = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        remedy = "correct id, put its folder on the PYTHONPATH, or install what it needs"
        require(False, "robot.id", config.id, f"a module that can be imported ({error})", remedy)
    fits = isinstance(cls, type) and issubclass(cls, Robot)
    require(fits, "robot.id", config.id, f"a subclass of vla.control.robot.Robot in {module}")
    try:
        robot: Robot = cls(**config.kwargs)
    except TypeError as error:
        require(False, "robot.kwargs", config.kwargs, f"what {name} takes ({error})")
    require(
        isinstance(getattr(robot, "features", None), Features), "robot.id", config.id,
        "a class that sets features in __init__",
    )  # fmt: skip
    joints, limits = getattr(robot, "joints", ()), config.limits
    expected = f"one number for each joint: {', '.join(joints)}"
    require(len(limits.lower) == len(joints), "robot.limits.lower", list(limits.lower), expected)
    if limits.workspace_lower:
        known = robot.position(np.zeros((1, len(joints)))) is not None
        expected = f"none, since {name} does not know its hand's position"
        require(known, "robot.limits.workspace_lower", list(limits.workspace_lower), expected)
    return robot


def reading_fields(robot: Robot) -> np.dtype:
    features = robot.features
    fields: list[Any] = [
        ("stamp", "f8"), ("joints", "f8", len(robot.joints)), ("stamps", "f8", len(features.cameras)),
        ("state", "f4", features.state_dim), ("report", f"S{REPORT_BYTES}"),
    ]  # fmt: skip
    fields += [(f"image.{name}", "u1", (*size, 3)) for name, size in features.cameras.items()]
    return np.dtype(fields, align=True)


def command_fields(robot: Robot) -> np.dtype:
    return np.dtype([("time", "f8"), ("command", "f8", len(robot.joints))], align=True)


class RobotProcess:
    """The controller's side. A context manager; one thread uses it. robot: for what the controller computes.

    log: a file for one line of JSON when the robot's process ends: why, and its last report.
    Raises ConfigError for a robot that cannot be made, RobotError for one that fails, then or later.
    """

    def __init__(self, config: RobotConfig, log: str | Path | None = None) -> None:
        self.robot = load_robot(config)
        self.config, self.log = config, log
        self._process: subprocess.Popen[bytes] | None = None
        self._asked, self._last_words = 0, ""

    def start(self, timeout_s: float = 60.0) -> None:
        """Connect the robot and wait for its first reading."""
        self._readings, self._commands = (
            Newest(reading_fields(self.robot)),
            Newest(command_fields(self.robot)),
        )
        self._pipe, theirs = Pipe()
        woken, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        paths = [path or os.getcwd() for path in sys.path]
        environment = dict.fromkeys(ONE_THREAD, "1") | os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        descriptors = [theirs.fileno(), self._readings.descriptor, self._commands.descriptor, woken]
        code = f"from vla.control.host import main; main(*{descriptors})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], env=environment, pass_fds=descriptors, start_new_session=True
        )
        theirs.close()
        os.close(woken)
        try:
            self._pipe.send((self.config, str(self.log) if self.log else None))
            self._answer(0, timeout_s)
        except BaseException as error:
            self.close()
            if isinstance(error, BrokenPipeError):
                raise RobotError("The robot's process died at once; see its output above.") from None
            raise

    def read(self) -> Reading | None:
        """The newest reading, a copy; None before the first. Does not wait."""
        self._require_alive()
        record = self._readings.read()
        if record is None:
            return None
        cameras = self.robot.features.cameras
        return Reading(
            images={name: record[f"image.{name}"] for name in cameras},
            stamps=dict(zip(cameras, record["stamps"].tolist(), strict=True)),
            state=record["state"], joints=record["joints"], stamp=float(record["stamp"]),
            report=json.loads(record["report"]),
        )  # fmt: skip

    def send(self, command: np.ndarray) -> None:
        """Have the robot's `send` called with (J,), soon. Does not wait; the newest command wins."""
        self._require_alive()
        self._commands.write(time=time.monotonic(), command=command)
        try:
            os.write(self._wake, b"\0")
        except BlockingIOError:
            pass  # it is asleep under thousands of these
        except BrokenPipeError:
            raise self._failure() from None

    def ask(self, name: str, timeout_s: float = 30.0, **arguments: Any) -> Any:
        """What the robot's method `name` returns; readings from then on are later than it.

        Waits. Raises RobotError with what the method raised (the robot goes on), or when no answer comes.
        """
        self._require_alive()
        self._asked += 1
        try:
            self._pipe.send((self._asked, name, arguments))
        except (BrokenPipeError, ConnectionError):
            raise self._failure() from None
        return self._answer(self._asked, timeout_s)

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None, "start() comes first"
        return self._process.pid

    def close(self) -> None:
        """Disconnect the robot and end its process; one that does not listen is killed."""
        if self._process is None or self._pipe.closed:
            return
        with contextlib.suppress(BrokenPipeError, ConnectionError):
            self._pipe.send(None)
        os.close(self._wake)
        try:
            self._process.wait(timeout=HUNG_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._pipe.close()
        self._readings.close()
        self._commands.close()

    def __enter__(self) -> RobotProcess:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self, number: int, timeout_s: float) -> Any:
        end = time.monotonic() + timeout_s
        try:
            while self._pipe.poll(max(0.0, end - time.monotonic())):
                answered, error, value = self._pipe.recv()
                if answered is None:
                    self._last_words = error
                if answered == number:
                    if error:
                        raise RobotError(error)
                    return value
        except (EOFError, ConnectionError):
            raise self._failure() from None
        raise RobotError(
            f"The robot. got: no answer in {timeout_s} s. expected: one. remedy: look at the robot."
        )

    def _require_alive(self) -> None:
        if not self.alive:
            raise self._failure()

    def _failure(self) -> RobotError:
        """Why the process ended: what it said last, or how it died."""
        assert self._process is not None, "start() comes first"
        with contextlib.suppress(EOFError, ConnectionError):
            while not self._pipe.closed and self._pipe.poll():
                answered, error, _ = self._pipe.recv()
                self._last_words = error if answered is None else self._last_words
        if self._last_words:
            return RobotError(self._last_words)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return RobotError(f"The robot's process died with exit code {self._process.wait(HUNG_S)}.")
        return RobotError("The robot's process hung up and hangs.")
