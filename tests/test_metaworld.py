"""Meta-World's fifty tasks: LeRobot's protocol, scenes by seed alone, nothing stale, experts as outside."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import mujoco
import numpy as np
import psutil
import pytest
from gymnasium.utils.env_checker import check_env

from envs.lerobot_metaworld import LeRobotMetaworld, average, shares
from envs.metaworld import CAMERA, Metaworld
from envs.metaworld_tasks import AS_PUBLISHED, TASKS, TIERS, chosen, instruction
from vla.environment import make_env
from vla.observation import ENVIRONMENT_STATE, IMAGES, STATE

IMAGE = IMAGES + CAMERA
THREE = ["reach-v3", "button-press-v3", "push-v3"]


@pytest.fixture(scope="module")
def three() -> Iterator[Metaworld]:
    """Three tasks, for the tests that look at no picture."""
    env = Metaworld(THREE, pixels=32)
    env.images_enabled = False
    yield env
    env.close()


def blind(*tasks: str, **options: Any) -> Metaworld:
    env = Metaworld(tasks, pixels=32, **options)
    env.images_enabled = False
    return env


def physics(env: Metaworld) -> np.ndarray:
    """All that moves, and where the things of the scene stand."""
    assert env.scene is not None
    model, data = env.scene.model, env.scene.data
    parts = (data.qpos, data.qvel, data.mocap_pos, model.body_pos, model.site_pos, env.environment_state())
    return np.concatenate([np.ravel(part) for part in parts])


def bare(task: str) -> Any:
    """Meta-World without us: its class with a visible goal, scenes by its `seed`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
    env: Any = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{task}-goal-observable"]()
    env._freeze_rand_vec, env.seeded_rand_vec = False, True
    return env


# -- tasks -----------------------------------------------------------------------------------


def test_fifty_tasks_in_four_tiers_each_told_apart() -> None:
    assert Counter(task.tier for task in TASKS.values()) == dict(zip(TIERS, (28, 11, 6, 5), strict=True))
    assert len({task.instruction for task in TASKS.values()}) == len(TASKS) == 50


def test_the_published_table_is_lerobots() -> None:
    spec = importlib.util.find_spec("lerobot")
    assert spec is not None
    (folder,) = spec.submodule_search_locations or ()
    table = json.loads((Path(folder) / "envs/metaworld_config.json").read_text(encoding="utf-8"))
    assert {name: instruction(name, "lerobot") for name in TASKS} == table["TASK_DESCRIPTIONS"]
    assert {tier: set(chosen(tier)) for tier in TIERS} == {
        tier: set(names) for tier, names in table["DIFFICULTY_TO_TASKS"].items()
    }
    changed = {name for name in TASKS if instruction(name, "distinct") != table["TASK_DESCRIPTIONS"][name]}
    assert changed == set(AS_PUBLISHED) == {"push-back-v3"}


def test_which_tasks_are_played() -> None:
    assert Metaworld().tasks == tuple(TASKS)
    assert Metaworld("very_hard").n_tasks == 5
    assert Metaworld("reach-v3").tasks == ("reach-v3",)
    assert Metaworld(["push-v3", "reach-v3"]).tasks == ("push-v3", "reach-v3")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(tasks="tea-v3"), "tasks: got .'tea-v3'., expected 'mt50'"),
        (dict(tasks=["reach-v3", "easy"]), "tasks: got .'easy'., expected"),
        (dict(tasks=[]), "tasks: got .., expected"),
        (dict(tasks=["reach-v3", "reach-v3"]), "tasks: got .*expected .*each once"),
        (dict(preset="best"), "render preset: got 'best', expected one of fast, full, default"),
        (dict(instructions="ours"), "instructions: got 'ours', expected one of distinct, lerobot"),
        (dict(pixels=0), "pixels: got 0, expected a positive number"),
        (dict(max_steps=0), "max_steps: got 0, expected a positive number"),
    ],
)
def test_wrong_choices(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message + ".*remedy"):
        Metaworld(**options)


