"""Train and evaluate variants of one job, some seeds each, and print one table.

    python scripts/ablate.py configs/ablations/quickstart.yaml

Everything that is finished is kept: the same command goes on where it was stopped. The demonstrations are
the base job's, recorded first when they are missing. What a run prints goes to log.txt in its folder.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import evaluate
import record
import train

from vla.checks import flat, require
from vla.config import Job, load
from vla.evaluation.evaluate import RESULT
from vla.provenance import portable, versions

RATES = ("success_rate", "counterfactual_pair_rate", "blank_instruction_rate")


@dataclass(frozen=True)
class Ablation:
    """Variants of a job: each the base's YAML with other arguments."""

    base: str
    output: str  # a folder per variant and seed
    results: str  # the JSON to write
    seeds: tuple[int, ...] = (0, 1, 2)
    at_once: int = 1  # runs that share the machine; give each its --train.threads in `common`
    common: tuple[str, ...] = ()  # arguments of every run, --a.b=c
    variants: dict[str, Any] = field(default_factory=dict)  # name -> its further arguments

    def __post_init__(self) -> None:
        require(bool(self.seeds), "seeds", self.seeds, "at least one")
        require(self.at_once > 0, "at_once", self.at_once, "1 or more")
        fits = all(isinstance(v, list) and all(isinstance(a, str) for a in v) for v in self.variants.values())
        require(
            bool(self.variants) and fits,
            "variants",
            self.variants,
            "name: [--a.b=c, …]",
            "see configs/ablations/",
        )
        folders = {slug(name) for name in self.variants}
        require(
            len(folders) == len(self.variants), "variants", list(self.variants),
            "names that differ in their letters and digits, as each is a folder's",
        )  # fmt: skip

    def job(self, variant: str, seed: int) -> Job:
        """The job of one run. Ends the program with one line when an argument is wrong."""
        place = Path(self.output) / f"{slug(variant)}_{seed}"
        data = load(Job, [self.base]).dataset_root
        run = [f"--seed={seed}", f"--output={place}", f"--data.root={data}"]
        return load(Job, [self.base, *self.common, *self.variants[variant], *run])


def slug(name: str) -> str:
    """A folder's name: letters and digits, the rest one underscore each."""
    return "_".join("".join(c if c.isalnum() else " " for c in name).split())


def main(ablation: Ablation) -> list[dict[str, Any]]:
    """Make every run that is not there yet, seed by seed; returns and writes one row per variant."""
    jobs = {(name, seed): ablation.job(name, seed) for seed in ablation.seeds for name in ablation.variants}
    record.main(load(Job, [ablation.base]))
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ablation.variants}
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(ablation.at_once, multiprocessing.get_context("spawn")) as pool:
        pending = {pool.submit(run, job): key for key, job in jobs.items()}
        try:
            for done in as_completed(pending):
                name, seed = pending[done]
                numbers, machine = done.result()
                runs[name].append({"seed": seed} | numbers)
                runs[name].sort(key=lambda run: run["seed"])
                rows = write(ablation, runs, machine)
                print(f"{sum(map(len, runs.values()))} of {len(jobs)}: {name}, seed {seed}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    print("\n" + table(rows))
    return rows


def run(job: Job) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train and evaluate, or read what an earlier call left; the rates and what it took, and the machine.

    Raises ConfigError when what an earlier call left is of another job.
    """
    path = Path(job.output) / RESULT
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        with (path.parent / "log.txt").open("a") as log:
            try:
                with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                    evaluate.main(job, train.main(job, resume=True))
            except Exception as error:
                raise RuntimeError(f"{job.output}: {error}") from error
    result = json.loads(path.read_text())
    before, now = (
        flat(config) for config in (result["config"], json.loads(json.dumps(portable(asdict(job)))))
    )
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    require(
        not changed, ", ".join(changed), ", ".join(str(now.get(name)) for name in changed),
        f"{', '.join(str(before.get(name)) for name in changed)}, by which {job.output} was made",
        f"remove {job.output}, or choose another output",
    )  # fmt: skip
    rows = [json.loads(row) for row in (Path(job.output) / "metrics.jsonl").read_text().splitlines()]
    rates = {name: result[name] for name in ("n_episodes", "wilson_95", *RATES)}
    samples = statistics.median(row["samples_per_s"] for row in rows if "samples_per_s" in row)
    skills = {name: group["success_rate"] for name, group in result["skills"].items()}
    return rates | {"samples_per_s": samples, "skills": skills}, result["machine"]


def write(
    ablation: Ablation, runs: dict[str, list[dict[str, Any]]], machine: dict[str, Any]
) -> list[dict[str, Any]]:
    """Summarise what is there and write it."""
    rows = [
        {"variant": name, "arguments": ablation.variants[name], "runs": of_seeds} | summary(of_seeds)
        for name, of_seeds in runs.items()
        if of_seeds
    ]
    content = {"base": ablation.base, "common": ablation.common, "at_once": ablation.at_once}
    content |= {"machine": machine, "versions": versions()}
    path = Path(ablation.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | {"rows": rows}, indent=1) + "\n")
    return rows


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of every rate; None where it was not measured."""
    columns = {name: [run[name] for run in runs] for name in (*RATES, "samples_per_s")}
    known = {name: values for name, values in columns.items() if None not in values}
    mean = {name: statistics.mean(known[name]) if name in known else None for name in columns}
    many = len(runs) > 1
    std = {name: statistics.stdev(known[name]) if many and name in known else None for name in RATES}
    return {"mean": mean, "std": std}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown: mean ± standard deviation over seeds."""
    lines = [
        "| variant | seeds | success | both of a pair | told nothing | samples/s |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        mean, std = row["mean"], row["std"]
        rates = [
            ("–" if mean[n] is None else f"{mean[n]:.0%}")
            + ("" if std[n] is None else f" ± {100 * std[n]:.0f}")
            for n in RATES
        ]
        lines.append(
            f"| {' | '.join([row['variant'], str(len(row['runs'])), *rates])} | {mean['samples_per_s']:.0f} |"
        )
    return "\n".join(lines)


def from_command_line(argv: list[str]) -> Ablation:
    if {"-h", "--help"} & set(argv) or len(argv) != 1:
        print(f"usage: {__doc__}")
        raise SystemExit(0 if {"-h", "--help"} & set(argv) else 2)
    return load(Ablation, argv)


if __name__ == "__main__":
    try:
        main(from_command_line(sys.argv[1:]))
    except (ValueError, RuntimeError, OSError, FloatingPointError) as error:
        sys.exit(f"ablate: {error}")
    except KeyboardInterrupt:
        sys.exit("ablate: interrupted; the same command goes on")
