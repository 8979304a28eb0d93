"""Where the numbers of a run go: metrics.jsonl always, wandb unless disabled."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

from vla.config import Job


class Tracker:
    """Writes one JSON row a call; on resume the rows behind the resumed step are dropped."""

    def __init__(self, job: Job, step: int = 0) -> None:
        self.path = Path(job.output) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = self.path.read_text().splitlines() if self.path.exists() and step else []
        partial = self.path.with_suffix(".jsonl.partial")
        partial.write_text("".join(row + "\n" for row in rows if _is_kept(row, step)))
        partial.replace(self.path)
        self.started = time.monotonic()
        self.run: Any = None
        mode: Any = job.train.wandb
        if mode == "auto":
            mode = "online" if _has_key() else "offline"
        if mode != "disabled":
            import wandb

            self.run = wandb.init(
                project=job.train.wandb_project, name=Path(job.output).name, dir=job.output, mode=mode,
                config=dataclasses.asdict(job), settings=wandb.Settings(silent=True),
            )  # fmt: skip

    def log(self, step: int, **numbers: float) -> None:
        """numbers: anything JSON holds; `seconds` since the start is added."""
        row = {"step": step, "seconds": round(time.monotonic() - self.started, 2), **numbers}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self.run is not None:
            self.run.log(numbers, step=step)

    def log_videos(self, step: int, paths: list[Path]) -> None:
        if self.run is not None and paths:
            import wandb

            self.run.log({f"video/{p.stem}": wandb.Video(str(p), format="mp4") for p in paths}, step=step)

    def close(self) -> None:
        if self.run is not None:
            self.run.finish()


class Silent:
    """The tracker of a rank that writes nothing."""

    def log(self, step: int, **numbers: float) -> None: ...

    def log_videos(self, step: int, paths: list[Path]) -> None: ...

    def close(self) -> None: ...


def _is_kept(row: str, step: int) -> bool:
    try:
        return json.loads(row)["step"] <= step
    except json.JSONDecodeError:  # a kill tore the last row
        return False


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path.home() / ".netrc"
    return netrc.is_file() and "wandb" in netrc.read_text()
