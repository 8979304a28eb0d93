"""Meta-World MT50 in one command: record demonstrations, train one policy, play unseen scenes, write the table.

    python scripts/mt50.py [CONFIG.yaml] [--minutes=9] [--stages=record,train] [--results=FILE] [--train.lr=1e-3 …]

CONFIG: configs/mt50.yaml unless said otherwise. Stages, all by default, each begun when the one before is done:
record · train · evaluate · default_renderer (the same checkpoint, pictures as Meta-World draws them) · lerobot
(through LeRobot's own environment, a fifth of the episodes; left out where lerobot is missing) · report (writes
FILE, results/<CONFIG's name>.json by default, and prints the table, whatever there is so far).

--minutes: end in time, cleanly, and say what is left; the same command goes on. What is done is not repeated. The
exit code is 1 while something is left. What a stage prints goes to <output>/logs/, its seconds, over all runs, to
<output>/mt50_times.json. Another configuration than a stage was begun with is refused.

A machine without a network needs, beside torch, timm and transformers with what these need, scipy and imageio, the
wheels of mujoco 3.3.0, metaworld 3.1.1, gymnasium, farama-notifications, glfw, PyOpenGL, draccus, mergedeep,
typing-inspect and mypy-extensions (47 MB, metaworld 37 of them), and PYTHONPATH=<the repository>. For films it needs
av (40 MB), for the stage lerobot that wheel (2 MB) without its dependencies.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import metaworld
from gpu import ROOT, within

from envs.metaworld_tasks import chosen
from vla.checks import ConfigError, flat, require
from vla.config import Job, load
from vla.provenance import portable
from vla.system import require_writable

ENVIRONMENT, THEIRS = "envs:Metaworld-v0", "envs:LeRobotMetaworld-v0"
FEWER = 5  # LeRobot's environment draws 480 x 480 pixels at every step
LEAST_S = 10.0  # nothing is begun with less time than this
TIMES = "mt50_times.json"
GRACE_S = 20.0  # less than scripts/gpu.py leaves to this one
# How a stage runs, not what comes out: may change while it is under way.
HOW = {
    "record.workers", "record.shard_episodes", "train.device", "train.threads", "train.log_every", "train.save_every",
    "train.keep", "train.capture", "train.compile", "train.accumulate", "train.wandb", "train.wandb_project",
    "train.evaluate_every", "train.evaluate_episodes", "evaluate.workers", "evaluate.device", "evaluate.launch",
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A script that goes on where it was ended. sections: of the job, what its result depends on."""

    script: str
    sections: tuple[str, ...]
    after: str = ""
    needs: str = ""  # a package that may be missing


PLAYED = ("env", "evaluate")
STAGES = {
    "record": Stage("record.py", ("env", "record")),
    "train": Stage("train.py", ("seed", "data", "model", "train"), after="record"),
    "evaluate": Stage("evaluate.py", PLAYED, after="train"),
    "default_renderer": Stage("evaluate.py", PLAYED, after="train"),
    "lerobot": Stage("evaluate.py", PLAYED, after="train", needs="lerobot"),
}


class Times:
    """<output>/mt50_times.json: of every stage whether it is done, its seconds and runs, and what it was begun with."""

    def __init__(self, output: Path) -> None:
        self.path = output / TIMES
        self.stages: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            self.stages = json.loads(self.path.read_text(encoding="utf-8"))

    def done(self, stage: str) -> bool:
        return self.stages.get(stage, {}).get("done", False)

    def minutes(self) -> dict[str, float]:
        return {name: round(entry["seconds"] / 60, 2) for name, entry in self.stages.items()}

    def save(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.stages, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)


