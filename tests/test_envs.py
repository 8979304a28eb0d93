"""The tabletop environment: spaces, seeds, switches, instructions, splits, endings."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from envs import randomize, splits, tasks
from envs.experts import STEP
from envs.tabletop import Tabletop
from envs.tasks import SKILLS
from vla.observation import STATE, Features

FRONT, WRIST = "observation.images.front", "observation.images.wrist"


@pytest.fixture(scope="module")
def table() -> Iterator[Tabletop]:
    """One environment for the tests that look at no picture."""
    env = Tabletop(cameras=["front"], pixels=32)
    env.images_enabled = False
    yield env
    env.close()


def restrict(env: Tabletop, *skills: str, split: str = "train") -> Tabletop:
    """The shared environment with other skills and another split."""
    env.skills = env.drawn = skills or tuple(SKILLS)
    env.split = split
    return env


def follow(env: Tabletop, limit: int = 300) -> tuple[bool, bool, list[str]]:
    """Run the expert; (success, terminated, instructions seen)."""
    seen: list[str] = []
    for _ in range(limit):
        *_, terminated, truncated, info = env.step(env.expert_action())
        seen += [info["task"]] if info["task"] not in seen else []
        if terminated or truncated:
            return info["is_success"], terminated, seen
    raise AssertionError("the episode did not end")


@pytest.mark.filterwarnings("ignore:.*(minimum|maximum) value.*infinity")  # positions have no natural bounds
@pytest.mark.parametrize("skill", ["press", "stack", "open"])
def test_gymnasium_checker(skill: str) -> None:
    env = gymnasium.make("envs:Tabletop-v0", skills=[skill], pixels=32)
    check_env(env.unwrapped)
    env.close()


def test_spaces_hold_what_is_delivered() -> None:
    env = gymnasium.make("envs:Tabletop-v0", pixels=48, render_pixels=80)
    features = Features.of_spaces(env.observation_space, env.action_space, 10)
    assert features.cameras == {"front": (48, 48), "wrist": (48, 48)}
    assert (features.state_dim, features.action_dim) == (11, 5)
    for seed in range(6):
        observation, info = env.reset(seed=seed)
        assert env.observation_space.contains(observation)
        assert isinstance(info["task"], str)
        assert info["is_success"] is False
        assert info["skill"] in SKILLS
    observation, *_ = env.step(env.action_space.sample())
    assert env.observation_space.contains(observation)
    picture: Any = env.render()
    assert picture.shape == (80, 80, 3)
    env.close()


@pytest.mark.parametrize("preset", ["fast", "full"])
def test_segmentation_names_what_each_pixel_shows(preset: str) -> None:
    env = Tabletop(["press"], references=["name"], pixels=64, preset=preset)
    shades = {"red": 0, "green": 1, "blue": 2}
    checked = 0
    for seed in range(4):
        before, _ = env.reset(seed=seed)
        shown = env.segmentation("front")
        assert shown.shape == (64, 64)
        assert np.array_equal(env.view.picture(env.data, "front", 64), before[FRONT])  # it leaves no trace
        items = env.world.scene.items
        assert set(np.unique(shown)) <= {-1, *range(len(items))}
        assert {env.goal.target, *env.rivals} == set(env.world.scene.of("button"))
        assert env.goal.target not in env.rivals
        for i, item in enumerate(items):
            pixels = shown == i
            assert 30 < pixels.sum() < 300
            if item.colour in shades:  # its cap is of its colour: the channel that stands out most
                colour = before[FRONT][pixels].mean(0) - before[FRONT].mean((0, 1))
                checked += 1
                assert colour.argmax() == shades[item.colour], item
    assert checked > 3
    with pytest.raises(ValueError, match="camera: got.*expected some of front, wrist"):
        env.segmentation("view")
    env.close()


def test_pictures_of_three_environments_in_one_process() -> None:
    """A second renderer made carelessly is black."""
    environments = [Tabletop(pixels=32) for _ in range(3)]
    pictures = []
    for env in environments:
        observation, _ = env.reset(seed=5)
        for key in (FRONT, WRIST):
            assert observation[key].std() > 10
        pictures.append(observation)
    for key in (FRONT, WRIST):
        assert np.array_equal(pictures[0][key], pictures[1][key])
        assert np.array_equal(pictures[0][key], pictures[2][key])
    again, _ = environments[0].reset(seed=5)  # after the others were made
    assert np.array_equal(again[FRONT], pictures[0][FRONT])
    for env in environments:
        env.close()


@pytest.mark.parametrize("skill", list(SKILLS))
def test_a_seed_repeats_an_episode_exactly(skill: str) -> None:
    """Also in an environment that has run other episodes in between."""
    env = Tabletop(pixels=24)
    actions = np.random.default_rng(0).uniform(-1, 1, (10, 5)).astype(np.float32)
    runs = []
    for _ in range(2):
        restrict(env, skill)
        observation, info = env.reset(seed=11)
        run = [observation, *(env.step(action)[0] for action in actions)]
        runs.append((run, info["task"], info["alternatives"]))
        restrict(env, "put", "press", "open")
        env.reset(seed=12)
        env.step(actions[0])
    assert runs[0][1:] == runs[1][1:]
    for a, b in zip(runs[0][0], runs[1][0], strict=True):
        for key in a:
            assert np.array_equal(a[key], b[key]), key
    env.close()


def looks(switch: str) -> list[dict[str, Any]]:
    """What an episode's scene looks like over seeds, with one switch off."""
    env = Tabletop(skills=["press"], cameras=["front"], pixels=16, randomize={switch: False})
    env.images_enabled = False
    found = []
    for seed in range(4):
        env.reset(seed=seed)
        items, model = env.world.scene.items, env.model
        red = [
            randomize.draw_look(
                randomize.generators(np.random.default_rng(seed), env.switches), env.switches
            ).paint["red"]
        ]
        found.append(
            {
                "layout": [(i.x, i.y) for i in items[:3]] + [tuple(env.world.scene.hand)],
                "hue": red,
                "table": model.geom("table").rgba.tolist(),
                "light": model.light("key").dir.tolist() + model.light("key").diffuse.tolist(),
                "camera": model.camera("front").pos.tolist() + model.camera("front").quat.tolist(),
            }
        )
    return found


