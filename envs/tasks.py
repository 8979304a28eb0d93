"""What can be asked for, in which words, and when it has been done.

A skill is one entry of SKILLS: its scene, its phrasings, and a predicate on physics alone.
Left, right, in front and behind are as seen by the front camera: left is -y, in front is +x.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from envs import splits
from envs.scene import BUTTON_TRAVEL, DRAWER_TRAVEL, HALF_HEIGHT, RECEPTACLE_RADIUS, RIM
from envs.world import ROBOT, Item, Scene, World


@dataclass(frozen=True)
class Goal:
    """An instruction's meaning: indices into the scene's items; place is None for one-thing skills."""

    skill: str
    target: int
    place: int | None = None


@dataclass(frozen=True)
class Skill:
    """One skill. phrasings: {a} target, {b} place; unseen: the phrasings of split L2; steps: time limit."""

    scene: str  # buttons | objects | drawers
    phrasings: tuple[str, ...]
    unseen: tuple[str, ...]
    done: Callable[[World, Goal], bool]
    places: tuple[str, ...] = ()  # kinds of item that can be the place
    steps: int = 60


def pressed(world: World, goal: Goal) -> bool:
    """The cap is down and the robot is on it."""
    return world.slide(goal.target) < -0.65 * BUTTON_TRAVEL and world.touching(ROBOT, goal.target)


def touched(world: World, goal: Goal) -> bool:
    return world.touching(ROBOT, goal.target)


def pushed(world: World, goal: Goal) -> bool:
    """The object stands on the table, its middle well inside the zone."""
    assert goal.place is not None
    target, place = world.position(goal.target), world.position(goal.place)
    return bool(np.hypot(*(target - place)[:2]) < 0.04 and target[2] < HALF_HEIGHT + 0.01)


def put(world: World, goal: Goal) -> bool:
    """The object lies within the receptacle's walls and the robot has let go."""
    assert goal.place is not None
    offset = world.position(goal.target) - world.position(goal.place)
    inside = np.hypot(*offset[:2]) < RECEPTACLE_RADIUS - 0.008 and offset[2] < RIM + 0.004
    return bool(inside) and not world.touching(ROBOT, goal.target)


def stacked(world: World, goal: Goal) -> bool:
    """The object rests on the other one, at its height, and the robot has let go."""
    assert goal.place is not None
    offset = world.position(goal.target) - world.position(goal.place)
    above = np.hypot(*offset[:2]) < 0.035 and abs(offset[2] - 2 * HALF_HEIGHT) < 0.008
    return (
        bool(above)
        and world.touching(goal.target, goal.place)
        and not world.touching(ROBOT, goal.target)
        and world.speed(goal.target) < 0.05
    )


def opened(world: World, goal: Goal) -> bool:
    return world.slide(goal.target) > 0.85 * DRAWER_TRAVEL


def closed(world: World, goal: Goal) -> bool:
    return world.slide(goal.target) < 0.12 * DRAWER_TRAVEL


SKILLS: dict[str, Skill] = {
    "touch": Skill(
        "objects",
        ("touch {a}", "touch {a} with the gripper", "reach for {a}", "put a finger on {a}", "make contact with {a}",
         "go and touch {a}", "tap {a}"),
        ("lay a finger on {a}", "move the hand until it touches {a}", "please tap on {a}"),
        touched,
    ),
    "press": Skill(
        "buttons",
        ("press {a}", "push {a} down", "press down on {a}", "push down {a}", "click {a}", "go and press {a}",
         "press on {a}"),
        ("hold {a} down", "i want {a} pressed", "please press {a} with the gripper"),
        pressed,
    ),
    "push": Skill(
        "objects",
        ("push {a} to {b}", "push {a} into {b}", "slide {a} to {b}", "move {a} onto {b} by pushing it",
         "slide {a} into {b}", "shove {a} to {b}", "push {a} onto {b}"),
        ("slide {a} across the table to {b}", "give {a} a push until it is in {b}", "nudge {a} over to {b}"),
        pushed, ("zone",), 120,
    ),
    "put": Skill(
        "objects",
        ("put {a} in {b}", "put {a} into {b}", "place {a} in {b}", "drop {a} into {b}", "pick up {a} and put it in {b}",
         "move {a} into {b}", "place {a} inside {b}"),
        ("pick {a} up and drop it in {b}", "{b} is where {a} should go", "leave {a} inside {b}"),
        put, ("receptacle",), 120,
    ),
    "stack": Skill(
        "objects",
        ("stack {a} on {b}", "put {a} on top of {b}", "place {a} on {b}", "stack {a} on top of {b}",
         "set {a} on top of {b}", "pick up {a} and stack it on {b}", "put {a} onto {b}"),
        ("build a tower with {a} on {b}", "{a} should stand on {b}", "lift {a} and set it down on {b}"),
        stacked, ("object",), 120,
    ),
    "open": Skill(
        "drawers",
        ("open {a}", "pull {a} open", "pull out {a}", "slide {a} open", "open up {a}", "go and open {a}"),
        ("please pull {a} all the way out", "i want {a} opened"),
        opened, (), 120,
    ),
    "close": Skill(
        "drawers",
        ("close {a}", "push {a} shut", "shut {a}", "push {a} in", "slide {a} shut", "go and close {a}"),
        ("please push {a} all the way in", "i want {a} closed"),
        closed, (), 120,
    ),
}  # fmt: skip