@dataclass(frozen=True)
class Run:
    """What a call is about. config, overrides: as given, for the scripts; job: what they come to."""

    config: Path
    overrides: tuple[str, ...]
    job: Job

    @property
    def output(self) -> Path:
        return Path(self.job.output)

    @property
    def tasks(self) -> tuple[str, ...]:
        return chosen(self.job.env.kwargs.get("tasks", "mt50"))

    def command(self, name: str) -> list[str]:
        """A stage's script and its arguments."""
        words = [str(ROOT / "scripts" / STAGES[name].script)]
        given = [str(self.config), *self.overrides]
        if name == "record":
            return words + given
        if name == "train":
            return [*words, *given, "--resume"]
        kwargs, episodes = self.job.env.kwargs, self.job.evaluate.episodes
        changed = [f"--output={self.output / name}"]
        if name != "evaluate" or find_spec("av") is None:  # a film needs a picture of every step
            changed.append("--evaluate.videos=0")
        if name == "default_renderer":
            changed.append(f"--env.kwargs={json.dumps(kwargs | {'preset': 'default'})}")
        if name == "lerobot":
            theirs = {key: kwargs[key] for key in ("tasks", "pixels") if key in kwargs}
            per_task = -(-episodes // len(self.tasks) // FEWER)
            changed += [f"--env.id={THEIRS}", f"--env.kwargs={json.dumps(theirs)}"]
            changed.append(f"--evaluate.episodes={per_task * len(self.tasks)}")
        return [*words, self.job.output, *given, *changed]

    def fields(self, stage: str) -> dict[str, Any]:
        """The fields of the job that a stage's result depends on, as JSON gives them back."""
        sections = {name: value for name, value in asdict(self.job).items() if name in STAGES[stage].sections}
        fields = flat(json.loads(json.dumps(portable(sections))))
        return {name: value for name, value in fields.items() if name not in HOW}


def check_job(run: Run) -> None:
    """Raises ConfigError for what would only show in the report, hours later."""
    job = run.job
    require(job.env.id == ENVIRONMENT, "env.id", job.env.id, ENVIRONMENT)
    try:
        n = len(run.tasks)
    except ValueError as error:
        raise ValueError(f"env.kwargs.{error}") from None
    for name, episodes in (("record", job.record.episodes), ("evaluate", job.evaluate.episodes)):
        require(episodes % n == 0, f"{name}.episodes", episodes, f"a multiple of the number of tasks, {n}")
    splits = job.evaluate.splits
    require(not splits, "evaluate.splits", splits, "none", "choose tasks by env.kwargs.tasks")


def require_same(run: Run, times: Times) -> None:
    """Raises ConfigError where a stage was begun with another configuration: results must not be mixed."""
    for name, entry in times.stages.items():
        now, before = run.fields(name), entry["config"]
        changed = sorted(key for key in now.keys() | before.keys() if now.get(key) != before.get(key))
        if changed:
            raise ConfigError(
                ", ".join(changed), ", ".join(str(now.get(key)) for key in changed),
                f"{', '.join(str(before.get(key)) for key in changed)}, with which {name} was begun in {run.output}",
                f"remove {run.output}, or choose another --output (--data.root={run.job.dataset_root} keeps the "
                "demonstrations)",
            )  # fmt: skip


def main(run: Run, names: list[str], minutes: float, results: Path) -> int:
    """Carry out what is not done, until the time is over; the number of stages that are left."""
    end = time.monotonic() + 60 * minutes
    require_writable(run.output)
    with alone(run.output) as lock:
        times = Times(run.output)
        check_job(run)
        require_same(run, times)
        left = [name for name in names if name in STAGES and not carried_out(run, name, times, end, lock)]
        if left:
            print(f"mt50: left: {', '.join(left)}. The same command goes on.", flush=True)
        if "report" in names:
            report(run, times, results)
    return len(left)


def carried_out(run: Run, name: str, times: Times, end: float, lock: int) -> bool:
    """Whether a stage is done in the end, or cannot be done here."""
    stage, seconds = STAGES[name], end - time.monotonic()
    if times.done(name):
        return True
    if stage.needs and find_spec(stage.needs) is None:
        print(f"{name}: left out, needs {stage.needs}", flush=True)
        return True
    if stage.after and not times.done(stage.after):
        print(f"{name}: waits for {stage.after}", flush=True)
        return False
    if seconds < LEAST_S:
        print(f"{name}: no time left", flush=True)
        return False
    if name == "evaluate" and find_spec("av") is None and run.job.evaluate.videos:
        print(f"{name}: without films, which need av", flush=True)
    log = run.output / "logs" / f"{name}.log"
    log.parent.mkdir(exist_ok=True)
    new = {"done": False, "seconds": 0.0, "runs": 0, "config": run.fields(name)}
    entry = times.stages.setdefault(name, new)
    entry["runs"] += 1
    before = entry["seconds"]

    def beat(took: float) -> None:
        entry["seconds"] = round(before + took, 1)
        times.save()

    beat(0.0)
    print(f"{name}: see {log}", flush=True)
    code = within(seconds, run.command(name), log, grace=GRACE_S, beat=beat, keep=(lock,))
    entry["done"] = code == 0
    times.save()
    said = {0: "done", None: "out of time"}.get(code, f"failed with exit code {code}")
    print(f"{name}: {said}, {entry['seconds']:.0f} s in {entry['runs']} runs", flush=True)
    if code:
        print(tail(log), flush=True)
    return entry["done"]


def tail(log: Path, lines: int = 8) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def report(run: Run, times: Times, results: Path) -> None:
    """Print the table with what there is; write the results when the policy has been evaluated."""
    measured: dict[str, Any] | None = None
    if times.done("evaluate"):
        without = {"lerobot": "lerobot is not installed there"} if find_spec("lerobot") is None else {}
        words = [word.partition("=") for word in (str(run.config), *run.overrides)]
        command = shlex.join(["python", "scripts/mt50.py", *("".join(map(portable, word)) for word in words)])
        measured = metaworld.result(run.output, run.job.dataset_root, command, times.minutes(), without)
        results.parent.mkdir(parents=True, exist_ok=True)
        results.write_text(json.dumps(measured, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print("\n" + metaworld.table(measured) + "\n\n" + metaworld.differences(measured, asdict(run.job)))
    if measured:
        print(f"\n{metaworld.worst(measured, run.output / 'evaluate' / 'videos')}\nmt50: {results}")


@contextmanager
def alone(output: Path) -> Iterator[int]:
    """Hold the output against a second call. What this one starts holds it too, and so does what is left of a call
    that was killed.
    """
    with open(output / "mt50.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"{output} is in use. got: a lock held by another call, or by what a killed one left running. "
                "expected: nobody. remedy: wait for it, or end it (fuser finds it by mt50.lock)."
            ) from None
        yield lock.fileno()


def from_command_line(argv: list[str]) -> tuple[Run, list[str], float, Path]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="python scripts/mt50.py [CONFIG.yaml] [--minutes=N] [--stages=A,B] [--results=FILE] [--a.b=c …]",
    )  # fmt: skip
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="for this call; no end by default"
    )
    parser.add_argument(
        "--stages", default=",".join([*STAGES, "report"]), help="some, by commas; all by default"
    )
    parser.add_argument("--results", type=Path, help="results/<CONFIG's name>.json by default")
    given = bool(argv) and not argv[0].startswith("-")
    config = Path(argv[0]) if given else ROOT / "configs" / "mt50.yaml"
    own, overrides = parser.parse_known_args(argv[given:])
    names = own.stages.split(",")
    known = [*STAGES, "report"]
    require(set(names) <= set(known), "--stages", own.stages, f"some of {','.join(known)}")
    run = Run(config, tuple(overrides), load(Job, overrides, path=config))
    names.sort(key=known.index)
    return run, names, own.minutes, own.results or Path("results") / f"{config.stem}.json"


if __name__ == "__main__":
    # Ended as by Ctrl-C. A shell's background jobs ignore that one, and would hand it on to every stage.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    try:
        sys.exit(1 if main(*from_command_line(sys.argv[1:])) else 0)
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"mt50: {error}")
    except KeyboardInterrupt:
        sys.exit("mt50: interrupted; the same command goes on")
