"""The robot's own process: shared memory, commands, questions, and every way to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla.checks import ConfigError
from vla.control.config import LimitsConfig, RobotConfig
from vla.control.process import RobotError, RobotProcess, load_robot
from vla.control.shared import SLOTS, Newest

FREE = 1e9  # the toy's second joint carries times
LIMITS = LimitsConfig((-FREE,) * 2, (FREE,) * 2, (1,) * 2, (1,) * 2, (1,) * 2)
PATIENCE_S = 20.0
ROOT = Path(__file__).parents[1]
BOXED = replace(LIMITS, workspace_lower=(0, 0, 0), workspace_upper=(1, 1, 1))


def toy(**kwargs: Any) -> RobotConfig:
    return RobotConfig("toy_robot:ToyRobot", kwargs, LIMITS)


def wait_for(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(0.005)
    raise AssertionError("it did not happen")


def running(pid: int) -> bool:
    """Whether there is such a process that has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def last_words(log: Path) -> dict[str, Any]:
    wait_for(lambda: log.is_file() and log.read_text().endswith("\n"))
    (line,) = log.read_text().splitlines()
    return json.loads(line)


@pytest.fixture(scope="module")
def robot() -> Iterator[RobotProcess]:
    with RobotProcess(toy()) as robot:
        yield robot


# -- shared memory ---------------------------------------------------------------------------

FIELDS = np.dtype([("number", "f8"), ("many", "i8", 40_000)])

WRITER = """
import sys, numpy as np
from vla.control.shared import Newest
newest = Newest(np.dtype([("number", "f8"), ("many", "i8", 40_000)]), int(sys.argv[1]))
n = 0
while True:
    n += 1
    newest.write(number=n, many=n)
"""


def test_no_read_is_torn_while_another_process_hammers() -> None:
    newest = Newest(FIELDS)
    command = [sys.executable, "-c", WRITER, str(newest.descriptor)]
    writer = subprocess.Popen(command, pass_fds=[newest.descriptor], cwd=ROOT)
    try:
        wait_for(lambda: newest.read() is not None)
        seen = []
        for _ in range(3000):
            record = newest.read()
            assert record is not None
            assert (record["many"] == record["number"]).all()
            seen.append(float(record["number"]))
        assert seen == sorted(seen)
        assert len(set(seen)) > 10
    finally:
        writer.kill()
        writer.wait()
    assert newest.read() is not None  # whatever the writer was doing when it died
    newest.close()


class Interrupted:
    """Records in the middle of whose copying something happens, once."""

    def __init__(self, records: np.ndarray, meanwhile: Callable[[], None]) -> None:
        self.records, self.meanwhile = records, meanwhile

    def __getitem__(self, index: Any) -> np.ndarray:
        meanwhile, self.meanwhile = self.meanwhile, lambda: None
        meanwhile()
        return self.records[index]


def test_a_record_that_was_written_over_meanwhile_is_read_anew() -> None:
    fields = np.dtype([("a", "i8"), ("b", "i8")])
    writer = Newest(fields)
    reader: Any = Newest(fields, writer.descriptor)
    assert reader.read() is None
    for n in range(1, 8):
        writer.write(a=n, b=n)

    def half_written() -> None:  # all round the ring, then half of the slot that is being read
        for n in range(8, 8 + SLOTS - 1):
            writer.write(a=n, b=n)
        slot = 7 % SLOTS
        writer._behind[slot] = 8 + SLOTS - 1
        writer._records["a"][slot] = 8 + SLOTS - 1

    reader._records = Interrupted(reader._records, half_written)
    record = reader.read()
    assert (record["a"], record["b"]) == (7 + SLOTS - 1,) * 2
    assert reader.number == 7 + SLOTS - 1


def test_without_ordered_stores_a_checksum_tells_a_torn_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vla.control.shared.CHECKED", True)
    newest = Newest(np.dtype([("number", "f8"), ("many", "i8", 8)]))
    newest.write(number=1, many=1)
    record = newest.read()
    assert record is not None
    assert record["many"].tolist() == [1] * 8
    newest._records["many"][1 % SLOTS][3] = 7  # a store that is seen late
    with pytest.raises(RuntimeError, match="Shared memory"):
        newest.read()


def test_memory_has_no_name() -> None:
    before = set(os.listdir("/dev/shm"))
    newest = Newest(FIELDS)
    assert {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("vla-")} == set()
    newest.close()


# -- readings, commands, questions -------------------------------------------------------------


