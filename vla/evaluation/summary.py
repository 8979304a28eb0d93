"""From episodes to numbers: success rates with their intervals, and what they were measured on."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable
from importlib import metadata
from math import sqrt
from pathlib import Path
from typing import Any

from vla.evaluation.episodes import CONTROLS, COUNTERFACTUAL, STANDARD, Row
from vla.system import cores

PACKAGES = ("torch", "numpy", "timm", "transformers", "gymnasium", "mujoco", "lerobot")


def wilson(successes: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The Wilson score interval of a proportion, 95 % by default; (0, 1) when nothing was tried.

    Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if n == 0:
        return 0.0, 1.0
    share, spread = successes / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z * sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def rate(outcomes: Iterable[bool]) -> dict[str, Any]:
    """success_rate (None when nothing was tried), n_episodes and wilson_95 of some outcomes."""
    outcomes = [bool(outcome) for outcome in outcomes]
    won, n = sum(outcomes), len(outcomes)
    return {"success_rate": won / n if n else None, "n_episodes": n, "wilson_95": list(wilson(won, n))}


def group(rows: list[Row]) -> dict[str, Any]:
    """A rate with the mean number of environment steps, of all episodes and of the successful ones."""
    won = [row.steps for row in rows if row.success]
    return rate(row.success for row in rows) | {
        "mean_steps": sum(row.steps for row in rows) / len(rows) if rows else None,
        "mean_steps_of_successes": sum(won) / len(won) if won else None,
        "non_finite": sum(row.non_finite for row in rows),
    }


def by_skill(rows: list[Row]) -> dict[str, Any]:
    skills = sorted({row.skill for row in rows} - {""})
    return {skill: group([row for row in rows if row.skill == skill]) for skill in skills}


def pairs(rows: list[Row]) -> list[bool]:
    """One outcome per scene that was played with two instructions: whether both succeeded."""
    standard = {row.scene: row for row in rows if row.episode.control == STANDARD}
    other = [row for row in rows if row.episode.control == COUNTERFACTUAL]
    return [row.success and standard[row.scene].success for row in other]


def summarise(rows: list[Row]) -> dict[str, Any]:
    """All numbers; those at the top are of the first split's standard episodes.

    Without controls, or where the environment names no alternatives, their rates are None.
    """
    standard = [row for row in rows if row.episode.control == STANDARD]
    splits = list(dict.fromkeys(row.episode.split for row in standard))
    first = [row for row in standard if row.episode.split == splits[0]] if splits else []
    controls = {name: [row for row in rows if row.episode.control == name] for name in CONTROLS}
    controls = {name: group(part) for name, part in controls.items() if part}
    pair = rate(pairs(rows))
    return group(first) | {
        "counterfactual_pair_rate": pair["success_rate"],
        "counterfactual_pairs": pair,
        "blank_instruction_rate": controls.get("blank", {}).get("success_rate"),
        "shuffled_instruction_rate": controls.get("shuffled", {}).get("success_rate"),
        "splits": {
            split: group(part) | {"skills": by_skill(part)}
            for split in splits
            if (part := [row for row in standard if row.episode.split == split])
        },
        "skills": by_skill(first),
        "controls": controls,
    }


def versions() -> dict[str, str]:
    """Python's version and those of the packages that matter, without importing them."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """The processor's model and cores, memory and GPU; nothing that names the machine or its user."""
    model = platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        names = [line for line in information.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    torch = sys.modules.get("torch")  # without it, no GPU was used
    gpu = torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None
    memory_gb = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    return {"cpu": model, "cores": cores(), "memory_gb": memory_gb, "gpu": gpu, "system": platform.system()}


def portable(value: Any) -> Any:
    """A configuration without absolute paths: those below the working folder become relative,
    of others the last name is kept.
    """
    if isinstance(value, dict):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable(item) for item in value]
    if isinstance(value, Path | str) and os.path.isabs(value):
        path = Path(value)
        return path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else path.name
    return value.as_posix() if isinstance(value, Path) else value
