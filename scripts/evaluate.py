"""Evaluate a checkpoint in closed loop.

    python scripts/evaluate.py CHECKPOINT [CONFIG] [--evaluate.episodes=20] [--env.id=…]
    python scripts/evaluate.py --expert [CONFIG]

CHECKPOINT is a checkpoint's folder, the output folder of a training, or a folder that
scripts/export.py wrote. Its own job is played, with changes from the command line; evaluation.json,
videos/ and report.html go to --output, by default the job's own (of an export, evaluation/ in it).
With CONFIG, a YAML file, the job is that one's, and results go to evaluation/ in the folder that was named. What
lerobot-train wrote plays too, ours or any policy of LeRobot's (its output, or a folder pretrained_model, beside which
evaluation/ lies then); it needs a CONFIG.
An evaluation that was killed goes on with the same command, which plays what is missing.
`--expert` has the environment's scripted expert play instead, through the same machinery, which checks
the evaluator and the environment; its results go to <output>/expert.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from vla.checks import require
from vla.config import Job, load
from vla.evaluation import Evaluation, evaluate
from vla.evaluation.report import percent, write_report
from vla.system import require_writable
from vla.training.ranks import Ranks, launched, start


def main(job: Job, checkpoint: Path | None) -> Evaluation:
    """Play the job, write its results and print them; without a checkpoint the expert plays."""
    require_writable(job.output)
    if not launched():
        return main_on(Ranks(), job, checkpoint)
    ranks = start(job.evaluate.device)
    with ranks.together("evaluate", lambda: "the same command goes on"):
        return main_on(ranks, job, checkpoint)


def main_on(ranks: Ranks, job: Job, checkpoint: Path | None) -> Evaluation:
    """What `main` does, on each of the ranks; the first one writes and prints."""
    policy = None
    metrics = Path(job.output) / "metrics.jsonl"
    if checkpoint is None:
        job = replace(job, output=str(Path(job.output) / "expert"))
    else:
        policy = load_policy(checkpoint, job, str(ranks.device or ""))
        policy.require_cameras(set(policy.features.cameras) - set(job.evaluate.without))
        require(
            job.evaluate.ensemble > 0 or job.evaluate.n_action_steps <= policy.chunk_size,
            "evaluate.n_action_steps", job.evaluate.n_action_steps, f"at most the policy's chunk, {policy.chunk_size}",
        )  # fmt: skip
        if policy.checkpoint is not None and not metrics.is_file():
            metrics = policy.checkpoint.parent.parent / metrics.name
    folder = Path(job.output)
    result = evaluate(policy, job, ranks=ranks, keep=True)
    if not ranks.main:
        return result
    data = result.as_dict(folder)
    result.save(folder)
    print(table(data))
    print(f"evaluation: {folder / 'evaluation.json'}\nreport:     {write_report(data, folder, metrics)}")
    return result


def load_policy(path: Path, job: Job, device: str = "") -> Any:
    """Whichever kind of policy the folder holds. device: the job's when none is given."""
    device = device or job.evaluate.device
    if of_lerobot(path):
        from vla.lerobot_plugin.adapter import LeRobotPolicy

        return LeRobotPolicy.load(path, device, job.dataset_root)
    from vla.export.load import load_policy

    return load_policy(path, device, launch=job.evaluate.launch, dataset=job.evaluate.dataset)


def of_lerobot(path: Path) -> bool:
    """Whether a folder was written by LeRobot for a policy that is not ours: a checkpoint of ours has a manifest."""
    from vla.export.load import is_export

    if is_export(path):
        return False
    from vla.training.checkpoint import pretrained_folders

    found = next((place for place in pretrained_folders(path) if (place / "config.json").is_file()), None)
    return found is not None and not (found / "manifest.json").is_file()


def table(data: dict[str, Any]) -> str:
    """The rates as plain text."""
    groups = dict(data["splits"])
    if len(groups) == 1:
        groups |= {f"  {skill}": group for skill, group in data["skills"].items()}
    if data["counterfactual_pairs"]["n_episodes"]:
        groups["counterfactual pairs"] = data["counterfactual_pairs"]
    groups |= {
        f"instruction {name}": data["controls"][name]
        for name in ("blank", "shuffled")
        if name in data["controls"]
    }
    width = max(24, *map(len, groups))
    lines = [f"{'':{width}} success   95 % interval   episodes"]
    for name, group in groups.items():
        low, high = group["wilson_95"]
        bounds = f"{100 * low:.0f} – {100 * high:.0f} %"
        lines.append(
            f"{name:{width}} {percent(group['success_rate']):>7} {bounds:>15} {group['n_episodes']:>10}"
        )
    return "\n".join(lines)


def from_command_line(argv: list[str]) -> tuple[Job, Path | None]:
    """The job to play and the checkpoint to play it, or None for the expert."""
    arguments = [argument for argument in argv if argument != "--expert"]
    if len(arguments) < len(argv) and not (arguments and (Path(arguments[0]) / "manifest.json").is_file()):
        return load(Job, arguments), None
    if not arguments or arguments[0].startswith("-"):
        if {"-h", "--help"} & set(arguments):
            print(__doc__)
            load(Job, ["--help"])
        raise SystemExit("evaluate: got no checkpoint, expected its folder first. remedy: see --help.")
    from vla.export.load import is_export
    from vla.training import checkpoint

    path, rest = Path(arguments[0]), arguments[1:]
    home = path.parent if path.name == "pretrained_model" else path  # a folder that people upload as it is
    theirs, expert = of_lerobot(path), len(arguments) < len(argv)
    if not theirs and not is_export(path):
        path = checkpoint.find(path)
    given = bool(rest) and not rest[0].startswith("-")
    require(
        given or not (theirs or (path / "train_config.json").is_file()), "CONFIG", "none",
        "a YAML file behind what lerobot-train wrote, which knows no job of ours",
        "name one, e.g. configs/quickstart.yaml",
    )  # fmt: skip
    config = rest.pop(0) if given else path / "config.yaml"
    output = [f"--output={home / 'evaluation'}"] if given or is_export(path) else []
    return load(Job, [*output, *rest], path=config), None if expert else path


if __name__ == "__main__":
    try:
        main(*from_command_line(sys.argv[1:]))
    except (ValueError, OSError, RuntimeError) as error:  # ConfigError and EnvironmentCrash among them
        sys.exit(f"evaluate: {error}")
    except KeyboardInterrupt:
        sys.exit("evaluate: interrupted. The same command goes on with what is missing.")
