"""Closed-loop evaluation: rollouts, success with intervals, language controls, films, a report."""

from vla.evaluation.evaluate import Evaluation, evaluate
from vla.evaluation.pool import EnvironmentCrash
from vla.evaluation.rollouts import ChunkPolicy

__all__ = ["ChunkPolicy", "EnvironmentCrash", "Evaluation", "evaluate"]