@pytest.mark.parametrize("switch", randomize.SWITCHES)
def test_each_randomisation_can_be_switched_off_alone(switch: str) -> None:
    found = looks(switch)
    for name in randomize.SWITCHES:
        same = [one[name] == found[0][name] for one in found[1:]]
        assert all(same) if name == switch else not any(same), name


def test_named_colours_stay_apart() -> None:
    """Whatever the jitter, each paint is nearest to its own name's middle colour."""
    off = dict.fromkeys(randomize.SWITCHES, False)
    middle = randomize.draw_look(randomize.generators(np.random.default_rng(0), off), off).paint
    for seed in range(200):
        switches = dict.fromkeys(randomize.SWITCHES, True)
        paint = randomize.draw_look(
            randomize.generators(np.random.default_rng(seed), switches), switches
        ).paint
        for name, colour in paint.items():
            distance = {other: np.linalg.norm(np.subtract(colour, middle[other])) for other in middle}
            own = distance.pop(name)
            assert own < 0.5 * min(distance.values()), (seed, name)


@pytest.mark.parametrize("skill", list(SKILLS))
def test_another_instruction_in_the_identical_scene(table: Tabletop, skill: str) -> None:
    env = restrict(table, skill)
    for seed in range(5):
        first, info = env.reset(seed=seed)
        scene, goal = env.world.scene, env.goal
        other = info["alternatives"][0]
        second, changed = env.reset(seed=seed, options={"task": other})
        assert changed["task"] == other != info["task"]
        assert env.world.scene.items == scene.items
        assert np.array_equal(first[STATE], second[STATE])
        assert env.goal.skill == goal.skill
        assert env.goal.target != goal.target
        assert follow(env)[0]