# -- protocol --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*(minimum|maximum) value.*infinity")  # positions have no natural bounds
def test_gymnasium_checker() -> None:
    env = gymnasium.make("envs:Metaworld-v0", tasks="reach-v3", pixels=32)
    check_env(env.unwrapped)
    env.close()


def test_what_is_delivered() -> None:
    env, features = make_env("envs:Metaworld-v0", dict(tasks=THREE, pixels=48, render_pixels=80), render=True)
    assert features.cameras == {CAMERA: (48, 48)}
    assert (features.state_dim, features.action_dim, features.fps) == (4, 4, 80)
    observation, info = env.reset(seed=2)
    assert env.observation_space.contains(observation)
    assert info == dict(task="Push the puck to a goal", is_success=False, skill="push-v3", alternatives=[])
    observation, _, terminated, truncated, _ = env.step(env.action_space.sample())
    assert env.observation_space.contains(observation)
    assert (terminated, truncated) == (False, False)
    picture: Any = env.render()
    assert picture.shape == (80, 80, 3)
    env.close()


def test_seeds_take_the_tasks_in_turns(three: Metaworld) -> None:
    for seed in (0, 4, 10_000_001, 2):
        _, info = three.reset(seed=seed)
        name = THREE[seed % three.n_tasks]
        assert (info["skill"], info["task"]) == (name, TASKS[name].instruction)
    _, info = three.reset()  # without a seed, any
    assert info["skill"] in THREE


def test_a_seed_is_a_scene_whatever_was_played_before(three: Metaworld) -> None:
    """Bit for bit, also what follows from it; of one task directly before, and of another."""
    actions = np.random.default_rng(0).uniform(-1, 1, (20, 4))
    scenes = []
    for seed, before in ((7, None), (7, 10), (7, 3), (10, 7)):
        env = blind(*THREE) if before is None else three
        if before is not None:
            env.reset(seed=before)
            for action in actions:
                env.step(-action)
        env.reset(seed=seed)
        first = physics(env)
        for action in actions:
            env.step(action)
        scenes.append(np.concatenate([first, physics(env)]))
    np.testing.assert_array_equal(scenes[1], scenes[0])
    np.testing.assert_array_equal(scenes[2], scenes[0])
    assert np.abs(scenes[3] - scenes[0]).max() > 0.01  # metres


def test_motion_is_metaworlds_own_to_the_last_bit(three: Metaworld) -> None:
    outside = bare("button-press-v3")
    outside.seed(4)
    outside.reset()
    three.reset(seed=4)
    for action in np.random.default_rng(0).uniform(-1, 1, (40, 4)).astype(np.float32):
        outside.step(action)
        three.step(action)
    assert three.scene is not None
    np.testing.assert_array_equal(three.scene.data.qpos, outside.data.qpos)
    np.testing.assert_array_equal(three.scene.data.qvel, outside.data.qvel)


@pytest.mark.slow
def test_a_seed_is_a_scene_in_every_process(three: Metaworld) -> None:
    program = (
        "import envs.metaworld as m; env = m.Metaworld(['reach-v3', 'button-press-v3', 'push-v3'], pixels=32); "
        "observation, _ = env.reset(seed=4); "
        f"print(env.environment_state().tolist(), int(observation['{IMAGE}'].sum())); env.close()"
    )
    outputs = []
    for hashed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hashed}
        root = Path(__file__).parents[1]
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""  # no warning of Meta-World's reaches the user
        outputs.append(done.stdout)
    three.reset(seed=4)
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith(str(three.environment_state().tolist()))


