"""From a random generator to a scene, and from a scene to the model's arrays.

Each thing that varies has a generator of its own, so that switching one off leaves the others
as they were. Units: metres, radians.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import mujoco
import numpy as np

from envs import arm
from envs.scene import DRAWER_TRAVEL, HALF_HEIGHT, HIDDEN, PARKED, RECEPTACLES, SHAPES, SLOTS, look_at
from envs.world import Item, Scene

SWITCHES = ("layout", "hue", "table", "light", "camera")

# hue (turns), saturation, value. Hues are so far apart that the jitter cannot make two meet.
COLOURS = {
    "red": (0.995, 0.84, 0.86), "yellow": (0.135, 0.88, 0.97), "green": (0.37, 0.74, 0.66),
    "blue": (0.59, 0.84, 0.88), "purple": (0.79, 0.58, 0.72), "white": (0.60, 0.02, 0.97),
}  # fmt: skip
HUE_JITTER, VALUE_JITTER = 0.018, 0.06

CAMERA, TARGET, FOVY = np.array([0.80, 0.0, 1.02]), np.array([-0.015, 0.0, 0.0]), 28.0
LOW, HIGH = np.array([-0.20, -0.21]), np.array([0.19, 0.21])  # where things may stand
ROW_X, ROW_GAP = 0.02, 0.15  # of buttons in a row
GAPS = {  # radius that a thing keeps free around itself
    "button": 0.066, "object": 0.055, "receptacle": 0.083, "zone": 0.066,
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """Paint, light and camera of one episode."""

    paint: dict[str, tuple[float, float, float]]  # colour word -> rgb
    table: tuple[float, float, float]
    light: np.ndarray  # direction (3,)
    brightness: float
    camera: np.ndarray  # position (3,) of the front camera
    aim: np.ndarray  # point (3,) it looks at


def generators(rng: np.random.Generator, switches: dict[str, bool]) -> dict[str, np.random.Generator]:
    """One generator per thing that varies, plus "content" (what there is) and "goal" (what is asked)."""
    seeds = {name: int(rng.integers(2**62)) for name in (*SWITCHES, "content", "goal")}
    return {
        name: np.random.default_rng(seed if switches.get(name, True) else 0) for name, seed in seeds.items()
    }


def draw_scene(
    kind: str,
    content: np.random.Generator,
    layout: np.random.Generator,
    skill: str = "",
    row: float | None = None,
) -> Scene | None:
    """A scene of this kind; None when its things did not find room.

    row: None has buttons stand anywhere; a distance has three stand in a row, each at most so far
    from its place.
    """
    names = list(COLOURS)
    items: list[Item] = []
    hand = np.array([layout.uniform(-0.12, 0.06), layout.uniform(-0.12, 0.12), layout.uniform(0.17, 0.22)])
    hand_yaw = float(layout.uniform(-0.3, 0.3))
    if kind == "drawers":
        colours = content.permutation(names)[:3]
        is_open = content.permutation([skill == "close", skill == "close", content.random() < 0.5])
        if skill == "open":
            is_open = content.permutation([False, False, content.random() < 0.5])
        x = layout.uniform(-0.17, -0.13)
        for slot in range(3):
            y = (slot - 1) * layout.uniform(0.145, 0.16) + layout.uniform(-0.004, 0.004)
            ajar = layout.uniform(0.0, 0.004)
            slide = DRAWER_TRAVEL - ajar if is_open[slot] else ajar
            items.append(Item("drawer", slot, "drawer", str(colours[slot]), x, y, 0.0, slide))
    elif kind == "buttons" and row is not None:
        for slot, colour in enumerate(content.permutation(names)[:3]):
            dx, dy = layout.uniform(-row, row, 2)
            items.append(
                Item("button", slot, "button", str(colour), ROW_X + dx, (slot - 1) * ROW_GAP + dy, 0.0)
            )
    else:
        things = _buttons(content) if kind == "buttons" else _objects(content)
        spots: list[tuple[float, float, float]] = []
        for thing_kind, slot, shape, colour in things:
            spot = _spot(layout, spots, GAPS[thing_kind])
            if spot is None:
                return None
            spots.append((*spot, GAPS[thing_kind]))
            yaw = float(layout.uniform(-np.pi, np.pi)) if thing_kind == "object" else 0.0
            items.append(Item(thing_kind, slot, shape, colour, *spot, yaw))
    return Scene(kind, tuple(items), hand, hand_yaw)


def _buttons(rng: np.random.Generator) -> list[tuple[str, int, str, str]]:
    colours = rng.permutation(list(COLOURS))[: rng.integers(3, 5)]
    return [("button", i, "button", str(c)) for i, c in enumerate(colours)]


def _objects(rng: np.random.Generator) -> list[tuple[str, int, str, str]]:
    names = list(COLOURS)
    n_receptacles = int(rng.integers(1, 3))
    things = []
    kinds, colours = rng.permutation(RECEPTACLES), rng.permutation(names)
    for i in range(n_receptacles):
        things.append(("receptacle", i, str(kinds[i]), str(colours[i])))
    colours = rng.permutation(names)
    for i in range(3 - n_receptacles):
        things.append(("zone", i, "zone", str(colours[i])))
    pairs = [(shape, colour) for shape in SHAPES for colour in names]
    for i, choice in enumerate(rng.permutation(len(pairs))[: rng.integers(3, 5)]):
        things.append(("object", i, *pairs[choice]))
    return things


def _spot(
    rng: np.random.Generator, taken: list[tuple[float, float, float]], gap: float
) -> tuple[float, float] | None:
    for _ in range(40):
        x, y = rng.uniform(LOW, HIGH)
        if all(np.hypot(x - tx, y - ty) > gap + other for tx, ty, other in taken):
            return float(x), float(y)
    return None


def draw_look(rngs: dict[str, np.random.Generator], switches: dict[str, bool]) -> Look:
    """Paint, light and camera; a switched-off one takes its middle value."""

    def spread(name: str, width: float, size: int = 3) -> np.ndarray:
        return rngs[name].uniform(-width, width, size) * switches.get(name, True)

    paint = {}
    for name, (hue, saturation, value) in COLOURS.items():
        jitter = spread("hue", 1.0)
        saturation = saturation * (1 + 0.06 * jitter[1])
        paint[name] = colorsys.hsv_to_rgb(
            (hue + HUE_JITTER * jitter[0]) % 1.0,
            min(saturation, 1.0),
            min(value * (1 + VALUE_JITTER * jitter[2]), 1.0),
        )
    tint = spread("table", 1.0)
    table = colorsys.hsv_to_rgb(0.09 + 0.02 * tint[0], 0.20 + 0.10 * tint[1], 0.80 + 0.10 * tint[2])
    light = np.array([-0.3, 0.35, -0.9]) + spread("light", 0.25)
    brightness = 1.0 + float(spread("light", 0.15, 1)[0])
    camera = CAMERA + spread("camera", 0.03)
    return Look(
        paint, table, light / np.linalg.norm(light), brightness, camera, TARGET + spread("camera", 0.008)
    )


def apply(model: mujoco.MjModel, data: mujoco.MjData, scene: Scene, look: Look) -> None:
    """Write a scene and its look into the arrays; the hand is at its start with settled servos."""
    mujoco.mj_resetData(model, data)
    model.geom_group[model.geom_bodyid >= _first_slot(model)] = HIDDEN
    used = {(item.kind, item.slot): item for item in scene.items}
    for kind, count in SLOTS.items():
        for slot in range(count):
            item = used.get((kind, slot))
            if kind == "object":
                _set_object(model, data, slot, item, look)
                continue
            body = model.body(f"{kind}{slot}").id
            model.body_pos[body] = PARKED if item is None else (item.x, item.y, 0.0)
            if item is None:
                continue
            for part in range(model.nbody):  # the body and what slides in it
                if part == body or model.body_parentid[part] == body:
                    first = model.body_geomadr[part]
                    model.geom_group[first : first + model.body_geomnum[part]] = 0
            colour = look.paint[item.colour]
            if kind == "receptacle":
                first, last = model.body_geomadr[body], model.body_geomadr[body] + model.body_geomnum[body]
                for geom in range(first, last):
                    here = item.shape in model.geom(geom).name.partition("/")[2]
                    wall = model.geom(geom).name[-1].isdigit()
                    model.geom_conaffinity[geom] = 3 if here and wall else 0
                    model.geom_group[geom] = 0 if here else HIDDEN
                    model.geom_rgba[geom, :3] = colour
            elif kind == "drawer":
                for part in ("front", "floor", "left", "right", "stem", "knob"):
                    shade = 0.75 if part in ("floor", "left", "right", "stem") else 1.0
                    model.geom(f"drawer{slot}/{part}").rgba[:3] = np.array(colour) * shade
                data.joint(f"drawer{slot}").qpos[0] = item.slide
            else:
                model.geom(f"{kind}{slot}/paint").rgba[:3] = colour
                if kind == "zone":
                    pale = 0.45 * np.array(colour) + 0.55 * np.array(look.table)
                    model.geom(f"zone{slot}/inner").rgba[:3] = pale
    model.geom("table").rgba[:3] = look.table
    light = model.light("key")
    light.dir[:] = look.light
    light.diffuse[:] = np.array([0.45, 0.44, 0.42]) * look.brightness
    camera = model.camera("front")
    camera.pos[:] = look.camera
    camera.quat[:] = look_at(look.camera, look.aim)
    camera.fovy[:] = FOVY
    angles = arm.inverse(scene.hand, scene.hand_yaw)
    for name, angle in zip(arm.JOINTS, angles, strict=True):
        data.joint(name).qpos[0] = angle
        data.actuator(name).ctrl[0] = angle
    for name in arm.FINGERS:
        data.joint(name).qpos[0] = arm.OPENING
        data.actuator(name).ctrl[0] = arm.OPENING
    mujoco.mj_forward(model, data)


def _first_slot(model: mujoco.MjModel) -> int:
    """Body id from which on all bodies belong to slots."""
    return model.body("button0").id


def _set_object(model: mujoco.MjModel, data: mujoco.MjData, slot: int, item: Item | None, look: Look) -> None:
    body = model.body(f"object{slot}").id
    model.body_gravcomp[body] = 1.0 if item is None else 0.0
    first = model.body_geomadr[body]
    for geom in range(first, first + model.body_geomnum[body]):
        part = model.geom(geom).name.partition("/")[2]
        here = item is not None and part.startswith(item.shape)
        solid = here and part != "cylinder"  # which collides as its octagon, cylinder0 to cylinder3
        model.geom_contype[geom], model.geom_conaffinity[geom] = (2, 3) if solid else (0, 0)
        if item is not None and part == item.shape:
            model.geom_group[geom], model.geom_rgba[geom, :3] = 0, look.paint[item.colour]
    joint = data.joint(f"object{slot}")
    if item is None:
        joint.qpos[:] = (*(PARKED + [0.3 * slot, 0, 0]), 1, 0, 0, 0)
    else:
        joint.qpos[:] = (item.x, item.y, HALF_HEIGHT, np.cos(item.yaw / 2), 0, 0, np.sin(item.yaw / 2))
