"""From episodes to numbers: success rates with their intervals."""

from __future__ import annotations

from typing import Any

from vla.evaluation.episodes import CONTROLS, COUNTERFACTUAL, STANDARD, Row
from vla.rates import rate


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
