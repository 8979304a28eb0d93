"""The controller: from sensors, answers and orders to one legal command a tick. No clock, no sockets, no files.

`tick` is called at a fixed rate with the time and the newest reading; everything it does is a
function of what it was given, so that every fault can be played to it. What runs it on a
robot is loop.py. A policy step (1 / fps) is a whole number of ticks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from vla.checks import require
from vla.control.config import LoopConfig
from vla.control.dialogue import Dialogue, Link
from vla.control.robot import Reading, Robot
from vla.control.safety import Audit, Limiter, Limits
from vla.control.states import Machine, State
from vla.control.watch import Watch
from vla.serve.wire import MAX_TASK

LATCHED = (State.STOPPED, State.FAULT)


@dataclass(frozen=True)
class Step:
    """What was begun in one policy step, for the recorder. command: what its first tick emitted (J,)."""

    reading: Reading
    action: np.ndarray
    command: np.ndarray
    task: str
    intervention: bool


class Controller:
    """Owns the arm. Orders (`stop`, `resume`, `reset`, `instruct`, `intervene`) may come before any tick.

    After a tick, `captured` is when the observation was seen whose chunk took effect in it, and
    `step` what was begun in it; None otherwise. Raises ConfigError when loop and robot do not fit.
    """

    def __init__(self, robot: Robot, limits: Limits, config: LoopConfig, link: Link) -> None:
        fps = robot.features.fps
        require(
            config.rate % fps == 0, "loop.rate", config.rate, f"a multiple of the {fps} policy steps a second"
        )
        self.robot, self.config, self.link = robot, config, link
        self.ticks_per_step = config.rate // fps
        self.machine, self.watch = Machine(), Watch(config)
        self.dialogue = Dialogue(link, config, robot.features)
        self.limiter, self.audit = Limiter(limits, 1 / config.rate), Audit(limits, 1 / config.rate)
        self.task, self.ticks = "", 0
        self.operator: tuple[np.ndarray, float] | None = None  # an operator's action, and when it came
        self.console_heard: float | None = None  # None: no console has to be there
        self.begin = self.end = np.zeros(len(robot.joints))  # targets before and after the present step
        self.phase = 0  # tick within the step; 0: an action is due
        self.starved_since = self.clamped_since = 0.0
        self.captured: float | None = None
        self.step: Step | None = None
        self._leaving = False  # a latched state, as soon as the arm is at rest
        self._stop_wanted = False  # in FAULT: its reset leads to STOPPED
        self._ticked = math.inf  # when the last tick was
        self._not_before = -math.inf  # readings of before a restart show another pose

    @property
    def state(self) -> State:
        return self.machine.state

    # -- orders ----------------------------------------------------------------------------

    def instruct(self, task: str) -> None:
        """Follow another instruction; the chunk that plays goes on until the first answer to it.

        One that the wire would refuse counts as none.
        """
        self.task = task.strip() if len(task) <= MAX_TASK else ""

    def stop(self, now: float, reason: str = "operator") -> None:
        """Brake and stay; wins over a reset or resume that is under way."""
        self._leaving = False
        if self.state is State.FAULT:
            self._stop_wanted = True
        else:
            self._go(State.STOPPED, reason, now)

    def fail(self, now: float, reason: str) -> None:
        """Something is broken."""
        self._go(State.FAULT, reason, now)

    def hold(self, now: float, reason: str) -> None:
        """Go on only from a fresh observation."""
        if self.state is State.RUN:
            self._go(State.HOLD, reason, now)

    def resume(self, now: float) -> None:
        """Leave STOPPED; the arm moves again after a fresh observation."""
        self._leaving = self.state is State.STOPPED
        self._leave(now)

    def reset(self, now: float) -> None:
        """Leave FAULT, the operator having looked."""
        self._leaving = self.state is State.FAULT
        self._leave(now)

    def _leave(self, now: float) -> None:
        """Once the arm is at rest. Where it is found then, perhaps pushed, becomes the command."""
        if not self._leaving or not self.limiter.at_rest:
            return
        after = State.STOPPED if self._stop_wanted else State.HOLD
        self._leaving = self._stop_wanted = False
        self.dialogue.refused, self.limiter.motion, self._not_before = 0, None, now
        self._go(after, "reset" if self.state is State.FAULT else "resumed", now)

    def restart(self, now: float) -> None:
        """The robot was put somewhere else (a simulated scene): hold, begin a new episode without instruction."""
        if self.state in (State.READY, State.RUN):
            self._go(State.HOLD, "a new episode", now)
        self.dialogue.forget()
        self.dialogue.episode += 1
        self.limiter.motion, self.limiter.way_out, self.task, self._not_before = None, [], "", now
        self.operator = None
        self.watch = Watch(self.config)

    def intervene(self, action: np.ndarray, now: float) -> bool:
        """An operator's action (A,) instead of the policy's, for a moment; whether it is one. In a latched state
        nothing is taken.
        """
        action = np.asarray(action, np.float32)
        fits = action.shape == (self.robot.features.action_dim,) and bool(np.isfinite(action).all())
        if fits and self.state not in LATCHED:
            self.operator = (action, now)
        return fits

    # -- the tick --------------------------------------------------------------------------

    def tick(self, now: float, reading: Reading | None) -> np.ndarray | None:
        """The command (J,) of this tick; None while nothing may be commanded. Never raises: what does is a fault."""
        self.ticks += 1
        self.captured = self.step = None
        try:
            command = self._tick(now, reading)
        except Exception as error:  # the robot's class, its readings, or a mistake here: the arm must brake
            self.fail(now, f"{type(error).__name__}: {error}")
            command = self.limiter.step(None) if self.limiter.motion is not None else None
        self._ticked = now
        if command is not None and not self.audit.check(command):
            self._go(State.FAULT, "an illegal command was computed, and withheld", now)
            return None
        return command

    def _tick(self, now: float, reading: Reading | None) -> np.ndarray | None:
        self._leave(now)
        if now - self._ticked > self.config.stale:
            self.hold(now, f"the controller stood still for {1000 * (now - self._ticked):.0f} ms")
        self.dialogue.listen(now, self.task)
        trouble = self.watch.sensors(now, reading)
        if trouble is None and reading is not None and self.limiter.motion is None:
            trouble = self._adopt(reading, now)
        if self.state is State.INIT:
            self.machine.reason = trouble or self.watch.server(now, self.link) or "meeting robot and policy"
        if self.limiter.motion is None or reading is None:
            return None
        if self.state not in LATCHED and self._judge(now, reading, trouble) and self.state is not State.RUN:
            self._prepare(now, reading)
        action = self._play(now, reading) if self.state is State.RUN else None
        command = self._command(now)
        if action is not None:
            self.step = Step(reading, action, command, self.task, self._driving(now))
        return command

    def _adopt(self, reading: Reading, now: float) -> str | None:
        """Take the measured pose as the first command. Outside of the limits nothing is commanded."""
        if reading.stamp <= self._not_before:
            return "no reading since the restart"
        try:
            self.limiter.reset(reading.joints)
        except ValueError as error:
            self._go(State.FAULT, str(error), now)
            return str(error)
        self.begin = self.end = self.limiter.command
        self.audit.reset(self.begin)
        return None

    def _judge(self, now: float, reading: Reading, trouble: str | None) -> bool:
        """The state by what sensors, server and console show; whether the arm may move."""
        off = np.abs(reading.joints - self.limiter.command).max()
        if self.link.changed:
            self._go(State.FAULT, "the policy server came back with another policy", now)
        elif off > self.config.following:
            self._go(State.FAULT, f"the arm does not follow: a joint is {off:.3f} away from its command", now)
        elif self.dialogue.refused >= self.config.refused:
            reason = f"{self.dialogue.refused} chunks in a row were refused: {self.dialogue.why}"
            self._go(State.FAULT, reason, now)
        else:
            self._meet(now)
        if self.state in (*LATCHED, State.INIT):
            return False
        server = None if self._driving(now) else self.watch.server(now, self.link)
        console = "the console is lost" if self._abandoned(now) else None
        if why := trouble or server or console:
            self.dialogue.forget()
            self._go(State.HOLD, why, now)
            return False
        if self.state is State.HOLD:
            self.machine.reason = "waiting for a fresh chunk" if self.task else "no instruction"
        return True

    def _meet(self, now: float) -> None:
        try:
            self.dialogue.meet()
        except ValueError as error:
            self._go(State.FAULT, str(error), now)
            return
        if self.state is State.INIT and self.dialogue.player is not None:
            self._go(State.READY, "robot and policy are there", now)

    def _prepare(self, now: float, reading: Reading) -> None:
        """READY or HOLD: run when there is something to play that was seen since."""
        player = self.dialogue.player
        if self._driving(now):
            self._go(State.RUN, "an operator drives", now)
        elif self.task and player is not None and player.left:
            self._go(State.RUN, f"following {self.task!r}", now)
        elif self.task and self.limiter.at_rest:
            self.dialogue.ask(now, reading, self.task)
        if self.state is State.RUN:
            self.begin = self.end = self.limiter.command
            self.phase, self.starved_since, self.clamped_since = 0, now, 0.0

    def _play(self, now: float, reading: Reading) -> np.ndarray | None:
        """RUN: at the beginning of a policy step, ask for what is due and take the next action, if there is one."""
        phase, self.phase = self.phase, (self.phase + 1) % self.ticks_per_step
        if phase > 0:
            return None
        action, captured = None, None
        if self._driving(now) and self.operator is not None:
            self.dialogue.forget()
            action = self.operator[0]
        elif self.task:
            self.dialogue.ask(now, reading, self.task)
            action, captured = self.dialogue.take(reading)
            self.machine.reason = f"following {self.dialogue.playing!r}"
        else:
            self._go(State.HOLD, "no instruction", now)
        if action is None:
            self.phase, self.begin = 0, self.end
            if self.state is State.RUN and now - self.starved_since > self.config.starved:
                self._go(State.HOLD, "no action to play: the policy is slower than its chunks", now)
            return None
        target = np.asarray(self.robot.target(action, self.end, reading), np.float64)
        if target.shape != self.end.shape or not np.isfinite(target).all():
            self._go(
                State.FAULT, "the robot's class made a target that is not finite, or of another size", now
            )
            return None
        self.starved_since, self.captured = now + 1 / self.robot.features.fps, captured
        self.begin, self.end = self.end, target
        return action

    def _command(self, now: float) -> np.ndarray:
        """One tick along the way from `begin` to `end`, or to a stop."""
        if self.state is not State.RUN:
            return self.limiter.step(None)
        share = (self.phase or self.ticks_per_step) / self.ticks_per_step
        velocity = (self.end - self.begin) * self.robot.features.fps
        trouble = self.limiter.clamped + self.limiter.braked
        command = self.limiter.step(self.begin + share * (self.end - self.begin), velocity)
        if self.limiter.clamped + self.limiter.braked == trouble:
            self.clamped_since = 0.0
        elif not self.clamped_since:
            self.clamped_since = now
        elif now - self.clamped_since > self.config.clamped:
            self._go(
                State.FAULT,
                f"targets beyond the limits, or no safe way to them, for {self.config.clamped} s",
                now,
            )
        return command

    def _driving(self, now: float) -> bool:
        return self.operator is not None and now - self.operator[1] <= self.config.intervention

    def _abandoned(self, now: float) -> bool:
        """The console is gone, and the configuration wants somebody to watch."""
        lost = self.console_heard is not None and now - self.console_heard > self.config.silence
        return lost and self.config.deadman == "hold"

    def _go(self, state: State, reason: str, now: float) -> None:
        if state is not State.RUN and state is not self.state:
            self.dialogue.forget()
            if state in LATCHED:
                self.operator = None
        if state is State.FAULT:
            self._leaving = False
        self.machine.go(state, reason, now, self.ticks)
