"""How much delay each way of playing chunks can take: python scripts/delays.py CHECKPOINT [--episodes=400]

Plays unseen scenes of a simulated robot with the real controller, its safety layer included, in virtual time, where
the policy's answer comes exactly so many milliseconds late. All ways play the same scenes. Prints a Markdown
table and, with --results, writes every row to a JSON file.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from vla.checks import read_yaml
from vla.config import decode
from vla.control.config import SCHEDULES, LoopConfig, RobotConfig
from vla.control.lockstep import Outcome, play
from vla.control.process import load_robot
from vla.control.safety import Limits
from vla.provenance import machine, versions
from vla.rates import rate
from vla.system import cores, require_writable

DELAYS_MS = (0, 50, 100, 200, 400)
Cell = tuple[str, int]  # schedule, delay in ms


def some(
    checkpoint: str, robot_file: str, cells: list[Cell], seeds: range, n_action_steps: int, misled: float
) -> dict[Cell, list[Outcome]]:
    """The outcomes of some scenes, by cell; in a process of its own."""
    import torch

    from vla.export.load import load_policy

    torch.set_num_threads(1)
    config = decode(RobotConfig, read_yaml(Path(robot_file)))
    robot: Any = load_robot(replace(config, kwargs={**config.kwargs, "realtime": False}))
    robot.connect()
    policy, limits = load_policy(checkpoint, "cpu", 1), Limits(config.limits, robot.position)
    outcomes: dict[Cell, list[Outcome]] = {}
    for schedule, delay in cells:
        loop = LoopConfig(schedule=schedule, n_action_steps=n_action_steps)
        outcomes[schedule, delay] = [
            play(robot, policy, limits, loop, seed, delay / 1000, misled) for seed in seeds
        ]
        print(f"{schedule} {delay} ms, scenes {seeds.start} … {seeds.stop - 1}: done", file=sys.stderr)
    robot.disconnect()
    return outcomes


def main(
    checkpoint: str,
    robot: str,
    cells: list[Cell],
    episodes: int,
    seed: int,
    n_action_steps: int,
    misled: float,
) -> dict[str, Any]:
    """All cells, the scenes spread over the cores."""
    n = min(cores(), episodes)
    bounds = [seed + episodes * i // n for i in range(n + 1)]
    with ProcessPoolExecutor(n, get_context("spawn")) as pool:
        parts = [
            pool.submit(some, checkpoint, robot, cells, range(low, high), n_action_steps, misled)
            for low, high in pairwise(bounds)
        ]
        found = [part.result() for part in parts]
    rows = [
        row(schedule, delay, [o for part in found for o in part[schedule, delay]])
        for schedule, delay in cells
    ]
    return {
        "checkpoint": Path(checkpoint).name, "robot": Path(robot).name, "episodes": episodes, "seed": seed,
        "misled_s": misled,
        "machine": machine(), "versions": versions(), "rows": rows,
    }  # fmt: skip


def row(schedule: str, delay: int, outcomes: list[Outcome]) -> dict[str, Any]:
    """The figures of a cell; seconds are of the successful episodes."""
    won = [o.seconds for o in outcomes if o.success]
    return {
        "schedule": schedule, "delay_ms": delay, "success": rate(o.success for o in outcomes),
        "seconds_median": float(np.median(won)) if won else None,
        "seconds_p95": float(np.quantile(won, 0.95)) if won else None,
        "held_mean": float(np.mean([o.held for o in outcomes])),
        "jump_mean": float(np.mean([jump for o in outcomes for jump in o.jumps])),
        "illegal": sum(o.illegal for o in outcomes),
        "samples_seconds": [o.seconds for o in outcomes], "samples_success": [o.success for o in outcomes],
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    cells = {(r["schedule"], r["delay_ms"]): r for r in result["rows"]}
    schedules, delays = (list(dict.fromkeys(cell[i] for cell in cells)) for i in (0, 1))
    lines = ["| schedule | " + " | ".join(f"{d} ms" for d in delays) + " |", "|---|" + "---|" * len(delays)]
    for schedule in schedules:
        texts = []
        for delay in delays:
            r = cells[schedule, delay]
            low, high = r["success"]["wilson_95"]
            text = f"{r['success']['success_rate']:.1%} [{low:.1%}, {high:.1%}]"
            texts.append(text + (f", {r['seconds_median']:.2f} s" if r["seconds_median"] is not None else ""))
        lines.append(f"| {schedule} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a run, a checkpoint or an export")
    parser.add_argument("--robot", default="configs/robots/tabletop.yaml")
    parser.add_argument("--schedules", nargs="+", default=SCHEDULES, choices=SCHEDULES)
    parser.add_argument("--delays", nargs="+", type=int, default=DELAYS_MS, help="in ms")
    parser.add_argument("--episodes", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1_000_000)
    parser.add_argument("--n-action-steps", type=int, default=0, help="0: half of the chunk")
    parser.add_argument("--misled", type=float, default=0.0, help="seconds of another instruction at first")
    parser.add_argument("--results", type=Path, help="a JSON file to write")
    a = parser.parse_args()
    try:
        if a.results:
            require_writable(a.results.parent)
        cells = [(schedule, delay) for schedule in a.schedules for delay in a.delays]
        result = main(a.checkpoint, a.robot, cells, a.episodes, a.seed, a.n_action_steps, a.misled)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"delays: {error}")
    print(table(result))
    if a.results:
        a.results.write_text(json.dumps(result, indent=1) + "\n")
