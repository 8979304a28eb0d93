"""The loop's pulse: absolute deadlines, and ticks that are left out rather than piled up."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla.control import clock
from vla.control.clock import Pulse


class Time:
    """A clock that only sleeps and work move on."""

    def __init__(self) -> None:
        self.now, self.slept = 100.0, []
        self.slept: list[float]

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(clock, "time", time)
    return time


def test_deadlines_are_absolute(time: Time) -> None:
    pulse, ticks = Pulse(100), []
    for work in (0.002, 0.009, 0.0, 0.005) * 250:
        ticks.append(pulse.wait())
        time.now += work
    assert [tick.deadline for tick in ticks] == pytest.approx(
        [100 + 0.01 * (i + 1) for i in range(1000)], abs=1e-9
    )
    assert all(abs(tick.woke - tick.deadline) < 1e-9 and tick.missed == 0 for tick in ticks)


def test_a_late_tick_comes_at_once_and_the_next_one_on_time(time: Time) -> None:
    pulse = Pulse(100)
    pulse.wait()
    time.now += 0.013
    late, following = pulse.wait(), pulse.wait()
    assert (late.missed, following.missed) == (0, 0)
    assert late.woke - late.deadline == pytest.approx(0.003)
    assert following.woke == pytest.approx(100.03)


def test_ticks_that_are_over_are_left_out_and_counted(time: Time) -> None:
    pulse = Pulse(100)
    pulse.wait()
    time.now += 0.055  # at 100.065; 20 to 50 are over, 60 is due
    late, following = pulse.wait(), pulse.wait()
    assert late.missed == 4
    assert late.deadline == pytest.approx(100.06)
    assert following.deadline == pytest.approx(100.07)


def test_restart_forgets_a_pause(time: Time) -> None:
    pulse = Pulse(50)
    pulse.wait()
    time.now += 30
    pulse.restart()
    tick = pulse.wait()
    assert tick.missed == 0
    assert tick.deadline == pytest.approx(150 - 20 + 0.02 + 0.02)


@given(st.lists(st.floats(0, 0.5), max_size=50), st.sampled_from([1, 30, 100, 1000]))
def test_no_tick_is_early_and_none_is_lost(works: list[float], rate: int) -> None:
    time, before = Time(), clock.time
    clock.time = time  # type: ignore[assignment]
    try:
        pulse, count, last = Pulse(rate), 0, 0.0
        for work in works:
            tick = pulse.wait()
            count += 1 + tick.missed
            assert tick.deadline == pytest.approx(100 + count / rate)
            assert tick.woke >= tick.deadline - 1e-9
            assert tick.deadline > last
            assert tick.woke - tick.deadline < 1 / rate + 1e-6  # older ones are left out
            last = tick.deadline
            time.now += work
    finally:
        clock.time = before


PRIORITISE = """
import gc, os, sys, threading, time
def denied(*_):
    raise PermissionError
if sys.argv[1] == "denied":
    os.sched_setscheduler = denied
from vla.control.clock import prioritise
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
print(prioritise(int(sys.argv[2])), gc.isenabled(), sys.getswitchinterval() < 1e-3, os.sched_getscheduler(0), sep="|")
"""


@pytest.mark.parametrize(
    ("permitted", "priority", "said"),
    [
        ("denied", 50, "NO REAL-TIME PRIORITY (PermissionError)"),
        ("as it is", 0, "ordinary priority, as configured"),
    ],
)
def test_priority_is_said(permitted: str, priority: int, said: str) -> None:
    command = [sys.executable, "-c", PRIORITISE, permitted, str(priority)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    text, *rest = done.stdout.strip().split("|")
    assert text.startswith(said)
    assert rest == ["False", "True", "0"]


def test_tidy_collects_what_the_collector_would_have() -> None:
    class Knot:
        pass

    gc.disable()
    try:
        knots = [Knot(), Knot()]
        for knot in knots:
            knot.self = knot  # type: ignore[attr-defined]
        gone = [weakref.ref(knot) for knot in knots]
        gc.collect(0)
        gc.collect(1)  # now they are old
        del knot
        knots.clear()
        assert all(ref() is not None for ref in gone)
        clock.tidy()
        assert all(ref() is None for ref in gone)
    finally:
        gc.enable()
