"""`--robot.type=tabletop`: what can be said about the simulated arm. LeRobot finds its driver, arm.py, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from draccus import ParsingError  # any other error draccus hides behind one that says nothing
from lerobot.robots import RobotConfig

SEARCH = 1000  # seeds: the rarest sentences fit one scene in a few hundred


def quick_start() -> dict[str, Any]:
    """The table of configs/robots/tabletop.yaml, which the quick start's policy knows."""
    return dict(
        skills=["press"], row=0.03, references=["name"], cameras=["front"], pixels=64, commanded=False, split="L0"
    )  # fmt: skip


@RobotConfig.register_subclass("tabletop")
@dataclass(kw_only=True)
class TabletopArmConfig(RobotConfig):
    """kwargs: of the environment, see Tabletop; they replace the quick start's altogether.
    seed: of the first scene; the next ones follow. task: a sentence that all scenes are about, and the ones
    where it means nothing are left out; None: each scene's own. LeRobot tells a robot nothing about its own
    `--task` or `--dataset.single_task`: say it here too, or another instruction is scored.
    rest_s: seconds that a scene stays after its end, and that the arm rests in the next one; see TabletopArm.
    camera_fps: how often a camera takes a picture.
    Raises draccus.ParsingError for a wrong choice, before LeRobot makes a dataset or loads a policy.
    """

    kwargs: dict[str, Any] = field(default_factory=quick_start)
    seed: int = 0
    task: str | None = None
    rest_s: float = 1.0
    camera_fps: float = 30.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, good, expected in (
            ("seed", self.seed, self.seed >= 0, "0 or more"),
            ("rest_s", self.rest_s, self.rest_s > 0, "a positive number of seconds"),
            ("camera_fps", self.camera_fps, self.camera_fps > 0, "a positive number"),
        ):
            if not good:
                raise ParsingError(
                    f"robot.{name}: got {value}, expected {expected}. remedy: correct --robot.{name}."
                )
        from envs.tabletop import Tabletop

        try:
            table = Tabletop(**self.kwargs)  # milliseconds: nothing is rendered
            table.images_enabled = False
        except (TypeError, ValueError, AttributeError) as error:
            raise ParsingError(
                f"robot.kwargs: got {self.kwargs}, expected arguments of the tabletop ({error}). "
                "remedy: correct --robot.kwargs; configs/robots/tabletop.yaml shows some."
            ) from None
        if self.task is not None:
            try:
                fitting(
                    lambda seed, task: table.reset(seed=seed, options={"task": task}), self.seed, self.task
                )
            except ValueError as error:
                raise ParsingError(str(error)) from None
        table.close()


def fitting[T](reset: Callable[[int, str | None], T], seed: int, task: str | None) -> tuple[int, T]:
    """The first seed from `seed` on whose scene the task fits, and what reset(seed, task) said.

    Raises ValueError when it fits none of a thousand.
    """
    for candidate in range(seed, seed + SEARCH):
        try:
            return candidate, reset(candidate, task)
        except ValueError as error:
            why = error
    raise ValueError(
        f"robot.task: got {task!r}, expected a sentence that fits one of the scenes {seed} to "
        f"{seed + SEARCH - 1} ({why}) remedy: correct --robot.task, or leave it out and follow each scene's own."
    )