def test_every_sentence_of_a_scene_means_one_thing(table: Tabletop) -> None:
    for seed, skill in enumerate(("press", "touch", "put", "push", "open")):
        env = restrict(table, skill)
        env.reset(seed=seed)
        meaning: dict[str, tasks.Goal] = {}
        for other in SKILLS:
            for goal in env.feasible_goals(other):
                for sentence in tasks.sentences(env.world.scene, goal):
                    assert meaning.setdefault(sentence, goal) == goal, sentence
        assert len(meaning) > 20
        for sentence in list(meaning)[::9]:
            env.reset(seed=seed, options={"task": f"  {sentence.upper()}. "})
            assert env.goal == meaning[sentence]


def test_relations_hold_by_a_margin(table: Tabletop) -> None:
    seen = 0
    env = restrict(table, "press", "touch")
    for seed in range(60):
        env.reset(seed=seed)
        scene = env.world.scene
        for index in scene.of("button") + scene.of("object"):
            item = scene.items[index]
            for words in tasks.references(scene, index).get("relation", []):
                noun, _, rest = words.partition(" left of the ")
                if not rest:
                    continue
                anchor = next(i for i in scene.items if f"{i.colour} {i.shape}" == rest)
                assert item.y < anchor.y - 0.05, words
                assert noun == f"the {item.kind}"
                for other in (scene.items[i] for i in scene.of(item.kind) if i != index):
                    beside = other.y < anchor.y - 0.03 and abs(other.x - anchor.x) < abs(other.y - anchor.y)
                    assert other is anchor or not beside, words
                seen += 1
    assert seen > 10


def test_unknown_sentence_is_refused_with_examples(table: Tabletop) -> None:
    env = restrict(table, "press")
    _, info = env.reset(seed=0)
    with pytest.raises(ValueError, match=r"got 'make coffee'.*expected.*remedy") as error:
        env.reset(seed=0, options={"task": "make coffee"})
    assert info["alternatives"][0] in str(error.value)


@pytest.mark.parametrize("skill", ["press", "touch", "put", "push"])
def test_the_wrong_target_ends_the_episode_unsuccessfully(table: Tabletop, skill: str) -> None:
    env = restrict(table, skill)
    for seed in range(3):
        env.reset(seed=seed)
        wrong = next(g for g in env.feasible_goals(skill) if g.target != env.goal.target)
        asked, env._goals = env._goals, [wrong]
        for _ in range(200):
            action = env.expert_action()
            env._goals = asked
            _, reward, terminated, truncated, info = env.step(action)
            env._goals = [wrong]
            if terminated or truncated:
                break
        assert terminated
        assert not info["is_success"]
        assert reward == 0


def test_doing_nothing_is_no_success(table: Tabletop) -> None:
    for skill in SKILLS:
        env = restrict(table, skill)
        for seed in range(4):
            env.reset(seed=seed)
            for _ in range(5):
                *_, terminated, _, info = env.step(np.zeros(5, np.float32))
                assert not terminated
                assert not info["is_success"]


@pytest.mark.parametrize("action", [[np.nan, 0, 0, 0, 0], [0, 0, np.inf, 0, 0], [0, 0, 0]])
def test_a_broken_action_raises(table: Tabletop, action: list[float]) -> None:
    restrict(table, "press").reset(seed=0)
    with pytest.raises(ValueError, match=r"action: got.*expected 5 finite numbers.*remedy"):
        table.step(np.array(action, np.float32))


