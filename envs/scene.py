"""One MuJoCo model that can become every scene: it is compiled once, a reset only writes arrays.

Every movable thing is a slot: four buttons, four objects (each can be any shape), two
receptacles (bowl or tray), two zones, three drawers. Slots that a scene does not use are parked
below the table. Units: metres, radians; the table's surface is z = 0.
"""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np

from envs.arm import DARK, add_arm

TIMESTEP, SUBSTEPS = 0.005, 20  # 10 Hz control
SLOTS = {"button": 4, "object": 4, "receptacle": 2, "zone": 2, "drawer": 3}
SHAPES = ("cube", "cylinder", "brick")
RECEPTACLES = ("bowl", "tray")
HALF_HEIGHT = 0.022  # of every object
CUBE, BRICK, RADIUS = 0.0225, (0.040, 0.020), 0.025  # horizontal half sides; the cylinder's radius
BUTTON_RADIUS, BUTTON_TRAVEL = 0.042, 0.014
RIM = 0.032  # height of the receptacles' walls
RECEPTACLE_RADIUS = 0.061  # from the middle to the walls
ZONE_RADIUS = 0.058
DRAWER_TRAVEL = 0.11
KNOB = 0.085  # from the drawer's middle to its knob, along x
HIDDEN = 4  # a geom group that is not drawn
PARKED = np.array([0.0, 0.0, -1.0])

FIXED = dict(contype=0, conaffinity=3)  # collides with robot and objects
MOVABLE = dict(contype=2, conaffinity=3)  # collides with robot, objects and fixtures
VISUAL = dict(contype=0, conaffinity=0)
PAINT = (0.8, 0.8, 0.8, 1)  # replaced at reset
WOOD = (0.90, 0.84, 0.75, 1)

BOX, CYLINDER = mujoco.mjtGeom.mjGEOM_BOX, mujoco.mjtGeom.mjGEOM_CYLINDER


