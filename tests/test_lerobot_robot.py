"""The tabletop arm and its expert as LeRobot devices: motion, actions, scenes, errors, and a recording for real."""

from __future__ import annotations

import ast
import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from draccus import ParsingError

from envs import arm as kinematics
from envs import simulated
from envs.lerobot_plugin import arm as module
from envs.lerobot_plugin.arm import ACTION_NAMES, TabletopArm
from envs.lerobot_plugin.config_arm import TabletopArmConfig, quick_start
from envs.lerobot_plugin.config_expert import TabletopExpertConfig
from envs.lerobot_plugin.expert import TabletopExpert
from envs.tabletop import Tabletop
from vla.observation import IMAGES, STATE

TABLE: dict[str, Any] = dict(
    skills=["press"], row=0.03, references=["name"], cameras=["front"], pixels=32, commanded=False, split="L0"
)  # fmt: skip
STEP_S = 0.1
PLUGIN = Path(__file__).parents[1] / "envs/lerobot_plugin"


class Clock:
    """time.monotonic, as this test wants it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def wait(self, seconds: float = STEP_S) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(simulated.time, "monotonic", lambda: clock.now)
    return clock


@pytest.fixture
def connect(clock: Clock, tmp_path: Path) -> Iterator[Callable[..., TabletopArm]]:
    def connect(table: dict[str, Any] | None = None, **fields: Any) -> TabletopArm:
        config = TabletopArmConfig(kwargs=TABLE | (table or {}), calibration_dir=tmp_path, **fields)
        arm = TabletopArm(config)
        arm.connect()
        return arm

    yield connect
    for arm in list(module.CONNECTED):
        arm.disconnect()


def action(*numbers: float) -> dict[str, float]:
    return dict(zip(ACTION_NAMES, numbers, strict=True))


def drive(arm: TabletopArm, clock: Clock, steps: int, dt: float = STEP_S, **numbers: float) -> None:
    for _ in range(steps):
        arm.send_action(action(0, 0, 0, 0, 1) | {name + ".vel": value for name, value in numbers.items()})
        clock.wait(dt)
        arm.get_observation()


def hand(arm: TabletopArm) -> np.ndarray:
    arm.robot.observe()
    return arm.robot.env.world.hand.copy()


def teach(arm: TabletopArm, clock: Clock, steps: int) -> None:
    """The expert's turn, in the order of LeRobot's loops."""
    for _ in range(steps):
        arm.get_observation()
        arm.send_action(arm.expert_action())
        clock.wait()


# -- as LeRobot finds it -------------------------------------------------------------------


def test_lerobot_makes_the_devices(tmp_path: Path) -> None:
    from lerobot.robots import RobotConfig, make_robot_from_config
    from lerobot.teleoperators import TeleoperatorConfig, make_teleoperator_from_config

    assert RobotConfig.get_choice_class("tabletop") is TabletopArmConfig
    assert TeleoperatorConfig.get_choice_class("tabletop_expert") is TabletopExpertConfig
    arm = make_robot_from_config(TabletopArmConfig(id="a", calibration_dir=tmp_path))
    expert = make_teleoperator_from_config(TabletopExpertConfig(calibration_dir=tmp_path))
    assert isinstance(arm, TabletopArm)
    assert isinstance(expert, TabletopExpert)
    assert arm.is_calibrated
    assert expert.is_calibrated
    assert arm.action_features == expert.action_features == dict.fromkeys(ACTION_NAMES, float)
    assert len(arm.cameras) == 1  # lerobot-record counts them before it connects


def test_its_table_is_the_controllers() -> None:
    """One policy drives both."""
    controllers = yaml.safe_load((PLUGIN.parents[1] / "configs" / "robots" / "tabletop.yaml").read_text())
    assert quick_start() == controllers["kwargs"]


@pytest.mark.parametrize("name", ["config_arm", "config_expert"])
def test_configurations_import_no_simulator(name: str) -> None:
    """Every command of LeRobot's imports them."""
    body = ast.parse((PLUGIN / f"{name}.py").read_text()).body
    modules = {node.module for node in body if isinstance(node, ast.ImportFrom)}
    names = {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
    assert not {str(n).split(".")[0] for n in modules | names} & {"mujoco", "envs", "gymnasium", "torch"}


@pytest.mark.parametrize("commanded", [True, False])
def test_observations_are_the_policys(connect: Any, commanded: bool) -> None:
    arm = connect(dict(commanded=commanded, cameras=["wrist", "front"], pixels=40))
    observation = arm.get_observation()
    assert list(arm.observation_features) == list(observation)
    numbers = [value for name, value in observation.items() if name.endswith(".pos")]
    assert numbers == arm.robot.env.state().tolist()
    assert len(numbers) == (11 if commanded else 7)
    for camera in ("wrist", "front"):
        assert observation[camera].shape == arm.observation_features[camera] == (40, 40, 3)
        assert observation[camera].std() > 5


def test_devices_that_are_not_connected_or_twice(connect: Any, tmp_path: Path) -> None:
    from lerobot.utils.errors import DeviceAlreadyConnectedError, DeviceNotConnectedError

    arm = connect()
    expert = TabletopExpert(TabletopExpertConfig(calibration_dir=tmp_path))
    expert.connect()
    for device in (arm, expert):
        assert device.is_connected
        with pytest.raises(DeviceAlreadyConnectedError):
            device.connect()
        device.disconnect()
        assert not device.is_connected
    for use in (arm.get_observation, arm.disconnect, expert.get_action, expert.disconnect):
        with pytest.raises(DeviceNotConnectedError):
            use()
    with pytest.raises(DeviceNotConnectedError):
        arm.send_action(action(0, 0, 0, 0, 1))
    arm.connect()  # and again
    assert arm.get_observation()


# -- motion --------------------------------------------------------------------------------


def test_a_step_is_the_environments(connect: Any, clock: Clock) -> None:
    """At ten actions a second, in joints, state and pixels, up to the press."""
    arm, env = connect(seed=3), Tabletop(**TABLE)
    env.reset(seed=3)
    success = False
    while not success:
        chosen = env.expert_action()
        sent = arm.send_action(action(*map(float, chosen)))
        assert list(sent.values()) == pytest.approx(np.clip(chosen, -1, 1))
        clock.wait()
        expected, _, _, _, info = env.step(chosen)
        got, success = arm.get_observation(), info["is_success"]
        assert arm.robot.env.data.qpos == pytest.approx(env.data.qpos, abs=1e-7)
        assert [v for k, v in got.items() if k.endswith(".pos")] == pytest.approx(expected[STATE], abs=1e-6)
        difference = got["front"].astype(int) - expected[IMAGES + "front"]
        assert np.abs(difference).max() <= 2
        assert (arm._trial.outcome == "success") == success
    env.close()


def test_the_hand_is_as_fast_at_any_rate(connect: Any, clock: Clock) -> None:
    arm = connect()
    travelled = []
    for dt in (1 / 10, 1 / 15, 1 / 30, 1 / 60):
        arm.robot.reset(0)
        start = hand(arm)
        drive(arm, clock, round(0.4 / dt), dt, y=0.5, z=0.5)
        clock.wait(0.2)
        travelled.append((hand(arm) - start)[1:])
    assert travelled[0] == pytest.approx([0.06, 0.06], abs=0.004)
    for other, dt in zip(travelled[1:], (1 / 15, 1 / 30, 1 / 60), strict=True):
        seconds = 0.4 - dt + STEP_S  # the last one is carried out to its end
        assert other * 0.4 / seconds == pytest.approx(travelled[0], rel=0.05)


def test_without_actions_it_holds(connect: Any, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    arm = connect()
    drive(arm, clock, 3, z=1.0)
    for _ in range(10):
        clock.wait()
        arm.get_observation()
    held = hand(arm)
    clock.wait(0.4)
    assert hand(arm) == pytest.approx(held, abs=1e-3)
    assert arm.robot.observe().report["timeouts"] == 1
    drive(arm, clock, 3, z=-1.0)
    assert hand(arm)[2] < held[2] - 0.04
    arm.disconnect()
    assert "6 actions, one every 100 ms, 1 late; held by its own timeout 1 times" in caplog.messages[-1]


def test_the_way_back_to_the_start(connect: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """By LeRobot's own code, with what lerobot-rollout keeps of the first observation."""
    from lerobot.rollout.strategies import core

    arm = connect(dict(commanded=True))
    first = {name: v for name, v in arm.get_observation().items() if name.endswith(".pos")}
    start, yaw = hand(arm), arm.robot.env.world.hand_yaw
    drive(arm, clock, 8, x=0.6, y=-0.7, z=0.5, yaw=0.8)
    assert np.linalg.norm(hand(arm) - start) > 0.1
    speeds, before = [], hand(arm)

    def sleep(seconds: float) -> None:
        nonlocal before
        clock.wait(seconds)
        now = hand(arm)
        speeds.append(np.linalg.norm(now - before) / seconds)
        before = now

    monkeypatch.setattr(core, "precise_sleep", sleep)
    core.RolloutStrategy._return_to_initial_position(
        SimpleNamespace(robot_wrapper=arm, initial_position=first)  # pyright: ignore[reportArgumentType]
    )
    clock.wait(0.4)
    assert hand(arm) == pytest.approx(start, abs=0.005)
    assert arm.robot.env.world.hand_yaw == pytest.approx(yaw, abs=0.02)
    assert len(speeds) == 150
    assert max(speeds[5:]) < 0.3
    arm.get_observation()
    arm.send_action(first | {"x.pos": start[0] + 0.2})  # a jump: at an action's speed, and no farther
    clock.wait()
    assert hand(arm)[0] - start[0] < kinematics.STEP + 0.005


@pytest.mark.parametrize(
    ("keys", "axis", "sign"),
    [
        (dict(delta_y=-1), 0, -1),  # keyboard_ee's up: away from the front camera
        (dict(delta_x=1), 1, -1),  # left
        (dict(delta_z=1), 2, 1),  # right shift
    ],
)
def test_lerobots_keyboard_drives_in_the_picture(
    connect: Any, clock: Clock, keys: dict[str, int], axis: int, sign: int
) -> None:
    arm = connect()
    start, deltas = hand(arm), dict.fromkeys(module.KEYS, 0.0) | keys
    for gripper, told in ((0, 0), (0, -1), (1, -1), (2, 0)):  # half way at a press; 1 leaves it
        arm.get_observation()
        sent = arm.send_action(deltas | {"gripper": gripper})
        assert sent["gripper.pos"] == pytest.approx(told)
        clock.wait()
    moved = hand(arm) - start
    assert moved[axis] * sign > 0.04
    assert np.abs(np.delete(moved, axis)).max() < 0.02
    assert arm.send_action(deltas)["gripper.pos"] == pytest.approx(0)  # keyboard_ee without its gripper


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (action(0, float("nan"), 0, 0, 1), r"action\['y.vel'\]: got nan, expected a finite number"),
        (action(0, 0, 0, 0, float("inf")), r"action\['gripper.pos'\]: got inf"),
        (action(0, 0, 0, 0, 1) | {"shoulder.pos": 1.0}, "got an unknown 'shoulder.pos'.*x.vel"),
        ({"x.vel": 0.0}, "got no 'y.vel', expected an action of x.vel"),
        ({}, "got no 'x.vel'"),
        ({"x.pos": 0.0, "y.pos": 0.0}, "got no 'z.pos', expected a pose"),
        (dict.fromkeys(module.POSE, 0.0) | {"x.pos": float("nan")}, r"action\['x.pos'\]: got nan"),
        ({"delta_x": 1.0, "delta_y": 0.0}, "got no 'delta_z', expected deltas"),
        ({"delta_x": 0.0, "delta_y": 0.0, "delta_z": 0.0, "grip": 1.0}, "got an unknown 'grip'"),
    ],
)
def test_wrong_actions_are_named(connect: Any, wrong: dict[str, float], message: str) -> None:
    arm = connect()
    before = arm.robot.commanded
    with pytest.raises(ValueError, match=message + ".*remedy"):
        arm.send_action(wrong)
    assert np.array_equal(arm.robot.commanded, before)
    assert arm._actions == 0


# -- scenes --------------------------------------------------------------------------------


def test_scene_after_scene(connect: Any, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    arm = connect(seed=5)
    teach(arm, clock, 100)
    outcomes = [trial.outcome for trial in arm._trials]
    assert len(outcomes) >= 3
    assert set(outcomes[:-1]) == {"success"}
    assert [trial.seed for trial in arm._trials] == list(range(5, 5 + len(outcomes)))
    second = arm._trials[1]
    assert second.rests_until - arm._trials[0].ended == pytest.approx(2.0, abs=0.15)  # stays 1 s, rests 1 s
    assert second.began == pytest.approx(10, abs=1)
    text = caplog.messages
    assert text[0] == f"tabletop scene 5: {arm._trials[0].task}"
    assert text[1].startswith("tabletop scene 5: success after ")
    arm.disconnect()
    assert (
        f"tabletop: {outcomes.count('success')} of {outcomes.count('success')} scenes" in caplog.messages[-1]
    )


def test_what_is_left_of_a_chunk_moves_nothing_in_the_next_scene(connect: Any, clock: Clock) -> None:
    arm = connect(rest_s=0.5)
    while len(arm._trials) == 1:
        teach(arm, clock, 1)
    start = hand(arm)
    for _ in range(4):
        sent = arm.send_action(action(1, 1, 0, 0, -1))
        assert [sent[name] for name in ACTION_NAMES[:4]] == [0, 0, 0, 0]
        clock.wait()
        arm.get_observation()
    assert hand(arm) == pytest.approx(start, abs=1e-3)
    assert arm._trial.began is None
    clock.wait()
    arm.send_action(action(1, 0, 0, 0, 1))
    clock.wait()
    arm.get_observation()
    assert hand(arm)[0] > start[0] + 0.01


def test_episodes_of_lerobot_have_a_scene_each(
    connect: Any, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """However long they are; LeRobot says so to the person in the room alone."""
    from lerobot.utils.utils import log_say

    caplog.set_level(logging.INFO)
    arm = connect()
    for episode in range(3):
        log_say(f"Recording episode {episode}", play_sounds=False)
        first = arm.get_observation()
        assert arm._trial.seed == episode
        assert first["z.pos"] == pytest.approx(float(arm.robot.env.world.scene.hand[2]), abs=0.01)
        teach(arm, clock, 45 if episode else 5)
        if episode:
            assert arm._trial.outcome == "success"
            assert arm._trial.seed == episode  # long after its end
        log_say("Reset the environment", play_sounds=False)
    arm.disconnect()
    assert "2 of 2 scenes with success, 1 not finished" in caplog.messages[-1]


@pytest.mark.parametrize("name", ["lerobot.scripts.lerobot_record", "lerobot.rollout.strategies.episodic"])
def test_lerobot_still_says_so(name: str) -> None:
    folder, path = importlib.util.find_spec("lerobot"), name.split(".")[1:]
    assert folder is not None
    assert folder.submodule_search_locations
    source = Path(folder.submodule_search_locations[0], *path).with_suffix(".py").read_text()
    assert f'log_say(f"{module.CUE} {{dataset.num_episodes}}"' in source


def test_the_wrong_button_and_no_button(connect: Any, clock: Clock) -> None:
    arm = connect(rest_s=100.0)
    other = arm.robot.env._alternatives[0]
    while arm._trial.outcome is None:
        arm.get_observation()
        arm.send_action(action(*map(float, arm.robot.env.expert_action(other))))
        clock.wait()
    assert arm._trial.outcome.startswith("failure")
    arm = connect(rest_s=100.0)
    for _ in range(30):  # before the first action no time counts
        clock.wait()
        arm.get_observation()
    drive(arm, clock, 59)
    assert arm._trial.outcome is None
    drive(arm, clock, 1)
    assert arm._trial.outcome == "no success"


def test_one_sentence_for_all_scenes(connect: Any, clock: Clock) -> None:
    task = "press the red button"
    arm = connect(seed=2, task=task, rest_s=0.1)
    teach(arm, clock, 60)
    assert len(arm._trials) >= 3
    assert {trial.task for trial in arm._trials} == {task}
    env, meant = Tabletop(**TABLE), []
    env.images_enabled = False
    for seed in range(2, arm._trial.seed + 1):
        try:
            env.reset(seed=seed, options={"task": task})
            meant.append(seed)
        except ValueError:
            continue
    assert [trial.seed for trial in arm._trials] == meant
    assert len(meant) < arm._trial.seed - 1  # and some were left out


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(kwargs=TABLE | dict(pixls=3)), "robot.kwargs: got .*pixls"),
        (dict(kwargs=TABLE | dict(skills=["juggle"])), "robot.kwargs: got .*skills: got"),
        (dict(task="fly away"), "robot.task: got 'fly away', expected a sentence"),
        (dict(seed=-1), "robot.seed: got -1, expected 0 or more"),
        (dict(rest_s=0.0), "robot.rest_s: got 0.0"),
        (dict(camera_fps=0.0), "robot.camera_fps: got 0.0"),
    ],
)
def test_wrong_configurations(fields: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("envs.lerobot_plugin.config_arm.SEARCH", 20)
    with pytest.raises(ParsingError, match=message + ".*remedy"):
        TabletopArmConfig(**fields)


# -- the expert ----------------------------------------------------------------------------


def test_the_expert_drives_its_arm(connect: Any, clock: Clock, tmp_path: Path) -> None:
    expert = TabletopExpert(TabletopExpertConfig(arm="b", calibration_dir=tmp_path))
    expert.connect()  # before the arms, as LeRobot does
    with pytest.raises(ValueError, match="teleop.arm: got 'b' with \\[\\] connected.*remedy"):
        expert.get_action()
    arm = connect(id="a")
    with pytest.raises(ValueError, match="teleop.arm: got 'b' with \\['a'\\] connected.*remedy"):
        expert.get_action()
    expert.config.arm = None
    assert list(expert.get_action().values()) == pytest.approx(arm.robot.expert_action())
    other = connect(id="b", seed=8)
    with pytest.raises(ValueError, match="teleop.arm: got None with \\['a', 'b'\\] connected.*remedy"):
        expert.get_action()
    expert.config.arm = "b"
    while other._trial.outcome is None:
        other.get_observation()
        other.send_action(expert.get_action())
        clock.wait()
    assert other._trial.outcome == "success"
    assert list(expert.get_action().values())[:4] == [0, 0, 0, 0]  # nothing is left to do
    assert arm._trial.began is None


# -- for real ------------------------------------------------------------------------------


@pytest.mark.slow
def test_lerobot_record_with_the_expert(tmp_path: Path) -> None:
    """Every episode of the dataset ends with its button pressed, and our reader takes it."""
    from vla.data.lerobot_v3 import DatasetFolder

    task = "press the red button"
    command = [sys.executable, "-m", "lerobot.scripts.lerobot_record", "--robot.type=tabletop",
               f"--robot.task={task}", "--teleop.type=tabletop_expert", "--dataset.repo_id=me/taught",
               f"--dataset.root={tmp_path / 'data'}", f"--dataset.single_task={task}", "--dataset.fps=10",
               "--dataset.num_episodes=3", "--dataset.episode_time_s=4", "--dataset.reset_time_s=0",
               "--dataset.push_to_hub=false", "--dataset.streaming_encoding=true", "--play_sounds=false"]  # fmt: skip
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_LEROBOT_HOME": str(tmp_path / "lerobot")}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    assert "3 of 3 scenes with success, 0 not finished" in done.stderr
    info = json.loads((tmp_path / "data/meta/info.json").read_text())
    assert (info["total_episodes"], info["robot_type"]) == (3, "tabletop")
    assert info["features"]["action"]["names"] == list(ACTION_NAMES)
    folder = DatasetFolder.open(tmp_path / "data")
    numeric = folder.numeric()
    assert (folder.fps, len(numeric.lengths)) == (10, 3)
    for start, length in zip(numeric.starts, numeric.lengths, strict=True):
        assert length >= 30
        heights = numeric.state[start : start + length, 2]
        assert heights[0] > 0.08  # a scene's start
        assert heights[-1] < 0.05  # on the button
