"""The loop in real time around an arm, a policy and a recorder of a few lines each."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_link import FakeLink, PlaneArm
from test_controller import LIMITS, towards

from vla.control import loop as module
from vla.control.config import LoopConfig
from vla.control.console import (
    Alive,
    Begin,
    Channel,
    Instruct,
    Intervene,
    Quit,
    Reset,
    Resume,
    Status,
    Stop,
    desk,
    pair,
)
from vla.control.controller import Controller
from vla.control.loop import EVENTS, Loop
from vla.control.process import RobotError
from vla.control.safety import Limits
from vla.control.states import Event, State
from vla.data.journal import Frame


class LiveLink(FakeLink):
    """FakeLink on the machine's own clock."""

    @property
    def now(self) -> float:
        return time.monotonic()

    @now.setter
    def now(self, _: float) -> None: ...


class Handle:
    """A RobotProcess without a process; fails: what raises."""

    def __init__(self, arm: PlaneArm) -> None:
        self.arm, self.fails = arm, ""

    def read(self) -> Any:
        self._maybe_fail("read")
        reading = self.arm.look(time.monotonic())
        reading.report = {"scene": self.arm.__dict__.get("scene"), "success": True}
        return reading

    def send(self, command: np.ndarray) -> None:
        self._maybe_fail("send")
        self.arm.send(command)

    def ask(self, name: str, timeout_s: float = 30.0, **arguments: Any) -> Any:
        self._maybe_fail(name)
        if self.fails == "answer":
            return None
        assert name == "reset"
        self.arm.scene = arguments["seed"]  # type: ignore[attr-defined]
        self.arm.at = np.full(2, -0.5)
        return {"task": "go", "limit_s": 5.0}

    def _maybe_fail(self, what: str) -> None:
        if what == self.fails:
            raise RobotError(f"{what} was to fail")


class Notes:
    """A recorder that keeps what it is told."""

    state = "ok"

    def __init__(self) -> None:
        self.notes: list[Any] = []

    def begin(self, task: str, model: str = "", **meta: Any) -> int:
        self.notes.append(("begin", task, model, meta))
        return 0

    def add(self, frame: Frame) -> bool:
        self.notes.append(frame)
        return True

    def end(self, outcome: dict[str, Any]) -> None:
        self.notes.append(("end", outcome))


OPEN: list[Channel] = []


class Bench:
    def __init__(self, recorder: Notes | None = None, watched: bool = True, **options: Any) -> None:
        self.arm, self.link = PlaneArm(), LiveLink(towards())
        config = LoopConfig(deadman="continue")
        self.controller = Controller(self.arm, Limits(LIMITS, self.arm.position), config, self.link)
        self.handle, self.console = Handle(self.arm), None
        self.console: Channel | None
        channel = None
        if watched:
            self.console, theirs = pair()
            channel = desk(theirs)
            OPEN.extend((self.console, channel))
        self.loop = Loop(self.controller, self.handle, config, channel, recorder, **options)
        self.statuses: list[Status] = []

    def ticks(self, n: int, *say: Any) -> Bench:
        """Say something and tick so often."""
        if say and self.state is State.INIT:
            self.loop.tick()  # READY: before that, nothing is followed
        for order in say:
            assert self.console is not None
            assert self.console.send(order)
        for _ in range(n):
            self.loop.tick()
        if self.console is not None and not self.console.lost:
            self.statuses += self.console.receive()
        return self

    def until(self, condition: Callable[[], bool]) -> None:
        for _ in range(500):
            if condition():
                return
            self.ticks(1)
        raise AssertionError(self.controller.machine.events)

    @property
    def state(self) -> State:
        return self.controller.state


