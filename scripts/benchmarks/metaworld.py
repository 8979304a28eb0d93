"""Meta-World MT50's numbers: from evaluations to results/mt50.json and the table beside the published ones.

The published average is the mean of the four tiers' means, so that one of 5 very hard tasks counts as much as 5.6 of
28 easy ones; the task mean is over all tasks alike. Both are given. Everything here is in percent.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.common import markdown
from envs.metaworld_tasks import TASKS, TIERS
from vla.data.record import SUMMARY, Recording
from vla.rates import wilson

# Name, parameters, the tiers and their mean as published, and where; of 50 demonstrations per task.
PUBLISHED: list[tuple[str, str, tuple[float, float, float, float], float, str]] = [
    ("Diffusion Policy", "–", (23.1, 10.7, 1.9, 6.1), 10.5, "SmolVLA's paper"),
    ("TinyVLA-H", "1.3 B", (77.6, 21.5, 11.4, 15.8), 31.6, "SmolVLA's paper"),
    ("π0", "3.5 B", (71.8, 48.2, 41.7, 30.0), 47.9, "SmolVLA's paper"),
    ("SmolVLA", "0.45 B", (82.5, 41.8, 45.0, 60.0), 57.3, "arXiv:2506.01844"),
    ("SmolVLA", "2.25 B", (87.1, 51.8, 70.0, 64.0), 68.2, "arXiv:2506.01844"),
    ("ProgVLA", "0.1 B", (84.9, 72.7, 77.0, 79.6), 78.5, "arXiv:2605.28231"),
    ("Evo-1, told where things are", "0.77 B", (89.2, 76.8, 77.2, 79.2), 80.6, "arXiv:2511.04555"),
    ("FabriVLA, told where things are", "0.89 B", (95.0, 88.2, 86.7, 90.0), 90.0, "arXiv:2607.08575"),
]
COLUMNS = {  # a stage each; what the table calls them
    "evaluate": "ours",
    "default_renderer": "ours, pictures by the default renderer",
    "lerobot": "ours, through LeRobot's environment",
}
NOT_YET = "not measured yet"
UNDER = 50.0  # a task below this is worth a look at its films


def rates(successes: int, n: int) -> dict[str, Any]:
    """In percent, with the 95 % Wilson interval."""
    return {"success_rate": percent(successes / n), "wilson_95": interval(successes, n), "n": n}


def percent(share: float) -> float:
    return round(100 * share, 2)


def interval(successes: int, n: int) -> list[float]:
    return [percent(bound) for bound in wilson(successes, n)]


def summarise(skills: dict[str, Any]) -> dict[str, Any]:
    """The numbers of one column from evaluation.json's `skills`.

    A tier's rate is the mean over its tasks; one without a task here is None, and tier_mean then too. Intervals
    take all episodes as one sample, which fits where every task has as many.
    """
    won = {name: round(skills[name]["success_rate"] * skills[name]["n_episodes"]) for name in skills}
    played = {name: skills[name]["n_episodes"] for name in skills}
    tiers: dict[str, Any] = {}
    means: list[float] = []
    for tier in TIERS:
        names = [name for name in skills if TASKS[name].tier == tier]
        tiers[tier] = None
        if names:
            tiers[tier] = rates(sum(won[name] for name in names), sum(played[name] for name in names))
            means.append(statistics.mean(won[name] / played[name] for name in names))
            tiers[tier] |= {"success_rate": percent(means[-1]), "tasks": len(names)}
    counts = sorted(set(played.values()))
    return {
        "tier_mean": percent(statistics.mean(means)) if len(means) == len(TIERS) else None,
        "task_mean": percent(statistics.mean(won[name] / played[name] for name in skills)),
        "wilson_95": interval(sum(won.values()), sum(played.values())),
        "n": sum(played.values()),
        "episodes_per_task": counts[0] if len(counts) == 1 else counts,
        "tiers": tiers,
        "per_task": {
            name: {"tier": TASKS[name].tier}
            | rates(won[name], played[name])
            | {"mean_steps_of_successes": skills[name].get("mean_steps_of_successes")}
            for name in TASKS
            if name in skills
        },
    }


def demonstrations(root: Path) -> dict[str, Any] | None:
    """What the policy learned from; None where nothing says so."""
    if not (root / SUMMARY).is_file():
        return None
    recording = Recording.load(root)
    return {
        "episodes": len(recording.episodes),
        "frames": recording.frames,
        "attempts": recording.attempts,
        "attempts_that_succeeded": percent(recording.success_rate),
        "noise": recording.content["noise"],
        "noise_episodes": recording.content["noise_episodes"],
        "episodes_with_noise": sum(episode["noise"] for episode in recording.episodes),
    }


def parameters(checkpoint: Path) -> dict[str, int]:
    """Of the network that acts: what only training has is not in it."""
    from vla.model.parameters import count_parameters
    from vla.training.checkpoint import find, load_model

    model, _, _ = load_model(find(checkpoint))
    return {"trainable": count_parameters(model), "all": sum(p.numel() for p in model.parameters())}


def result(
    output: Path, dataset: Path, command: str, minutes: dict[str, float], without: dict[str, str]
) -> dict[str, Any]:
    """What results/mt50.json holds. minutes: of every stage so far; without: why a column is not there.

    gpu_minutes: of the stages that used the GPU, recording among them, whose pictures it draws; None without one.
    """
    if (dataset / SUMMARY).is_file():  # demonstrations of another output took their time there
        minutes = minutes | {"record": max(minutes["record"], round(Recording.load(dataset).seconds / 60, 2))}
    played = {name: read(output / name) for name in COLUMNS}
    main = played.pop("evaluate")
    assert main is not None
    used = ["record", "train", "evaluate"] if main["machine"]["gpu"] else []
    return {
        "unit": "percent",
        **summarise(main["skills"]),
        **{name: summarise(other["skills"]) if other else None for name, other in played.items()},
        "why_not": {name: without.get(name, NOT_YET) for name, other in played.items() if other is None},
        "params": parameters(output),
        "gpu_minutes": round(sum(minutes.get(stage, 0.0) for stage in used), 2) if used else None,
        "gpu_minutes_of": used,
        "minutes": minutes,
        "demonstrations": demonstrations(dataset),
        "command": command,
        "checkpoint": main["checkpoint"],
        "machine": main["machine"],
        "versions": main["versions"],
        "config": main["config"],
    }


def read(folder: Path) -> dict[str, Any] | None:
    """An evaluation's result, where there is one."""
    path = folder / "evaluation.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def table(measured: dict[str, Any] | None) -> str:
    """Ours beside the published ones, in Markdown; measured: what `result` gives, None: nothing yet."""
    size = f"{measured['params']['all'] / 1e6:.1f} M" if measured else "–"
    lines = []
    for stage, name in COLUMNS.items():
        column = measured if stage == "evaluate" else (measured or {}).get(stage)
        if not column:
            lines.append(
                [name, size, (measured or {"why_not": {}})["why_not"].get(stage, NOT_YET), *["–"] * 6]
            )
            continue
        few = f", {n} of {len(TASKS)} tasks" if (n := len(column["per_task"])) < len(TASKS) else ""
        cells = [number(tier and tier["success_rate"]) for tier in column["tiers"].values()]
        low, high = column["wilson_95"]
        cells += [number(column["tier_mean"]), f"{number(column['task_mean'])} [{low:.0f}, {high:.0f}]"]
        lines.append([name + few, size, f"{column['episodes_per_task']} episodes per task", *cells])
    tasks = [sum(task.tier == tier for task in TASKS.values()) for tier in TIERS]
    for name, size, tiers, tier_mean, source in PUBLISHED:
        task_mean = sum(rate * n for rate, n in zip(tiers, tasks, strict=True)) / sum(tasks)
        lines.append([name, size, source, *map(number, (*tiers, tier_mean, task_mean))])
    header = ["system", "parameters", "from", *(tier.replace("_", " ") for tier in TIERS)]
    return markdown([*header, "tier mean", "task mean"], lines)


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def differences(measured: dict[str, Any] | None, config: dict[str, Any]) -> str:
    """What differs from how the published numbers came about; config: the job's."""
    made = measured and measured["demonstrations"]
    noise = "with noise on the executed action of some, the label being the expert's without it"
    if made:
        noise = (
            f"{made['episodes_with_noise']} of {made['episodes']} with noise of {made['noise']} on the executed "
            "action, the label being the expert's without it"
        )
    kwargs, model = config["env"]["kwargs"], config["model"]
    preset = kwargs.get("preset", "fast")
    scratch = model["text"]["encoder"] == "scratch" and not model["image"]["pretrained"]
    told = {
        "distinct": "push-back has an instruction of its own; in LeRobot, and the row through it, it is push's",
        "lerobot": "nothing in the instructions: push and push-back share one, as LeRobot has it",
    }  # fmt: skip
    lines = [
        f"demonstrations were made here, by metaworld's scripted experts, {noise}; theirs are LeRobot's dataset",
        f"pictures are drawn with the preset {preset!r} of envs/render.py, but by the default renderer and through "
        "LeRobot's environment",
        "an episode's first picture and state show its own goal; LeRobot's show the one before",
        told[kwargs.get("instructions", "distinct")],
        f"{'nothing' if scratch else 'an encoder'} was pretrained; the policy sees one picture, four numbers of state "
        "and the instruction",
    ]
    return "What differs from the published ones:\n" + ";\n".join(f"- {line}" for line in lines) + "."


def worst(column: dict[str, Any], films: Path) -> str:
    """The tasks under 50 %, the worst first, and where to look."""
    rates = {name: task["success_rate"] for name, task in column["per_task"].items()}
    below = sorted((rate, name) for name, rate in rates.items() if rate < UNDER)
    listed = ", ".join(f"{name} {rate:.0f}" for rate, name in below)
    return f"under {UNDER:.0f} %: {listed or 'none'}" + (
        f" (films: {films})" if below and films.is_dir() else ""
    )
