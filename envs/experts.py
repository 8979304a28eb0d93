"""Experts: stateless functions of the privileged state and the goal.

Being stateless they recover from whatever noise did, and their label is clean in any state.
Heights follow a funnel (falling with the distance left) rather than stages, which is easier to
imitate. Units: metres, radians; actions in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from envs.arm import STEP, TURN
from envs.scene import BRICK, CUBE, HALF_HEIGHT, RADIUS, RECEPTACLE_RADIUS, ZONE_RADIUS
from envs.tasks import Goal
from envs.world import ROBOT, Scene, World

OPEN, CLOSED = 1.0, -1.0
GRASP = -0.004  # the fingertips' height against an object's middle
CARRY = 0.105  # height of a carried object's middle: clear of everything that stands
LOW = 0.016  # fingertips when pushing
FINGER = 0.011  # half the fingers' depth
SUPPORT = {"cube": CUBE, "cylinder": RADIUS, "brick": BRICK[1]}  # half the width a finger grasps
RELEASE = {"put": (0.048, 0.014), "stack": (3 * HALF_HEIGHT + 0.004, 0.009)}  # height, how well centred


def towards(commanded: np.ndarray, yaw: float, point: np.ndarray, turn: float, grip: float) -> np.ndarray:
    """The action (5,) that brings the commanded pose nearest to a point and an angle."""
    move = (point - commanded) / STEP
    move /= max(1.0, np.abs(move).max())  # keep the direction
    return np.array([*move, np.clip((turn - yaw) / TURN, -1, 1), grip], np.float32)


def retreat(commanded: np.ndarray, yaw: float) -> np.ndarray:
    """Up, fingers open."""
    return towards(commanded, yaw, np.array([commanded[0], commanded[1], max(0.15, commanded[2])]), yaw, OPEN)


def nearest_turn(angle: float, period: float, yaw: float) -> float:
    """The angle, modulo the period, that is nearest to the hand's and within its reach."""
    turn = angle + period * round((yaw - angle) / period)
    return turn - period * np.sign(turn) if abs(turn) > 1.65 else turn


def flat(vector: np.ndarray) -> float:
    """Horizontal length."""
    return float(np.hypot(vector[0], vector[1]))


def tap(world: World, goal: Goal, commanded: np.ndarray, yaw: float) -> np.ndarray:
    """Closed fingers come down on the top of a button or an object."""
    point = world.position(goal.target).copy()
    if world.scene.items[goal.target].kind == "object":
        point[2] += HALF_HEIGHT
    distance = flat(point - commanded)
    point[2] += -0.02 if distance < 0.015 else 0.012 + 1.2 * max(0.0, distance - 0.012)
    point[2] = min(point[2], 0.2)
    return towards(commanded, yaw, point, 0.0, CLOSED)


def grasp(world: World, commanded: np.ndarray, yaw: float, point: np.ndarray, turn: float) -> np.ndarray:
    """Open fingers come down around a point, then close."""
    distance, above = flat(point - commanded), commanded[2] - point[2]
    straddling = above < 0.035
    if distance < (0.018 if straddling else 0.008) and abs(turn - yaw) < (0.25 if straddling else 0.1):
        there = distance < 0.010 and world.hand[2] - point[2] < 0.008
        return towards(commanded, yaw, point, turn, CLOSED if there else OPEN)
    point = point.copy()
    point[2] = min(point[2] + 0.045 + 1.2 * max(0.0, distance - 0.01), 0.2)
    return towards(commanded, yaw, point, turn, OPEN)


def between_fingers(world: World, point: np.ndarray, index: int, half_width: float) -> bool:
    """Whether the fingers have closed on the thing at this point."""
    offset = world.hand - point
    near = flat(offset) < 0.02 and abs(offset[2]) < 0.02
    return near and world.opening < half_width + 0.005 and world.touching(ROBOT, index)


def carry(world: World, goal: Goal, commanded: np.ndarray, yaw: float) -> np.ndarray:
    """Grasp an object, lift it, and let go over (put) or on (stack) its place."""
    assert goal.place is not None
    item = world.scene.items[goal.target]
    thing, place = world.position(goal.target), world.position(goal.place)
    handle = thing + [0, 0, GRASP]
    release, centred = RELEASE[goal.skill]
    distance = flat(place - thing)
    if not between_fingers(world, handle, goal.target, SUPPORT[item.shape]):
        level = HALF_HEIGHT if goal.skill == "put" else 3 * HALF_HEIGHT
        if distance < 0.03 and abs(thing[2] - level) < 0.012:  # it is there: leave it alone
            return retreat(commanded, yaw)
        period = {"cube": np.pi / 2, "brick": np.pi}.get(item.shape)
        turn = yaw if period is None else nearest_turn(world.yaw(goal.target), period, yaw)
        return grasp(world, commanded, yaw, handle, turn)
    if distance < centred and thing[2] < release + 0.006:
        return towards(commanded, yaw, commanded, yaw, OPEN)
    height = min(release + 1.5 * max(0.0, distance - 0.006), CARRY)
    lift = height - thing[2]
    across = (place - thing) * np.clip(1.0 - lift / 0.03, 0.0, 1.0)  # first up, then across
    return towards(commanded, yaw, commanded + [across[0], across[1], lift], yaw, CLOSED)


