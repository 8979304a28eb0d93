"""The loop on a robot: wake up, read, decide, command, and tell whoever watches. This is the only writer of motors.

Everything that may wait has a process of its own (the robot, the policy, the recorder, the console); the link
to the policy has a thread. What is decided, and why, is in controller.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vla.control import console as orders
from vla.control.clock import Pulse, prioritise, tidy
from vla.control.config import LoopConfig
from vla.control.console import Channel, Status
from vla.control.controller import Controller
from vla.control.process import RobotError
from vla.control.robot import Reading
from vla.control.safety import MOST_TICKS
from vla.control.states import State
from vla.control.stats import Stats
from vla.data.journal import Frame

REPORT_HZ = 10
RECENT_S = 5
SCENE_S = 5.0  # that a new scene may take
EVENTS = 50  # in a report, at most: a console that slept gets the rest with the next ones


class RobotHandle(Protocol):
    """What the loop needs of vla.control.process.RobotProcess."""

    def read(self) -> Reading | None: ...
    def send(self, command: np.ndarray) -> None: ...
    def ask(self, name: str, timeout_s: float = 30.0, **arguments: Any) -> Any: ...


class Recording(Protocol):
    """What the loop needs of vla.control.recorder.Recorder; nothing here waits."""

    @property
    def state(self) -> str: ...
    def begin(self, task: str, model: str = "", **meta: Any) -> int: ...
    def add(self, frame: Frame) -> bool: ...
    def end(self, outcome: dict[str, Any]) -> None: ...


class Loop:
    """Runs a controller until it is told to quit. `events` of the controller and `stats` are what is left."""

    def __init__(
        self, controller: Controller, robot: RobotHandle, config: LoopConfig,
        channel: Channel | None = None, recorder: Recording | None = None,
        tasks: Sequence[str] = (), task_seconds: float = 10.0,
    ) -> None:  # fmt: skip
        """channel: to a console; None: nobody watches, and `seconds`, a signal or the last of `tasks` ends the loop.
        tasks: followed one after another, task_seconds each, until somebody types another.
        """
        self.controller, self.robot, self.config = controller, robot, config
        self.channel, self.recorder = channel, recorder
        self.tasks, self.task_seconds = list(tasks), task_seconds
        self.stats, self.pulse = Stats(), Pulse(config.rate)
        self.priority, self.ended = "", False
        self.recording = False
        self.last: Reading | None = None
        self.scene: dict[str, Any] = {}
        self.commands = self.told = 0
        self.task_due = 0.0
        self.outcome = {"state": "INIT", "reason": "it never ran"}  # before the end
        self.note = ""  # why the last order was not followed
        self.asleep = (
            time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()
        )  # while suspended, this grows
        if channel is not None:
            controller.console_heard = time.monotonic()

    def run(self, seconds: float = float("inf")) -> None:
        """Tick until `Quit`, or for so long; then brake, with the last ticks, and return."""
        self.priority = prioritise(self.config.priority)
        end = time.monotonic() + seconds
        self.pulse.restart()
        while not self.ended and time.monotonic() < end:
            self.tick()
        self.outcome = {"state": str(self.controller.state), "reason": self.controller.machine.reason}
        self.controller.stop(time.monotonic(), "the loop ends")
        for _ in range(MOST_TICKS):
            self.tick(obey=False)
            if self.controller.limiter.at_rest:
                break
        if self.recorder is not None:
            self.recorder.end({"ended": "the loop"})

    def tick(self, obey: bool = True) -> None:
        """One beat of the pulse. obey: follow the console's orders."""
        beat = self.pulse.wait()
        self.stats.missed += beat.missed
        self.stats.add("lateness", beat.woke - beat.deadline)
        if obey:
            self._obey()
        now, controller = time.monotonic(), self.controller
        if abs((asleep := time.clock_gettime(time.CLOCK_BOOTTIME) - now) - self.asleep) > self.config.stale:
            controller.hold(now, "the machine was suspended")
        self.asleep = asleep
        self._follow(now)
        reading = self._read(now)
        command = controller.tick(now, reading)
        if command is not None:
            self._send(command, now)
        written = time.monotonic()
        if controller.captured is not None:
            self.stats.add("latency", written - controller.captured)
        self._record(now, reading, command)
        if controller.ticks % max(1, self.config.rate // REPORT_HZ) == 0:
            self._tell(now)
        if controller.ticks % self.config.rate == 0:
            tidy()
        self.stats.add("duration", time.monotonic() - beat.woke)

    def _follow(self, now: float) -> None:
        """The next of `tasks` when the time of the last is over; without a console, the end after the last."""
        if self.controller.state is State.INIT or now < self.task_due:
            return
        if self.tasks:
            self.controller.instruct(self.tasks.pop(0))
            self.task_due = now + self.task_seconds
        elif self.task_due and self.channel is None:
            self.ended = True

    def _read(self, now: float) -> Reading | None:
        try:
            self.last = self.robot.read()
        except (
            RobotError,
            RuntimeError,
            ValueError,
        ) as error:  # it died, or what it published cannot be read
            self._robot_lost(error, now)
        return self.last

    def _send(self, command: np.ndarray, now: float) -> None:
        try:
            self.robot.send(command)
            self.commands += 1
        except RobotError as error:
            self._robot_lost(error, now)

    def _robot_lost(self, error: Exception, now: float) -> None:
        """The last reading stays what it was, and grows stale."""
        if self.controller.state is not State.FAULT:
            self.controller.fail(now, f"the robot: {error}")

    # -- the console -----------------------------------------------------------------------

    def _obey(self) -> None:
        if self.channel is None:
            return
        now = time.monotonic()
        for order in self.channel.receive():
            self.controller.console_heard = now
            self.note = self.note if isinstance(order, orders.Alive) else ""
            self._carry_out(order, now)

    def _carry_out(self, order: Any, now: float) -> None:
        controller = self.controller
        match order:
            case orders.Stop():
                controller.stop(now)
            case orders.Resume():
                controller.resume(now)
            case orders.Reset():
                controller.reset(now)
            case orders.Instruct(task) if controller.state is not State.INIT:
                self.tasks.clear()
                controller.instruct(task)
            case orders.Instruct(task):  # or the arm would move by itself when the server comes
                self.note = f"{task!r} is ignored: robot and policy are not there yet"
            case orders.Intervene(action):
                if not controller.intervene(np.array(action), now):
                    n = controller.robot.features.action_dim
                    self.note = (
                        f"an intervention of {len(action)} numbers is ignored: {n} finite ones are expected"
                    )
            case orders.Begin(seed):
                self._begin(seed)
            case orders.Quit():
                self.ended = True

    def _begin(self, seed: int) -> None:
        """A new scene, which takes a while: the ticks meanwhile do not count. A robot without scenes stays as it is."""
        self._end_episode()
        try:
            self.scene = {"seed": seed, **self.robot.ask("reset", timeout_s=SCENE_S, seed=seed)}
            self.controller.restart(time.monotonic())
        except (RobotError, TypeError) as error:  # the latter for an answer that is no mapping
            self.scene = {"seed": seed, "error": str(error)}
        self.pulse.restart()

    def _tell(self, now: float) -> None:
        if self.channel is None:
            return
        controller, recent = self.controller, RECENT_S * self.config.rate
        new = controller.machine.events[self.told : self.told + EVENTS]
        told = self.channel.send(
            Status(
                time=now, tick=controller.ticks, state=controller.state, reason=controller.machine.reason,
                task=controller.task, episode=controller.dialogue.episode,
                steps=controller.dialogue.player.step if controller.dialogue.player else 0,
                counts=self.counts(), lateness=self.stats.recent("lateness", recent),
                latency=self.stats.recent("latency", RECENT_S * 5), robot=self.last.report if self.last else {},
                recorder=self.recorder.state if self.recorder else "off", priority=self.priority, note=self.note,
                events=[(e.time, e.tick, e.before, e.after, e.reason) for e in new], scene=self.scene,
            )
        )  # fmt: skip
        if told:
            self.told += len(new)

    def counts(self) -> dict[str, int]:
        """Since the start: commands, illegal ones, cut targets, refused ways, ticks left out, answers not used."""
        controller = self.controller
        return {
            "commands": self.commands, "illegal": controller.audit.illegal, "clamped": controller.limiter.clamped,
            "braked": controller.limiter.braked, "missed": self.stats.missed,
            "late_answers": controller.dialogue.player.late if controller.dialogue.player else 0,
            "refused_answers": controller.dialogue.refusals,
        }  # fmt: skip

    # -- what is left ----------------------------------------------------------------------

    def _record(self, now: float, reading: Reading | None, command: np.ndarray | None) -> None:
        """A frame for every policy step; while the arm holds, at the same rate and without an action."""
        controller = self.controller
        if self.recorder is None or reading is None or command is None:
            return
        step, resting = controller.step, controller.ticks % controller.ticks_per_step == 0
        if step is None and (controller.state is State.RUN or not self.recording or not resting):
            return
        if not self.recording:
            hello = controller.link.hello
            self.recorder.begin(controller.task, hello.model if hello else "", scene=self.scene.get("seed"))
            self.recording = True
        none = np.full(controller.robot.features.action_dim, np.nan, np.float32)
        self.recorder.add(
            Frame(
                step=controller.ticks // controller.ticks_per_step, stamp=now, mode=controller.state,
                task=step.task if step else controller.task, images=reading.images, stamps=reading.stamps,
                state=reading.state, state_stamp=reading.stamp, action=step.action if step else none,
                command=command, intervention=step is not None and step.intervention,
            )
        )  # fmt: skip

    def _end_episode(self) -> None:
        if self.recorder is not None and self.recording:
            report = self.last.report if self.last else {}
            self.recorder.end({key: report[key] for key in ("success", "failure") if key in report})
            self.recording = False

    def write(self, folder: Path, about: dict[str, Any]) -> dict[str, Any]:
        """control.json (figures and transitions) and control.npz (every sample) in a folder; returns the former."""
        events = [asdict(event) for event in self.controller.machine.events]
        result = about | {
            "loop": asdict(self.config),
            "priority": self.priority,
            **self.outcome,
            "ticks": self.controller.ticks,
            "counts": self.counts(),
            **self.stats.summary(),
            "recorder": self.recorder.state if self.recorder else "off",
            "events": events,
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "control.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        samples: dict[str, Any] = self.stats.arrays()
        np.savez_compressed(folder / "control.npz", **samples)
        return result
