"""Everything that waits for a GPU, in stages: python scripts/gpu.py [STAGE ...] [--minutes=9] [--state=FOLDER]

Runs the stages that are not done yet, each with its own time limit, until the time is over; run it again to go on. A
stage that is done leaves its results in --state, one that failed its log, and is tried again. Needs torch, timm and
transformers; each stage says what else. Copy the JSON files into results/ and their tables into the README.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Stage:
    """A command below the repository's root; {state} is the folder for results."""

    command: tuple[str, ...]
    minutes: float
    needs: tuple[str, ...] = ()  # packages beside torch, timm, transformers


def benchmark(what: str, minutes: float, *needs: str) -> Stage:
    """What scripts/benchmark.py measures; peers whose packages are missing are left out there."""
    return Stage(("scripts/benchmark.py", what, "--device=cuda", "--output={state}"), minutes, needs)


STAGES = {
    "training": benchmark("training", 9),
    "inference": benchmark("inference", 9),
    "scaling": benchmark("scaling", 9),
    "simulation": benchmark("simulation", 9, "mujoco"),
    "data": benchmark("data", 8, "lerobot", "mujoco"),
    "attention": benchmark("attention", 4),
    "roundtrip": Stage(("scripts/roundtrip.py", "--results={state}/roundtrip_gpu.json"), 2, ("websockets", "msgspec")),
    "control": Stage(
        ("scripts/control.py", "configs/control/tabletop.yaml", "--checkpoint={checkpoint}", "--device=cuda",
         "--trials=100", "--output={state}/control"), 6, ("websockets", "msgspec", "ruckig", "rich", "mujoco"),
    ),
    "record": Stage(
        ("scripts/record.py", "configs/tabletop.yaml", "--output={state}/tabletop"), 9, ("lerobot", "mujoco")
    ),
    "train": Stage(
        ("scripts/train.py", "configs/tabletop.yaml", "--output={state}/tabletop", "--resume"), 25, ("lerobot",)
    ),
    "evaluate": Stage(("scripts/evaluate.py", "{state}/tabletop"), 8, ("lerobot", "mujoco")),
    "compare": Stage(
        ("scripts/compare.py", "configs/comparisons/tabletop.yaml", "--data={state}/tabletop/dataset",
         "--output={state}/comparison", "--results={state}/comparison_tabletop.json"),
        9, ("lerobot", "mujoco", "diffusers"),
    ),
}  # fmt: skip


def main(names: list[str], minutes: float, state: Path, checkpoint: str) -> int:
    """Run what is not done; the number of stages that are left."""
    import torch

    if not torch.cuda.is_available():
        print(
            "gpu: got a machine without CUDA, expected one with. remedy: run it where a GPU is.",
            file=sys.stderr,
        )
        return len(names)
    state.mkdir(parents=True, exist_ok=True)
    end, left = time.monotonic() + 60 * minutes, 0
    for name in names:
        stage, done = STAGES[name], state / f"{name}.done"
        if done.exists():
            continue
        missing = [package for package in stage.needs if find_spec(package) is None]
        seconds = min(60 * stage.minutes, end - time.monotonic())
        if missing or seconds < 20:
            print(f"{name}: {'needs ' + ', '.join(missing) if missing else 'no time left'}", flush=True)
            left += 1
            continue
        left += not run(name, stage, seconds, state, checkpoint)
    return left


def run(name: str, stage: Stage, seconds: float, state: Path, checkpoint: str) -> bool:
    """Whether the stage came to its end in time."""
    words = [word.format(state=state, checkpoint=checkpoint) for word in stage.command]
    environment = {"MUJOCO_GL": "egl"} | os.environ | {"PYTHONPATH": str(ROOT)}
    start = time.monotonic()
    with open(state / f"{name}.log", "a") as log:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what it started
            process.wait()
            code = None
    took = time.monotonic() - start
    print(
        f"{name}: {'done' if code == 0 else f'exit code {code}' if code else 'out of time'}, {took:.0f} s",
        flush=True,
    )
    if code == 0:
        (state / f"{name}.done").write_text(json.dumps({"seconds": round(took, 1), "command": words}) + "\n")
    return code == 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "stages", nargs="*", metavar="STAGE", help=f"some of {', '.join(STAGES)}; all by default"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="for all stages of this call together")
    parser.add_argument("--state", type=Path, default=Path("outputs/gpu"))
    parser.add_argument("--checkpoint", default="outputs/quickstart", help="for control")
    a = parser.parse_args()
    if unknown := set(a.stages) - set(STAGES):
        sys.exit(
            f"gpu: got {', '.join(sorted(unknown))}, expected some of {', '.join(STAGES)}. remedy: correct it."
        )
    sys.exit(1 if main(a.stages or list(STAGES), a.minutes, a.state.resolve(), a.checkpoint) else 0)
