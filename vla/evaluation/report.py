"""report.html: an evaluation as a page to look at; one file without scripts that needs no network."""

from __future__ import annotations

import base64
import json
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from vla.evaluation.charts import curve, interval, short

EMBED_BYTES = 11_000_000  # of films; as base64 this leaves the page below 16 MB
TILES = {
    "counterfactual": ("Pairs", "the same scene with two instructions: both followed"),
    "blank": ("No instruction", "the policy is told nothing; what is left is chance"),
    "shuffled": ("Wrong instruction", "the policy is told another goal of the scene; low is good"),
}
CONTROL_NAMES = {
    "counterfactual": "counterfactual instruction",
    "shuffled": "wrong instruction",
    "blank": "no instruction",
}


def write_report(data: dict[str, Any], folder: Path, metrics: Path | None = None) -> Path:
    """Write <folder>/report.html and return its path.

    data: what evaluation.json holds; its films are looked for in `folder`.
    metrics: the training's metrics.jsonl, for the learning curves; may be missing.
    """
    title = f"{short_name(data['environment'])}: {percent(data['success_rate'])} success"
    style = (resources.files("vla.evaluation") / "report.css").read_text(encoding="utf-8")
    films = Films(data, folder)
    body = [header(data), hero(data), films.pairs(), table(data)]
    body += [films.others(), curves(metrics), footer(data)]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style></head>\n"
        f"<body><main>\n{'\n'.join(part for part in body if part)}\n</main></body></html>\n"
    )
    path = folder / "report.html"
    partial = path.with_suffix(".html.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def short_name(env_id: str) -> str:
    return env_id.rpartition(":")[2]


def header(data: dict[str, Any]) -> str:
    played = "played by the environment's expert" if data["played_by"] == "expert" else ""
    if data["checkpoint"]:
        played = f"checkpoint {data['checkpoint']['path']}"
    name = escape(short_name(data["environment"]))
    return f'<header><h1>{name}</h1><p class="quiet">{escape(played)}</p></header>'


def hero(data: dict[str, Any]) -> str:
    """The one number, and beside it what shows whether the instruction is read."""
    low, high = data["wilson_95"]
    number = "–" if data["success_rate"] is None else f"{100 * data['success_rate']:.0f}"
    groups = dict(data["controls"])
    if groups.get("counterfactual"):
        groups["counterfactual"] = data["counterfactual_pairs"]
    tiles = []
    for name, (title, text) in TILES.items():
        if name in groups:
            share, (bottom, top) = groups[name]["success_rate"], groups[name]["wilson_95"]
            tiles.append(
                f'<div class="tile"><h3>{title}</h3><b>{percent(share)}</b><span>{text}</span>'
                f"{interval(share, bottom, top)}</div>"
            )
    return (
        f'<section class="hero"><div><p class="number">{number}<small>%</small></p>'
        f"{interval(data['success_rate'], low, high)}"
        f'<p>of {data["n_episodes"]} episodes succeed <span class="quiet">· between '
        f"{100 * low:.0f} and {100 * high:.0f} % with 95 % confidence</span></p></div>"
        f'<div class="tiles">{"".join(tiles)}</div></section>'
    )


class Films:
    """The filmed episodes as cards; embedded while there is room, else linked."""

    def __init__(self, data: dict[str, Any], folder: Path) -> None:
        self.data, self.folder, self.room = data, folder, EMBED_BYTES
        rows = [row for row in data["episodes"] if row["video"] and (folder / row["video"]).is_file()]
        other = {self._scene(row): row for row in rows if row["control"] == "counterfactual"}
        standard = [row for row in rows if row["control"] == "standard"]
        self.couples = [(row, other[self._scene(row)]) for row in standard if self._scene(row) in other]
        self.singles = [row for row in standard if self._scene(row) not in other]

    @staticmethod
    def _scene(row: dict[str, Any]) -> tuple[str, int]:
        return row["split"], row["index"]

    def pairs(self) -> str:
        """Scenes filmed under two instructions, side by side."""
        cards = "".join(f'<div class="pair">{self._card(a)}{self._card(b)}</div>' for a, b in self.couples)
        return f'<h2>One scene, two instructions</h2><div class="pairs">{cards}</div>' if cards else ""

    def others(self) -> str:
        """Failures first: they teach more."""
        sections = []
        for title, won in (("Failures", False), ("Successes", True)):
            cards = "".join(self._card(row) for row in self.singles if row["success"] is won)
            sections.append(f'<h2>{title}</h2><div class="films">{cards}</div>' if cards else "")
        return "".join(sections)

    def _card(self, row: dict[str, Any]) -> str:
        path = self.folder / row["video"]
        source, self.room = escape(row["video"], quote=True), self.room - path.stat().st_size
        if self.room >= 0:
            source = "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
        outcome = "success" if row["success"] else "failure"
        skill = "" if len(self.data["skills"]) < 2 else f" · {escape(row['skill'])}"
        split = "" if len(self.data["splits"]) == 1 else f" · {escape(row['split'])}"
        return (
            f'<figure class="film {outcome}"><video src="{source}" autoplay muted loop playsinline></video>'
            f'<figcaption>{escape(row["text"])}<span class="outcome"><b>{outcome}</b> · '
            f"{row['steps'] / self.data['fps']:.1f} s{skill}{split}</span></figcaption></figure>"
        )


def table(data: dict[str, Any]) -> str:
    """Every split with its skills, the one that fails most first, then the controls."""

    def row(name: str, group: dict[str, Any], under: bool = False) -> str:
        steps = group.get("mean_steps_of_successes")
        low, high = group["wilson_95"]
        return (
            f"<tr class='{'under' if under else ''}'><td>{escape(name)}</td>"
            f'<td class="rate">{percent(group["success_rate"])}</td>'
            f'<td class="bar">{interval(group["success_rate"], low, high)}</td>'
            f'<td class="quiet wide">{100 * low:.0f}–{100 * high:.0f} %</td>'
            f'<td class="quiet">{group["n_episodes"]}</td>'
            f'<td class="quiet wide">{"–" if steps is None else f"{steps:.1f}"}</td></tr>'
        )

    lines = []
    for split, group in data["splits"].items():
        lines.append(row("all scenes" if split == "default" else split, group))
        if len(group["skills"]) > 1:
            skills = sorted(group["skills"].items(), key=lambda item: item[1]["success_rate"])
            lines += [row(skill, part, under=True) for skill, part in skills]
    if data["controls"]:
        lines.append('<tr class="group"><td colspan="6">Does it read the instruction?</td></tr>')
        if data["counterfactual_pairs"]["n_episodes"]:
            lines.append(row("pairs, both followed", data["counterfactual_pairs"]))
        lines += [row(CONTROL_NAMES[name], group) for name, group in data["controls"].items()]
    broken = sum(part["non_finite"] for part in [*data["splits"].values(), *data["controls"].values()])
    warning = (
        f'<p class="lead">{broken} episodes ended because the policy returned NaN.</p>' if broken else ""
    )
    head = (
        '<th></th><th>success</th><th></th><th class="wide">95 % interval</th><th>episodes</th>'
        '<th class="wide">steps to success</th>'
    )
    return (
        f'<h2>Success</h2>{warning}<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def curves(metrics: Path | None) -> str:
    """Loss, success, learning rate and speed over training, as far as they were logged."""
    if metrics is None or not metrics.is_file():
        return ""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines() if line.strip()]

    def of(key: str) -> list[tuple[float, float]]:
        return [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]

    drawn = [
        curve("Loss", of("loss"), short, logarithmic=True),
        curve("Success during training", of("success"), percent, top=1.0),
        curve("Learning rate", of("lr"), short),
        curve("Samples per second", of("samples_per_s"), short),
    ]
    return f'<h2>Training</h2><div class="curves">{"".join(drawn)}</div>' if any(drawn) else ""


def footer(data: dict[str, Any]) -> str:
    """Where and with what it was measured."""
    clock, machine = data["time"], data["machine"]
    parts = f"in {clock['parts']} parts, since it was interrupted, " if clock["parts"] > 1 else ""
    facts = {
        "Evaluation": f"{clock['wall_s']:.0f} s with {clock['workers']} workers, {parts}"
        f"{clock['env_steps_per_s']:.0f} environment steps a second; {percent(clock['env_share'])} of the "
        f"time in the environment, {percent(clock['policy_share'])} in the policy",
        "Machine": f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, "
        + (machine["gpu"] or "no GPU"),
        "Software": ", ".join(f"{name} {version}" for name, version in data["versions"].items()),
    }
    if data["checkpoint"] and data["checkpoint"]["sha256"]:
        facts["Weights"] = f"sha256 {data['checkpoint']['sha256']}"
    entries = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    config = escape(json.dumps(data["config"], indent=2, ensure_ascii=False))
    return (
        f"<h2>Measured on</h2><dl>{entries}</dl>"
        f"<details><summary>Configuration</summary><pre>{config}</pre></details>"
    )
