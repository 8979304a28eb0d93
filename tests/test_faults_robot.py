"""Faults of sensors, robot, recorder, console and controller, against real processes."""

from __future__ import annotations

import ast
import json
import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from controlled import PATIENCE_S, Controlled, WalkingServer, controlled, ended, walking_server
from faults import REPETITIONS, timed
from serving import wait_until

from vla.control.console import Begin, Instruct, Intervene, Reset, Resume, Stop

IN_TIME_MS = 250
ROOT = Path(__file__).parents[1]
WHOLE = resource.RLIM_INFINITY
GRACE_S = 0.5  # from the controller's end to that of the robot's process: vla.control.host


@pytest.fixture(scope="module")
def server() -> Iterator[WalkingServer]:
    with walking_server("--port=0") as server:
        yield server


@pytest.fixture(scope="module")
def shared(server: WalkingServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Controlled]:
    with controlled(tmp_path_factory.mktemp("robot"), server.url, "--record=true") as shared:
        yield shared


@pytest.fixture
def control(shared: Controlled) -> Iterator[Controlled]:
    """The module's controller, running; judged after every test."""
    shared.run()
    yield shared
    assert shared.legal() > 100
    assert shared.fresh().counts["illegal"] == 0


@pytest.fixture(scope="module")
def times(request: pytest.FixtureRequest) -> range:
    return range(REPETITIONS if request.config.getoption("--faults") else 1)


# --- sensors ---


@pytest.mark.parametrize(
    ("fault", "faults", "words"),
    [
        ("camera frozen, its stamps fresh", {"freeze": ["front"]}, "frozen camera front"),
        ("camera stalled", {"unstamped": ["wrist"]}, "stale camera wrist"),
        ("all sensors stalled", {"stall": True}, "stale reading"),
        ("joints measured as NaN", {"nan": True}, "a reading that is not finite"),
    ],
)
def test_a_sensor_that_fails_holds_and_a_fresh_observation_goes_on(
    control: Controlled, times: range, fault: str, faults: dict[str, Any], words: str
) -> None:
    for _ in times:
        control.run()
        since = control.set_faults(**faults)
        hold = control.timed(fault, "HOLD", IN_TIME_MS, since)
        assert words in hold[4]
        control.still(0.3, hold[0] + 1e-6)
        mended = control.set_faults()
        assert control.event("RUN", hold[0] + 1e-6)[0] > mended
        assert control.stopped_at(hold[0]) > mended  # it moves again


def test_a_robot_process_that_stands_still_holds_and_goes_on(control: Controlled, times: range) -> None:
    pid = control.robot_pid()
    for _ in times:
        control.run()
        since = time.monotonic()
        os.kill(pid, signal.SIGSTOP)
        try:
            hold = control.timed("robot's process stopped (SIGSTOP)", "HOLD", IN_TIME_MS, since)
            control.still(0.3, hold[0] + 1e-6)
        finally:
            os.kill(pid, signal.SIGCONT)
        control.event("RUN", hold[0] + 1e-6)


def test_a_robot_that_raises_is_a_fault_and_the_controller_stays(
    server: WalkingServer, tmp_path: Path, times: range
) -> None:
    for i in times:
        with controlled(tmp_path / str(i), server.url) as control:
            control.run()
            event = control.timed("sensors raise", "FAULT", IN_TIME_MS, control.set_faults(**{"raise": True}))
            assert event[4] == "the robot: The robot failed: OSError: the test's fault"
            lost(control)


def test_a_killed_robot_is_a_fault_and_the_controller_stays(
    server: WalkingServer, tmp_path: Path, times: range
) -> None:
    for i in times:
        with controlled(tmp_path / str(i), server.url) as control:
            control.run()
            pid, since = control.robot_pid(), time.monotonic()
            os.kill(pid, signal.SIGKILL)
            event = control.timed("robot's process killed (SIGKILL)", "FAULT", IN_TIME_MS, since)
            assert "died with exit code -9" in event[4]
            lost(control)


