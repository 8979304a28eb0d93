"""scripts/seams.py: which actions it compares, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from load_script import load_script
from toy_run import toy_job, toy_model, toy_step

from vla.config import EvaluateConfig
from vla.policy import Policy

H, EVERY, DELAY = 8, 4, 2


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("seams")


class Counting(Policy):
    """Says 0, 1, 2, … from where its prefix ends: 1 apart with a prefix, else from 0 again."""

    asked: list[int]

    def predict_chunk(
        self, images: Any, state: Any, tasks: Any, prefix: Any = None, prefix_length: Any = None
    ):
        n = 0 if prefix is None else int(prefix_length[0])
        self.asked.append(n)
        first = 0.0 if prefix is None else prefix[0, n - 1, 0] + 1 - n
        chunk = np.zeros((1, H, 2), np.float32)
        chunk[0, :, 0] = first + np.arange(H)
        return chunk


def make_policy(kind: type[Policy] = Policy, **model: Any) -> Policy:
    job = toy_job(Path(), toy_model(chunk_size=H, **model))
    job = replace(job, evaluate=EvaluateConfig(n_action_steps=EVERY))
    return kind(toy_step(job).model, job, "cpu")


def test_distances_known_by_hand(script: ModuleType) -> None:
    policy = make_policy(Counting)
    assert isinstance(policy, Counting)
    policy.asked = []
    result = script.main(policy, 3, DELAY)
    distance = result["distance"]
    assert set(policy.asked) == {0, DELAY}
    assert distance["seam with prefix"] == {
        "n": distance["seam with prefix"]["n"],
        "mean": 1,
        "median": 1,
        "p95": 1,
    }
    assert distance["beside the seam"]["mean"] == distance["inside chunks"]["mean"] == 1
    # alone it begins at 0 again: action 2, where EVERY + DELAY - 1 = 5 was the last one, and 3 more each time
    assert distance["seam without prefix"]["mean"] >= 3
    assert distance["beside the seam"]["n"] == 2 * distance["seam with prefix"]["n"] > 0
    assert "| seam with prefix | " in script.table(result)


def test_a_real_policy_is_played(script: ModuleType) -> None:
    result = script.main(make_policy(), 2, 1)
    assert result["distance"]["seam with prefix"]["n"] > 0
    assert 0 <= result["success"]["success_rate"] <= 1


@pytest.mark.parametrize("delay", [0, 3])
def test_a_delay_that_training_never_saw_is_refused(script: ModuleType, delay: int) -> None:
    with pytest.raises(ValueError, match=f"delay: got {delay}, expected 1 … 2, .*max_prefix=2"):
        script.main(make_policy(), 1, delay)