def look_at(position: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Quaternion (4,) of a camera at `position` that looks at `target`, upright."""
    back = np.asarray(position, float) - target
    back /= np.linalg.norm(back)
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    quaternion = np.zeros(4)
    mujoco.mju_mat2Quat(quaternion, np.stack([right, np.cross(back, right), back], 1).ravel())
    return quaternion


def build() -> mujoco.MjModel:
    """The compiled model."""
    spec = mujoco.MjSpec()
    spec.compiler.degree = False
    spec.compiler.inertiafromgeom = mujoco.mjtInertiaFromGeom.mjINERTIAFROMGEOM_FALSE
    option = spec.option
    option.timestep = TIMESTEP
    option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    option.cone = mujoco.mjtCone.mjCONE_ELLIPTIC
    option.impratio = 10.0
    option.iterations, option.ls_iterations = 100, 50  # fewer line-search steps throw pressed objects away
    spec.default.geom.solref = [0.01, 1.0]
    spec.default.geom.friction = [0.8, 0.01, 0.0005]
    _add_surroundings(spec)
    add_arm(spec)
    for i in range(SLOTS["button"]):
        _add_button(spec, i)
    for i in range(SLOTS["object"]):
        _add_object(spec, i)
    for i in range(SLOTS["receptacle"]):
        _add_receptacle(spec, i)
    for i in range(SLOTS["zone"]):
        body = spec.worldbody.add_body(name=f"zone{i}", pos=PARKED)
        body.add_geom(
            name=f"zone{i}/paint", type=CYLINDER, size=[ZONE_RADIUS, 0.0008, 0], rgba=PAINT, **VISUAL
        )
        body.add_geom(
            name=f"zone{i}/inner", type=CYLINDER, size=[ZONE_RADIUS - 0.012, 0.0012, 0], rgba=WOOD, **VISUAL
        )
    for i in range(SLOTS["drawer"]):
        _add_drawer(spec, i)
    return spec.compile()


def _inertia(body: Any, mass: float, inertia: float) -> None:
    body.mass, body.inertia, body.explicitinertial = mass, [inertia] * 3, True
    body.ipos = [0, 0, 0]  # left alone it becomes the body's position


def _add_surroundings(spec: mujoco.MjSpec) -> None:
    world = spec.worldbody
    spec.add_texture(name="sky", type=mujoco.mjtTexture.mjTEXTURE_SKYBOX, builtin=mujoco.mjtBuiltin.mjBUILTIN_GRADIENT,
                     rgb1=[0.80, 0.88, 0.95], rgb2=[0.42, 0.52, 0.66], width=64, height=384)  # fmt: skip
    spec.visual.headlight.ambient = [0.38, 0.38, 0.38]
    spec.visual.headlight.diffuse = [0.28, 0.28, 0.28]
    spec.visual.headlight.specular = [0.05, 0.05, 0.05]
    spec.visual.map.znear, spec.visual.map.zfar = 0.02, 30.0
    spec.visual.map.shadowclip = 2.0  # less, and the table shadows itself in dots
    spec.stat.extent, spec.stat.center = 1.0, [0, 0, 0.1]
    world.add_light(name="key", pos=[0.5, -0.6, 1.6], dir=[-0.3, 0.35, -0.9], diffuse=[0.45, 0.44, 0.42],
                    specular=[0.15, 0.15, 0.15], directional=True, castshadow=True)  # fmt: skip
    world.add_camera(name="front", pos=[0.78, 0, 0.95], fovy=33)
    view = np.array([1.10, -0.60, 0.80])  # for people: the whole arm, obliquely
    world.add_camera(name="view", pos=view, quat=look_at(view, np.array([-0.15, 0.0, 0.17])), fovy=38)
    world.add_geom(
        name="table", type=BOX, size=[0.56, 0.52, 0.03], pos=[-0.14, 0, -0.03], rgba=WOOD, **VISUAL
    )
    # Contacts with a plane are analytic: cheaper and steadier than with a box.
    world.add_geom(name="surface", type=mujoco.mjtGeom.mjGEOM_PLANE, size=[1, 1, 0.1], group=HIDDEN, **FIXED)
    world.add_geom(type=BOX, size=[0.52, 0.48, 0.02], pos=[-0.14, 0, -0.08], rgba=DARK, **VISUAL)
    for x in (-0.58, 0.26):
        for y in (-0.40, 0.40):
            world.add_geom(type=CYLINDER, size=[0.025, 0.32, 0], pos=[x, y, -0.42], rgba=DARK, **VISUAL)
    world.add_geom(
        name="floor", type=BOX, size=[4, 4, 0.01], pos=[0, 0, -0.75], rgba=(0.50, 0.56, 0.63, 1), **VISUAL
    )


def _add_button(spec: mujoco.MjSpec, i: int) -> None:
    base = spec.worldbody.add_body(name=f"button{i}", pos=PARKED)
    base.add_geom(
        type=CYLINDER, size=[BUTTON_RADIUS + 0.010, 0.007, 0], pos=[0, 0, 0.007], rgba=DARK, **FIXED
    )
    cap = base.add_body(name=f"button{i}/cap", pos=[0, 0, 0.016], gravcomp=1)
    _inertia(cap, 0.05, 5e-5)
    cap.add_joint(name=f"button{i}", type=mujoco.mjtJoint.mjJNT_SLIDE, axis=[0, 0, 1], range=[-BUTTON_TRAVEL, 0],
                  limited=mujoco.mjtLimited.mjLIMITED_TRUE, stiffness=200.0, springref=0.006, damping=3.0,
                  armature=0.05)  # fmt: skip
    cap.add_geom(name=f"button{i}/paint", type=CYLINDER, size=[BUTTON_RADIUS, 0.012, 0], pos=[0, 0, 0.012],
                 rgba=PAINT, **FIXED)  # fmt: skip


def _add_object(spec: mujoco.MjSpec, i: int) -> None:
    body = spec.worldbody.add_body(name=f"object{i}", pos=PARKED + [0.3 * i, 0, 0], gravcomp=1)
    # Collision bits are set for all shapes here, since the compiler collects them per body.
    # One inertia for all shapes: they differ too little to matter, and a reset stays cheap.
    _inertia(body, 0.08, 4e-5)
    body.add_freejoint(name=f"object{i}")
    rub = dict(friction=[1.0, 0.02, 0.0005], condim=3)
    wide, narrow = 0.0235, 0.0097  # half sides of the octagon's rectangles
    tall = [wide, narrow, HALF_HEIGHT]
    body.add_geom(
        name=f"object{i}/cube", type=BOX, size=[CUBE, CUBE, HALF_HEIGHT], rgba=PAINT, **rub, **MOVABLE
    )
    body.add_geom(
        name=f"object{i}/brick",
        type=BOX,
        size=[*BRICK, HALF_HEIGHT],
        rgba=PAINT,
        **rub,
        **MOVABLE,
    )
    # A cylinder collides as an octagon of boxes: box contacts are steadier than those of round things.
    body.add_geom(
        name=f"object{i}/cylinder", type=CYLINDER, size=[RADIUS, HALF_HEIGHT, 0], rgba=PAINT, **VISUAL
    )
    for n in range(4):
        shrink = [0, 0, 0.0008 * (n % 2)]  # two of the four carry all eight corners
        body.add_geom(name=f"object{i}/cylinder{n}", type=BOX, size=np.subtract(tall, shrink), group=HIDDEN,
                      quat=[np.cos(n * np.pi / 8), 0, 0, np.sin(n * np.pi / 8)], **rub, **MOVABLE)  # fmt: skip


def _add_receptacle(spec: mujoco.MjSpec, i: int) -> None:
    body = spec.worldbody.add_body(name=f"receptacle{i}", pos=PARKED)
    radius, thick = RECEPTACLE_RADIUS, 0.004

    def wall(kind: str, n: int, angle: float, width: float) -> None:
        body.add_geom(name=f"receptacle{i}/{kind}{n}", type=BOX, size=[thick, width, RIM / 2 - 0.001],
                      pos=[radius * np.cos(angle), radius * np.sin(angle), RIM / 2],
                      quat=[np.cos(angle / 2), 0, 0, np.sin(angle / 2)], rgba=PAINT, **FIXED)  # fmt: skip

    # The floors are paint: things inside stand on the table.
    body.add_geom(name=f"receptacle{i}/bowl", type=CYLINDER, size=[radius, 0.001, 0], pos=[0, 0, 0.001],
                  rgba=PAINT, **VISUAL)  # fmt: skip
    for n in range(12):
        wall("bowl", n, n * np.pi / 6, radius * np.tan(np.pi / 12) + 0.003)
    body.add_geom(name=f"receptacle{i}/tray", type=BOX, size=[radius, radius, 0.001], pos=[0, 0, 0.001],
                  rgba=PAINT, **VISUAL)  # fmt: skip
    for n in range(4):
        wall("tray", n, n * np.pi / 2, radius + thick)


def _add_drawer(spec: mujoco.MjSpec, i: int) -> None:
    shell = spec.worldbody.add_body(name=f"drawer{i}", pos=PARKED)
    slate = (0.44, 0.49, 0.56, 1)
    shell.add_geom(type=BOX, size=[0.062, 0.058, 0.004], pos=[-0.002, 0, 0.068], rgba=slate, **FIXED)
    shell.add_geom(type=BOX, size=[0.004, 0.058, 0.034], pos=[-0.060, 0, 0.034], rgba=slate, **FIXED)
    for side in (-1, 1):
        shell.add_geom(
            type=BOX, size=[0.062, 0.004, 0.034], pos=[-0.002, side * 0.054, 0.034], rgba=slate, **FIXED
        )
    tray = shell.add_body(name=f"drawer{i}/tray", gravcomp=1)
    _inertia(tray, 0.25, 4e-4)
    tray.add_joint(name=f"drawer{i}", type=mujoco.mjtJoint.mjJNT_SLIDE, axis=[1, 0, 0], range=[0, DRAWER_TRAVEL],
                   limited=mujoco.mjtLimited.mjLIMITED_TRUE, damping=6.0, frictionloss=0.8, armature=0.05)  # fmt: skip
    pieces: dict[str, Any] = {
        "front": ([0.004, 0.047, 0.029], [0.054, 0, 0.032]), "floor": ([0.052, 0.047, 0.002], [0, 0, 0.005]),
        "left": ([0.052, 0.002, 0.016], [0, -0.045, 0.022]), "right": ([0.052, 0.002, 0.016], [0, 0.045, 0.022]),
        "stem": ([0.014, 0.008, 0.006], [0.070, 0, 0.034]),
    }  # fmt: skip
    for name, (size, pos) in pieces.items():
        tray.add_geom(name=f"drawer{i}/{name}", type=BOX, size=size, pos=pos, rgba=PAINT, **VISUAL)
    tray.geoms[0].contype, tray.geoms[0].conaffinity = 0, 3  # the front can be pushed
    tray.add_geom(name=f"drawer{i}/knob", type=BOX, size=[0.012, 0.012, 0.024], pos=[KNOB, 0, 0.040], rgba=PAINT,
                  friction=[1.5, 0.02, 0.0005], **FIXED)  # fmt: skip
