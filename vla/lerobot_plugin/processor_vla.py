"""The processors LeRobot runs around the policy: they rename, batch and move, and change no number."""

from __future__ import annotations

from typing import Any

from lerobot.processor import PolicyProcessorPipeline
from lerobot.processor.factory import make_default_pre_post_processors
from torch import Tensor

from vla.lerobot_plugin.configuration_vla import VLAConfig


def make_vla_pre_post_processors(
    config: VLAConfig, dataset_stats: dict[str, dict[str, Tensor]] | None = None
) -> tuple[PolicyProcessorPipeline[Any, Any], PolicyProcessorPipeline[Any, Any]]:
    """LeRobot's default pair, whose normalisation is IDENTITY.

    Those two steps stay, as lerobot-train and lerobot-eval address them by name; they carry no
    statistics, which the network has.
    """
    return make_default_pre_post_processors(config)
