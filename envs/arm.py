"""The robot: a 7-DoF arm with a parallel gripper, from primitives, and its inverse kinematics.

Units: metres, radians, newtons. The table's surface is z = 0; x points from the robot to the
front camera, y to the right in the front camera's picture. The hand always points down.
"""

from __future__ import annotations

import mujoco
import numpy as np

BASE = np.array([-0.52, 0.0, 0.0])
SHOULDER = 0.36  # height of joint 2
UPPER, FORE, HAND = 0.42, 0.42, 0.22  # shoulder to elbow, elbow to wrist, wrist to fingertips
LINKS = (
    0.15,
    SHOULDER - 0.15,
    UPPER / 2,
    UPPER / 2,
    FORE / 2,
    FORE / 2,
    0.06,
)  # from joint to joint, from the base
OPENING = 0.04  # of each finger, from the middle
FINGERTIP_REACH = 0.005  # the commanded point lies this far above the fingertips

WHITE, DARK, ACCENT = (0.93, 0.94, 0.96, 1), (0.20, 0.22, 0.27, 1), (0.98, 0.50, 0.16, 1)
ROBOT = dict(contype=1, conaffinity=0)  # collides with objects and fixtures, not with itself
VISUAL = dict(contype=0, conaffinity=0)
Z_TO_Y = [0.7071068, -0.7071068, 0, 0]  # turns a cylinder's axis from z to y

JOINTS = tuple(f"joint{i}" for i in range(1, 8))
FINGERS = ("finger_left", "finger_right")

LOWEST, HIGHEST = np.array([-0.26, -0.27, 0.010]), np.array([0.26, 0.27, 0.28])  # of the commanded point
YAW_LIMIT = 1.75
STEP, TURN = 0.03, 0.25  # metres and radians of a full action
LEASH = 0.015  # a step starts this near to the hand at most, so that contact does not wind up the command


def advance(
    commanded: np.ndarray, yaw: float, hand: np.ndarray, action: np.ndarray
) -> tuple[np.ndarray, float]:
    """The commanded position (3,) and yaw one step later, by an action (5,) in [-1, 1].

    hand: where the fingertips really are (3,).
    """
    held = np.clip(commanded, hand - LEASH, hand + LEASH)
    turned = float(np.clip(yaw + TURN * action[3], -YAW_LIMIT, YAW_LIMIT))
    return np.clip(held + STEP * action[:3], LOWEST, HIGHEST), turned


def opening(grip: float) -> float:
    """The gripper's action, -1 closed to 1 open, as what its servos are told: metres of each finger."""
    return OPENING * (1 + grip) / 2