def test_success_is_ever_and_ends_nothing() -> None:
    env = blind("reach-v3")
    env.reset(seed=0)
    reward, steps, info = 0.0, 0, {}
    while not reward:
        _, reward, terminated, truncated, info = env.step(env.expert_action())
        steps += 1
        assert not terminated
        assert info["is_success"] is bool(reward)
    while not truncated:
        _, reward, terminated, truncated, info = env.step(np.array([0, -1, 1, 0]))
        steps += 1
        assert not terminated
        assert info["is_success"] is True
    assert (reward, steps) == (0.0, 500)  # lost again, no reset of its own
    for _ in range(3):  # and nothing is raised behind the end
        *_, truncated, info = env.step(np.zeros(4))
        assert truncated
    env.reset(seed=0)
    *_, info = env.step(np.zeros(4))
    assert info["is_success"] is False
    env.close()


def test_an_episode_may_be_shorter(three: Metaworld) -> None:
    env = blind("reach-v3", max_steps=3)
    env.reset(seed=0)
    assert [env.step(np.zeros(4))[3] for _ in range(3)] == [False, False, True]
    env.close()


def test_actions_are_clipped_and_garbage_is_refused(three: Metaworld) -> None:
    ends = []
    for scale in (1.0, 30.0):
        three.reset(seed=0)
        for _ in range(5):
            three.step(scale * np.array([1, -1, 1, -1]))
        ends.append(physics(three))
    np.testing.assert_array_equal(ends[0], ends[1])
    for wrong in (np.array([0, np.nan, 0, 0]), np.array([np.inf, 0, 0, 0]), np.zeros(3)):
        with pytest.raises(ValueError, match="action: got .*expected 4 finite numbers.*remedy"):
            three.step(wrong)
    np.testing.assert_array_equal(physics(three), ends[1])  # before anything moved


def test_a_sentence_has_to_be_the_tasks(three: Metaworld) -> None:
    _, info = three.reset(seed=0, options={"task": "Reach a goal position"})
    assert info["task"] == "Reach a goal position"
    with pytest.raises(ValueError, match="options.'task'.: got 'make tea', expected 'Reach a goal position'"):
        three.reset(seed=0, options={"task": "make tea"})


def test_push_back_is_told_as_published_on_demand() -> None:
    for table, told in (("distinct", "Push the puck back to a goal"), ("lerobot", "Push the puck to a goal")):
        env = blind("push-back-v3", instructions=table)
        assert env.reset(seed=0)[1]["task"] == told
        env.close()


def test_what_only_the_simulator_knows() -> None:
    env = blind("reach-v3", "stick-pull-v3")
    for seed, second in ((0, False), (1, True)):
        observation, _ = env.reset(seed=seed)
        state = env.environment_state()
        assert ENVIRONMENT_STATE not in observation
        assert (state.shape, state.dtype) == ((9,), np.float32)
        assert bool(state[3:6].any()) is second
        assert env.scene is not None
        np.testing.assert_array_equal(state[6:], env.scene.env._target_pos.astype(np.float32))
        assert np.abs(state[6:]).max() > 0.1  # metres; hidden, it would be zero
    assert env.scene is not None
    before = env.environment_state()
    for _ in range(100):
        env.step(env.expert_action())
    moved = np.abs(env.environment_state() - before)
    assert moved[:3].max() > 0.02  # the stick; the goal stays
    assert moved[6:].max() == 0
    env.close()


# -- pictures --------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["fast", "default"])
def test_the_second_and_third_environment_show_the_same_picture(preset: str) -> None:
    """Also after another one has been drawn, and after one has been closed."""
    envs = [Metaworld("reach-v3", pixels=48, preset=preset) for _ in range(3)]
    first = [env.reset(seed=5)[0][IMAGE] for env in envs]
    assert first[0].std() > 20
    envs[1].close()
    for env in (envs[0], envs[2]):
        first.append(env.reset(seed=5)[0][IMAGE])
    for image in first[1:]:
        np.testing.assert_array_equal(image, first[0])
    for env in envs:
        env.close()