def test_readings_arrive_whole_and_new(robot: RobotProcess) -> None:
    first = robot.read()
    assert first is not None
    later = wait_for(
        lambda: (r := robot.read()) and r.report["readings"] > first.report["readings"] + 2 and r
    )
    for reading in (first, later):
        n = reading.report["readings"]
        assert reading.images["front"].shape == (8, 8, 3)
        assert (reading.images["front"] == n % 256).all()
        assert (reading.state == n).all()
        assert reading.state.dtype == np.float32
        assert reading.stamps["front"] == reading.stamp <= time.monotonic()
    assert (first.images["front"] == first.report["readings"] % 256).all()  # a copy: it stays what it was
    assert later.report["pid"] == robot.pid != os.getpid()


def test_commands_reach_the_robot(robot: RobotProcess) -> None:
    before = len(robot.ask("delays"))
    for i in range(100):
        robot.send(np.array([i, time.monotonic()]))
        time.sleep(0.002)
    wait_for(lambda: robot.read().joints[0] == 99)  # type: ignore[union-attr]
    delays = robot.ask("delays")[before:]
    assert 50 < len(delays) <= 100
    assert 0 < np.median(delays) < 20  # milliseconds; 0.15 on an idle machine


def test_a_slow_camera_delays_no_command() -> None:
    with RobotProcess(toy(observe_s=0.3)) as robot:
        for i in range(60):
            robot.send(np.array([i, time.monotonic()]))
            time.sleep(0.005)
        delays = robot.ask("delays")
    assert len(delays) > 20
    assert np.median(delays) < 60


def test_a_robot_that_stands_still_blocks_nobody_and_wakes_up_to_the_present() -> None:
    with RobotProcess(toy()) as robot:
        os.kill(robot.pid, signal.SIGSTOP)
        begin = time.monotonic()
        for i in range(5000):
            robot.send(np.array([i, 0.0]))
        assert robot.read() is not None
        assert time.monotonic() - begin < PATIENCE_S
        time.sleep(0.2)
        os.kill(robot.pid, signal.SIGCONT)
        report = wait_for(lambda: (r := robot.read()) and r.report["stale"] and r.report)
        assert report["commands"] <= 1  # one may have got through before it stopped
        robot.send(np.array([-1.0, 0.0]))
        wait_for(lambda: robot.read().joints[0] == -1)  # type: ignore[union-attr]


def test_wake_ups_never_block(robot: RobotProcess) -> None:
    os.kill(robot.pid, signal.SIGSTOP)
    try:
        while True:  # fill the pipe
            os.write(robot._wake, bytes(4096))
    except BlockingIOError:
        pass
    robot.send(np.zeros(2))
    os.kill(robot.pid, signal.SIGCONT)
    robot.send(np.array([5.0, 0.0]))
    wait_for(lambda: robot.read().joints[0] == 5)  # type: ignore[union-attr]


def test_questions(robot: RobotProcess) -> None:
    assert robot.ask("reset", seed=4) == {"seed": 4}
    reading = robot.read()
    assert reading is not None
    assert reading.joints.tolist() == [4, 4]  # no reading from before
    with pytest.raises(RobotError, match="reset: ValueError: seed: got -1, expected 0 or more"):
        robot.ask("reset", seed=-1)
    with pytest.raises(RobotError, match="no attribute 'dance'"):
        robot.ask("dance")
    assert robot.alive
    os.kill(robot.pid, signal.SIGSTOP)
    with pytest.raises(RobotError, match="no answer in 0.05 s"):
        robot.ask("reset", timeout_s=0.05, seed=5)
    os.kill(robot.pid, signal.SIGCONT)
    assert robot.ask("reset", seed=6) == {"seed": 6}  # and not the late answer


# -- ends --------------------------------------------------------------------------------------


def test_a_command_from_before_a_new_scene_does_not_reach_it(robot: RobotProcess) -> None:
    """The robot stands still; a command is written, and behind it a new scene is asked for."""
    robot.send(np.array([1.0, time.monotonic()]))
    time.sleep(0.05)
    os.kill(robot.pid, signal.SIGSTOP)
    robot.send(np.array([5.0, time.monotonic()]))
    waker = subprocess.Popen(["sh", "-c", f"sleep 0.03; kill -CONT {robot.pid}"])
    try:
        assert robot.ask("reset", seed=3) == {"seed": 3}
    finally:
        waker.wait()
    time.sleep(0.1)
    reading = robot.read()
    assert reading is not None
    assert reading.joints.tolist() == [3.0, 3.0]


def test_closing(tmp_path: Path) -> None:
    robot = RobotProcess(toy(), log=tmp_path / "log")
    assert not robot.alive
    robot.start()
    assert robot.alive
    robot.close()
    assert not robot.alive
    robot.close()
    assert last_words(tmp_path / "log")["end"] == "closed"
    with pytest.raises(RobotError, match="exit code 0"):
        robot.read()


