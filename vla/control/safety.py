"""The last word before the motors: any target whatsoever in, a legal command out.

Legal: finite, inside the limits of position and workspace, and with differences from one tick to the next
inside the limits of velocity, acceleration and jerk. The argument is by induction. Together with every
command the limiter holds a way to stop after it: a jerk-limited trajectory (Ruckig: Berscheid and Kröger,
"Jerk-limited Real-time Trajectory Generation with Arbitrary Target States", 2021) to rest, whose points, at
every tick, have been checked against all limits, their differences included: the planner is not trusted. A new
command is emitted only with a checked way to stop of its own; otherwise the arm takes the next point of
the last one. So whatever comes, there is always something legal left to do.

    J joints   N ticks   Units: radians or metres, seconds
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from ruckig import ControlInterface, InputParameter, Result, Ruckig, RuckigError, Synchronization, Trajectory

from vla.checks import require
from vla.control.config import LimitsConfig

SLACK = 1e-6  # relative to a limit: rounding
# Plans are made inside slightly narrower limits than those that are checked, so that rounding never refuses one.
MARGIN = 1e-4
MOST_TICKS = 200  # of a way to stop, all of which are checked in every tick
FRACTIONS = np.linspace(1.0, 0.0, 33)

Position = Callable[[np.ndarray], np.ndarray | None]


def nowhere(joints: np.ndarray) -> None:
    """For robots whose hand's position is not known: no workspace to check."""


class Limits:
    """The limits as arrays, and the question whether poses are inside them."""

    def __init__(self, config: LimitsConfig, position: Position = nowhere) -> None:
        """position: joints (N, J) -> the hand (N, 3) in metres."""
        self.lower, self.upper, self.velocity, self.acceleration, self.jerk = (
            np.array(getattr(config, name), np.float64)
            for name in ("lower", "upper", "velocity", "acceleration", "jerk")
        )
        self.box = np.array([config.workspace_lower, config.workspace_upper], np.float64)  # (2, 3) or (2, 0)
        self.position = position

    @property
    def stop_s(self) -> float:
        """How long a stop from the highest velocity takes at most, and some."""
        return float(2 * np.max(self.velocity / self.acceleration + self.acceleration / self.jerk))

    def reach(self, poses: np.ndarray, dt: float) -> bool:
        """Whether (N, J) poses, one a tick, keep to the limits of velocity, acceleration and jerk."""
        size = np.abs(poses).max(initial=1.0)
        for order, bound in enumerate((self.velocity, self.acceleration, self.jerk), start=1):
            rounding = 2**order * np.finfo(np.float64).eps * size / dt**order
            rates = np.diff(poses, order, axis=0) / dt**order
            if not (np.abs(rates) <= bound * (1 + SLACK) + rounding).all():  # False for NaN
                return False
        return True

    def hold(self, poses: np.ndarray) -> np.ndarray:
        """(N, J) -> (N,) bool: whether each pose is finite, within the joints' limits and the workspace."""
        slack = SLACK * (self.upper - self.lower)
        inside = (poses >= self.lower - slack) & (poses <= self.upper + slack)  # False for NaN
        good: np.ndarray = np.all(inside, axis=1)
        if self.box.size and good.any():
            try:
                hand = self.position(np.where(good[:, None], poses, self.lower))
            except Exception:  # the robot's own code: what cannot be judged is not allowed
                return np.zeros(len(poses), bool)
            if hand is not None:
                good = good & np.all((hand >= self.box[0] - SLACK) & (hand <= self.box[1] + SLACK), axis=1)
        return good


@dataclass
class Motion:
    """Position, velocity and acceleration (J,) of what is commanded."""

    p: np.ndarray
    v: np.ndarray
    a: np.ndarray


