"""Ours beside LeRobot's policies at equal data and equal wall-clock budget.

    python scripts/compare.py [configs/comparisons/quickstart.yaml] [--budget=340] [--only=[ours,act]]

Every row of the YAML is trained on the base job's demonstrations for the budget, start-up included: with flags by
lerobot-train, after short trials of the learning rate and batch size; without by scripts/train.py. Each is evaluated
by scripts/evaluate.py on the job's scenes, and answers one observation at a time. What is done is kept in `output`,
the same command goes on. Writes `results` and prints a table. Wants a quiet machine.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import evaluate
import latency
from benchmarks import common

from vla.checks import require
from vla.config import Job, load
from vla.provenance import machine, versions
from vla.system import require_writable

CONFIG = Path(__file__).parent.parent / "configs" / "comparisons" / "quickstart.yaml"


@dataclass(frozen=True)
class Row:
    """One policy. flags: of lerobot-train, none: scripts/train.py; told: it gets the sentence as
    observation.environment_state; tries: further flags, of which the best are taken; like: the row whose
    choice it takes over.
    """

    title: str
    flags: dict[str, Any] = field(default_factory=dict)
    told: bool = False
    tries: list[dict[str, Any]] = field(default_factory=list)
    like: str = ""


@dataclass(frozen=True)
class Comparison:
    """What is compared, and where its stages leave their results."""

    base: str  # a job's YAML: its scenes
    output: str
    results: str  # the JSON to write
    data: str = ""  # the demonstrations' folder; empty: the base job's
    budget: float = 340  # seconds
    trial: float = 80  # seconds
    seed: int = 0  # of all training
    answers: int = 200  # timed one by one
    only: tuple[str, ...] = ()  # rows; empty: all
    common: dict[str, Any] = field(default_factory=dict)  # flags of every lerobot-train
    rows: dict[str, Row] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.only:
            require(name in self.rows, "only", name, f"some of {', '.join(self.rows)}")
        for name, row in self.rows.items():
            known = not row.like or row.like in self.rows
            require(known, f"rows.{name}.like", row.like, "the name of another row")

    @property
    def names(self) -> tuple[str, ...]:
        return self.only or tuple(self.rows)

    @property
    def job(self) -> Job:
        return load(Job, [self.base])


@dataclass(frozen=True)
class Pace:
    """Of a training command: seconds before the first step, seconds a step, and the share of those waiting for data."""

    start_s: float
    step_s: float
    waiting: float

    def steps(self, seconds: float) -> int:
        return max(1, int((seconds - self.start_s) / self.step_s))


class Stages:
    """What is done for each row, once: a stage leaves a JSON file, and is not repeated while that is there."""

    def __init__(self, comparison: Comparison) -> None:
        self.of, self.folder = comparison, Path(comparison.output)

    def once(self, row: str, stage: str, make: Callable[[], Any]) -> Any:
        """What `make` returns, or returned when it was called with the same configuration."""
        path, used = self.folder / row / f"{stage}.json", self.used(row)
        if not path.is_file():
            value = make()
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps({"configuration": used, "value": value}, indent=1) + "\n")
            partial.replace(path)
        kept = json.loads(path.read_text())
        changed = [name for name in used if used[name] != kept["configuration"].get(name)]
        require(
            not changed, ", ".join(changed), [used[name] for name in changed],
            f"{[kept['configuration'].get(name) for name in changed]}, as {path} was made with",
            f"choose another output, or remove {path.parent}",
        )  # fmt: skip
        return kept["value"]

    def used(self, row: str) -> dict[str, Any]:
        """What the results of a row depend on, as JSON holds it."""
        names = ("base", "data", "seed", "trial", "common")
        used = {name: getattr(self.of, name) for name in names} | {"row": asdict(self.of.rows[row])}
        return json.loads(json.dumps(used))

    def data(self, told: bool) -> Path:
        """A copy of the demonstrations, as they are or with sentences; made when it is not there."""
        source = Path(self.of.data) if self.of.data else self.of.job.dataset_root
        target = self.folder / ("told" if told else "plain")
        remedy = f"python scripts/record.py {self.of.base}"
        require((source / "meta").is_dir(), "dataset", str(source), "the base job's demonstrations", remedy)
        if not target.exists() and told:
            from vla.lerobot_plugin.told import tell

            tell(source, target)
        elif not target.exists():
            partial = target.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source, partial, ignore=shutil.ignore_patterns("frames*"))
            partial.rename(target)
        return target

    def command(self, name: str, choice: dict[str, Any], steps: int, output: Path, **more: Any) -> list[str]:
        """What trains a row and leaves its checkpoint in `output`; more: further flags."""
        row, data = self.of.rows[name], self.data(self.of.rows[name].told)
        if not row.flags:
            flags = {"data.root": data, "output": output, "train.steps": steps, "train.evaluate_every": 0,
                     "train.wandb": "disabled"}  # fmt: skip
            program = ["python", "scripts/train.py", self.of.base]
        else:
            flags = row.flags | choice | self.of.common
            flags |= {"dataset.repo_id": f"local/{data.name}", "dataset.root": data, "output_dir": output,
                      "steps": steps, "save_freq": 0}  # fmt: skip
            program = ["lerobot-train"]
        flags |= {"seed": self.of.seed} | more
        return program + [f"--{key}={text(value)}" for key, value in flags.items()]

    def run(self, command: list[str], output: Path) -> tuple[float, str]:
        """Wall seconds, and what was printed. Raises RuntimeError with its last line when the command fails."""
        shutil.rmtree(output, ignore_errors=True)
        shutil.rmtree(self.data(False) / "frames", ignore_errors=True)  # ours decodes within its budget, too
        program = sys.executable if command[0] == "python" else Path(sys.executable).with_name(command[0])
        print("+", shlex.join(command), flush=True)
        log = output.with_name(output.name + ".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        with log.open("w") as file:
            code = subprocess.run([program, *command[1:]], stdout=file, stderr=file).returncode
        wall, printed = time.monotonic() - start, log.read_text(errors="replace")
        if code:
            last = next(iter(printed.strip().splitlines()[::-1]), "nothing was printed")
            raise RuntimeError(f"{command[0]} ended with {code}: {last}. See {log}.")
        return wall, printed

    def pace(self, name: str, choice: dict[str, Any]) -> Pace:
        """From a short run."""
        output, theirs = self.folder / name / "pace", bool(self.of.rows[name].flags)
        steps = max(24, 512 // self.batch_size(name, choice)) if theirs else 400
        more = {"log_freq": steps // 4, "save_checkpoint": False} if theirs else {"train.log_every": 100}
        wall, printed = self.run(self.command(name, choice, steps, output, **more), output)
        if theirs:
            found = re.findall(r"updt_s:([\d.]+) data_s:([\d.]+)", printed)[1:]  # the first quarter warms up
            update, waiting = (sum(map(float, column)) / len(found) for column in zip(*found, strict=True))
        else:
            rows = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
            speeds = [row["samples_per_s"] for row in rows if "samples_per_s" in row][1:]
            update, waiting = self.batch_size(name, choice) * len(speeds) / sum(speeds), 0.0
        shutil.rmtree(output, ignore_errors=True)  # lerobot-train leaves none without a checkpoint
        step = update + waiting
        return Pace(max(0.0, wall - steps * step), step, waiting / step)

    def choose(self, name: str) -> dict[str, Any]:
        """The best of a row's tries, by the loss on held-out episodes after equal wall-clock time each."""
        tried, row = [], self.of.rows[name]
        for number, choice in enumerate(row.tries):
            steps, output = self.pace(name, choice).steps(self.of.trial), self.folder / name / f"try_{number}"
            more = {"dataset.eval_split": 0.02, "eval_steps": steps, "max_eval_samples": 512,
                    "save_checkpoint": False}  # fmt: skip
            wall, printed = self.run(self.command(name, choice, steps, output, **more), output)
            loss: float | None = float(re.findall(r"eval_loss=(\S+)", printed)[-1])
            loss = loss if math.isfinite(loss) else None  # JSON knows no NaN
            tried.append(
                {"flags": choice, "steps": steps, "wall_s": wall, "held_out_loss": loss, "seed": self.of.seed}
            )
        finite = [one for one in tried if one["held_out_loss"] is not None]
        best = min(finite, key=lambda one: one["held_out_loss"])["flags"] if finite else {}
        return {"flags": best, "tried": tried}

    def train(self, name: str) -> dict[str, Any]:
        chooser = self.of.rows[name].like or name
        choice = self.once(chooser, "choice", lambda: self.choose(chooser))
        pace = Pace(**self.once(name, "pace", lambda: vars(self.pace(name, choice["flags"]))))
        steps, output = pace.steps(self.of.budget), self.folder / name / f"{self.of.budget:g}s"
        command = self.command(name, choice["flags"], steps, output)
        batch = self.batch_size(name, choice["flags"])
        wall, _ = self.run(command, output)
        return {"command": shlex.join(command), "wall_s": wall, "steps": steps, "batch_size": batch,
                "samples": steps * batch, "pace": vars(pace), "tried": choice["tried"],
                "checkpoint": str(output)}  # fmt: skip

    def play(self, name: str, checkpoint: str) -> dict[str, Any]:
        output = self.folder / name / f"{self.of.budget:g}s_evaluation"
        command = ["python", "scripts/evaluate.py", checkpoint, self.of.base, f"--output={output}"]
        self.run(command, output)
        data = json.loads((output / "evaluation.json").read_text())
        kept = ("n_episodes", "success_rate", "wilson_95", "counterfactual_pairs", "controls", "checkpoint")
        return {"command": shlex.join(command)} | {key: data[key] for key in kept}

    def row(self, name: str) -> dict[str, Any]:
        """Everything about a row but the time of its answers."""
        trained = self.once(name, f"{self.of.budget:g}s_train", lambda: self.train(name))
        played = self.once(name, f"{self.of.budget:g}s_play", lambda: self.play(name, trained["checkpoint"]))
        return {"name": name, "title": self.of.rows[name].title, "train": trained, "evaluate": played}

    def batch_size(self, name: str, choice: dict[str, Any]) -> int:
        flags = self.of.rows[name].flags
        if not flags:
            return self.of.job.train.batch_size
        return (flags | choice).get("batch_size", 8)  # LeRobot's default