@pytest.fixture(autouse=True)
def as_it_is(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The test's process keeps its priority, and no sockets."""
    monkeypatch.setattr(module, "prioritise", lambda priority: f"priority {priority} of the test")
    yield
    while OPEN:
        OPEN.pop().close()


def test_it_runs_for_so_long_brakes_and_says_what_it_was(tmp_path: Path) -> None:
    bench = Bench(watched=False, tasks=["go"])
    bench.loop.run(0.5)
    assert bench.state is State.STOPPED
    assert np.ptp(bench.arm.sent, axis=0).max() > 0.01
    assert bench.controller.limiter.at_rest
    result = bench.loop.write(tmp_path / "new", {"robot": "plane"})
    assert result == json.loads((tmp_path / "new/control.json").read_text())
    assert [event["after"] for event in result["events"]] == ["READY", "RUN", "STOPPED"]
    assert result["events"][-1]["reason"] == "the loop ends"
    assert (result["robot"], result["priority"]) == ("plane", "priority 50 of the test")
    assert result["counts"]["commands"] == len(bench.arm.sent) > 20
    assert result["counts"]["illegal"] == 0
    assert result["lateness_ms"]["n"] == result["ticks"]
    arrays = np.load(tmp_path / "new/control.npz")
    assert len(arrays["lateness"]) == result["ticks"]
    assert 0 < arrays["latency"].max() < 1000


def test_orders_are_carried_out() -> None:
    bench = Bench().ticks(3, Instruct("go"))
    bench.until(lambda: bench.state is State.RUN)
    assert bench.ticks(1, Stop()).state is State.STOPPED
    assert bench.ticks(1, Reset()).state is State.STOPPED
    bench.ticks(1, Resume()).until(lambda: bench.state is State.HOLD)  # once the arm is at rest
    bench.until(lambda: bench.state is State.RUN)
    bench.ticks(12, Intervene([0.1, 0.1]))
    assert bench.controller.operator is not None
    heard = bench.controller.console_heard
    assert heard is not None
    bench.ticks(1, Alive())
    assert bench.controller.console_heard > heard
    bench.ticks(1, Quit())
    assert bench.loop.ended


def test_the_end_of_the_console_is_not_the_end() -> None:
    bench = Bench().ticks(3, Instruct("go"))
    assert bench.console is not None
    bench.console.close()
    bench.until(lambda: bench.state is State.RUN)
    bench.console = None
    sent = len(bench.arm.sent)
    assert bench.ticks(15).state is State.RUN
    assert len(bench.arm.sent) == sent + 15


@pytest.mark.parametrize("where", ["read", "send"])
def test_a_lost_robot_is_a_fault_that_no_reset_ends(where: str) -> None:
    bench = Bench().ticks(3, Instruct("go"))
    bench.until(lambda: bench.state is State.RUN)
    bench.handle.fails = where
    assert bench.ticks(1).state is State.FAULT
    assert bench.controller.machine.reason == f"the robot: {where} was to fail"
    sent = len(bench.arm.sent)
    assert bench.ticks(30, Reset()).state is State.FAULT
    assert (len(bench.arm.sent) == sent) is (where == "send")
    assert bench.statuses[-1].state == "FAULT"


def test_a_new_scene() -> None:
    notes = Notes()
    bench = Bench(notes).ticks(3, Instruct("go"))
    bench.until(lambda: bench.state is State.RUN)
    bench.ticks(20)
    bench.ticks(1, Begin(7))
    assert bench.state is State.HOLD
    assert bench.loop.scene == {"seed": 7, "task": "go", "limit_s": 5.0}
    bench.ticks(25)
    assert bench.controller.task == ""
    np.testing.assert_allclose(bench.arm.sent[-1], -0.5)
    assert bench.statuses[-1].scene["seed"] == 7
    assert bench.controller.audit.illegal == 0
    assert notes.notes[-1] == ("end", {"success": True})


@pytest.mark.parametrize("fault", ["reset", "answer"])
def test_a_robot_without_scenes_goes_on_without_a_jump(fault: str) -> None:
    bench = Bench().ticks(3, Instruct("go"))
    bench.until(lambda: bench.state is State.RUN)
    bench.until(lambda: bench.arm.at[0] > 0.05)
    bench.handle.fails = fault
    bench.ticks(3, Begin(7)).ticks(30)
    assert set(bench.loop.scene) == {"seed", "error"}
    sent = np.array(bench.arm.sent)
    assert np.abs(np.diff(sent, n=2, axis=0)).max() < 30.0 * 0.01**2 * 1.01
    assert bench.state is State.RUN


def test_without_a_console_the_last_task_is_the_end() -> None:
    bench = Bench(watched=False, tasks=["go", "come"], task_seconds=0.2)
    bench.loop.run(seconds=5)
    assert bench.loop.ended
    assert 0.4 <= bench.controller.ticks / 100 < 2
    assert bench.loop.outcome["state"] == "RUN"


def test_an_instruction_before_all_is_there_is_not_kept_for_later() -> None:
    bench = Bench()
    hello, bench.link.hello, bench.link.connected = bench.link.hello, None, False
    bench.link.error = "connection refused"
    bench.ticks(30)
    assert bench.state is State.INIT
    assert bench.controller.machine.reason == "no connection to the policy server: connection refused"
    assert bench.console is not None
    bench.console.send(Instruct("go"))
    bench.ticks(30)
    assert "'go' is ignored" in bench.statuses[-1].note
    bench.link.hello, bench.link.connected = hello, True
    bench.ticks(50)
    assert bench.state is State.READY
    assert bench.arm.at.tolist() == [0.0, 0.0]


def test_an_intervention_of_another_size_is_said_to_be_ignored() -> None:
    bench = Bench().ticks(1, Intervene([1.0])).ticks(20)
    assert "of 1 numbers is ignored: 2 finite ones" in bench.statuses[-1].note


def test_tasks_follow_each_other_until_somebody_types() -> None:
    bench = Bench(tasks=["go", "come", "go"], task_seconds=0.2)
    seen = []
    for _ in range(30):
        bench.ticks(1)
        seen += [bench.controller.task] if bench.controller.task not in seen[-1:] else []
    assert seen[-2:] == ["go", "come"]
    bench.ticks(40, Instruct("stay"))
    assert bench.controller.task == "stay"


def test_every_transition_is_told_once_however_long_nobody_listens() -> None:
    bench = Bench()
    events = [Event(float(i), i, State.RUN, State.HOLD, "x" * 500) for i in range(3 * EVENTS + 1)]
    bench.controller.machine.events += events
    told: list[Any] = []
    while len(told) <= 3 * EVENTS and len(bench.statuses) < 20:
        bench.ticks(10)
        told = [event[0] for status in bench.statuses for event in status.events if event[4].startswith("x")]
    assert told == [event.time for event in events]
    channel = bench.loop.channel
    assert channel is not None
    while channel.send(bench.statuses[0]):  # nobody reads
        pass
    before = len(bench.controller.machine.events)
    bench.controller.stop(time.monotonic())
    for _ in range(25):
        bench.loop.tick()
    assert len(bench.controller.machine.events) == before + 1
    assert bench.console is not None
    bench.console.receive()
    bench.statuses.clear()
    bench.ticks(12)
    assert [event[3] for status in bench.statuses for event in status.events] == ["STOPPED"]


def test_a_frame_for_every_step_and_none_before_the_first() -> None:
    notes = Notes()
    bench = Bench(notes).ticks(30)
    assert notes.notes == []
    bench.ticks(3, Instruct("go"))
    bench.until(lambda: bench.state is State.RUN)
    bench.ticks(50)
    assert notes.notes[0] == ("begin", "go", "f" * 64, {"scene": None})
    frames = [note for note in notes.notes if isinstance(note, Frame)]
    assert len(frames) in (5, 6)
    assert all(np.isfinite(frame.action).all() and frame.mode == "RUN" for frame in frames)
    assert [frame.task for frame in frames] == ["go"] * len(frames)
    assert set(np.diff([frame.step for frame in frames])) == {1}
    bench.ticks(1, Stop()).ticks(30)
    held = [note for note in notes.notes if isinstance(note, Frame) and note.mode == "STOPPED"]
    assert len(held) in (3, 4)
    assert all(np.isnan(frame.action).all() and not frame.intervention for frame in held)
    bench.ticks(1, Quit())
    bench.loop.run()
    assert notes.notes[-1] == ("end", {"ended": "the loop"})
