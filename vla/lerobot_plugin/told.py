"""The instruction for policies that read none: a sentence embedding, as `observation.environment_state`.

LeRobot's ACT and Diffusion take that key besides images and state (FeatureType.ENV), whatever is in it. `tell`
writes a copy of a dataset with the embedding of each frame's task there; adapter.py computes the same one
from what the policy is told in closed loop. lerobot and transformers are imported when first needed.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vla.checks import require
from vla.observation import ENVIRONMENT_STATE

WIDTH = 384  # of all-MiniLM-L6-v2


class Sentences:
    """Instructions as numbers: MiniLM's last hidden states, averaged over all tokens of a sentence.

    That is what sentence-transformers makes of it before it is scaled to length 1. Each sentence is encoded on
    its own and once, so that its numbers do not depend on which others are asked for at the same time.
    """

    def __init__(self) -> None:
        from vla.model.text import load_encoder, minilm

        self.tokenizer, encoder = load_encoder(minilm())
        self.encoder = encoder.eval()
        self.known: dict[str, np.ndarray] = {}

    def __call__(self, sentences: Sequence[str]) -> np.ndarray:
        """N sentences -> (N, 384) float32."""
        for sentence in dict.fromkeys(sentences):
            if sentence not in self.known:
                self.known[sentence] = self._encode(sentence)
        return np.stack([self.known[sentence] for sentence in sentences])

    def _encode(self, sentence: str) -> np.ndarray:
        import torch

        with torch.inference_mode():
            hidden = self.encoder(**self.tokenizer([sentence], return_tensors="pt")).last_hidden_state
        return hidden[0].mean(dim=0).numpy()


def tell(source: Path, target: Path) -> None:
    """Copy the dataset at `source` to `target` with every frame's task as a sentence embedding.

    Through LeRobot's own API: videos are copied, not encoded again. Its statistics get the new column, which
    that API leaves out, so that `policy.normalization_mapping` can name ENV. Raises ConfigError when there is
    no dataset, or already something at `target`.
    """
    require((source / "meta" / "info.json").is_file(), "source", str(source), "a LeRobotDataset's folder")
    require(not target.exists(), "target", str(target), "a folder that does not exist yet", "remove it")
    from lerobot.datasets import LeRobotDataset
    from lerobot.datasets.compute_stats import get_feature_stats
    from lerobot.datasets.dataset_tools import add_features
    from lerobot.datasets.io_utils import write_stats

    dataset = LeRobotDataset("local/source", root=source)
    require(
        ENVIRONMENT_STATE not in dataset.meta.features, "source", f"a dataset with {ENVIRONMENT_STATE}",
        "one without, for the sentence's place", "record it with record.environment_state=false",
    )  # fmt: skip
    rows = np.asarray(dataset.hf_dataset.data.column("task_index"))
    tasks: Any = dataset.meta.tasks
    by_index = tasks["task_index"].sort_values()  # the instruction is the table's index
    column = Sentences()(list(by_index.index))[np.searchsorted(by_index.to_numpy(), rows)]  # (frames, 384)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    feature = {"dtype": "float32", "shape": (WIDTH,), "names": None}
    told = add_features(dataset, {ENVIRONMENT_STATE: (column, feature)}, partial, repo_id="local/told")
    statistics = get_feature_stats(column, axis=0, keepdims=False)
    write_stats({**(told.meta.stats or {}), ENVIRONMENT_STATE: statistics}, partial)
    partial.rename(target)