def text(value: Any) -> str:
    return str(value) if isinstance(value, str | Path) else json.dumps(value, separators=(",", ":"))


def answers(checkpoints: dict[str, str], job: Job, n: int) -> dict[str, dict[str, Any]]:
    """One observation to a chunk on one thread, all policies in turns, as scripts/latency.py does it."""
    import torch

    torch.set_num_threads(1)
    policies = {name: evaluate.load_policy(Path(path), job) for name, path in checkpoints.items()}
    calls = {name: latency.call(policy) for name, policy in policies.items()}
    samples = common.take_turns(calls, n, latency.WARM)
    networks = {
        name: policy.network if hasattr(policy, "network") else policy.model
        for name, policy in policies.items()
    }
    sizes = {name: {"threads": 1, "params": trained(network)} for name, network in networks.items()}
    return {name: common.row(name, {}, times) | sizes[name] for name, times in samples.items()}


def trained(network: Any) -> int:
    """Parameters that were trained: ours carries a frozen text encoder, theirs gets its numbers from one outside."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| policy | parameters trained | training | samples | success | both of a pair | told nothing | p50 | p99 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        train, played, answer = row["train"], row["evaluate"], row["answers"]
        rates = map(share, (played, played["counterfactual_pairs"], played["controls"]["blank"]))
        lines.append(
            f"| {row['title']} | {answer['params'] / 1e6:.1f} M | {train['wall_s']:.0f} s, {train['steps']:,} steps | "
            f"{train['samples']:,} | {' | '.join(rates)} | {answer['p50_ms']:.1f} ms | {answer['p99_ms']:.1f} ms |"
        )
    return "\n".join(lines)


def share(group: dict[str, Any]) -> str:
    low, high = group["wilson_95"]
    return f"{group['success_rate']:.0%} [{100 * low:.0f}, {100 * high:.0f}]"


def main(comparison: Comparison) -> list[dict[str, Any]]:
    """Every stage that is not done yet; returns, writes and prints the rows."""
    results, stages = Path(comparison.results), Stages(comparison)
    require_writable(comparison.output)
    require_writable(results.parent)
    diffusion = any(
        comparison.rows[name].flags.get("policy.type") == "diffusion" for name in comparison.names
    )
    require(
        not diffusion or importlib.util.find_spec("diffusers") is not None, "diffusers", "none",
        "the package, which LeRobot's Diffusion needs", 'install "diffusers>=0.38,<0.40", or choose rows by --only',
    )  # fmt: skip
    rows = [stages.row(name) for name in comparison.names]
    times = answers(
        {row["name"]: row["train"]["checkpoint"] for row in rows}, comparison.job, comparison.answers
    )
    rows = [row | {"answers": times[row["name"]]} for row in rows]
    packages = versions() | ({"diffusers": metadata.version("diffusers")} if diffusion else {})
    content = {"command": shlex.join(["python", "scripts/compare.py", *sys.argv[1:]]), "budget_s": comparison.budget,
               "trial_s": comparison.trial, "machine": machine(), "versions": packages, "rows": rows}  # fmt: skip
    results.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"\n{table(rows)}\n\nresults: {results}")
    return rows


if __name__ == "__main__":
    try:
        main(load(Comparison, path=CONFIG))
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"compare: {error}")
    except KeyboardInterrupt:
        sys.exit("compare: interrupted; the same command goes on")