def test_large_actions_are_clipped_and_the_workspace_is_bounded(table: Tabletop) -> None:
    env = restrict(table, "press")
    env.reset(seed=0)
    before = env.world.hand.copy()
    env.step(np.array([100, 0, 0, 0, 0], np.float32))
    assert 0 < env.world.hand[0] - before[0] < STEP + 0.005
    for _ in range(30):
        observation, *_ = env.step(np.array([1, 1, 1, 1, 1], np.float32))
    assert np.all(np.abs(observation[STATE][:2]) < 0.28)
    assert observation[STATE][2] < 0.29


def test_images_can_be_switched_off() -> None:
    env = Tabletop(cameras=["front"], pixels=16, skills=["press"])
    shown, _ = env.reset(seed=0)
    pictures = []
    env.view.picture, original = lambda *a: pictures.append(a) or original(*a), env.view.picture
    env.images_enabled = False
    for _ in range(3):
        stale, *_ = env.step(env.expert_action())
    assert not pictures
    assert np.array_equal(stale[FRONT], shown[FRONT])
    env.images_enabled = True
    fresh, *_ = env.step(env.expert_action())
    assert len(pictures) == 1
    assert not np.array_equal(fresh[FRONT], shown[FRONT])
    env.close()


def test_time_limit(table: Tabletop) -> None:
    for skill, limit in (("press", 60), ("put", 120)):
        restrict(table, skill).reset(seed=0)
        for step in range(1, limit + 1):
            *_, terminated, truncated, _ = table.step(np.zeros(5, np.float32))
            assert truncated == (step == limit)
            assert not terminated


@pytest.mark.parametrize("skills", [("press",), ("open", "close"), ("push", "put", "stack")])
def test_two_instructions_in_a_chain(table: Tabletop, skills: tuple[str, ...]) -> None:
    env = restrict(table, *skills, split="L4")
    for seed in range(3):
        _, info = env.reset(seed=seed)
        success, _, seen = follow(env)
        assert success
        assert seen[0] == info["task"]
        assert len(seen) == 2


# -- splits ----------------------------------------------------------------------------------


def asked(env: Tabletop, seeds: range) -> Iterator[tuple[tasks.Goal, str, Any]]:
    for seed in seeds:
        _, info = env.reset(seed=seed)
        yield env.goal, info["task"], info


def triple(env: Tabletop, goal: tasks.Goal) -> tuple[str, str, str | None]:
    items = env.world.scene.items
    return (
        items[goal.target].colour,
        items[goal.target].shape,
        None if goal.place is None else items[goal.place].shape,
    )


def templates(unseen: bool) -> list[str]:
    return [t for s in SKILLS.values() for t in (s.unseen if unseen else s.phrasings)]


def test_enough_phrasings_and_none_in_both_lists() -> None:
    for skill in SKILLS.values():
        assert len(set(skill.phrasings)) >= 6
        assert len(set(skill.unseen)) >= 2
    assert not set(templates(True)) & set(templates(False))


@pytest.mark.parametrize("split", ["train", "L0"])
def test_training_never_shows_what_is_held_out(table: Tabletop, split: str) -> None:
    env = restrict(table, split=split)
    for goal, task, info in asked(env, range(300)):
        colour, shape, place = triple(env, goal)
        assert (goal.skill, colour, shape) not in splits.UNSEEN_PAIRS
        assert goal.skill not in ("push", "put") or (colour, shape, place) not in splits.UNSEEN_COMBINATIONS
        scene = env.world.scene
        assert task in tasks.sentences(scene, goal, unseen=False)
        assert task not in tasks.sentences(scene, goal, unseen=True)
        for other in info["alternatives"]:  # they can be demonstrated as well
            meant = env._parse(other)
            assert tasks.split_kind(scene, meant) == "train"
            assert other in tasks.sentences(scene, meant, unseen=False)


def test_unseen_combinations(table: Tabletop) -> None:
    env = restrict(table, "push", "put", split="L1")
    for goal, _, _ in asked(env, range(40)):
        assert triple(env, goal) in splits.UNSEEN_COMBINATIONS
        assert (goal.skill, *triple(env, goal)[:2]) not in splits.UNSEEN_PAIRS


