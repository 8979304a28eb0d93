"""The loop's pulse: absolute deadlines on CLOCK_MONOTONIC, and the priority to meet them."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from dataclasses import dataclass

# A thread that computes hands Python over after so long, instead of after 5 ms, when the loop wants to run.
SWITCH_S = 1e-4


@dataclass(frozen=True)
class Tick:
    """One beat: when it should have been, when it was, and how many were left out before it."""

    deadline: float
    woke: float
    missed: int


class Pulse:
    """Ticks at a fixed rate. A late loop leaves ticks out instead of running several at once."""

    def __init__(self, rate: int) -> None:
        self.period = 1 / rate
        self.restart()

    def restart(self) -> None:
        """Begin to count anew, one period from now: after work that was allowed to take long."""
        self.start, self.count = time.monotonic(), 0

    def wait(self) -> Tick:
        """Sleep until the next deadline."""
        self.count += 1
        missed = int((time.monotonic() - self.start) / self.period) - self.count
        if missed > 0:
            self.count += missed
        deadline = self.start + self.count * self.period  # not a sum of periods: rounding would add up
        pause = deadline - time.monotonic()
        if pause > 0:
            time.sleep(pause)
        return Tick(deadline, time.monotonic(), max(0, missed))


def prioritise(priority: int) -> str:
    """Run this thread before others: SCHED_FIFO, and no pauses of the garbage collector.

    Returns what was achieved, to be shown: without FIFO a loaded machine makes the loop late. The other threads of
    this process get one level less, since one that sleeps while it holds Python's lock would keep the loop waiting.
    """
    sys.setswitchinterval(SWITCH_S)
    gc.collect()
    gc.freeze()
    gc.disable()
    if not priority:
        return "ordinary priority, as configured"
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
        for thread in threading.enumerate():
            if thread.native_id not in (None, threading.get_native_id()):
                os.sched_setscheduler(thread.native_id, os.SCHED_FIFO, os.sched_param(max(1, priority - 1)))
    except (PermissionError, AttributeError, ProcessLookupError) as error:
        return (
            f"NO REAL-TIME PRIORITY ({type(error).__name__}): expect late ticks when the machine is busy. "
            "remedy: run as root, or give the user rtprio in /etc/security/limits.conf"
        )
    return f"SCHED_FIFO {priority}"


def tidy() -> None:
    """Collect what has become garbage since `prioritise`, which is little: the collector is off while the loop runs."""
    gc.collect()
