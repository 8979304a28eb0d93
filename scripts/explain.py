"""Look inside a policy: where in pictures and words each of its actions looks.

    python scripts/explain.py CHECKPOINT [--task="press the red button"] [--seed=1000003] [--env.…]
    python scripts/explain.py CHECKPOINT --localisation --episodes=100

The first plays one episode of the checkpoint's own job and writes explain_NAME.png (every layer and
head of the first look) and explain_NAME.mp4 (the whole episode). The second counts on unseen scenes
how often the attention's peak lies on the object that the instruction names, against chance, and writes
explain_NAME.json. NAME is that of the training's output folder; fields of the job may be changed as
--env.id=…, --evaluate.n_action_steps=….
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vla.config import Job, load, require
from vla.environment import make_env
from vla.evaluation.episodes import split_kwargs
from vla.evaluation.video import Film
from vla.explain import Look, play
from vla.explain.localise import localise
from vla.policy import Policy
from vla.provenance import machine, portable, versions
from vla.system import require_writable
from vla.training import checkpoint

SLOWER = 4  # than real time: an episode of the quick start lasts one second


def main(policy: Policy, options: argparse.Namespace) -> None:
    """Write the pictures, or with --localisation the numbers, and print where they are."""
    job = policy.job
    folder, name = Path(options.output or Path(job.output) / "explain"), Path(job.output).name
    require_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    seed = job.evaluate.seed if options.seed is None else options.seed
    first_split = next(iter(split_kwargs(job.evaluate).values()))
    env, features = make_env(job.env.id, {**job.env.kwargs, **first_split})
    policy.features.require(features, "The environment", closed_loop=True)
    try:
        if options.localisation:
            result = numbers(policy, env, seed, options.episodes)
            path = folder / f"explain_{name}.json"
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(f"{table(result)}\nnumbers: {path}")
        else:
            looks = list(play(policy, env, seed, options.task))
            print(
                f"“{looks[0].task}”: {'done' if looks[-1].success else 'not done'} after {steps(looks)} steps"
            )
            print(f"picture: {picture(looks, folder / f'explain_{name}.png', policy)}")
            print(f"film:    {film(looks, folder / f'explain_{name}.mp4', features.fps)}")
    finally:
        env.close()


def steps(looks: list[Look]) -> int:
    return sum(len(look.after) for look in looks)


def picture(looks: list[Look], path: Path, policy: Policy) -> Path:
    """The first look's grid, for the first, the middle and the last action of the chunk."""
    from vla.explain.pictures import grid

    chunk = policy.chunk_size
    where = f"Checkpoint {policy.checkpoint.name}." if policy.checkpoint else ""
    page = grid(looks[0], sorted({0, (chunk - 1) // 2, chunk - 1}), where)
    page.save(path, optimize=True)
    return path


def film(looks: list[Look], path: Path, fps: int) -> Path:
    """Every executed action under its own maps; all pages share one scale."""
    import numpy as np

    from vla.explain.pictures import film_page

    shown = [(look, action) for look in looks for action in range(len(look.after))]
    maps = {"average": lambda look: look.maps.average}
    if looks[0].maps.encoder is not None:
        maps["rollout"] = lambda look: look.maps.rollout
    full = {
        name: float(max(look.patches(of(look)[:, action : action + 1]).max() for look, action in shown))
        for name, of in maps.items()
    }
    full["words"] = float(
        max(look.memory.of_words(look.maps.average)[0, action].max() for look, action in shown)
    )
    writer = Film(path, fps)
    for look, action in shown:
        page = np.asarray(
            film_page(look, action, look.after[action], full, f"{SLOWER} times slower than real.")
        )
        for _ in range(SLOWER):
            writer.add(page)
    writer.close()
    return path


def numbers(policy: Policy, env: Any, seed: int, episodes: int) -> dict[str, Any]:
    """What `localise` found, and on what."""
    result = localise(policy, env, seed, episodes)
    own = {
        "checkpoint": policy.checkpoint and policy.checkpoint.name,
        "env": portable(asdict(policy.job.env)),
    }
    return {"seed": seed} | own | result | {"versions": versions(), "machine": machine()}


def table(result: dict[str, Any]) -> str:
    """The rates as plain text."""
    lines = [
        "peak over patches: on the named object, on others of its kind, by chance, and with the peaks of other scenes;",
        "most attended of its kind, and follows the instruction: with what chance gives in brackets",
        f"{'':32} on target   95 % interval   on others   chance   swapped   most attended       follows",
    ]
    for when in ("first_look", "second_look"):
        for name, row in result[when].items():
            low, high = row["peak_on_target"]["wilson_95"]
            cells = [percent(row[name]) for name in ("peak_on_others", "chance", "chance_swapped")]
            cells.append(f"{percent(row['most_attended']['rate'])} ({percent(row['most_chance'])})")
            cells.append(percent(row["follows"]["rate"]) + (" (50 %)" if row["follows"]["n"] else ""))
            bounds = f"{100 * low:.0f} – {100 * high:.0f} %"
            widths = zip(cells, (12, 9, 10, 16, 14), strict=True)
            lines.append(
                f"{when.replace('_', ' ') + ', ' + name:32} {percent(row['peak_on_target']['rate']):>9} {bounds:>15}"
                + "".join(f"{cell:>{width}}" for cell, width in widths)
            )
    best = result["best_head"]
    lines.append(
        f"{best['name']} is the best head of other scenes: {percent(best['rate_where_chosen'])} there"
    )
    return "\n".join(lines)


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def from_command_line(argv: list[str]) -> tuple[Policy, argparse.Namespace]:
    """The policy with its job, changed as asked, and what to do with it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint", type=Path, help="its folder, or the output folder of a training")
    parser.add_argument("--seed", type=int, help="of the (first) scene; default: the job's evaluate.seed")
    parser.add_argument("--task", help="an instruction for that scene, instead of its own")
    parser.add_argument("--output", type=Path, help="folder to write to; default: explain/ in the job's own")
    parser.add_argument("--localisation", action="store_true", help="count, instead of drawing one episode")
    parser.add_argument("--episodes", type=int, default=100, help="scenes to count on (default: 100)")
    options, rest = parser.parse_known_args(argv)
    if options.episodes < 1:
        parser.error(f"--episodes: got {options.episodes}, expected 1 or more.")
    if options.localisation and options.task:
        parser.error(
            "--task: got it with --localisation, expected one of them; every scene has its own task."
        )
    path = checkpoint.find(options.checkpoint)
    job = load(Job, rest, path=path / "config.yaml")
    require(
        not job.evaluate.without and not job.evaluate.ensemble, "evaluate", "without or ensemble",
        "neither, as every look shows all cameras and one chunk", "leave them out",
    )  # fmt: skip
    model, trained, _ = checkpoint.load_model(path, job.evaluate.dataset)
    job = replace(job, model=trained.model)  # the network is what it is
    return Policy(model, job, job.evaluate.device, path, "eager"), options  # a graph cannot be listened to


if __name__ == "__main__":
    try:
        main(*from_command_line(sys.argv[1:]))
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"explain: {error}")
