"""The configuration of control: a robot with its limits, and how the loop runs. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from vla.checks import one_of, require

SCHEDULES = ("receding", "naive", "aligned", "ensemble", "prefix")


@dataclass(frozen=True)
class LimitsConfig:
    """Of every joint, in the robot's order and units (radians or metres, and seconds)."""

    lower: tuple[float, ...] = ()
    upper: tuple[float, ...] = ()
    velocity: tuple[float, ...] = ()
    acceleration: tuple[float, ...] = ()
    jerk: tuple[float, ...] = ()
    workspace_lower: tuple[float, ...] = ()  # x, y, z of the hand in metres; empty: no limit
    workspace_upper: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.lower)
        for name in ("lower", "upper", "velocity", "acceleration", "jerk"):
            values = getattr(self, name)
            expected = f"as many numbers as joints ({n})"
            require(len(values) == n > 0, f"limits.{name}", list(values), expected)
            require(all(map(math.isfinite, values)), f"limits.{name}", list(values), "finite numbers")
        for name in ("velocity", "acceleration", "jerk"):
            values = getattr(self, name)
            require(min(values) > 0, f"limits.{name}", list(values), "positive numbers")
        ordered = all(low < high for low, high in zip(self.lower, self.upper, strict=True))
        require(ordered, "limits.lower", list(self.lower), f"numbers below limits.upper={list(self.upper)}")
        box = (self.workspace_lower, self.workspace_upper)
        require(
            {*map(len, box)} in ({0}, {3}), "limits.workspace_lower", [list(side) for side in box],
            "x, y and z of both corners, or neither",
        )  # fmt: skip
        inside = all(low < high for low, high in zip(*box, strict=True))
        require(
            inside, "limits.workspace_lower", list(box[0]), f"numbers below workspace_upper={list(box[1])}"
        )


@dataclass(frozen=True)
class RobotConfig:
    """configs/robots/<name>.yaml: a class of vla.control.robot.Robot by `module:Class`, and its limits."""

    id: str = ""
    kwargs: dict[str, Any] = field(default_factory=dict)
    limits: LimitsConfig = field(default_factory=lambda: LimitsConfig((-1,), (1,), (1,), (1,), (1,)))

    def __post_init__(self) -> None:
        require(self.id.count(":") == 1, "id", self.id, "module:Class of a robot")


@dataclass(frozen=True)
class LoopConfig:
    """How the controller runs, and when it holds. Times in seconds."""

    rate: int = 100  # commands a second
    schedule: str = "prefix"  # receding | naive | aligned | ensemble | prefix: see player.py
    n_action_steps: int = 0  # of each chunk before the next is asked for; 0: half of the chunk
    ensemble: float = 0.1  # of schedule ensemble: weights exp(-ensemble * i), i = 0 the oldest
    stale: float = 0.2  # age of the newest reading or picture at which the arm holds
    frozen: float = 0.2  # the same picture for so long, while the arm moves: a camera that repeats itself
    frozen_motion: float = 0.02  # how far a joint must have moved for that, radians or metres
    silence: float = 0.2  # of the policy server, busy or not, and of the console
    starved: float = 0.2  # without an action to play
    clamped: float = 1.0  # targets beyond the limits, or that cannot be approached, for so long are a fault
    refused: int = 3  # chunks in a row that could not be used are a fault
    following: float = 0.5  # distance of command and measured joint that is a fault, radians or metres
    intervention: float = 0.3  # an operator's action counts for so long
    deadman: str = "hold"  # when the console is lost: hold | continue
    priority: int = 50  # of the loop's thread under SCHED_FIFO, where permitted; 0: ordinary

    def __post_init__(self) -> None:
        one_of("loop.schedule", self.schedule, SCHEDULES)
        one_of("loop.deadman", self.deadman, ("continue", "hold"))
        require(0 < self.rate <= 1000, "loop.rate", self.rate, "1 to 1000 commands a second")
        require(0 <= self.priority < 100, "loop.priority", self.priority, "0 to 99")
        require(self.refused > 0, "loop.refused", self.refused, "1 or more")
        for name in ("n_action_steps", "ensemble"):
            require(getattr(self, name) >= 0, f"loop.{name}", getattr(self, name), "0 or more")
        for name in (
            "stale",
            "frozen",
            "frozen_motion",
            "silence",
            "starved",
            "clamped",
            "following",
            "intervention",
        ):
            require(
                0 < getattr(self, name) < math.inf, f"loop.{name}", getattr(self, name), "a positive number"
            )


@dataclass(frozen=True)
class ControlConfig:
    """One robot under control: configs/control/*.yaml."""

    output: str = "outputs/control"
    robot: str = ""  # a file of configs/robots
    robot_kwargs: dict[str, Any] = field(default_factory=dict)  # over those in that file
    checkpoint: str = ""  # a run, checkpoint or export, for a policy server of one's own
    server: str = ""  # of a policy server that runs already: ws://…, wss://… or unix://…
    device: str = "auto"  # of one's own policy server
    threads: int = 0  # of one's own policy server; 0: its own choice
    launch: str = "auto"  # of its network on a GPU: compiled first (auto) | graph | eager
    ca: str = ""  # certificate authority of a wss:// server, beyond the system's
    token_file: str = ""  # of the server; or the variable VLA_TOKEN
    jpeg_quality: int = 0  # 1 … 95 for slow links; 0: pictures as they are
    tasks: tuple[str, ...] = ()  # instructions to follow one after another, when no one types them
    task_seconds: float = 10.0  # for each of them
    seconds: float = 0.0  # ends by itself; 0: when told to
    trials: int = 0  # scripted episodes of a simulated robot, scored
    seed: int = 1_000_000  # of the first of them
    record: bool = False  # what the robot saw and did, into <output>/session
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        require(bool(self.robot), "robot", self.robot, "a file of configs/robots")
        require(
            bool(self.checkpoint) != bool(self.server), "checkpoint", self.checkpoint,
            "a checkpoint for a policy of one's own, or the url of a server, and not both",
            "set either checkpoint or server",
        )  # fmt: skip
        one_of("launch", self.launch, ("auto", "eager", "graph", "compiled"))
        for name in ("task_seconds", "seconds", "trials", "seed"):
            require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 or more")
