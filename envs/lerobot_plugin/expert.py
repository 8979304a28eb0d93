"""The environment's scripted expert as a LeRobot teleoperator of the simulated arm of the same process."""

from __future__ import annotations

from typing import Any

from lerobot.teleoperators import Teleoperator
from lerobot.utils.decorators import check_if_already_connected, check_if_not_connected

from envs.lerobot_plugin import arm
from envs.lerobot_plugin.config_expert import TabletopExpertConfig


class TabletopExpert(arm.Uncalibrated, Teleoperator):
    """Follows each scene's instruction. It looks at the simulation itself: privileged."""

    config_class = TabletopExpertConfig
    name = "tabletop_expert"

    def __init__(self, config: TabletopExpertConfig) -> None:
        super().__init__(config)
        self.config = config

    @property
    def action_features(self) -> dict[str, type]:
        return dict.fromkeys(arm.ACTION_NAMES, float)

    @property
    def feedback_features(self) -> dict[str, type]:
        return {}

    @check_if_already_connected
    def connect(self, calibrate: bool = True) -> None:
        """The arm is looked for when it is driven: LeRobot connects teleoperators before robots."""
        self._connected = True

    @check_if_not_connected
    def get_action(self) -> dict[str, float]:
        """The arm's action. Raises ValueError when there is not exactly one such arm in this process."""
        wanted = self.config.arm
        arms = [a for a in arm.CONNECTED if wanted is None or a.id == wanted]
        if len(arms) != 1:
            raise ValueError(
                f"teleop.arm: got {wanted!r} with {[a.id for a in arm.CONNECTED]} connected in this process, expected "
                "the id of one. remedy: drive --robot.type=tabletop, with --teleop.arm=<its --robot.id> among several."
            )
        return arms[0].expert_action()

    def send_feedback(self, feedback: dict[str, Any]) -> None:
        """It feels nothing."""

    @check_if_not_connected
    def disconnect(self) -> None:
        self._connected = False