def test_presets_draw_differently_and_only_the_pictures() -> None:
    pictures, states = [], []
    for preset in ("fast", "default"):
        env = Metaworld("reach-v3", pixels=48, preset=preset)
        observation, _ = env.reset(seed=5)
        pictures.append(observation[IMAGE].astype(int))
        states.append(physics(env))
        env.close()
    np.testing.assert_array_equal(*states)
    difference = np.abs(pictures[0] - pictures[1])
    assert 0 < difference.mean() < 30  # shadows and edges, not another view


def test_the_first_picture_is_of_this_scene() -> None:
    """Meta-World leaves the goal that reach-v3 moved where it was, until the first step."""
    env = Metaworld("reach-v3", pixels=96)
    for seed in (1, 2):
        observation, _ = env.reset(seed=seed)
    scene = env.scene
    assert scene is not None
    mujoco.mj_forward(scene.model, scene.data)
    np.testing.assert_array_equal(env._picture(scene, 96), observation[IMAGE])
    scene.env.seed(3)
    scene.env.reset()
    stale = env._picture(scene, 96)
    assert not np.array_equal(env.reset(seed=3)[0][IMAGE], stale)
    env.close()


def test_the_first_state_is_of_this_scene() -> None:
    """Meta-World observes the window where it was drawn at first, 20 cm from where it stands."""
    env = blind("window-close-v3")
    env.reset(seed=3)
    window = env.environment_state()[:3]
    env.step(np.zeros(4))
    np.testing.assert_allclose(env.environment_state()[:3], window, atol=1e-3)
    stale = bare("window-close-v3")
    stale.seed(3)
    assert np.abs(stale.reset()[0][4:7] - window).max() > 0.05
    env.close()


def test_nothing_is_drawn_that_nobody_looks_at() -> None:
    env = Metaworld("reach-v3", pixels=32, max_steps=3)
    first = env.reset(seed=0)[0][IMAGE]
    up = np.array([0, 0, 1, 0])
    env.images_enabled = False
    np.testing.assert_array_equal(env.step(up)[0][IMAGE], first)
    env.images_enabled = True
    second = env.step(up)[0][IMAGE]
    assert not np.array_equal(second, first)
    env.images_at_end = False
    np.testing.assert_array_equal(env.step(up)[0][IMAGE], second)
    env.close()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_tasks_played() -> None:
    env, used = Metaworld(THREE, pixels=32), []
    for seed in range(10):
        env.reset(seed=seed)
        used.append(psutil.Process().memory_info().rss)
    assert max(used[6:]) - max(used[:4]) < 60e6  # bytes; a task that stays takes 95 MB
    env.close()


# -- experts ---------------------------------------------------------------------------------


def test_every_task_has_an_expert() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP
    assert set(TASKS) == set(ALL_V3_ENVIRONMENTS) == set(ENV_POLICY_MAP)


def test_labels_are_within_the_action_space(three: Metaworld) -> None:
    three.reset(seed=1)
    labels = []
    for _ in range(60):
        labels.append(three.expert_action())
        three.step(labels[-1])
    assert labels[0].dtype == np.float32
    assert np.abs(labels).max() == 1  # it asks for more


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Constant")  # of Meta-World's gains
def test_experts_do_here_what_they_do_outside() -> None:
    """The same scenes, the same steps to success, by Meta-World's own classes and no line of ours."""
    from metaworld.policies import ENV_POLICY_MAP

    tasks = ("door-open-v3", "drawer-close-v3", "basketball-v3", "pick-place-v3", "stick-push-v3")
    env, ours, theirs = blind(*tasks), {}, {}
    for number, task in enumerate(tasks):
        outside, expert = bare(task), ENV_POLICY_MAP[task]()
        for seed in range(number, 4 * len(tasks), len(tasks)):
            env.reset(seed=seed)
            steps, success, done = 0, False, False
            while not (success or done):
                *_, done, info = env.step(env.expert_action())
                steps, success = steps + 1, info["is_success"]
            ours[task, seed] = success, steps
            outside.seed(seed)
            seen, _ = outside.reset()
            steps, success, done = 0, False, False
            while not (success or done):
                seen, _, _, done, told = outside.step(expert.get_action(seen))
                steps, success = steps + 1, bool(told["success"])
            theirs[task, seed] = success, steps
    assert ours == theirs
    assert sum(success for success, _ in ours.values()) >= 18
    env.close()


