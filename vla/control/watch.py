"""Watchdogs: why the arm should hold now, by what sensors and server show. All times are monotonic seconds."""

from __future__ import annotations

import zlib

import numpy as np

from vla.control.config import LoopConfig
from vla.control.dialogue import Link
from vla.control.robot import Reading

AHEAD_S = 0.05  # a stamp may lie so far in the future: the reading came while the tick ran


class Frozen:
    """Notices a camera that delivers the same picture again and again while the arm moves.

    Its time stamps may be fresh: a driver that repeats its last buffer stamps it anew.
    """

    def __init__(self, after_s: float, motion: float) -> None:
        self.after_s, self.motion = after_s, motion
        self.seen: dict[str, tuple[float, int, float, np.ndarray]] = {}  # stamp, crc, since, joints then

    def cameras(self, reading: Reading) -> list[str]:
        """The frozen ones, by this reading."""
        frozen = []
        for name, image in reading.images.items():
            stamp = reading.stamps[name]
            before = self.seen.get(name)
            crc = before[1] if before and before[0] == stamp else zlib.crc32(np.ascontiguousarray(image))
            if before is None or crc != before[1]:
                self.seen[name] = (stamp, crc, stamp, reading.joints)
                continue
            _, _, since, joints = before
            self.seen[name] = (stamp, crc, since, joints)
            moved = float(np.abs(reading.joints - joints).max(initial=0.0)) > self.motion
            if moved and reading.stamp - since > self.after_s:
                frozen.append(name)
        return frozen


class Watch:
    """All reasons to hold that do not depend on what is being played."""

    def __init__(self, config: LoopConfig) -> None:
        self.config = config
        self.frozen = Frozen(config.frozen, config.frozen_motion)

    def sensors(self, now: float, reading: Reading | None) -> str | None:
        """Why the reading cannot be acted on; None when it can."""
        if reading is None:
            return "no reading from the robot yet"
        for what, stamp in {
            "reading": reading.stamp,
            **{f"camera {k}": v for k, v in reading.stamps.items()},
        }.items():
            if not now - stamp <= self.config.stale:  # NaN is stale
                return f"stale {what}: {1000 * (now - stamp):.0f} ms old"
            if now - stamp < -AHEAD_S:
                return (
                    f"{what} from the future: {1000 * (stamp - now):.0f} ms; stamps must be time.monotonic()"
                )
        if not (np.isfinite(reading.joints).all() and np.isfinite(reading.state).all()):
            return "a reading that is not finite"
        frozen = self.frozen.cameras(reading)
        return f"frozen camera {', '.join(frozen)}" if frozen else None

    def server(self, now: float, link: Link) -> str | None:
        """Why the policy cannot be relied on; None when it can."""
        if not link.connected:
            return f"no connection to the policy server: {link.error or 'connecting'}"
        if now - link.heard > self.config.silence:
            return f"silent policy server: {1000 * (now - link.heard):.0f} ms"
        return None