def push(world: World, goal: Goal, commanded: np.ndarray, yaw: float) -> np.ndarray:
    """Closed fingers behind the object, then straight ahead."""
    assert goal.place is not None
    thing, place = world.position(goal.target), world.position(goal.place)
    if flat(place - thing) < 0.035:
        return retreat(commanded, yaw)
    ahead = (place - thing)[:2] / max(flat(place - thing), 1e-6)
    turn = nearest_turn(np.arctan2(ahead[1], ahead[0]), np.pi, yaw)
    behind = extent(world, goal.target, ahead) + FINGER
    offset = (thing - world.hand)[:2]
    along, aside = float(offset @ ahead), float(offset @ [-ahead[1], ahead[0]])
    aligned = abs(turn - yaw) < 0.3
    in_line = abs(aside) < 0.018 and behind - 0.022 < along < behind + 0.06
    if in_line and aligned and world.hand[2] < LOW + 0.016:
        # The contact sticks: the object goes where the hand goes, so go where it should.
        correction = 0.2 * aside * np.array([-ahead[1], ahead[0]])
        point = np.array([*(commanded[:2] + ahead * min(0.018, along - behind + 0.03) + correction), LOW])
        return towards(commanded, yaw, point, turn if abs(turn - yaw) > 0.15 else yaw, CLOSED)
    start = np.array([*(thing[:2] - ahead * (behind + 0.025)), LOW])
    distance = flat(start - commanded)
    if distance > 0.012 or not aligned:
        start[2] = min(0.2, LOW + 0.045 + 1.5 * distance)
        if commanded[2] < 0.055 and distance > 0.02:  # beside the object: up before across
            start[:2] = commanded[:2]
            start[2] = 0.08
    return towards(commanded, yaw, start, turn, CLOSED)


def extent(world: World, index: int, direction: np.ndarray) -> float:
    """Half the length (metres) of an object along a horizontal direction."""
    shape = world.scene.items[index].shape
    if shape == "cylinder":
        return RADIUS
    half = np.array(BRICK if shape == "brick" else (CUBE, CUBE))
    angle = world.yaw(index)
    along = np.abs([np.cos(angle) * direction[0] + np.sin(angle) * direction[1],
                    -np.sin(angle) * direction[0] + np.cos(angle) * direction[1]])  # fmt: skip
    return float(half @ along)


def drawer(world: World, goal: Goal, commanded: np.ndarray, yaw: float) -> np.ndarray:
    """Grasp the knob and move it along x."""
    knob = world.position(goal.target)
    handle = np.array([knob[0], knob[1], 0.036])
    if not between_fingers(world, handle, goal.target, 0.012):
        return grasp(world, commanded, yaw, handle, 0.0)
    forward = STEP if goal.skill == "open" else -STEP
    return towards(commanded, yaw, np.array([commanded[0] + forward, knob[1], handle[2]]), 0.0, CLOSED)


EXPERTS: dict[str, Callable[[World, Goal, np.ndarray, float], np.ndarray]] = {
    "touch": tap, "press": tap, "push": push, "put": carry, "stack": carry, "open": drawer, "close": drawer,
}  # fmt: skip


def feasible(scene: Scene, goal: Goal) -> bool:
    """Whether the way to this goal is free; every other skill's always is, by the scenes' gaps."""
    if goal.skill == "push":
        assert goal.place is not None
        thing, place = scene.items[goal.target], scene.items[goal.place]
        start, end = np.array([thing.x, thing.y]), np.array([place.x, place.y])
        length = float(np.hypot(*(end - start)))
        if length < 2 * HALF_HEIGHT:  # already there
            return False
        ahead = (end - start) / length
        behind = start - ahead * 0.085
        if np.abs(behind[0]) > 0.25 or np.abs(behind[1]) > 0.26:
            return False
        room = {"object": 0.088, "receptacle": 0.055 + RECEPTACLE_RADIUS, "zone": ZONE_RADIUS}
        for i, item in enumerate(scene.items):
            if i in (goal.target, goal.place):
                continue
            spot = np.array([item.x, item.y])
            along = np.clip((spot - behind) @ ahead, 0.0, length + 0.085)
            if np.hypot(*(spot - behind - along * ahead)) < room[item.kind]:
                return False
    if goal.skill in ("open", "close"):
        return (scene.items[goal.target].slide < 0.05) == (goal.skill == "open")
    return True
