"""Everything that waits for a GPU, in stages: python scripts/gpu.py [STAGE ...] [--minutes=9] [--state=FOLDER]

Runs the stages that are not done yet, each with its own time limit, until the time is over; run it again to go on. A
stage that is done leaves its results in --state, one that failed its log, and is tried again. Needs torch, timm and
transformers; each stage says what else. Copy the JSON files into results/ and their tables into the README.
mt50 is all of scripts/mt50.py, which has stages of its own; what is left of it is done when it is run again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GRACE_S = 25.0  # what a stage has for ending itself before it is killed


@dataclass(frozen=True)
class Stage:
    """A command below the repository's root; {state} is the folder for results, {minutes} the time it has."""

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
    "mt50": Stage(
        ("scripts/mt50.py", "configs/mt50.yaml", "--output={state}/mt50", "--results={state}/mt50.json",
         "--minutes={minutes}"), 60, ("mujoco", "metaworld", "gymnasium", "draccus"),
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
    minutes = f"{max(0.0, seconds - GRACE_S) / 60:.2f}"  # it ends by itself, before it is ended
    words = [word.format(state=state, checkpoint=checkpoint, minutes=minutes) for word in stage.command]
    start = time.monotonic()
    code = within(seconds, words, state / f"{name}.log", folder=ROOT)
    took = time.monotonic() - start
    print(
        f"{name}: {'done' if code == 0 else f'exit code {code}' if code else 'out of time'}, {took:.0f} s",
        flush=True,
    )
    if code == 0:
        (state / f"{name}.done").write_text(json.dumps({"seconds": round(took, 1), "command": words}) + "\n")
    return code == 0


def within(
    seconds: float, words: list[str], log: Path, folder: Path | None = None, *, grace: float = GRACE_S,
    beat: Callable[[float], None] = lambda took: None, keep: tuple[int, ...] = (),
) -> int | None:  # fmt: skip
    """The exit code of a Python program, or None where it had not come to its end in time and was ended: asked to
    (SIGINT), and killed with all that it started when it did not obey within `grace` seconds.

    log: what it prints is appended. beat: called every few seconds with how many have passed. keep: open files that
    it has too. A program of this session: it does not outlive a machine on which every session is ended.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {"MUJOCO_GL": "egl"} | os.environ | {"PYTHONPATH": path}
    start = time.monotonic()
    with open(log, "a") as file:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=folder, env=environment, stdout=file, stderr=file, stdin=subprocess.DEVNULL,
            process_group=0, pass_fds=keep,
        )  # fmt: skip
        try:
            while (left := start + seconds - time.monotonic()) > 0:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(min(5.0, left))
                beat(time.monotonic() - start)
            return None
        finally:
            end(process, grace)
            beat(time.monotonic() - start)


def end(process: subprocess.Popen[bytes], grace: float) -> None:
    """Have a process end, and whatever is left of what it started."""
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            process.wait(grace)
    finally:  # of somebody impatient, too
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


if __name__ == "__main__":
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # which stages inherit; ignored in a shell's background
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