def forward(joints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Joint angles (..., 7) -> the fingertips' position (..., 3) and the hand's yaw (...).

    Of any posture; for those of `inverse` it is the inverse's inverse.
    """
    sines, cosines = np.sin(joints), np.cos(joints)
    x, y, z = 0.0, 0.0, HAND  # from the joint at hand to the fingertips
    u, v, w = -sines[..., 6], cosines[..., 6], 0.0  # the direction that the fingers travel in
    for i in reversed(range(6)):
        sine, cosine = sines[..., i], cosines[..., i]
        if i % 2:  # about y
            x, z = cosine * x + sine * z, cosine * z - sine * x
            u, w = cosine * u + sine * w, cosine * w - sine * u
        else:
            x, y = cosine * x - sine * y, cosine * y + sine * x
            u, v = cosine * u - sine * v, cosine * v + sine * u
        z = z + LINKS[i]
    return np.stack([x, y, z], -1) + BASE, np.arctan2(-u, v)


def inverse(position: np.ndarray, yaw: float) -> np.ndarray:
    """Joint angles (7,) that put the fingertips at `position` with the hand pointing down.

    Closed form with joints 3 and 5 at zero: a pure function of the commanded pose, so that no
    hidden null-space state makes the controlled system non-Markov.
    """
    dx, dy = position[0] - BASE[0], position[1] - BASE[1]
    turn, reach = np.arctan2(dy, dx), np.hypot(dx, dy)
    height = position[2] + HAND - SHOULDER  # of the wrist above the shoulder
    distance = min(np.hypot(reach, height), UPPER + FORE - 1e-6)
    shoulder = np.arctan2(reach, height) - np.arccos(
        (UPPER**2 + distance**2 - FORE**2) / (2 * UPPER * distance)
    )
    elbow = np.pi - np.arccos((UPPER**2 + FORE**2 - distance**2) / (2 * UPPER * FORE))
    return np.array([turn, shoulder, 0.0, elbow, 0.0, np.pi - shoulder - elbow, turn - yaw])


def add_arm(spec: mujoco.MjSpec) -> None:
    """Add the arm, the gripper, the wrist camera and their servos to the model."""
    cylinder, box = mujoco.mjtGeom.mjGEOM_CYLINDER, mujoco.mjtGeom.mjGEOM_BOX
    capsule = mujoco.mjtGeom.mjGEOM_CAPSULE
    base = spec.worldbody.add_body(name="base", pos=BASE)
    base.add_geom(type=cylinder, size=[0.11, 0.015, 0], pos=[0, 0, 0.015], rgba=DARK, **VISUAL)
    base.add_geom(type=cylinder, size=[0.085, 0.06, 0], pos=[0, 0, 0.09], rgba=WHITE, **VISUAL)
    # z joints turn a link about itself.
    half_upper, half_fore = UPPER / 2, FORE / 2
    axes = {"z": [0, 0, 1], "y": [0, 1, 0]}
    body = base
    for i, (length, axis) in enumerate(zip(LINKS, "zyzyzyz", strict=True), start=1):
        body = body.add_body(name=f"link{i}", pos=[0, 0, length], gravcomp=1)
        body.mass, body.inertia, body.ipos = 1.0, [0.006] * 3, [0, 0, 0.05]
        body.explicitinertial = True
        body.add_joint(name=f"joint{i}", axis=axes[axis], armature=0.1, damping=1.0)
        if axis == "y":
            width = 0.062 if i < 6 else 0.05
            radius = 0.062 if i < 6 else 0.05
            body.add_geom(type=cylinder, size=[radius, width, 0], quat=Z_TO_Y, rgba=WHITE, **VISUAL)
            for side in (-1, 1):
                body.add_geom(type=cylinder, size=[radius * 0.72, 0.006, 0], pos=[0, side * (width + 0.004), 0],
                              quat=Z_TO_Y, rgba=ACCENT if i == 4 else DARK, **VISUAL)  # fmt: skip
        if i == 1:
            body.add_geom(type=cylinder, size=[0.07, 0.095, 0], pos=[0, 0, 0.10], rgba=WHITE, **VISUAL)
            body.add_geom(type=cylinder, size=[0.0705, 0.012, 0], pos=[0, 0, 0.03], rgba=ACCENT, **VISUAL)
        if i in (2, 3):
            body.add_geom(
                type=capsule, size=[0.05, half_upper / 2, 0], pos=[0, 0, half_upper / 2], rgba=WHITE, **VISUAL
            )
        if i in (4, 5):
            body.add_geom(
                type=capsule, size=[0.043, half_fore / 2, 0], pos=[0, 0, half_fore / 2], rgba=WHITE, **VISUAL
            )
        if i in (3, 5):
            body.add_geom(type=cylinder, size=[0.052 if i == 3 else 0.045, 0.012, 0], rgba=DARK, **VISUAL)
    hand = body  # link7: origin 6 cm below the wrist, z down, y along the fingers' travel
    tip = HAND - 0.06
    hand.add_geom(type=cylinder, size=[0.036, 0.022, 0], pos=[0, 0, 0.0], rgba=WHITE, **VISUAL)
    hand.add_geom(type=cylinder, size=[0.0365, 0.005, 0], pos=[0, 0, 0.014], rgba=ACCENT, **VISUAL)
    hand.add_geom(name="palm", type=box, size=[0.024, 0.056, 0.026], pos=[0, 0, 0.048], rgba=DARK, **ROBOT)
    hand.add_site(name="tip", pos=[0, 0, tip], size=[0.002, 0, 0], rgba=[0, 0, 0, 0])
    tilt = np.deg2rad(28.0)  # the wrist camera leans towards the fingertips
    hand.add_camera(name="wrist", pos=[-0.092, 0, 0.045], fovy=72,
                    xyaxes=[0, 1, 0, np.cos(tilt), 0, -np.sin(tilt)])  # fmt: skip
    hand.add_geom(type=box, size=[0.034, 0.012, 0.008], pos=[-0.058, 0, 0.026], rgba=DARK, **VISUAL)
    for name, side in zip(FINGERS, (-1.0, 1.0), strict=True):
        finger = hand.add_body(name=name, pos=[0, 0, 0.074], gravcomp=1)
        finger.mass, finger.inertia, finger.explicitinertial = 0.08, [2e-5] * 3, True
        finger.ipos = [0, 0, 0.045]
        finger.add_joint(name=name, type=mujoco.mjtJoint.mjJNT_SLIDE, axis=[0, side, 0], range=[0, OPENING],
                         limited=mujoco.mjtLimited.mjLIMITED_TRUE, armature=0.05, damping=2.0)  # fmt: skip
        length = (tip + FINGERTIP_REACH - 0.074) / 2
        finger.add_geom(name=name, type=box, size=[0.011, 0.006, length], pos=[0, side * 0.006, length],
                        rgba=(0.42, 0.45, 0.50, 1), friction=[2.0, 0.05, 0.001], condim=3, **ROBOT)  # fmt: skip
        finger.add_geom(type=box, size=[0.0115, 0.0065, 0.010], pos=[0, side * 0.006, 2 * length - 0.0098],
                        rgba=ACCENT, **VISUAL)  # fmt: skip
        servo(spec, name, kp=1500.0, kv=60.0, force=25.0)
    spec.add_equality(type=mujoco.mjtEq.mjEQ_JOINT, name1=FINGERS[0], name2=FINGERS[1],
                      objtype=mujoco.mjtObj.mjOBJ_JOINT, data=[0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0])  # fmt: skip
    for i, name in enumerate(JOINTS):
        kp = (1500, 1500, 1000, 1500, 600, 600, 300)[i]
        servo(
            spec,
            name,
            kp=kp,
            kv=2 * np.sqrt(kp * (0.6 if i < 4 else 0.15)),
            force=(60, 50, 30, 40, 15, 15, 8)[i],
        )


def servo(spec: mujoco.MjSpec, joint: str, kp: float, kv: float, force: float) -> None:
    """A position servo: kp (target - q) - kv q', limited to ±force."""
    spec.add_actuator(name=joint, target=joint, trntype=mujoco.mjtTrn.mjTRN_JOINT,
                      biastype=mujoco.mjtBias.mjBIAS_AFFINE, gainprm=[kp] + [0] * 9,
                      biasprm=[0, -kp, -kv] + [0] * 7, forcerange=[-force, force],
                      forcelimited=mujoco.mjtLimited.mjLIMITED_TRUE)  # fmt: skip