def test_unseen_phrasings(table: Tabletop) -> None:
    env = restrict(table, split="L2")
    for goal, task, _ in asked(env, range(60)):
        assert task in tasks.sentences(env.world.scene, goal, unseen=True)
        assert task not in tasks.sentences(env.world.scene, goal, unseen=False)


def test_unseen_skill_and_object(table: Tabletop) -> None:
    env = restrict(table, split="L3")
    skills = set()
    for goal, _, _ in asked(env, range(60)):
        assert (goal.skill, *triple(env, goal)[:2]) in splits.UNSEEN_PAIRS
        skills.add(goal.skill)
    assert skills == set(SKILLS)


def test_splits_leave_every_word_in_training() -> None:
    """Every colour, shape and place is still demonstrated with every skill that has it."""
    from envs.randomize import COLOURS
    from envs.scene import SHAPES

    for skill, colour in itertools.product(("touch", "push", "put", "stack"), COLOURS):
        assert any((skill, colour, shape) not in splits.UNSEEN_PAIRS for shape in SHAPES)
    for place, colour in itertools.product(("bowl", "tray", "zone"), COLOURS):
        assert any((colour, shape, place) not in splits.UNSEEN_COMBINATIONS for shape in SHAPES)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(skills=["juggle"]), dict(split="L9"), dict(cameras=["side"]), dict(references=["smell"]),
        dict(randomize={"gravity": True}), dict(preset="best"), dict(split="L1", skills=["press"]), dict(skills=[]),
    ],
)  # fmt: skip
def test_wrong_choices_are_explained(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"got.*expected.*remedy"):
        Tabletop(**wrong)


def test_a_row_shows_three_buttons_that_can_all_be_asked_for() -> None:
    env = Tabletop(skills=["press"], row=0.03, cameras=["front"], pixels=32, split="L0")
    env.images_enabled = False
    targets, orders = set(), set()
    for seed in range(40):
        _, info = env.reset(seed=seed)
        items = env.world.scene.items
        assert len(items) == len({item.colour for item in items}) == 3
        assert len(info["alternatives"]) == 2
        assert {item.colour for item in items}.isdisjoint({"purple"})  # press and purple belong to L3
        for slot, item in enumerate(items):
            assert abs(item.x - randomize.ROW_X) <= 0.03
            assert abs(item.y - (slot - 1) * randomize.ROW_GAP) <= 0.03
        targets.add(env.goal.target)
        orders.add(tuple(item.colour for item in items))
    assert targets == {0, 1, 2}  # no place gives the answer away
    assert len(orders) > 20
    env.close()


def test_buttons_anywhere_leave_at_least_three_to_ask_for() -> None:
    env = Tabletop(skills=["press"], cameras=["front"], pixels=32)
    env.images_enabled = False
    for seed in range(40):
        _, info = env.reset(seed=seed)
        assert len(info["alternatives"]) >= 2
    env.close()


def test_the_state_without_the_lag_behind_the_command() -> None:
    full, bare = (Tabletop(["press"], cameras=["front"], pixels=32, commanded=c) for c in (True, False))
    assert bare.observation_space[STATE].shape == (7,)
    for env in (full, bare):
        env.reset(seed=3)
    with_lag, *_ = full.step(np.array([1, 0, 0, 0, -1]))
    without, *_ = bare.step(np.array([1, 0, 0, 0, -1]))
    assert bare.observation_space.contains(without)
    assert with_lag[STATE][6] > 0.001  # metres
    np.testing.assert_array_equal(np.delete(with_lag[STATE], [6, 7, 8, 9]), without[STATE])
    full.close()
    bare.close()


@pytest.mark.parametrize(
    ("name", "value"), [("pixels", 0), ("max_steps", 0), ("row", 0.2), ("render_pixels", -1)]
)
def test_sizes_that_cannot_be(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}: got {value}, expected .*remedy"):
        Tabletop(**{name: value})  # type: ignore[arg-type]
