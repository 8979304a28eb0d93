"""The robot's side of RobotProcess: the main thread observes and answers, a second one sends.

So no camera delays a motor: a command waits for nothing but its wake-up, and for Python. When the pipe that
wakes closes, the controller is gone: the robot is observed on for GRACE_S, while its own timeout
holds it, and then disconnected.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

from vla.control.process import HUNG_S, REPORT_BYTES, command_fields, load_robot, reading_fields
from vla.control.robot import Robot
from vla.control.shared import Newest

PERIOD_S = 0.005  # between two readings, at least
GRACE_S = 0.5  # from the controller's end to the robot's: its own timeout must be shorter
STALE_S = 0.1  # older commands are from before the process stood still: not sent


class Host:
    """A robot, its two threads, and what they share."""

    def __init__(self, pipe: Connection, readings: int, commands: int, woken: int) -> None:
        self.pipe, self.woken = pipe, woken
        self.descriptors = readings, commands
        self.moving = threading.Lock()  # held while a command is sent or a question answered
        self.ended = False
        self.trouble: BaseException | None = None  # of the other thread
        self.gone = float("inf")  # when the controller went
        self.report: dict[str, Any] = {}
        self.stale = 0
        self.asked = 0.0  # when the last question was answered: older commands were meant for what was before

    def run(self) -> bool:
        """Until the end; whether it was a good one."""
        config, log = self.pipe.recv()
        why, robot, good, connected = "closed", None, True, False
        try:
            robot = load_robot(config)
            self.readings = Newest(reading_fields(robot), self.descriptors[0])
            self.commands = Newest(command_fields(robot), self.descriptors[1])
            robot.connect()
            connected = True
            self._publish(robot)
            self.pipe.send((0, "", None))
            threading.Thread(target=self._forward, args=(robot,), daemon=True).start()
            why = self._observe(robot)
        except Exception as error:
            traceback.print_exc()
            good, why = False, "The robot failed: " + traceback.format_exception_only(error)[-1].strip()
            self._say((None, why, None))
        with self.moving:
            self.ended = True
        try:
            if robot is not None and connected:
                robot.disconnect()
        finally:
            if log is not None:
                with open(log, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"end": why, "report": self.report}) + "\n")
        return good

    def _observe(self, robot: Robot) -> str:
        """Publish readings and answer questions until it is over; why it is."""
        due, hung_up = time.monotonic(), False
        while time.monotonic() < self.gone + GRACE_S:
            if self.trouble is not None:
                raise self.trouble
            answer = None
            if not hung_up and self.pipe.poll():
                try:
                    question = self.pipe.recv()
                except (EOFError, ConnectionError):
                    hung_up, self.gone = True, min(self.gone, time.monotonic())
                    continue
                if question is None:
                    return "closed"
                answer = self._answer(robot, *question)
            self._publish(robot)
            if answer is not None:
                self._say(answer)
            due = max(due + PERIOD_S, time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))
        return "controller gone"

    def _answer(self, robot: Robot, number: int, name: str, arguments: dict[str, Any]) -> Any:
        with self.moving:
            try:
                return number, "", getattr(robot, name)(**arguments)
            except Exception as error:
                return (
                    number,
                    f"The robot's {name}: {traceback.format_exception_only(error)[-1].strip()}",
                    None,
                )
            finally:
                self.asked = time.monotonic()

    def _publish(self, robot: Robot) -> None:
        reading, features = robot.observe(), robot.features
        self.report = reading.report | {"stale": self.stale}
        report = json.dumps(self.report).encode()
        got = {name: (image.shape, str(image.dtype)) for name, image in reading.images.items()}
        got |= {"state": reading.state.shape, "joints": reading.joints.shape}
        expected: dict[str, Any] = {name: ((*size, 3), "uint8") for name, size in features.cameras.items()}
        expected |= {"state": (features.state_dim,), "joints": (len(robot.joints),)}
        if got != expected or len(report) > REPORT_BYTES:
            raise ValueError(
                f"A reading does not fit the robot's features. got: {got}, a report of {len(report)} bytes. expected: "
                f"{expected}, at most {REPORT_BYTES}. remedy: correct the robot's features or its cameras."
            )
        images = {f"image.{name}": reading.images[name] for name in features.cameras}
        stamps = [reading.stamps[name] for name in features.cameras]
        self.readings.write(
            stamp=reading.stamp, joints=reading.joints, stamps=stamps, state=reading.state, report=report, **images
        )  # fmt: skip

    def _forward(self, robot: Robot) -> None:
        """Send the newest command whenever one comes, until the controller hangs up."""
        try:
            while os.read(self.woken, 4096):
                before = self.commands.number
                record = self.commands.read()
                if record is None or self.commands.number == before:
                    continue
                with self.moving:
                    if self.ended:
                        return
                    if record["time"] <= self.asked or time.monotonic() - record["time"] > STALE_S:
                        self.stale += 1
                        continue
                    robot.send(record["command"])
        except Exception as error:
            self.trouble = error
            return
        self.gone = min(self.gone, time.monotonic())
        time.sleep(HUNG_S)
        os._exit(1)  # observe() or disconnect() hangs

    def _say(self, message: Any) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionError):  # the controller is gone
            self.pipe.send(message)


def main(pipe: int, readings: int, commands: int, woken: int) -> None:
    sys.setswitchinterval(5e-4)  # how long a command may wait for Python in the other thread
    sys.exit(0 if Host(Connection(pipe), readings, commands, woken).run() else 1)
