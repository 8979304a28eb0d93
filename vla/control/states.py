"""The controller's states, and which may follow which.

    INIT -> READY -> RUN <-> HOLD        STOPPED and FAULT latch: only an operator leaves them

INIT waits for sensors and server, READY for an instruction, RUN plays chunks, HOLD keeps position and
goes on by itself when its cause is gone and a chunk from a fresh observation has come. STOPPED
is left by `resume`, FAULT by `reset`, for STOPPED if somebody has stopped meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    INIT = "INIT"
    READY = "READY"
    RUN = "RUN"
    HOLD = "HOLD"
    STOPPED = "STOPPED"
    FAULT = "FAULT"


MAY_FOLLOW = {
    State.INIT: {State.READY, State.STOPPED, State.FAULT},
    State.READY: {State.RUN, State.HOLD, State.STOPPED, State.FAULT},
    State.RUN: {State.HOLD, State.STOPPED, State.FAULT},
    State.HOLD: {State.RUN, State.STOPPED, State.FAULT},
    State.STOPPED: {State.HOLD, State.FAULT},
    State.FAULT: {State.HOLD, State.STOPPED},
}


@dataclass(frozen=True)
class Event:
    """One transition: when (CLOCK_MONOTONIC, and in ticks), from, to, and why."""

    time: float
    tick: int
    before: State
    after: State
    reason: str


class Machine:
    """The current state and how it came to be. Transitions outside the table raise RuntimeError."""

    def __init__(self) -> None:
        self.state, self.reason, self.since = State.INIT, "starting", 0.0
        self.events: list[Event] = []

    def go(self, state: State, reason: str, time: float, tick: int) -> None:
        """Change the state, or its reason."""
        if state is self.state:
            self.reason = reason
            return
        if state not in MAY_FOLLOW[self.state]:
            raise RuntimeError(f"The controller cannot go from {self.state} to {state} ({reason}).")
        self.events.append(Event(time, tick, self.state, state, reason))
        self.state, self.reason, self.since = state, reason, time
