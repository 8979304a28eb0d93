"""A robot of LeRobot's behind ours: a simulated one that subclasses LeRobot's own base class."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vla.control.lerobot_arm import UNITS, LeRobotArm
from vla.control.robot import Reading

ROOT = Path(__file__).parents[1]
JOINTS = ("pan", "lift", "gripper")
EMPTY = Reading({}, {}, np.zeros(3, np.float32), np.zeros(3), 0.0)


def make_arm(**changed: Any) -> LeRobotArm:
    kwargs: dict[str, Any] = dict(
        type="toy_lerobot_arm:ToyArm", config={}, cameras={"wrist": {"height": 6, "width": 8}}, joints=JOINTS
    )
    return LeRobotArm(**kwargs | changed)


@pytest.fixture
def arm(tmp_path: Path) -> Iterator[LeRobotArm]:
    arm = make_arm(config={"calibration_dir": str(tmp_path), "id": "one"})
    arm.connect()
    yield arm
    arm.disconnect()


@pytest.fixture(autouse=True)
def calibrations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LeRobot makes a folder for every robot: not the user's."""
    import lerobot.robots.robot

    monkeypatch.setattr(lerobot.robots.robot, "HF_LEROBOT_CALIBRATION", tmp_path)


def test_units_there_and_back(arm: LeRobotArm) -> None:
    """Degrees are radians, the gripper is a fraction; state and actions stay LeRobot's."""
    command = arm.target(np.array([90.0, -45.0, 100.0]), EMPTY.joints, EMPTY)
    assert command == pytest.approx([np.pi / 2, -np.pi / 4, 1.0])
    arm.send(command)
    assert arm.robot.goal == pytest.approx({"pan": 90, "lift": -45, "gripper": 100})
    arm.observe()
    reading = arm.observe()
    assert reading.joints == pytest.approx(command)
    assert reading.joints.dtype == np.float64
    assert reading.state == pytest.approx([90, -45, 100])
    assert reading.state.dtype == np.float32


@given(
    units=st.sampled_from(sorted(UNITS)),
    values=arrays(np.float64, 3, elements=st.floats(-1000, 1000)),
)
def test_any_action_comes_out_as_it_went_in(units: str, values: np.ndarray) -> None:
    arm = make_arm(units=units)
    sent: list[dict[str, float]] = []
    arm.robot = type("Sink", (), {"send_action": lambda _, action: sent.append(action)})()
    arm.send(arm.target(values, EMPTY.joints, EMPTY))
    assert list(sent[0]) == ["pan.pos", "lift.pos", "gripper.pos"]
    assert [*sent[0].values()] == pytest.approx(values)


def test_lerobots_contract(arm: LeRobotArm) -> None:
    robot = arm.robot
    assert set(robot.get_observation()) == set(robot.observation_features)
    action = {"pan.pos": 1.0, "lift.pos": 2.0, "gripper.pos": 3.0}
    assert robot.send_action(action) == action
    assert robot.is_connected
    arm.disconnect()
    assert not robot.is_connected
    arm.disconnect()  # twice is no mistake of the user's
    from lerobot.utils.errors import DeviceNotConnectedError

    with pytest.raises(DeviceNotConnectedError):
        arm.observe()
    with pytest.raises(DeviceNotConnectedError):
        arm.send(np.zeros(3))


def test_readings_fit_the_features(arm: LeRobotArm) -> None:
    reading, features = arm.observe(), arm.features
    assert {name: image.shape for name, image in reading.images.items()} == {"wrist": (6, 8, 3)}
    assert features.cameras == {"wrist": (6, 8)}
    assert (features.state_dim, features.action_dim, features.fps) == (3, 3, 30)
    assert set(reading.stamps) == {"wrist"}
    assert reading.stamps["wrist"] == reading.stamp <= time.monotonic()


def test_a_frozen_camera_grows_old(arm: LeRobotArm) -> None:
    first = arm.observe()
    second = arm.observe()
    assert second.stamp > first.stamp
    assert second.stamps == first.stamps
    arm.send(np.array([1.0, 0.0, 0.0]))  # what the camera sees changes
    third = arm.observe()
    assert third.stamps["wrist"] == third.stamp
    assert not np.array_equal(third.images["wrist"], first.images["wrist"])


def test_the_bus_serves_one_at_a_time(arm: LeRobotArm) -> None:
    inside, overlaps = [False], []
    look, move = arm.robot.get_observation, arm.robot.send_action

    def busy(call: Any) -> Any:
        def guarded(*arguments: Any) -> Any:
            overlaps.append(inside[0])
            inside[0] = True
            time.sleep(0.0005)
            result = call(*arguments)
            inside[0] = False
            return result

        return guarded

    arm.robot.get_observation, arm.robot.send_action = busy(look), busy(move)
    thread = threading.Thread(target=lambda: [arm.observe() for _ in range(50)])
    thread.start()
    for _ in range(50):
        arm.send(np.zeros(3))
    thread.join()
    assert len(overlaps) == 100
    assert not any(overlaps)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        (dict(joints=("pan", "lift")), "joints: got .*expected the robot's .*gripper.*remedy"),
        (dict(cameras={"wrist": {"height": 8, "width": 6}}), r"cameras: got .*\(8, 6, 3\).*\(6, 8, 3\)"),
        (dict(cameras={}), "cameras: got {}"),
        (dict(config={"calibrated": False}), "got one that is not calibrated.*lerobot-calibrate"),
        (dict(config={"prt": "x"}), "prt.*remedy"),
        (dict(type="no_arm"), "got 'no_arm'.*remedy"),
        (dict(type="no_module:Arm"), "got 'no_module:Arm'.*remedy"),
        (dict(type="toy_lerobot_arm:Leg"), "got 'toy_lerobot_arm:Leg'.*remedy"),
    ],
)
def test_what_cannot_be_connected(changed: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make_arm(**changed).connect()


def test_unknown_units() -> None:
    with pytest.raises(ValueError, match="units: got 'grads', expected one of degrees"):
        make_arm(units="grads")


def test_types_by_lerobots_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `--robot.type` says it: LeRobot registers a configuration when its package is imported."""
    from lerobot import robots

    asked: list[Any] = []
    monkeypatch.setattr(robots, "make_robot_from_config", lambda config: asked.append(config) or 1 / 0)
    camera = {"type": "opencv", "index_or_path": 0, "width": 640, "height": 480, "fps": 30}
    arm = make_arm(type="so101_follower", config={"port": "/dev/ttyACM0", "cameras": {"front": camera}})
    with pytest.raises(ZeroDivisionError):
        arm.connect()
    (config,) = asked
    assert (type(config).__name__, config.port) == ("SOFollowerRobotConfig", "/dev/ttyACM0")
    assert config.cameras["front"].width == 640


def test_the_controller_imports_no_lerobot() -> None:
    code = """
import sys
from vla.config import load
from vla.control.config import RobotConfig
from vla.control.process import load_robot
robot = load_robot(load(RobotConfig, ["configs/robots/lerobot_so101.yaml"]))
assert robot.joints[-1] == "gripper"
print([name for name in ("torch", "lerobot", "mujoco") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