@pytest.mark.parametrize("where", ["connect", "observe", "send"])
def test_an_exception_reaches_the_controller(
    where: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    robot = RobotProcess(toy(fails=where), log=tmp_path / "log")
    message = f"OSError: the toy's {where} was to fail"

    def until_it_fails() -> None:
        robot.start()
        robot.send(np.zeros(2))
        wait_for(lambda: robot.read() is None)

    with pytest.raises(RobotError, match=message):
        until_it_fails()
    robot.close()
    assert not robot.alive
    assert message in last_words(tmp_path / "log")["end"]
    assert "Traceback" in capfd.readouterr().err


def test_a_killed_robot_is_noticed() -> None:
    with RobotProcess(toy()) as robot:
        os.kill(robot.pid, signal.SIGKILL)
        wait_for(lambda: not robot.alive)
        for attempt in (robot.read, lambda: robot.send(np.zeros(2)), lambda: robot.ask("reset", seed=1)):
            with pytest.raises(RobotError, match="died with exit code -9"):
                attempt()


def test_reports_have_limits() -> None:
    with RobotProcess(toy(report={"n": float("inf")})) as robot:
        assert robot.read().report["n"] == float("inf")  # type: ignore[union-attr]
    with pytest.raises(RobotError, match="at most 4096"):
        RobotProcess(toy(report={"long": "x" * 5000})).start()


CONTROLLER = """
import sys, time, json, numpy as np
sys.path[:0] = json.loads(sys.argv[1])
from vla.control.config import LimitsConfig, RobotConfig
from vla.control.process import RobotProcess
robot = RobotProcess(RobotConfig(*json.loads(sys.argv[2]), LimitsConfig(*json.loads(sys.argv[3]))), log=sys.argv[4])
robot.start()
command = robot.read().joints
print(robot.pid, flush=True)
while True:
    robot.send(command)
    time.sleep(0.01)
"""


@pytest.mark.parametrize("name", ["toy", "tabletop"])
def test_the_robot_outlives_a_killed_controller_until_it_holds(name: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    id_, joints, kwargs = "toy_robot:ToyRobot", 2, dict[str, Any](timeout_s=0.1)
    if name == "tabletop":
        id_, joints = "envs.robot:TabletopRobot", 8
        kwargs |= dict(skills=["press"], cameras=["front"], pixels=32)
    limits = [[-1] * joints] + [[1] * joints] * 4
    arguments = [json.dumps(x) for x in ([str(ROOT), str(ROOT / "tests")], [id_, kwargs], limits)] + [
        str(log)
    ]
    controller = subprocess.Popen(
        [sys.executable, "-c", CONTROLLER, *arguments], stdout=subprocess.PIPE, cwd=ROOT
    )
    assert controller.stdout is not None
    pid = int(controller.stdout.readline())
    time.sleep(0.2)
    assert running(pid)
    assert not log.exists()
    killed = time.monotonic()
    controller.kill()
    controller.wait()
    words = last_words(log)
    assert time.monotonic() - killed < 10  # 0.5 s on an idle machine
    assert words["end"] == "controller gone"
    assert words["report"]["timeouts"] == 1
    assert 99 < words["report"]["held_after_ms"] < 5000
    wait_for(lambda: not running(pid))
    controller.stdout.close()


def test_ctrl_c_reaches_the_controller_alone(robot: RobotProcess) -> None:
    assert os.getsid(robot.pid) != os.getsid(0)


# -- what is refused before anything starts ----------------------------------------------------


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (RobotConfig("no_such_module:X"), "got 'no_such_module:X', expected a module that can be imported.*remedy"),
        (RobotConfig("toy_robot:Nothing"), "robot.id: got 'toy_robot:Nothing', expected a subclass of"),
        (RobotConfig("toy_robot:NoRobot"), "expected a subclass of vla.control.robot.Robot in toy_robot"),
        (toy(pixls=3), "robot.kwargs: got {'pixls': 3}, expected what ToyRobot takes.*pixls"),
        (RobotConfig("toy_robot:ToyRobot"), r"limits.lower: got \[-1\], expected one number .*: slide, gripper"),
        (
            RobotConfig("toy_robot:ToyRobot", {}, BOXED),
            "workspace_lower: got .*expected none, since ToyRobot does not know its hand's position",
        ),
    ],
)  # fmt: skip
def test_robots_that_cannot_be_loaded(config: RobotConfig, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        RobotProcess(config)
    with pytest.raises(ConfigError):
        load_robot(config)


def test_a_reading_that_does_not_fit_is_refused() -> None:
    with pytest.raises(RobotError, match=r"got: .*\(9, 9, 3\).*expected: .*\(8, 8, 3\).*remedy"):
        RobotProcess(toy(pixels=8, delivers=9)).start()


def test_the_controllers_side_stays_light() -> None:
    code = """
import sys
from vla.control.process import RobotProcess
print([name for name in ("torch", "mujoco", "gymnasium", "lerobot", "metaworld", "timm") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
