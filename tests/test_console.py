"""Orders and reports between two processes, the terminal's view of them, and scripted episodes."""

from __future__ import annotations

import os
import socket
import time
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from vla.control.console import (
    Alive,
    Begin,
    Channel,
    Instruct,
    Intervene,
    Order,
    Quit,
    Reset,
    Resume,
    Status,
    Stop,
    desk,
    pair,
)
from vla.control.trials import MORE_TIME, PATIENCE_S, Trial, Trials
from vla.control.view import HELP, View, parse, times

ALL = [
    Alive(),
    Stop(),
    Resume(),
    Reset(),
    Instruct("press the button"),
    Intervene([1.0, -2.5]),
    Begin(7),
    Quit(),
]


def status(**changes: Any) -> Status:
    fields = dict(
        time=1.0, tick=1, state="READY", reason="", task="", episode=0, steps=0, counts={}, lateness={},
        latency={}, robot={}, recorder="off", priority="", events=[], scene={},
    )  # fmt: skip
    return Status(**fields | changes)


@pytest.fixture
def ends() -> Any:
    console, theirs = pair()
    controller = desk(theirs)
    yield console, controller
    console.close()
    controller.close()


# --- the socket ---


def test_orders_and_reports_arrive_as_they_were(ends: tuple[Channel, Channel]) -> None:
    console, controller = ends
    assert controller.receive() == []
    for order in ALL:
        assert console.send(order)
    assert controller.receive() == ALL
    report = status(events=[(1.5, 150, "RUN", "HOLD", "why")], robot={"success": True}, lateness={"p50": 0.1})
    assert controller.send(report)
    assert console.receive(1.0) == [report]
    assert controller.send(status(robot={"height": np.float32(0.5), "what": {1}}, scene={"at": np.arange(2)}))
    (got,) = console.receive(1.0)
    assert (got.robot, got.scene) == ({"height": 0.5, "what": [1]}, {"at": [0, 1]})


def test_every_order_is_tested() -> None:
    assert {type(order) for order in ALL} == set(Order.__subclasses__())


@given(st.binary(max_size=200))
def test_messages_that_are_none_are_dropped(data: bytes) -> None:
    console, theirs = pair()
    controller = desk(theirs)
    try:
        console.socket.send(data or b"\0")
        console.send(Stop())
        got = controller.receive()
        assert got[-1] == Stop()
        assert len(got) <= 2
        assert all(isinstance(order, Order) for order in got)
        assert not controller.lost
    finally:
        console.close()
        controller.close()