def lost(control: Controlled) -> None:
    """Assert that a controller without its robot lives, says so, and cannot be reset."""
    status = control.fresh()
    assert (status.state, status.reason.partition(":")[0]) == ("FAULT", "the robot")
    since = control.order(Reset())
    control.event("FAULT", since)
    assert control.fresh().tick > status.tick
    assert control.end()["events"][-1]["after"] == "FAULT"


# --- the operator ---


def test_an_operators_stop_brakes_at_once_and_latches(control: Controlled, times: range) -> None:
    for _ in times:
        control.run()
        since = control.order(Stop())
        event = control.timed("operator's stop", "STOPPED", 50, since)
        time.sleep(0.3)
        braked = 1000 * (control.stopped_at(event[0]) - event[0])
        timed("operator's stop: until the arm rests", "STOPPED", 150, braked, control.fresh().lateness["max"])
        control.order(Instruct("swing"))
        control.order(Reset())  # which is not for this
        control.still(0.3, event[0] + 1e-6)
        since = control.order(Resume())
        control.event("RUN", since)
        assert [e[3] for e in control.events if e[0] >= since] == ["HOLD", "RUN"]


def test_orders_that_are_none_change_nothing(control: Controlled) -> None:
    since = time.monotonic()
    for data in (b"\0", b"\xff" * 100, b"\x81\xa4type\xa4Stop"[:-1], os.urandom(1000), b"x" * 2**16):
        control.channel.socket.send(data)
    control.order(Intervene([0.0]))
    control.order(Intervene([float("nan")] * 7))
    control.order(Intervene([]))
    control.still(0.3, since)
    assert control.fresh().state == "RUN"


def test_a_new_scene_begins_at_rest_and_needs_an_instruction(control: Controlled) -> None:
    since = control.order(Begin(5))
    hold = control.event("HOLD", since)
    control.wait(lambda status: status.scene.get("seed") == 5)
    control.still(0.2, hold[0] + 1e-6)
    assert control.fresh().task == ""
    np.testing.assert_allclose(control.commands()["command"][-1], 0.05)
    since = control.order(Begin(-(2**60)))  # 0.01 * (seed % 10)
    control.wait(lambda status: status.scene.get("seed") == -(2**60))


@pytest.mark.parametrize("deadman", ["hold", pytest.param("continue", marks=pytest.mark.slow)])
def test_a_lost_console(server: WalkingServer, tmp_path: Path, times: range, deadman: str) -> None:
    for i in times:
        with controlled(tmp_path / str(i), server.url, f"--loop.deadman={deadman}") as control:
            lose_console(control, deadman)


def lose_console(control: Controlled, deadman: str) -> None:
    control.run()
    since = time.monotonic()
    control.channel.close()
    time.sleep(1.0)
    control.process.terminate()
    assert control.process.wait(PATIENCE_S) == 0
    result = json.loads((control.folder / "control.json").read_text())
    after = [event for event in result["events"] if event["time"] >= since]
    if deadman == "continue":
        assert [event["reason"] for event in after] == ["the loop ends"]
        assert control.moved(since + 0.4) > 0.1
    else:
        assert [event["reason"] for event in after] == ["the console is lost", "the loop ends"]
        late = result["lateness_ms"]["max"]
        ms = 1000 * (after[0]["time"] - since)
        timed("console lost, deadman: hold", "HOLD", IN_TIME_MS, ms, late if late > 100 else 0.0)
        assert control.moved(since + 0.5) == 0


# --- the recorder ---


def test_a_full_disk_costs_the_recording_and_nothing_else(control: Controlled) -> None:
    with Untouched(control):
        recorder = control.child("vla.control.journalist").pid
        (journal,) = sorted((control.folder / "session").iterdir())[-1:]
        limit = journal.stat().st_size + 2_000
        resource.prlimit(recorder, resource.RLIMIT_FSIZE, (limit, WHOLE))
        control.wait(lambda status: status.recorder.startswith("disk full ("), "a full disk")
    resource.prlimit(recorder, resource.RLIMIT_FSIZE, (WHOLE, WHOLE))
    control.wait(lambda status: status.recorder.startswith("ok ("), "a disk with room")
    assert journal.stat().st_size > limit