# -- LeRobot's own environment -----------------------------------------------------------------


def test_averaging_by_area() -> None:
    image = np.random.default_rng(0).integers(0, 256, (480, 480, 3), np.uint8)
    blocks = image.reshape(160, 3, 160, 3, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(average(image, shares(480, 160)), blocks, atol=0.51)
    np.testing.assert_array_equal(average(image, shares(480, 480)), image)
    small = average(image, shares(480, 128))
    assert small.shape == (128, 128, 3)
    assert small.mean() == pytest.approx(image.mean(), abs=0.1)
    np.testing.assert_allclose(shares(480, 128).sum(axis=1), 1, atol=1e-6)


@pytest.mark.slow
def test_lerobots_environment_shows_what_ours_shows() -> None:
    """The same tasks, scenes, states and, drawn as by default, pictures to the last bit; its first one is stale."""
    tasks = ["reach-v3", "drawer-close-v3"]
    theirs, another = (LeRobotMetaworld(tasks, pixels=480) for _ in range(2))
    ours = Metaworld(tasks, pixels=480, preset="default", instructions="lerobot")
    actions = np.random.default_rng(0).uniform(-1, 1, (2, 4)).astype(np.float32)
    another.reset(seed=2)
    for seed in (0, 1):
        mine, info = ours.reset(seed=seed)
        seen, told = theirs.reset(seed=seed)
        assert told == info
        np.testing.assert_array_equal(seen[STATE], mine[STATE])
        assert not np.array_equal(seen[IMAGE], mine[IMAGE])
        for action in actions:
            mine, *_ = ours.step(action)
            other, *_ = another.step(-action)  # drawn in between, and neither turns black
            seen, *_ = theirs.step(action)
            np.testing.assert_array_equal(seen[IMAGE], mine[IMAGE])
            np.testing.assert_array_equal(seen[STATE], mine[STATE])
            assert other[IMAGE].std() > 20
            assert not np.array_equal(other[IMAGE], seen[IMAGE])
    for env in (theirs, another, ours):
        env.close()


@pytest.mark.slow
def test_lerobots_environment_ends_at_success() -> None:
    """It steps as ours, whose expert sees the goal."""
    ours = blind("coffee-button-v3")
    env, features = make_env("envs:LeRobotMetaworld-v0", dict(tasks="coffee-button-v3", pixels=64))
    assert features == make_env("envs:Metaworld-v0", dict(tasks="coffee-button-v3", pixels=64))[1]
    ours.reset(seed=3)
    observation, _ = env.reset(seed=3)
    terminated = False
    assert observation[IMAGE].std() > 20
    theirs: Any = env.unwrapped
    picture = theirs.render()
    theirs.env._env.mujoco_renderer.render = lambda mode: picture  # a drawing takes 0.2 s
    while not terminated:
        action = ours.expert_action()
        *_, mine = ours.step(action)
        observation, _, terminated, truncated, info = env.step(action)
        assert env.observation_space.contains(observation)
        assert info["is_success"] == mine["is_success"] == terminated
        assert not truncated
    with pytest.raises(ValueError, match="action: got .*expected 4 finite numbers"):
        env.step(np.full(4, np.nan))
    env.close()
    ours.close()


def test_lerobots_environment_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="tasks: got .*remedy"):
        LeRobotMetaworld("tea-v3")
    with pytest.raises(ValueError, match="pixels: got 481, expected 1 to 480"):
        LeRobotMetaworld(pixels=481)
