"""What a killed evaluation leaves behind: the rows of the episodes that ended, which need not be played again.

    evaluation.partial.jsonl     beside where evaluation.json will be; of rank r > 0, evaluation.partial.r.jsonl

The first line says what the rows belong to. Each further one is a row, with the time that its part of the
evaluation (from one start to the kill, or to the end) had taken until then. A line is in the hands of the operating
system as soon as its episode has ended: killing the process costs the episodes that were being played, no more.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vla import __version__
from vla.config import Job
from vla.evaluation.episodes import STANDARD, Episode, Row
from vla.evaluation.rollouts import Clock
from vla.evaluation.video import VIDEOS
from vla.provenance import versions
from vla.training.ranks import Ranks

FILES = "evaluation.partial*.jsonl"


@dataclass(frozen=True)
class Line:
    """An episode that ended in a part of the evaluation, and the clock of that part when it did."""

    part: int
    clock: Clock
    row: Row

    @classmethod
    def of(cls, line: Any) -> Line:
        row = line["row"]
        return cls(line["part"], Clock(**line["clock"]), Row(**row | {"episode": Episode(**row["episode"])}))


class Kept:
    """The rows in `folder` that belong to a job and to what plays it, and the file that further ones go to.

    rows: as they were when their episodes ended; clock: of all parts that left any, None where none did.
    Nothing is changed before `begin`. All ranks make it alike, and all get the rows of all.
    """

    def __init__(self, folder: Path, job: Job, player: str, ranks: Ranks) -> None:
        """player: what acts: "expert", or what tells its weights from all others."""
        self.folder, self.ranks = folder, ranks
        self.of = ranks.gather([belonging(job, player)])[0]
        self.differs: set[str] = set()
        self.removed: list[Path] = []  # by `begin`: what is of another evaluation
        lines: list[Line] = []
        clocks: dict[int, dict[Path, Clock]] = {}  # by part, the last one of each rank
        for path in sorted(folder.glob(FILES)):
            of, found = read(path)
            if of != self.of:
                names = of.keys() | self.of.keys() if of else set()
                self.differs |= {name for name in names if of.get(name) != self.of.get(name)}
                films = [Path(line.row.video).name for line in found if line.row.video]
                self.removed += [path, *(folder / VIDEOS / film for film in films)]
                continue
            for line in found:
                clocks.setdefault(line.part, {})[path] = line.clock
            lines += [line for line in found if not line.row.video or (folder / line.row.video).is_file()]
        self.rows = ranks.gather([line.row for line in lines] if ranks.main else [])
        self.part = ranks.gather([max(clocks, default=-1) + 1])[0]
        parts = [Clock.of(list(part.values())) for part in clocks.values()]
        self.clock = Clock.after(parts) if parts else None

    @property
    def films(self) -> set[str]:
        """Names of the rows' films."""
        return {Path(row.video).name for row in self.rows if row.video}

    def begin(self, n_standard: int) -> None:
        """Remove what is of another evaluation, open this rank's file, and say in a line what there was.

        n_standard: how many standard episodes the whole evaluation has.
        """
        if self.ranks.main:
            for path in self.removed:
                path.unlink(missing_ok=True)
        self.ranks.wait()
        self.path = self.folder / FILES.replace("*", f".{self.ranks.index}" if self.ranks.index else "")
        if not self.path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._append({"of": self.of})
        elif not self.path.read_bytes().endswith(b"\n"):  # torn
            with self.path.open("a", encoding="ascii") as file:
                file.write("\n")
        if self.differs:
            names = ", ".join(sorted(self.differs))
            self.ranks.print(f"evaluation: begins anew, what was kept of another differs in {names}")
        elif self.rows:
            standard = sum(row.episode.control == STANDARD for row in self.rows)
            controls = len(self.rows) - standard
            besides = f", and {controls:,} of their controls" if controls else ""
            self.ranks.print(
                f"evaluation: {standard:,} of {n_standard:,} episodes are there already{besides}"
            )

    def add(self, row: Row, clock: Clock) -> None:
        """clock: of this part until now."""
        self._append(asdict(Line(self.part, clock, row)))

    def _append(self, content: dict[str, Any]) -> None:
        with self.path.open("a", encoding="ascii") as file:
            file.write(json.dumps(content) + "\n")


def belonging(job: Job, player: str) -> dict[str, Any]:
    """All that rows depend on, by name, but what changes the last bits alone: where and how the policy computes."""
    free = ("workers", "device", "launch")
    evaluate = {f"evaluate.{name}": value for name, value in asdict(job.evaluate).items() if name not in free}
    packages = {f"{name}'s version": value for name, value in (versions() | {"vla": __version__}).items()}
    of = {"player": player, "env.id": job.env.id, "env.kwargs": job.env.kwargs} | evaluate | packages
    return json.loads(json.dumps(of, default=str))  # as it is read again


def read(path: Path) -> tuple[dict[str, Any], list[Line]]:
    """What a file's rows belong to ({} where the first line does not say), and its lines without torn ones."""
    of: dict[str, Any] = {}
    lines: list[Line] = []
    for number, text in enumerate(path.read_text(encoding="ascii", errors="replace").splitlines()):
        try:
            content = json.loads(text)
            if number == 0:
                of = dict(content["of"])
            else:
                lines.append(Line.of(content))
        except (ValueError, KeyError, TypeError):
            continue
    return of, lines


def remove_kept(folder: Path) -> None:
    """After evaluation.json has been written."""
    for path in folder.glob(FILES):
        path.unlink()