@pytest.mark.slow
def test_a_slow_disk_costs_frames_and_nothing_else(control: Controlled) -> None:
    recorder = control.child("vla.control.journalist")
    with Untouched(control):
        recorder.suspend()
        try:
            control.wait(lambda status: status.recorder.startswith("slow ("), "a slow disk")
        finally:
            recorder.resume()
    control.wait(lambda status: status.recorder.startswith("ok"), "a disk that has caught up")


def test_a_killed_recorder_costs_the_recording_and_nothing_else(
    server: WalkingServer, tmp_path: Path
) -> None:
    with controlled(tmp_path, server.url, "--record=true") as control:
        control.run()
        with Untouched(control):
            control.child("vla.control.journalist").kill()
            control.wait(lambda status: status.recorder.startswith("dead (exit code -9"), "a dead recorder")
        assert control.end()["recorder"].startswith("dead (")


class Untouched:
    """Assert that what happens meanwhile costs the loop nothing: no transition, a command in every tick.

    Ticks that a busy machine makes it miss are counted as missed; how many is for the benchmarks to say.
    """

    def __init__(self, control: Controlled) -> None:
        self.control = control

    def __enter__(self) -> None:
        self.before = self.control.fresh()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.control.still(0.2, self.before.time)
            after = self.control.fresh()
            ticks, seconds = after.tick - self.before.tick, after.time - self.before.time
            missed = after.counts["missed"] - self.before.counts["missed"]
            assert abs(ticks + missed - 100 * seconds) < 5
            assert after.counts["commands"] - self.before.counts["commands"] == ticks


# --- the controller ---


def test_a_killed_controller_leaves_a_robot_that_holds_and_ends_by_itself(
    server: WalkingServer, tmp_path: Path, times: range
) -> None:
    for i in times:
        with controlled(tmp_path / str(i), server.url, kwargs={"timeout_s": 0.1}) as control:
            control.run()
            robot, since = psutil.Process(control.robot_pid()), time.monotonic()
            control.process.kill()
            wait_until(lambda robot=robot: ended(robot))
            ms = 1000 * (time.monotonic() - since)
            timed("controller killed (SIGKILL): robot's process", "ends", 1000 * GRACE_S + 500, ms, 1000)
            (words,) = [
                json.loads(line) for line in (tmp_path / str(i) / "robot.log").read_text().splitlines()
            ]
            assert words["end"] == "controller gone"
            assert words["report"]["timeouts"] >= 1
            held = words["report"]["held_after_ms"]
            timed("controller killed (SIGKILL): robot's own timeout (0.1 s)", "holds", 150, held, 100)
            assert control.stopped_at(since) - since < 0.1


@pytest.mark.slow
def test_a_killed_controller_takes_its_own_policy_server_with_it(tmp_path: Path) -> None:
    from toy_export import hand_made

    folder = hand_made(tmp_path / "export")
    with controlled(
        tmp_path / "out", checkpoint=str(folder), kwargs={"n": 2, "cameras": ["front"]}
    ) as control:
        control.wait(lambda status: status.state == "READY")
        children = psutil.Process(control.process.pid).children(recursive=True)
        assert sum("vla.serve" in " ".join(child.cmdline()) for child in children) == 1
        control.process.kill()
        wait_until(lambda: all(map(ended, children)))


def test_a_controller_that_stood_still_goes_on(control: Controlled) -> None:
    since, before = time.monotonic(), control.fresh().counts["missed"]
    control.process.send_signal(signal.SIGSTOP)
    time.sleep(1.0)
    control.process.send_signal(signal.SIGCONT)
    control.wait(lambda status: status.counts["missed"] >= before + 90, "missed ticks")
    control.run()
    control.still(0.3, time.monotonic())
    assert {e[3] for e in control.events if e[0] >= since} <= {"HOLD", "RUN"}


