"""Exact delays in virtual time, and the scripts that measure with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from load_script import load_script
from lockstep_arm import LockstepArm, SidePolicy

from vla.control.config import SCHEDULES, LimitsConfig, LoopConfig
from vla.control.lockstep import DelayedLink, play
from vla.control.safety import Limits

LIMITS = LimitsConfig((-1.0, -1.0), (1.0, 1.0), (2.0, 2.0), (30.0, 30.0), (3000.0, 3000.0))
ROBOT = """
id: lockstep_arm:LockstepArm
limits: {lower: [-1, -1], upper: [1, 1], velocity: [2, 2], acceleration: [30, 30], jerk: [3000, 3000]}
"""


def once(delay: float, policy: Any = None, seed: int = 3, misled: float = 0.0, **loop: Any) -> Any:
    robot = LockstepArm()
    robot.connect()
    return play(robot, policy or SidePolicy(), Limits(LIMITS), LoopConfig(**loop), seed, delay, misled)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_gets_there(schedule: str) -> None:
    outcome = once(0.0, schedule=schedule)
    assert outcome.success
    assert outcome.illegal == 0
    assert 0.9 < outcome.seconds < 1.6  # 50 cm at 5 cm a step
    assert 9 <= outcome.steps <= 12


def test_an_answer_comes_exactly_so_late() -> None:
    policy = SidePolicy()
    link = DelayedLink(policy, delay=0.25)
    question = {"seq": 7, "task": "go left", "prefix": np.zeros((0, 0)), "state": np.zeros((1, 2))}
    link.now = 1.0
    link.ask(**question, images={"front": np.zeros((1, 32, 32, 3), np.uint8)})
    link.now = 1.24
    assert link.poll() == []
    link.now = 1.25
    (answer,) = link.poll()
    assert answer.seq == 7
    assert link.poll() == []


def test_delay_costs_time_and_none_is_invented() -> None:
    quick, slow = once(0.0, schedule="prefix"), once(0.3, schedule="prefix")
    assert slow.success
    assert 0.25 < slow.seconds - quick.seconds < 0.6


def test_a_committed_prefix_is_passed_on_under_delay() -> None:
    policy = SidePolicy()
    once(0.3, policy, schedule="prefix")
    assert max(length for _, length in policy.asked) in (3, 4)
    policy = SidePolicy()
    once(0.3, policy, schedule="aligned")
    assert max(length for _, length in policy.asked) == 0


def test_misled_at_first() -> None:
    policy = SidePolicy()
    outcome = once(0.0, policy, misled=0.3, schedule="prefix")
    assert outcome.success
    assert outcome.seconds > once(0.0).seconds + 0.4  # there and back
    told = [task for task, _ in policy.asked]
    assert told[0] == "go right"
    assert told[-1] == "go left"
    assert policy.asked[told.index("go left")][1] == 0  # no prefix from under the other instruction


def test_a_scene_ends_when_its_time_is_over() -> None:
    class Lazy(SidePolicy):
        def predict_chunk(self, *arguments: Any, **more: Any) -> np.ndarray:
            return 0 * super().predict_chunk(*arguments, **more)

    outcome = once(0.0, Lazy())
    assert not outcome.success
    assert outcome.seconds == pytest.approx(6.0, abs=0.03)


@pytest.fixture
def robot_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "arm.yaml"
    path.write_text(ROBOT)
    monkeypatch.setattr("vla.export.load.load_policy", lambda *_: SidePolicy())
    return path


def test_delays_plays_all_cells_in_the_same_scenes(robot_file: Path) -> None:
    script = load_script("delays")
    cells = [("naive", 0), ("prefix", 200)]
    found = script.some("nowhere", str(robot_file), cells, range(4), 0, 0.0)
    assert set(found) == set(cells)
    rows = [script.row(*cell, outcomes) for cell, outcomes in found.items()]
    assert [row["success"]["n_episodes"] for row in rows] == [4, 4]
    assert all(row["success"]["success_rate"] == 1 and row["illegal"] == 0 for row in rows)
    assert rows[1]["seconds_median"] > rows[0]["seconds_median"]
    every = [
        script.row(schedule, delay, found["prefix", 200])
        for schedule in SCHEDULES
        for delay in script.DELAYS_MS
    ]
    text = script.table({"rows": every})
    assert text.count("\n") == 1 + len(SCHEDULES)
    assert "100.0% [51.0%, 100.0%]" in text
    json.dumps(every)


def test_gpu_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = load_script("gpu")
    quick = script.Stage(("-c", "print('measured')"), 1)
    assert script.run("good", quick, 30, tmp_path, "none")
    assert json.loads((tmp_path / "good.done").read_text())["command"] == ["-c", "print('measured')"]
    assert not script.run("bad", script.Stage(("-c", "raise SystemExit(3)"), 1), 30, tmp_path, "none")
    assert not script.run(
        "slow", script.Stage(("-c", "import time; time.sleep(9)"), 1), 0.5, tmp_path, "none"
    )
    assert not (tmp_path / "bad.done").exists()
    said = capsys.readouterr().out
    assert "bad: exit code 3" in said
    assert "slow: out of time" in said


def test_gpu_without_one_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is one")
    script = load_script("gpu")
    assert script.main(["latency"], 1, tmp_path, "none") == 1
    assert "without CUDA" in capsys.readouterr().err


def test_gpu_stages_name_scripts_that_are_there() -> None:
    script = load_script("gpu")
    for stage in script.STAGES.values():
        assert (script.ROOT / stage.command[0]).is_file()


@pytest.mark.slow
def test_latency_of_a_toy(tmp_path: Path) -> None:
    from toy_run import toy_job, toy_step, toy_store

    from vla.policy import Policy
    from vla.training import checkpoint

    job = toy_job(tmp_path)
    step = toy_step(job)
    weights = {n: p.detach() for n, p in step.model.named_parameters() if p.requires_grad}
    statistics = toy_store().statistics()
    path = checkpoint.save(tmp_path / "checkpoints", 1, job, step.model, statistics, weights, {}, keep=1)
    assert Policy.load(path, "cpu").chunk_size == 4
    result = load_script("latency").main(str(path), [], 5, 1, "cpu")
    assert [row["name"] for row in result["rows"]] == ["torch, fp32", "torch, own precision"]
    assert all(row["n"] == 5 and 0 < row["p50_ms"] <= row["max_ms"] for row in result["rows"])
    assert result["rows"][0]["ratio_to_peer"] == 1
    with pytest.raises(ValueError, match="export: got"):
        load_script("latency").main(str(path), [str(tmp_path)], 1, 1, "cpu")
