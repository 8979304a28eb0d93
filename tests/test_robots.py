"""The simulated robots, in lockstep: kinematics, the demonstrations' rule, physics, timeouts, cameras."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from envs import arm, simulated
from envs.metaworld_robot import CAMERA, MetaworldRobot
from envs.robot import TabletopRobot
from envs.scene import SUBSTEPS, build
from envs.simulated import Simulated
from envs.tabletop import Tabletop
from envs.tasks import SKILLS
from vla.config import load
from vla.control.config import RobotConfig
from vla.control.process import load_robot
from vla.control.robot import Reading
from vla.control.safety import Limiter, Limits
from vla.observation import IMAGES, STATE, Features

TABLE: dict[str, Any] = dict(skills=["press"], row=0.03, references=["name"], cameras=["front"], pixels=32)
CONFIGS = Path(__file__).parents[1] / "configs/robots"
TICK = 0.01


@functools.cache
def configured(name: str) -> RobotConfig:
    return load(RobotConfig, [], CONFIGS / f"{name}.yaml")


poses = arrays(np.float64, 3, elements=st.floats(0, 1)).map(
    lambda x: arm.LOWEST + x * (arm.HIGHEST - arm.LOWEST)
)
yaws = st.floats(-arm.YAW_LIMIT, arm.YAW_LIMIT)


def lockstep(**table: Any) -> TabletopRobot:
    robot = TabletopRobot(realtime=False, **TABLE | table)
    robot.connect()
    return robot


@pytest.fixture(scope="module")
def robot() -> Iterator[TabletopRobot]:
    robot = lockstep()
    yield robot
    robot.disconnect()


@pytest.fixture(scope="module")
def table() -> Iterator[Tabletop]:
    env = Tabletop(**TABLE)
    yield env
    env.close()


def follow(robot: Simulated, seed: int, limiter: Limiter | None = None, dt: float = TICK) -> dict[str, Any]:
    """Have the expert do a scene by `target` and `send`; the last report."""
    answer = robot.reset(seed)
    reading, per_step = robot.observe(), round(1 / robot.features.fps / dt)
    target = reading.joints.copy()
    if limiter is not None:
        limiter.reset(target)
    for _ in range(round(answer["limit_s"] * robot.features.fps)):
        new = robot.target(robot.expert_action(), target, reading)  # type: ignore[attr-defined]
        for part in range(1, per_step + 1):
            command = target + (new - target) * (part / per_step)
            velocity = (new - target) * robot.features.fps
            robot.send(command if limiter is None else limiter.step(command, velocity))
            robot.advance(dt)
        target, reading = new, robot.observe()
        if reading.report["success"] or reading.report["failure"]:
            break
    assert reading.report["refused"] == reading.report["timeouts"] == 0
    return reading.report


# -- kinematics and the rule ---------------------------------------------------------------


@given(position=poses, yaw=yaws)
def test_forward_of_inverse(position: np.ndarray, yaw: float) -> None:
    reached, turned = arm.forward(arm.inverse(position, yaw))
    assert reached == pytest.approx(position, abs=1e-9)
    assert turned == pytest.approx(yaw, abs=1e-9)


def test_forward_is_the_models_in_any_posture() -> None:
    model = build()
    data, tip, rng = mujoco.MjData(model), model.site("tip").id, np.random.default_rng(0)
    joints = rng.uniform(-3, 3, (50, 7))
    positions, turned = arm.forward(joints)
    for i in range(50):
        for name, angle in zip(arm.JOINTS, joints[i], strict=True):
            data.joint(name).qpos[0] = angle
        mujoco.mj_kinematics(model, data)
        matrix = data.site_xmat[tip]
        assert positions[i] == pytest.approx(data.site_xpos[tip], abs=1e-12)
        assert np.exp(1j * turned[i]) == pytest.approx(
            np.exp(1j * np.arctan2(-matrix[1], matrix[4])), abs=1e-9
        )


def test_target_is_the_environments_rule(robot: TabletopRobot, table: Tabletop) -> None:
    rng = np.random.default_rng(0)
    leashed = 0
    for seed in range(3):
        table.reset(seed=seed)
        for _ in range(25):
            before = np.append(arm.inverse(table._commanded, table._yaw), 0.0)
            hand = table.world.hand.copy()
            leashed += bool((np.abs(table._commanded - hand) > arm.LEASH).any())
            action = rng.uniform(-1.6, 1.6, 5) * [1, 1, 1, 2, 1] + [0, 0, -0.8, 0, 0]  # also into the table
            reading = Reading({}, {}, hand.astype(np.float32), before, 0.0)
            target = robot.target(action, before, reading)
            table.step(action)
            assert target[:7] == pytest.approx(arm.inverse(table._commanded, table._yaw), abs=1e-5)
            assert target[7] == pytest.approx(table.data.ctrl[table.finger_servos[0]])
    assert leashed > 5


@given(position=poses, yaw=yaws, action=arrays(np.float64, 5, elements=st.floats(-1e9, 1e9)), hand=poses)
def test_targets_stay_within_the_configured_limits(
    position: np.ndarray, yaw: float, action: np.ndarray, hand: np.ndarray
) -> None:
    robot = TabletopRobot(**TABLE)
    limits = configured("tabletop").limits
    before = np.append(arm.inverse(position, yaw), 0.02)
    target = robot.target(action, before, Reading({}, {}, hand.astype(np.float32), before, 0.0))
    assert Limits(limits, robot.position).hold(target[None])[0]
    assert (target >= robot.range[0]).all()
    assert (target <= robot.range[1]).all()


# -- physics -------------------------------------------------------------------------------


def test_the_same_servo_commands_give_the_same_simulation(robot: TabletopRobot, table: Tabletop) -> None:
    """Bit for bit, and pixel for pixel: what the demonstrations were recorded in."""
    robot.reset(7)
    table.reset(seed=7)
    assert np.array_equal(robot.env.data.qpos, table.data.qpos)
    for _ in range(6):
        start, action = arm.inverse(table._commanded, table._yaw), table.expert_action()
        observation, *_, info = table.step(action)
        end = arm.inverse(table._commanded, table._yaw)
        for part in range(2, SUBSTEPS + 2, 2):
            robot.send(np.append(start + (end - start) * (part / SUBSTEPS), arm.opening(float(action[4]))))
            robot.advance(TICK)
        reading = robot.observe()
        assert np.array_equal(robot.env.data.qpos, table.data.qpos)
        assert reading.state == pytest.approx(observation[STATE], abs=1e-6)
        assert np.array_equal(reading.images["front"], observation[IMAGES + "front"])
        assert reading.report["success"] == info["is_success"]


def test_looking_leaves_no_trace(robot: TabletopRobot) -> None:
    ends = []
    for looks in (1, 30):
        robot.reset(3)
        rng, command = np.random.default_rng(0), robot.observe().joints
        for tick in range(90):
            command = command + np.append(rng.uniform(-0.01, 0.012, 7), 0)
            robot.send(command)
            robot.advance(TICK)
            if tick % (90 // looks) == 0:
                robot.observe()
        ends.append(robot.env.data.qpos.copy())
    assert np.array_equal(*ends)


def test_the_expert_presses(robot: TabletopRobot) -> None:
    config = configured("tabletop")
    limiter = Limiter(Limits(config.limits, robot.position), TICK)
    for seed in range(8):
        assert follow(robot, seed)["success"]
        assert follow(robot, seed, limiter)["success"]
    assert limiter.clamped == 0  # the limits let the demonstrations through


@pytest.mark.slow
@pytest.mark.parametrize("skill", SKILLS)
def test_the_expert_does_every_skill_within_the_limits(skill: str) -> None:
    press = skill == "press"
    kwargs: dict[str, Any] = dict(skills=[skill], row=0.03 if press else None, camera_fps=0.01)
    robot, n = lockstep(**kwargs), 100 if press else 10
    config = configured("tabletop")
    limiter = Limiter(Limits(config.limits, robot.position), TICK)
    for limits in (None, limiter):
        assert sum(follow(robot, seed, limits)["success"] for seed in range(n)) >= 0.98 * n
    robot.disconnect()


def test_the_wrong_button_is_a_failure(robot: TabletopRobot) -> None:
    answer = robot.reset(5)
    other, target, reading = answer["alternatives"][0], robot._start(), robot.observe()
    for _ in range(30):
        robot._tell()
        target = robot.target(robot.env.expert_action(other), target, reading)
        robot.send(target)
        robot.advance(0.1)
        reading = robot.observe()
    assert reading.report["failure"]
    assert not reading.report["success"]
    assert follow(robot, 5)["success"]  # a new scene starts clean


def test_a_scene_and_its_sentence(robot: TabletopRobot) -> None:
    answer = robot.reset(11)
    assert answer["task"] == robot.observe().report["task"]
    again = robot.reset(11, task=answer["alternatives"][0])
    assert again["task"] == answer["alternatives"][0] != answer["task"]
    assert answer["limit_s"] == SKILLS["press"].steps / 10
    with pytest.raises(ValueError, match="options\\['task'\\]: got 'fly away'.*remedy"):
        robot.reset(11, task="fly away")


# -- commands, timeouts, cameras -------------------------------------------------------------


def moving(robot: TabletopRobot, ticks: int = 20) -> np.ndarray:
    """Turn the base at 0.5 rad/s and half close the gripper; the last command."""
    robot.reset(0)
    command = robot.observe().joints
    for _ in range(ticks):
        command = command + np.array([0.005, 0, 0, 0, 0, 0, 0, -0.001])
        robot.send(command)
        robot.advance(TICK)
    return command


def test_without_commands_the_robot_holds_where_it_is(robot: TabletopRobot) -> None:
    command = moving(robot)
    robot.send(command + [0.3, 0, 0, 0, 0, 0, 0, 0])  # and then silence, with half the way to go
    robot.advance(0.19)
    assert robot.observe().report["timeouts"] == 0
    before = robot.observe().joints
    robot.advance(0.02)
    report = robot.observe().report
    assert report["timeouts"] == 1
    assert report["held_after_ms"] == pytest.approx(200, abs=6)
    held = robot._command
    assert held[0] == pytest.approx(before[0], abs=0.05)
    assert held[7] == command[7]  # it does not drop what it carries
    robot.advance(5.0)
    reading = robot.observe()
    assert reading.report["timeouts"] == 1  # once
    assert reading.joints == pytest.approx(held, abs=0.01)
    robot.send(command)
    robot.advance(0.15)
    assert robot.observe().report["timeouts"] == 1
    robot.advance(0.15)
    assert robot.observe().report["timeouts"] == 2


def test_a_new_scene_waits_for_its_first_command(robot: TabletopRobot) -> None:
    robot.reset(0)
    start = robot.observe().joints
    robot.advance(3.0)
    reading = robot.observe()
    assert reading.report["timeouts"] == 0
    assert reading.joints == pytest.approx(start, abs=1e-3)


@pytest.mark.parametrize(
    "bad",
    [
        np.full(8, np.nan),
        np.array([np.inf] + [0.0] * 7),
        np.array([3.2] + [0.0] * 7),
        np.array([0.0] * 7 + [-0.01]),
        np.zeros(7),
        np.zeros((2, 8)),
    ],
)
def test_illegal_commands_are_refused(robot: TabletopRobot, bad: np.ndarray) -> None:
    command = moving(robot, 5)
    robot.send(bad)
    robot.advance(TICK)
    report = robot.observe().report
    assert (report["refused"], report["commands"]) == (1, 5)
    assert np.array_equal(robot._command, command)


def test_cameras_have_a_rate_of_their_own() -> None:
    robot = TabletopRobot(camera_fps=20, realtime=False, **TABLE | dict(cameras=["front", "wrist"]))
    robot.now = 100.0
    robot.connect()
    stamps, pictures = [], []
    for tick in range(101):
        reading = robot.observe()
        assert reading.stamp == pytest.approx(100 + tick * TICK)
        assert set(reading.images) == set(reading.stamps) == {"front", "wrist"}
        stamps.append(reading.stamps["front"])
        pictures.append(reading.images["front"])
        robot.send(reading.joints + [0.02, 0, 0, 0, 0, 0, 0, 0])
        robot.advance(TICK)
    times = sorted(set(stamps))
    assert times == pytest.approx(100 + np.arange(21) / 20)
    for i in range(1, 101):
        new = stamps[i] != stamps[i - 1]
        assert new != np.array_equal(pictures[i], pictures[i - 1])
    robot.disconnect()


def test_real_time_passes_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [50.0]
    monkeypatch.setattr(simulated.time, "monotonic", lambda: clock[0])
    robot = TabletopRobot(**TABLE, camera_fps=1)
    robot.connect()
    command = robot.observe().joints + [0.1, 0, 0, 0, 0, 0, 0, 0]
    clock[0] += 0.02
    robot.send(command)  # arrives while nobody looks: it counts from now on, not from the last reading on
    clock[0] += 0.3
    reading = robot.observe()
    assert reading.stamp == pytest.approx(50.32)
    assert reading.report["timeouts"] == 1
    assert reading.report["held_after_ms"] == pytest.approx(200, abs=6)
    clock[0] += 100  # the process was stopped: not all of it is lived through
    reading = robot.observe()
    assert reading.stamp == pytest.approx(150.32)
    assert reading.report["skipped_s"] == pytest.approx(99.5)
    robot.disconnect()


# -- what the controller asks before anything is built ---------------------------------------


@pytest.mark.parametrize("commanded", [True, False])
@pytest.mark.parametrize("cameras", ["wrist", ["front", "wrist"]])
def test_features_are_the_environments(commanded: bool, cameras: Any) -> None:
    kwargs = TABLE | dict(cameras=cameras, commanded=commanded)
    env = Tabletop(**kwargs)
    assert TabletopRobot(**kwargs).features == Features.of_spaces(env.observation_space, env.action_space, 10)
    env.close()


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="pixls"):
        TabletopRobot(pixls=3)
    with pytest.raises(ValueError, match="cameras: got .*remedy"):
        TabletopRobot(cameras=["back"])
    with pytest.raises(ValueError, match="timeout_s: got 0, expected a positive number"):
        TabletopRobot(timeout_s=0)
    with pytest.raises(ValueError, match="task: got 'tea-v3'.*remedy"):
        MetaworldRobot("tea-v3").connect()


@pytest.mark.parametrize("name", ["tabletop", "metaworld", "lerobot_so101"])
def test_configured_robots_load(name: str) -> None:
    config = configured(name)
    robot = load_robot(config)
    assert len(robot.joints) == len(config.limits.lower)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_start_poses_are_within_the_limits(seed: int) -> None:
    config = configured("tabletop")
    robot = STARTED.setdefault("robot", lockstep())
    robot.reset(seed)
    Limiter(Limits(config.limits, robot.position), TICK).reset(robot.observe().joints)


STARTED: dict[str, TabletopRobot] = {}


# -- Meta-World ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("task", ["reach-v3", "button-press-v3"])
def test_metaworlds_expert(task: str) -> None:
    robot = MetaworldRobot(task, realtime=False, camera_fps=1, pixels=32)
    robot.connect()
    config = configured("metaworld")
    limiter = Limiter(Limits(config.limits, robot.position), 1 / 80)
    for limits in (None, limiter):
        assert sum(follow(robot, seed, limits, 1 / 80)["success"] for seed in range(5)) >= 4
    robot.disconnect()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_metaworlds_scenes() -> None:
    robots = [MetaworldRobot("button-press-v3", realtime=False, pixels=48) for _ in range(2)]
    for robot in robots:
        robot.connect()
    robots[0].reset(1)
    first = robots[0].observe()
    robots[1].reset(2)
    other = robots[1].observe()
    for _ in range(40):
        robots[1].send(other.joints + [0.1, 0.1, 0, 0])
        robots[1].advance(1 / 80)
    moved = robots[1].observe()
    assert moved.joints[:3] == pytest.approx(other.joints[:3] + [0.1, 0.1, 0], abs=1e-6)
    assert moved.state[:3] == pytest.approx(moved.joints[:3], abs=0.02)
    robots[1].reset(1)  # the second in this process, after another scene: nothing stale, nothing black
    again = robots[1].observe()
    assert first.images[CAMERA].std() > 20
    assert np.array_equal(again.images[CAMERA], first.images[CAMERA])
    assert np.array_equal(again.state, first.state)
    assert not np.array_equal(other.images[CAMERA], first.images[CAMERA])
    robots[1].advance(1.0)
    assert robots[1].observe().report["timeouts"] == 0
    robots[1].send(again.joints + [0.3, 0, 0, 0])
    robots[1].advance(1.0)
    report = robots[1].observe()
    assert report.report["timeouts"] == 1
    assert report.joints[0] < again.joints[0] + 0.29  # 0.2 s at 0.8 m/s
    for robot in robots:
        robot.disconnect()


def test_metaworlds_targets_do_not_wind_up_outside_of_the_limits() -> None:
    robot, limits = MetaworldRobot(), configured("metaworld").limits
    target, reading = np.array([0.0, 0.6, 0.2, -1.0]), Reading({}, {}, np.zeros(4), np.zeros(4), 0.0)
    for action in (np.array([9.0, -9.0, -9.0, 9.0]), np.array([-9.0, 9.0, 9.0, -9.0])):
        for _ in range(150):
            target = robot.target(action, target, reading)
            assert (target >= limits.lower).all()
            assert (target <= limits.upper).all()


def test_metaworlds_box_has_to_be_the_tasks() -> None:
    with pytest.raises(ValueError, match="lowest: got .*expected .*remedy"):
        MetaworldRobot("button-press-v3", lowest=(-0.5, 0.4, 0.0)).connect()