TARGETS = {"objects": "object", "buttons": "button", "drawers": "drawer"}


def all_goals(scene: Scene, skill: str) -> list[Goal]:
    """Every goal of this skill that the scene's things make thinkable, reachable or not."""
    entry = SKILLS[skill]
    targets = scene.of(TARGETS[entry.scene]) if entry.scene == scene.kind else []
    if not entry.places:
        return [Goal(skill, t) for t in targets]
    places = [p for kind in entry.places for p in scene.of(kind)]
    return [Goal(skill, t, p) for t, p in itertools.product(targets, places) if t != p]


def done(scene: Scene, goal: Goal) -> Scene:
    """The scene as it will be when the goal is reached."""
    if goal.place is None:
        return scene
    place, items = scene.items[goal.place], list(scene.items)
    items[goal.target] = replace(items[goal.target], x=place.x, y=place.y)
    return replace(scene, items=tuple(items))


def split_kind(scene: Scene, goal: Goal) -> str:
    """The split that a goal belongs to: "train", "L1" or "L3"."""
    target = scene.items[goal.target]
    place = None if goal.place is None else scene.items[goal.place].shape
    return splits.kind_of(goal.skill, target.colour, target.shape, place)


REFERENCES = ("name", "colour", "shape", "relation")
SIDES = {"left of": (0, -1), "right of": (0, 1), "in front of": (1, 0), "behind": (-1, 0)}


def references(scene: Scene, index: int, kinds: tuple[str, ...] = REFERENCES) -> dict[str, list[str]]:
    """Unambiguous noun phrases for one item, by kind of reference; "name" always exists."""
    item = scene.items[index]
    others = [o for i, o in enumerate(scene.items) if i != index and o.kind == item.kind]
    noun = item.kind if item.kind in ("object", "receptacle") else item.shape
    words: dict[str, list[str]] = {
        "name": [f"the {item.colour} {item.shape}"],
        "colour": [],
        "shape": [],
        "relation": [],
    }
    if item.kind == "object" and all(o.colour != item.colour for o in others):
        words["colour"] = [f"the {item.colour} object", f"the {item.colour} thing"]
    if item.shape != noun and all(o.shape != item.shape for o in others):
        words["shape"] = [f"the {item.shape}"]
    if item.kind in ("object", "button") and "relation" in kinds:
        for side, direction in SIDES.items():
            for anchor in scene.items:
                if anchor is item or not _beside(item, anchor, direction, strict=True):
                    continue
                rivals = [
                    o for o in others if o is not anchor and _beside(o, anchor, direction, strict=False)
                ]
                if not rivals:
                    words["relation"].append(f"the {noun} {side} the {anchor.colour} {anchor.shape}")
    return {kind: words[kind] for kind in REFERENCES if words[kind] and (kind in kinds or kind == "name")}


def _beside(item: Item, anchor: Item, direction: tuple[int, int], strict: bool) -> bool:
    """Whether the item lies on that side of the anchor; loosely for rivals, strictly for the one meant."""
    dx, dy = item.x - anchor.x, item.y - anchor.y
    along = dx * direction[0] + dy * direction[1]
    across = abs(dx * direction[1]) + abs(dy * direction[0])
    if strict:
        return 0.06 < along < 0.24 and across < 0.6 * along
    return along > 0.02 and across < 1.6 * along


def sentences(
    scene: Scene, goal: Goal, kinds: tuple[str, ...] = REFERENCES, unseen: bool | None = None
) -> list[str]:
    """Every wording of a goal; unseen: only L2's phrasings (True), only training's (False), or both (None)."""
    entry = SKILLS[goal.skill]
    templates = (entry.phrasings if not unseen else ()) + (entry.unseen if unseen or unseen is None else ())
    targets = [w for group in references(scene, goal.target, kinds).values() for w in group]
    places = [""]
    if goal.place is not None:
        usual = tuple(k for k in kinds if k in ("name", "shape"))
        places = [w for group in references(scene, goal.place, usual).values() for w in group]
    return [t.format(a=a, b=b) for t in templates for a in targets for b in places]


def phrase(scene: Scene, goal: Goal, rng: np.random.Generator, kinds: tuple[str, ...], unseen: bool) -> str:
    """One wording, drawn: first the kind of reference, then the words, then the phrasing."""
    entry = SKILLS[goal.skill]

    def pick(index: int, allowed: tuple[str, ...]) -> str:
        groups = list(references(scene, index, allowed).values())
        group = groups[rng.integers(len(groups))]
        return group[rng.integers(len(group))]

    templates = entry.unseen if unseen else entry.phrasings
    template = templates[rng.integers(len(templates))]
    a = pick(goal.target, kinds)
    b = "" if goal.place is None else pick(goal.place, tuple(k for k in kinds if k in ("name", "shape")))
    return template.format(a=a, b=b)