class Limiter:
    """Follows a moving target by legal commands, one a tick.

    clamped: how often a target was cut to the limits; braked: how often no way to follow it was safe.
    """

    def __init__(self, limits: Limits, dt: float) -> None:
        """Raises ConfigError when a stop would take more ticks than can be checked in one."""
        require(
            limits.stop_s <= MOST_TICKS * dt, "limits.acceleration", limits.acceleration.tolist(),
            f"accelerations and jerks that stop the arm within {MOST_TICKS} ticks ({MOST_TICKS * dt:g} s; now "
            f"{limits.stop_s:.2g} s)", "raise them, or lower limits.velocity or loop.rate",
        )  # fmt: skip
        self.limits, self.dt = limits, dt
        self.past: list[np.ndarray] = []  # the three commands before `motion`
        n = len(limits.lower)
        self.planner, self.follow, self.stop = Ruckig(n, dt), InputParameter(n), InputParameter(n)
        for plan in (self.follow, self.stop):
            plan.max_velocity = list(limits.velocity * (1 - MARGIN))
            plan.max_acceleration = list(limits.acceleration * (1 - MARGIN))
            plan.max_jerk = list(limits.jerk * (1 - MARGIN))
            plan.synchronization = Synchronization.No
            plan.target_position = plan.target_velocity = plan.target_acceleration = [0.0] * n
        self.stop.control_interface = ControlInterface.Velocity
        self.clamped = self.braked = 0
        self.motion: Motion | None = None
        self.way_out: list[
            Motion
        ] = []  # the checked points after `motion`, the next one last; empty: at rest

    def reset(self, joints: np.ndarray) -> None:
        """Begin at rest in a measured pose (J,). Raises ValueError when that is outside the limits."""
        joints = np.array(joints, np.float64)
        if not self.limits.hold(joints[None])[0]:
            raise ValueError(
                f"The robot stands where it must not be. got: joints {np.round(joints, 4).tolist()}. expected: within "
                f"{self.limits.lower.tolist()} … {self.limits.upper.tolist()} and the workspace "
                f"{self.limits.box.tolist()}. remedy: move it inside by hand, or correct the limits."
            )
        self.motion, self.way_out, self.past = Motion(joints, 0 * joints, 0 * joints), [], [joints] * 3

    @property
    def command(self) -> np.ndarray:
        """What was last commanded (J,)."""
        assert self.motion is not None, "reset() comes first"
        return self.motion.p

    @property
    def at_rest(self) -> bool:
        return not self.way_out

    def step(self, target: np.ndarray | None, velocity: np.ndarray | None = None) -> np.ndarray:
        """The command of the next tick (J,): towards `target` (J,), which moves at `velocity` (J,).

        None, or what is not finite, means: stop. Never raises.
        """
        assert self.motion is not None, "reset() comes first"
        wanted = self._legal(target, velocity)
        if wanted is not None:
            following = self._first(*wanted)
            way_out = following and self._way_out(following)
            if following is not None and way_out is not None:
                self._move(following)
                self.way_out = way_out
                return self.command
            self.braked += 1
        self._move(self.way_out.pop() if self.way_out else self.motion)
        return self.command

    def _move(self, motion: Motion) -> None:
        self.past = [*self.past[1:], self.command]
        self.motion = motion

    def _legal(
        self, target: np.ndarray | None, velocity: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """The target cut to the limits; None where there is no telling what is meant."""
        if target is None or not np.isfinite(target).all():
            return None
        limits, top = self.limits, self.limits.velocity * (1 - 2 * MARGIN)
        velocity = np.zeros_like(top) if velocity is None or not np.isfinite(velocity).all() else velocity
        inside, slow = np.clip(target, limits.lower, limits.upper), np.clip(velocity, -top, top)
        if limits.box.size and not limits.hold(inside[None])[0]:
            poses = self.command + FRACTIONS[:, None] * (inside - self.command)
            allowed = limits.hold(poses)
            inside = (
                poses[np.argmax(allowed)] if allowed.any() else self.command
            )  # the farthest that is allowed
        if (np.abs(inside - target) > SLACK).any() or (np.abs(slow - velocity) > SLACK).any():
            self.clamped += 1
            slow = np.where(np.abs(inside - target) > SLACK, 0.0, slow)  # to rest, at a limit
        return inside, slow

    def _first(self, position: np.ndarray, velocity: np.ndarray) -> Motion | None:
        """One tick of the fastest way to meet a target that will be at `position` then, moving at `velocity`.

        Planned in the frame that moves with the target, where the way ends at rest: aiming at a point that
        moves on would swing back to gain speed first.
        """
        assert self.motion is not None
        seen, top = position - velocity * self.dt, self.limits.velocity * (1 - MARGIN)
        self.follow.max_velocity, self.follow.min_velocity = list(top - velocity), list(-top - velocity)
        trajectory = self._plan(
            self.follow, Motion(self.motion.p - seen, self.motion.v - velocity, self.motion.a)
        )
        if trajectory is None:
            return None
        relative = self._at(trajectory, self.dt)
        return Motion(relative.p + position, relative.v + velocity, relative.a)

    def _way_out(self, motion: Motion) -> list[Motion] | None:
        """The ticks that come to rest after `motion`, in reverse; None when one of them, or it, is not legal."""
        trajectory = self._plan(self.stop, motion)
        if trajectory is None or trajectory.duration > MOST_TICKS * self.dt:
            return None
        n = math.ceil(trajectory.duration / self.dt - 1e-9)
        ticks = [self._at(trajectory, (i + 1) * self.dt) for i in range(n)]
        rest = ticks[-1].p if ticks else motion.p  # and stays there
        poses = np.array(
            [*self.past[1:], self.command, motion.p, *(tick.p for tick in ticks), rest, rest, rest]
        )
        legal = self.limits.reach(poses, self.dt) and self.limits.hold(poses[3:]).all()
        return ticks[::-1] if legal else None

    def _plan(self, plan: InputParameter, start: Motion) -> Trajectory | None:
        plan.current_position, plan.current_velocity = start.p.tolist(), start.v.tolist()
        plan.current_acceleration = start.a.tolist()
        trajectory = Trajectory(len(start.p))
        try:
            result = self.planner.calculate(plan, trajectory)
        except (RuckigError, ValueError):  # the latter for results its binding does not know
            return None
        return trajectory if result in (Result.Working, Result.Finished) else None

    @staticmethod
    def _at(trajectory: Trajectory, time: float) -> Motion:
        return Motion(*map(np.array, trajectory.at_time(time)))


class Audit:
    """A second judge of what is to be emitted, by the commands alone; what it finds illegal must not be sent.

    A pause of the loop is no motion: judge tick by tick. illegal: how many it found.
    """

    def __init__(self, limits: Limits, dt: float) -> None:
        self.limits, self.dt = limits, dt
        self.illegal = 0
        self.last: list[np.ndarray] = []

    def reset(self, joints: np.ndarray) -> None:
        """A new beginning, at rest in this pose (J,)."""
        self.last = [joints] * 4

    def check(self, command: np.ndarray) -> bool:
        """Whether a command (J,) is legal after the ones before it."""
        last = [*self.last[-3:], command]
        rates = [np.diff(np.array(last), n, axis=0)[-1] / self.dt**n for n in (1, 2, 3)]
        bounds = (self.limits.velocity, self.limits.acceleration, self.limits.jerk)
        legal = bool(self.limits.hold(command[None])[0]) and all(
            (np.abs(rate) <= bound * (1 + 1e-3) + 1e-9).all()
            for rate, bound in zip(rates, bounds, strict=True)
        )
        if legal:
            self.last = last
        self.illegal += not legal
        return legal
