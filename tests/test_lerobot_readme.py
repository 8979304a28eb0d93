"""The README's five commands of LeRobot, as printed, but for how long they take; on a quick start of seconds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vla.policy import Policy

ROOT = Path(__file__).parent.parent
SHORTER = {
    "--steps=500": "--steps=2",
    "--batch_size=64": "--batch_size=4",
    "--eval.n_episodes=100": "--eval.n_episodes=2",
    "--eval.batch_size=10": "--eval.batch_size=2",
    "--duration=60": "--duration=4",
    "--dataset.num_episodes=10": "--dataset.num_episodes=1",
}
QUICK = (
    "--record.episodes=4", "--record.workers=1", "--train.steps=2", "--train.batch_size=4",
    "--train.wandb=disabled", "--train.evaluate_every=0",
)  # fmt: skip


def commands() -> dict[str, str]:
    """What the section's first block says, by the program; of scripts, by the script."""
    section = (ROOT / "README.md").read_text().partition("\n## At home in LeRobot\n")[2].partition("\n## ")[0]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)
    assert block, "no commands under '## At home in LeRobot'"
    lines = block[1].replace("\\\n", " ").splitlines()
    found = [line for line in lines if line and not line.startswith("#")]
    return {re.sub(r"^python ", "", line).split()[0]: line for line in found}


def shortened(command: str) -> str:
    for long, short in SHORTER.items():
        command = re.sub(rf"{re.escape(long)}(?=\s|$)", short, command)
    return command


def test_all_five_are_there_and_can_be_shortened() -> None:
    printed = commands()
    assert list(printed) == [
        "lerobot-train",
        "scripts/convert.py",
        "lerobot-eval",
        "lerobot-rollout",
        "lerobot-record",
    ]
    for long in SHORTER:
        assert sum(long in command for command in printed.values()) == 1, long


@pytest.mark.slow
def test_they_work_one_after_the_other(tmp_path: Path) -> None:
    for name in ("scripts", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    home = {"HF_HOME": str(tmp_path / "hub"), "HF_LEROBOT_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}

    def run(command: str) -> str:
        done = subprocess.run(
            ["bash", "-euc", command], cwd=tmp_path, env=os.environ | {"PATH": path} | home,
            capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        return done.stdout + done.stderr

    for script in ("record", "train"):
        run(" ".join([f"python scripts/{script}.py configs/quickstart.yaml", *QUICK]))
    said = {name: run(shortened(command)) for name, command in commands().items()}
    out = tmp_path / "outputs" / "lerobot"
    assert Policy.load(out / "train", "cpu").chunk_size == Policy.load(out / "policy", "cpu").chunk_size == 8
    played = json.loads((out / "eval" / "eval_info.json").read_text())
    assert played["overall"]["n_episodes"] == 2
    assert "with success" in said["lerobot-rollout"]
    assert "press the red button" in said["lerobot-rollout"]
    assert json.loads((out / "taught" / "meta" / "info.json").read_text())["total_episodes"] == 1
