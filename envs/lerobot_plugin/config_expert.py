"""`--teleop.type=tabletop_expert`: the environment's scripted expert in the place of a person."""

from __future__ import annotations

from dataclasses import dataclass

from lerobot.teleoperators import TeleoperatorConfig


@TeleoperatorConfig.register_subclass("tabletop_expert")
@dataclass(kw_only=True)
class TabletopExpertConfig(TeleoperatorConfig):
    """arm: the id of the tabletop arm to drive (its --robot.id); None: the only one that is connected."""

    arm: str | None = None
