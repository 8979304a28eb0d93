"""The scripts as a user runs them: the whole path, and the README's own-data section."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from toy_env import ToyEnv

from vla.observation import ACTION, IMAGES, STATE, TASK

ROOT = Path(__file__).parent.parent
TINY = (
    "--model.size=tiny", "--model.d_model=32", "--model.n_heads=2", "--model.image_width=32",
    "--model.image_heads=2", "--model.chunk_size=8", "--model.max_prefix=2", "--model.image.pixels=32",
    "--train.batch_size=8", "--train.threads=1", "--train.wandb=disabled", "--train.log_every=1",
    "--evaluate.episodes=4", "--evaluate.videos=2", "--evaluate.workers=1",
)  # fmt: skip


def run(script: str, *arguments: str, cwd: Path) -> str:
    """Run a script from another folder, with the toy environment to be found; its output."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_the_whole_path_runs_and_its_second_run_repeats_nothing(tmp_path: Path) -> None:
    config = tmp_path / "toy.yaml"
    config.write_text(
        "env: {id: 'toy_env:Toy-v0'}\nrecord: {episodes: 6, workers: 1, lead_in: 2}\noutput: run\n"
    )
    printed = run("quickstart.py", str(config), "--train.steps=4", *TINY, cwd=tmp_path)
    assert "success" in printed
    assert "report.html" in printed
    assert ".mp4" in printed
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluation["n_episodes"] == 4
    assert 0 <= evaluation["wilson_95"][0] <= evaluation["success_rate"] <= evaluation["wilson_95"][1] <= 1
    assert {"counterfactual_pair_rate", "blank_instruction_rate"} <= set(evaluation)
    assert "data:video/mp4;base64," in (tmp_path / "run" / "report.html").read_text()
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    dataset, before = tmp_path / "run" / "dataset" / "meta" / "recording.json", checkpoint.stat().st_mtime_ns
    recorded = dataset.stat().st_mtime_ns
    run("quickstart.py", str(config), "--train.steps=4", *TINY, cwd=tmp_path)
    assert (checkpoint.stat().st_mtime_ns, dataset.stat().st_mtime_ns) == (before, recorded)
    again = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert again["episodes"] == evaluation["episodes"]


@pytest.mark.slow
def test_somebody_elses_dataset_and_environment(tmp_path: Path) -> None:
    from lerobot.datasets import LeRobotDataset

    env = ToyEnv(cameras=("left", "right"))
    columns = {
        IMAGES + name: {"dtype": "video", "shape": (32, 32, 3), "names": ["height", "width", "channels"]}
        for name in env.cameras
    }
    columns |= {key: {"dtype": "float32", "shape": (2,), "names": None} for key in (STATE, ACTION)}
    dataset = LeRobotDataset.create(
        "somebody/points", 10, columns, root=tmp_path / "points", video_backend="pyav"
    )
    for seed in range(3):
        observation, info = env.reset(seed=seed)
        over = False
        while not over:
            action = env.expert_action()
            dataset.add_frame({**observation, ACTION: action, TASK: info[TASK]})
            observation, _, over, _, info = env.step(action)
        dataset.save_episode()
    dataset.finalize()
    run("train.py", "--data.root=points", "--output=mine", "--train.steps=3", *TINY, cwd=tmp_path)
    own = ("--env.id=toy_env:Toy-v0", "--env.kwargs={cameras: [left, right]}")
    run("evaluate.py", "mine", *own, "--evaluate.episodes=3", cwd=tmp_path)
    evaluation = json.loads((tmp_path / "mine" / "evaluation.json").read_text())
    assert evaluation["n_episodes"] == 3
    assert evaluation["environment"] == "toy_env:Toy-v0"