# --- the wall clock ---

STEPPING = """
import datetime, os, threading, time
FILE, SEEN = {file!r}, {seen!r}
truth = {{name: getattr(time, name) for name in ("time", "time_ns", "localtime", "gmtime")}}
def off():
    try:
        return float(open(FILE).read() or 0)
    except FileNotFoundError:
        return 0.0
time.time = lambda: truth["time"]() + off()
time.time_ns = lambda: truth["time_ns"]() + int(1e9 * off())
time.localtime = lambda at=None: truth["localtime"](time.time() if at is None else at)
time.gmtime = lambda at=None: truth["gmtime"](time.time() if at is None else at)
class Stepping(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(time.time(), tz)
    @classmethod
    def utcnow(cls):
        return cls.fromtimestamp(time.time(), datetime.timezone.utc).replace(tzinfo=None)
    today = now
datetime.datetime = Stepping
def watch():
    last = time.time()
    while True:
        time.sleep(0.02)
        now = time.time()
        if abs(now - last) > 1800:
            open(f"{{SEEN}}/{{os.getpid()}} {{'forward' if now > last else 'back'}}", "w").close()
        last = now
threading.Thread(target=watch, daemon=True).start()
"""


def test_a_wall_clock_that_steps_changes_nothing(server: WalkingServer, tmp_path: Path) -> None:
    """In controller, robot and recorder: each one's clock is seen to step, forward and back."""
    wall, seen, patch = tmp_path / "wall", tmp_path / "seen", tmp_path / "patch"
    seen.mkdir()
    patch.mkdir()
    (patch / "sitecustomize.py").write_text(STEPPING.format(file=str(wall), seen=str(seen)))
    env = {"PYTHONPATH": str(patch)}
    with controlled(tmp_path / "out", server.url, "--record=true", env=env) as control:
        control.run()
        since = time.monotonic()
        stepping = {control.process.pid, control.robot_pid(), control.child("vla.control.journalist").pid}
        for seconds, word in ((3600, "forward"), (-3600, "back")):
            new = wall.with_suffix(".new")
            new.write_text(str(seconds))
            new.replace(wall)
            for pid in stepping:
                wait_until((seen / f"{pid} {word}").exists)
            control.still(0.5, since)
        assert control.moved(since) > 0.1
        result = control.end()
        assert result["events"][-1]["reason"] == "the loop ends"
        assert result["recorder"] == "ok"


def test_nothing_in_control_or_serve_reads_the_wall_clock() -> None:
    files = [
        *(ROOT / "vla/control").glob("*.py"),
        *(ROOT / "vla/serve").glob("*.py"),
        ROOT / "vla/data/journal.py",
    ]
    assert len(files) > 20
    for file in files:
        assert wall_clock(file.read_text()) == [], file


def wall_clock(source: str) -> list[str]:
    """Every use of a wall clock, of all ways to name one."""
    clocks = {
        "time",
        "time_ns",
        "localtime",
        "gmtime",
        "ctime",
        "asctime",
        "strftime",
        "CLOCK_REALTIME",
        "CLOCK_TAI",
    }
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "time":
            found += [node.attr] if node.attr in clocks else []
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name == "datetime"]
            found += ["time as …" for alias in node.names if alias.name == "time" and alias.asname]
        elif isinstance(node, ast.ImportFrom) and node.module in ("time", "datetime"):
            found += [alias.name for alias in node.names if node.module == "datetime" or alias.name in clocks]
    return found


def test_the_search_for_wall_clocks_finds_them() -> None:
    for source in (
        "import time; time.time()",
        "from time import time",
        "import datetime",
        "import time as t",
    ):
        assert wall_clock(source)
    assert (
        wall_clock("import time; time.monotonic(); reading.time; time.clock_gettime(time.CLOCK_BOOTTIME)")
        == []
    )