@pytest.mark.parametrize(
    "data",
    [
        {"type": "Stop", "more": 1},
        {"type": "Instruct", "task": 3},
        {"type": "Instruct"},
        {"type": "Status"},
        {"type": "Begin", "seed": 2**70 // 2**70 + 0.5},
        [],
    ],
)
def test_almost_orders_are_dropped(ends: tuple[Channel, Channel], data: Any) -> None:
    console, controller = ends
    console.socket.send(msgspec.msgpack.encode(data))
    assert controller.receive() == []


def test_nobody_reads_and_nobody_waits(ends: tuple[Channel, Channel]) -> None:
    console, controller = ends
    began = time.monotonic()
    sent = 0
    while controller.send(status(reason="x" * 1000)):
        sent += 1
    assert not controller.lost
    assert not controller.send(status())
    assert time.monotonic() - began < 5
    assert len(console.receive()) == sent  # those that were handed over are all there
    assert controller.send(status())


def test_a_closed_end_is_lost_and_harmless(ends: tuple[Channel, Channel]) -> None:
    console, controller = ends
    console.send(Stop())
    console.close()
    assert controller.receive() == [Stop()]
    assert controller.lost
    assert not controller.send(status())
    assert controller.receive() == []


def test_receive_waits_as_long_as_it_is_told(ends: tuple[Channel, Channel]) -> None:
    console, controller = ends
    began = time.monotonic()
    assert console.receive(0.1) == []
    assert 0.09 < time.monotonic() - began < 5
    assert not console.lost
    assert console.socket.gettimeout() == 0
    assert controller.socket.type == socket.SOCK_SEQPACKET


# --- what is typed ---


@pytest.mark.parametrize(
    ("line", "order"),
    [
        ("", Stop()), ("  ", Stop()), ("/stop", Stop()), ("/resume", Resume()), ("/reset", Reset()), ("/quit", Quit()),
        ("press the button ", Instruct("press the button")), ("/drive 1 -2.5", Intervene([1.0, -2.5])),
    ],
)  # fmt: skip
def test_what_a_line_orders(line: str, order: Order) -> None:
    assert parse(line) == order


@pytest.mark.parametrize("line", ["/drive one", "/halt", "/ stop", "/Resume"])
def test_lines_that_order_nothing_say_so(line: str) -> None:
    said = parse(line)
    assert isinstance(said, str)
    assert "expected" in said


@given(st.text())
def test_any_keys_are_orders_or_nothing(keys: str) -> None:
    view = View()
    for order in view.type(keys + "\n"):
        assert isinstance(order, Order)
        assert msgspec.msgpack.encode(order)  # what is typed can be sent
    assert view.line == ""


def test_keys() -> None:
    view = View()
    assert list(view.type("pusx\x7f")) == []
    assert view.line == "pus"
    assert list(view.type("h\n/nonsense\r")) == [Instruct("push")]
    assert "/nonsense" in view.note
    assert list(view.type("\n")) == [Stop()]
    assert view.note == ""
    assert list(view.type("\x7fpu\x1b")) == [Stop()]  # Escape stops, whatever was typed


def test_the_picture(capsys: pytest.CaptureFixture[str]) -> None:
    def drawn() -> str:
        with open(os.devnull, "w") as nothing:
            screen = Console(width=140, record=True, file=nothing)
            screen.print(view.draw())
            return screen.export_text()

    view = View(plain=True)
    assert "vla control" in drawn()
    late = {"p50": 0.1, "p99": 1.25, "p999": 2.0, "max": 3.5}
    view.see(status(state="FAULT", reason="[bold]why", task="push", lateness=late, counts={"missed": 4, "illegal": 0},
                    recorder="disk full (3 lost)", robot={"success": False}, priority="NO REAL-TIME PRIORITY",
                    events=[(3.0, 1, "RUN", "FAULT", "[bold]why")]))  # fmt: skip
    text = drawn()
    for word in ("FAULT", "[bold]why", "push", "p99 1.25", "missed 4", "illegal 0", "disk full (3 lost)", "nothing yet",
                 "NO REAL-TIME PRIORITY", "2.00 s  RUN → FAULT", HELP):  # fmt: skip
        assert word in text, word
    assert capsys.readouterr().out == "    2.00 s  RUN → FAULT  [bold]why\n"
    for i in range(20):
        view.see(status(events=[(4.0 + i, 1, "RUN", "HOLD", f"event{i}")]))
    assert "event19" in drawn()
    assert "event13" not in drawn()
    assert times({}) == "nothing yet"


# --- scripted episodes ---


def play(trials: Trials, *statuses: Status) -> list[Any]:
    return [order for status in statuses for order in trials.see(status)]


def test_trials_from_scene_to_row() -> None:
    trials = Trials(2, 10)
    now = trials.changed
    scene = {"seed": 10, "task": "push", "limit_s": 4.0}
    assert play(trials, status(time=now)) == [Begin(10)]
    old, here = {"seed": 9, "task": "old", "limit_s": 4.0}, {"scene": 10}
    assert play(trials, status(time=now, scene=old, robot={"scene": 9})) == []
    assert play(trials, status(time=now, scene=scene, robot={"scene": 9, "success": True})) == []  # of before
    assert play(trials, status(time=now, scene=scene, robot=here, state="FAULT")) == []
    assert play(trials, status(time=now + 1, scene=scene, robot=here, steps=5)) == [Instruct("push")]
    events = [(now + 1.5, 1, "RUN", "HOLD", "why"), (now + 1.6, 1, "HOLD", "RUN", "on")]
    assert play(trials, status(time=now + 2, scene=scene, robot=here, events=events, state="RUN")) == []
    done = status(time=now + 3, scene=scene, robot=here | {"success": True}, steps=25, state="RUN")
    assert play(trials, done) == [Begin(11)]
    assert trials.rows == [Trial(10, "push", True, False, 2.0, 20, 1)]
    scene = {"seed": 11, "task": "pull", "limit_s": 4.0}
    ready = status(time=now + 4, scene=scene, robot={"scene": 11}, state="HOLD")
    assert play(trials, ready) == [Instruct("pull")]
    waiting = status(time=now + 4 + 4 * MORE_TIME, scene=scene, robot={"scene": 11}, state="RUN")
    assert play(trials, waiting) == []
    assert not trials.done
    over = status(time=now + 4.1 + 4 * MORE_TIME, scene=scene, robot={"scene": 11}, state="RUN")
    assert play(trials, over) == []
    assert trials.done
    assert (trials.rows[1].success, trials.rows[1].failure, trials.rows[1].holds) == (False, False, 0)


def test_trials_that_do_not_go_on_say_so() -> None:
    trials = Trials(1, 0)
    play(trials, status(time=trials.changed))
    with pytest.raises(TimeoutError, match=r"got: FAULT \(broken\).*remedy"):
        play(trials, status(time=trials.changed + PATIENCE_S + 1, state="FAULT", reason="broken"))
