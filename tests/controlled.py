"""A controller's real processes for tests: started, watched through a console, judged from the robot's side.

    with controlled(tmp_path, server.url) as c:
        c.run()                                        # until the robot moves
        began = time.monotonic(); server.send(SIGSTOP)
        event = c.event("HOLD", began)

Nothing here uses vla.control's own safety layer: `illegal` has its own differences.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from fault_robot import record
from faults import timed
from serving import PATIENCE_S, StubServer

from vla.control.console import Alive, Instruct, Order, Quit, Reset, Status, pair

TESTS = Path(__file__).parent
N, RATE = 7, 100
LOWER, UPPER, VELOCITY, ACCELERATION, JERK = -1.0, 1.0, 1.0, 20.0, 1000.0
PROGRAM = ("-m", "vla.control")


class WalkingServer(StubServer):
    """tests/walking_server.py in its process."""

    program = (sys.executable, str(TESTS / "walking_server.py"))


@contextmanager
def walking_server(*options: str, name: str = "walk") -> Iterator[WalkingServer]:
    server = WalkingServer(*options, name=name)
    try:
        yield server
    finally:
        server.end()


class Controlled:
    """One controller with its robot. events: all that were reported; status: the last report."""

    def __init__(
        self, folder: Path, server: str = "", arguments: tuple[str, ...] = (), checkpoint: str = "",
        kwargs: dict[str, Any] | None = None, program: tuple[str, ...] = PROGRAM, env: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        """kwargs: the robot's, beside its files."""
        self.folder, self.log, self.faults = folder, folder / "commands", folder / "faults.json"
        self.n = (kwargs or {}).get("n", N)
        config = configured(folder, server, checkpoint, kwargs or {})
        self.channel, theirs = pair()
        command = [
            sys.executable,
            *program,
            f"--console={theirs.fileno()}",
            str(config),
            *arguments,
        ]
        path = os.pathsep.join([*([env["PYTHONPATH"]] if env else []), str(TESTS.parent), str(TESTS)])
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}) | {"PYTHONPATH": path}
        self.errors = open(folder / "errors", "w")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], env=environment, stderr=self.errors
        )
        theirs.close()
        self.events: list[tuple[float, int, str, str, str]] = []
        self.status: Status | None = None
        self.random = random.Random(0)

    # -- the console -----------------------------------------------------------------------

    def look(self, timeout_s: float = 0.02) -> None:
        """Take what was reported, and be heard."""
        for status in self.channel.receive(timeout_s):
            self.status = status
            self.events += status.events
        self.channel.send(Alive())

    def order(self, order: Order) -> float:
        """Send it; when."""
        now = time.monotonic()
        assert self.channel.send(order)
        return now

    def wait(self, condition: Callable[[Status], Any], what: str = "") -> Any:
        """What the condition on a status was first, once it is true."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            self.look()
            if self.status is not None and (result := condition(self.status)):
                return result
            assert self.process.poll() is None, f"the controller ended: {self.said()}"
            assert time.monotonic() < deadline, f"{what} did not come: {self.status}, {self.events[-5:]}"

    def event(self, after: str, since: float) -> tuple[float, int, str, str, str]:
        """The first transition to one of these states (names, spaces between) at or behind a moment."""

        def found(_: Status) -> Any:
            return next((e for e in self.events if e[0] >= since and e[3] in after.split()), None)

        return self.wait(found, after)

    def fresh(self) -> Status:
        """A report from now on."""
        now = time.monotonic()
        return self.wait(lambda status: status if status.time >= now else None)

    def run(self, task: str = "swing") -> None:
        """Whatever state it is in: until it runs."""
        self.set_faults()
        self.wait(lambda status: status.state != "INIT")
        since = self.order(Instruct(task))

        def runs(status: Status) -> bool:
            if status.state == "FAULT":
                self.order(Reset())  # again, until what was wrong is over
            return status.time > since and status.state == "RUN" and status.task == task

        self.wait(runs, "RUN")
        end = (
            time.monotonic() + 0.15 + self.random.uniform(0, 0.1)
        )  # the arm moves; any moment of a policy step
        while time.monotonic() < end:
            self.look()

    def still(self, seconds: float, since: float) -> None:
        """Assert that there was no transition since, and is none for so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.look()
        self.fresh()
        assert [e for e in self.events if e[0] >= since] == []

    def set_faults(self, **faults: Any) -> float:
        """Have the robot's sensors fail; when that was ordered."""
        now = time.monotonic()
        new = self.faults.with_suffix(".new")
        new.write_text(json.dumps(faults))
        new.replace(self.faults)
        return now

    def timed(
        self, fault: str, response: str, expected_ms: float, since: float
    ) -> tuple[float, int, str, str, str]:
        """The transition that answers a fault, which must come in time."""
        event = self.event(response, since)
        late = self.fresh().lateness.get("max", 0.0)
        timed(fault, event[3], expected_ms, 1000 * (event[0] - since), late if late > 100 else 0.0)
        return event

    # -- processes -------------------------------------------------------------------------

    def child(self, word: str) -> psutil.Process:
        """The controller's child whose command line has this word."""
        (found,) = [c for c in psutil.Process(self.process.pid).children() if word in " ".join(c.cmdline())]
        return found

    def robot_pid(self) -> int:
        return self.wait(lambda status: status.robot.get("pid"))

    def said(self) -> str:
        return (self.folder / "errors").read_text()

    def end(self) -> dict[str, Any]:
        """Quit, and what control.json says; a run that ends in FAULT has exit code 1 and says why."""
        self.order(Quit())
        code = self.process.wait(PATIENCE_S)
        self.channel.close()
        result = json.loads((self.folder / "control.json").read_text())
        assert code == (result["state"] in ("INIT", "FAULT")), self.said()
        assert code == 0 or result["reason"] in self.said()
        return result

    def kill(self) -> None:
        """Whatever is left of it."""
        if self.process.poll() is None:
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    process.resume()
            self.process.kill()
        self.process.wait()
        self.channel.close()
        self.errors.close()

    # -- what the robot was told -----------------------------------------------------------

    def commands(self) -> np.ndarray:
        """The robot's log, as far as it is."""
        row = record(self.n)
        data = self.log.read_bytes() if self.log.exists() else b""
        return np.frombuffer(data[: len(data) // row.itemsize * row.itemsize], row)

    def moved(self, since: float) -> float:
        """How far the joint that moved most did, in radians."""
        rows = self.commands()
        part = rows["command"][rows["time"] >= since]
        return float(np.ptp(part, axis=0).max()) if len(part) else 0.0

    def stopped_at(self, since: float) -> float:
        """When the last command came that still changed something, of those behind `since`."""
        rows = self.commands()
        changes = rows["time"][1:][(np.diff(rows["command"], axis=0) != 0).any(1)]
        return float(max([since, *changes[changes >= since]]))

    def legal(self) -> int:
        """Assert that no command so far was illegal; how many there were."""
        rows = self.commands()
        assert (wrong := illegal(rows)) == [], f"of {len(rows)} commands these were illegal: {wrong[:5]}"
        return len(rows)


def configured(folder: Path, server: str, checkpoint: str, kwargs: dict[str, Any]) -> Path:
    """Write a robot's and a controller's configuration; the latter's path."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {"log": str(folder / "commands"), "faults": str(folder / "faults.json")} | kwargs
    limits = {
        "lower": LOWER,
        "upper": UPPER,
        "velocity": VELOCITY,
        "acceleration": ACCELERATION,
        "jerk": JERK,
    }
    limits = {name: [value] * given.get("n", N) for name, value in limits.items()}
    robot = {"id": "fault_robot:FaultRobot", "kwargs": given, "limits": limits}
    config = {"robot": str(folder / "robot.yaml"), "output": str(folder), "threads": 1}
    config |= {"loop": {"deadman": "continue"}}  # tests sleep
    config |= {"server": server} if server else {"checkpoint": checkpoint}
    for name, content in (("robot.yaml", robot), ("control.yaml", config)):
        (folder / name).write_text(json.dumps(content))  # which is YAML
    return folder / "control.yaml"


def ended(process: psutil.Process) -> bool:
    """Whether it runs no longer; nobody may have asked for its exit code yet."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@contextmanager
def controlled(folder: Path, server: str = "", *arguments: str, **options: Any) -> Iterator[Controlled]:
    """A controller that is judged, and gone afterwards."""
    control = Controlled(folder, server, arguments, **options)
    try:
        yield control
        if control.log.exists():
            control.legal()
    finally:
        control.kill()


def illegal(rows: np.ndarray) -> list[str]:
    """What is wrong with a robot's log (record's rows), by its own differences.

    Divided differences: of commands that follow each other they are the usual ones; where the robot was too busy
    to see each command (their numbers tell), they are averages of the usual ones, so the same limits hold.
    """
    wrong = []
    ticks, places = [], []
    for i, row in enumerate(rows):
        command = row["command"].astype(float)
        if row["number"] == 0:  # begun anew: as if it had been there for ever
            ticks, places = [-3.0, -2.0, -1.0], [command] * 3
            continue
        if ticks[-1] < 0:  # the first command since: however many were said before
            ticks = [row["number"] - 3.0, row["number"] - 2.0, row["number"] - 1.0]
        ticks, places = [*ticks[-3:], float(row["number"])], [*places[-3:], command]
        if not np.isfinite(command).all():
            wrong.append(f"{i}: not finite")
        elif command.min() < LOWER - 1e-5 or command.max() > UPPER + 1e-5:
            wrong.append(f"{i}: position {command}")
        for order, (name, limit) in enumerate(
            {"velocity": VELOCITY, "acceleration": ACCELERATION, "jerk": JERK}.items()
        ):
            rate = difference(ticks, places, order + 1) * RATE ** (order + 1)
            if not np.abs(rate).max() <= limit * (1 + 1e-3):  # NaN, too
                wrong.append(f"{i} (command {row['number']}): {name} {np.abs(rate).max():.4g}")
    return wrong


def difference(ticks: list[float], places: list[np.ndarray], order: int) -> np.ndarray:
    """The divided difference of the last order + 1 points, times order!: the n-th derivative's average (J,)."""
    t, column = ticks[-order - 1 :], places[-order - 1 :]
    for k in range(1, order + 1):
        column = [k * (b - a) / (t[i + k] - t[i]) for i, (a, b) in enumerate(pairwise(column))]
    return column[0]
