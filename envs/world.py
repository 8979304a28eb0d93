"""What is in a scene, and where physics has put it: the privileged view of predicates and experts."""

from __future__ import annotations

from dataclasses import dataclass, field

import mujoco
import numpy as np

from envs.arm import FINGERS
from envs.scene import SLOTS

ROBOT, TABLE = -2, -1  # who touches whom: items are their indices


@dataclass(frozen=True)
class Item:
    """One thing: which slot of the model it is, what one would call it, where it was placed."""

    kind: str  # button | object | receptacle | zone | drawer
    slot: int
    shape: str  # cube, cylinder, brick | bowl, tray | button | zone | drawer
    colour: str
    x: float
    y: float
    yaw: float = 0.0
    slide: float = 0.0  # drawers: how far open at the start


@dataclass(frozen=True)
class Scene:
    """Everything that a reset decides except colours of paint, light and camera."""

    kind: str  # buttons | objects | drawers
    items: tuple[Item, ...]
    hand: np.ndarray = field(default_factory=lambda: np.array([0.0, 0.0, 0.2]))
    hand_yaw: float = 0.0

    def of(self, kind: str) -> list[int]:
        """Indices of the items of one kind."""
        return [i for i, item in enumerate(self.items) if item.kind == kind]


class World:
    """Poses, joint positions and contacts of a scene's items, read from the simulation."""

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData) -> None:
        self.model, self.data = model, data
        self.scene = Scene("", ())
        self.tip = model.site("tip").id
        self.finger = int(model.joint(FINGERS[0]).qposadr[0])
        self._body = {(k, i): model.body(f"{k}{i}").id for k, n in SLOTS.items() for i in range(n)}
        self._moving = dict(self._body)
        self._slide: dict[tuple[str, int], int] = {}
        for kind, part in (("button", "cap"), ("drawer", "tray")):
            for i in range(SLOTS[kind]):
                self._moving[kind, i] = model.body(f"{kind}{i}/{part}").id
                self._slide[kind, i] = int(model.joint(f"{kind}{i}").qposadr[0])
        self._free = {i: model.joint(f"object{i}") for i in range(SLOTS["object"])}
        self._knob = [model.geom(f"drawer{i}/knob").id for i in range(SLOTS["drawer"])]
        self._owner = np.full(model.ngeom, 1 << 20)  # geom -> ROBOT, TABLE, item; big: nobody
        self._pairs: set[tuple[int, int]] | None = None
        palm = model.body("link7").id
        for g in range(model.ngeom):
            body = model.geom_bodyid[g]
            if body == palm or model.body_parentid[body] == palm:
                self._owner[g] = ROBOT
        self._owner[model.geom("surface").id] = TABLE

    def place(self, scene: Scene) -> None:
        """Adopt a new scene (its arrays are written by randomize.py)."""
        self.scene = scene
        self._owner[self._owner >= 0] = 1 << 20
        for index, item in enumerate(scene.items):
            owned = {self._body[item.kind, item.slot], self._moving[item.kind, item.slot]}
            self._owner[np.isin(self.model.geom_bodyid, list(owned))] = index
        self.moved()

    def items_of(self, geoms: np.ndarray) -> np.ndarray:
        """Ids of geoms -> indices into the scene's items, in the same shape; -1 for everything else."""
        owner = np.append(self._owner, 1 << 20)[geoms]  # id -1 takes the last
        return np.where((owner >= 0) & (owner < len(self.scene.items)), owner, -1)

    def moved(self) -> None:
        """The simulation has advanced: forget the contacts."""
        self._pairs = None

    @property
    def hand(self) -> np.ndarray:
        """Position (3,) between the fingertips."""
        return self.data.site_xpos[self.tip]

    @property
    def hand_yaw(self) -> float:
        """Angle of the fingers' axis against y, about the vertical."""
        matrix = self.data.site_xmat[self.tip]
        return float(np.arctan2(-matrix[1], matrix[4]))

    @property
    def opening(self) -> float:
        """Each finger's distance from the middle."""
        return float(self.data.qpos[self.finger])

    def position(self, index: int) -> np.ndarray:
        """An item's middle (3,); of a button its cap's top, of a drawer its knob."""
        item = self.scene.items[index]
        if item.kind == "drawer":
            return self.data.geom_xpos[self._knob[item.slot]]
        position = self.data.xpos[self._moving[item.kind, item.slot]]
        return position + [0, 0, 0.024] if item.kind == "button" else position

    def yaw(self, index: int) -> float:
        item = self.scene.items[index]
        matrix = self.data.xmat[self._moving[item.kind, item.slot]]
        return float(np.arctan2(matrix[3], matrix[0]))

    def slide(self, index: int) -> float:
        """Joint position of a button's cap (negative: down) or a drawer (positive: open)."""
        item = self.scene.items[index]
        return float(self.data.qpos[self._slide[item.kind, item.slot]])

    def speed(self, index: int) -> float:
        """Of an object, metres a second."""
        start = int(self._free[self.scene.items[index].slot].dofadr[0])
        return float(np.linalg.norm(self.data.qvel[start : start + 3]))

    def touching(self, a: int, b: int) -> bool:
        """Whether two of ROBOT, TABLE and the items are in contact."""
        if self._pairs is None:
            owners = np.sort(self._owner[self.data.contact.geom[: self.data.ncon]], axis=1)
            self._pairs = {(int(low), int(high)) for low, high in owners}
        return (min(a, b), max(a, b)) in self._pairs
