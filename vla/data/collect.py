"""Turns a session of recorded control (journals) into a LeRobotDataset v3.0 to train on.

A demonstration must be one uninterrupted motion. So an episode is split wherever frames are missing
in between: left out because the controller was not running, lost while recording, or without finite
numbers. Pieces too short to show anything are left out. `<dataset>` appears complete or not at all; a
killed run leaves `<dataset>.parts`, which the next one clears away.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vla.checks import one_of
from vla.data.journal import Frame, Header, Journal, JournalError, journals
from vla.data.lerobot_writer import SHORTEST, create_dataset, dataset_features
from vla.data.record import alone
from vla.observation import ACTION, IMAGES, STATE, TASK

KEEP = ("run", "all")
RUN = "RUN"
INTERVENTION = "intervention"  # LeRobot's name and shape
SUMMARY = Path("meta") / "collection.json"
LATE = 1.5  # times a step's duration between two frames: one is missing
BACKLOG = 64  # frames a camera that may wait for the encoder


@dataclass
class Collection:
    """What became of a session; `<dataset>/meta/collection.json`.

    left_out: frames that are not in the dataset, by reason; lost: frames that recording missed;
    ignored: journal -> bytes behind its last whole record; unreadable: journals without a header;
    source: for each episode its journal, steps, interventions, outcome (None: not finished), model and meta.
    """

    session: str
    keep: str
    robot: str
    joints: tuple[str, ...]
    frames: int = 0
    interventions: int = 0
    lost: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    source: list[dict[str, Any]] = field(default_factory=list)

    def leave_out(self, reason: str, frames: int) -> None:
        self.left_out[reason] = self.left_out.get(reason, 0) + frames

    def __str__(self) -> str:
        notes = [
            f"{self.interventions} by a person" if self.interventions else "",
            *(f"left out {n} ({reason})" for reason, n in sorted(self.left_out.items())),
            f"{self.lost} lost while recording" if self.lost else "",
            *(f"{name}: {n} damaged bytes ignored" for name, n in self.ignored.items()),
            *(f"{name}: nothing readable" for name in self.unreadable),
        ]
        return f"{len(self.source)} episodes, " + ", ".join([f"{self.frames} frames", *filter(None, notes)])


def collect(session: str | Path, root: str | Path, keep: str = "run", vcodec: str = "h264") -> Collection:
    """Write the session's frames to a dataset in `root`; keep: "run", or "all" of the controller's states.

    Raises ValueError when `root` is taken, or the session is being recorded, mixes robots, or has
    no frame to keep; RuntimeError while another process collects into the same place.
    """
    session, root = Path(session), Path(root)
    one_of("keep", keep, KEEP)
    if root.exists():
        raise refusal(
            "The dataset's place is taken.", root, "nothing there", "choose another, or move it away"
        )
    found, unreadable = open_all(session)
    header = common_header(found)
    result = Collection(str(session), keep, header.robot, header.joints, unreadable=unreadable)
    result.ignored = {journal.path.name: journal.ignored for journal in found if journal.ignored}
    parts = root.with_name(root.name + ".parts")
    parts.mkdir(parents=True, exist_ok=True)
    with alone(parts):
        unfinished = parts / "dataset"
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            write(found, unfinished, result, vcodec)
            if not result.frames:
                raise refusal(
                    f"Nothing of {session} can be kept.", f"left out {result.left_out}",
                    f"{SHORTEST} frames in a row", "look at the journals, or use --keep=all",
                )  # fmt: skip
            text = json.dumps(asdict(result), indent=1) + "\n"
            (unfinished / SUMMARY).write_text(text, encoding="utf-8")
            unfinished.rename(root)
        finally:
            shutil.rmtree(parts, ignore_errors=True)
    return result


def refusal(what: str, got: Any, expected: str, remedy: str) -> ValueError:
    return ValueError(f"{what} got: {got}. expected: {expected}. remedy: {remedy}.")


def open_all(session: Path) -> tuple[list[Journal], list[str]]:
    """The session's journals, and the names of those of which not even a header was written."""
    found, unreadable = [], []
    for path in journals(session):
        if being_written(path):
            raise refusal(
                f"{session} is being recorded.", f"{path.name} in use", "an ended session", "end it first"
            )
        try:
            found.append(Journal.open(path))
        except JournalError as problem:
            if "whole header" not in str(problem):
                raise
            unreadable.append(path.name)
    if not found:
        raise refusal(
            f"{session} is no recorded session.", f"{len(unreadable)} unreadable journals",
            "at least one episode_000000.journal", "give the folder that scripts/control.py recorded to",
        )  # fmt: skip
    return found, unreadable


def being_written(path: Path) -> bool:
    """Whether the recorder holds the journal."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def common_header(found: list[Journal]) -> Header:
    """The first header. Raises ValueError for a journal whose frames mean something else."""
    first = found[0].header
    for journal in found[1:]:
        for name in ("robot", "joints", "cameras", "state_dim", "action_dim", "fps"):
            got, expected = getattr(journal.header, name), getattr(first, name)
            if got != expected:
                raise refusal(
                    f"{journal.path} does not belong to its session: {name}.", got, str(expected),
                    "collect each robot's journals on their own",
                )  # fmt: skip
    return first


def pieces(journal: Journal, result: Collection) -> Iterator[tuple[bool, Frame]]:
    """The frames to keep, each with whether it follows the one before without a gap."""
    previous: float | None = None
    for frame in journal.frames():
        result.lost += frame.lost
        reason = ""
        if result.keep == "run" and frame.mode != RUN:
            reason = frame.mode
        elif not (np.isfinite(frame.state).all() and np.isfinite(frame.action).all()):
            reason = "numbers that are not finite"
        if reason:
            result.leave_out(reason, 1)
            previous = None
            continue
        late = previous is None or (frame.stamp - previous) * journal.header.fps > LATE
        yield not (late or frame.lost), frame
        previous = frame.stamp
    if journal.end is not None:
        result.lost += journal.end.lost


def write(found: list[Journal], root: Path, result: Collection, vcodec: str) -> None:
    """Write every piece as an episode. An empty dataset is left when there is none."""
    features = found[0].header.features
    columns = dataset_features(features) | {INTERVENTION: {"dtype": "bool", "shape": (1,), "names": None}}
    dataset = create_dataset(root, "collected", features.fps, columns, vcodec, episodes=10)
    bar = tqdm(total=sum(map(len, found)), desc="collect", unit="frame")
    with bar:
        for journal in found:
            piece: list[Frame] = []  # what is not in the dataset yet: the first frames, until they are enough
            begun = False
            for follows, frame in pieces(journal, result):
                if not follows:
                    finish(dataset, begun, piece, result)
                    piece, begun = [], False
                piece.append(frame)
                if begun or len(piece) == SHORTEST:
                    for ready in piece:
                        add(dataset, ready, journal, begun, result)
                        begun = True
                    piece = []
                bar.update()
            finish(dataset, begun, piece, result)
    dataset.finalize()


def finish(dataset: Any, begun: bool, piece: list[Frame], result: Collection) -> None:
    """End the piece: an episode of the dataset, or too short for one."""
    if begun:
        dataset.save_episode()
    elif piece:
        result.leave_out("pieces too short", len(piece))


def add(dataset: Any, frame: Frame, journal: Journal, begun: bool, result: Collection) -> None:
    """Add a frame to the dataset's open episode, and to the account of it."""
    if not begun:
        end, header = journal.end, journal.header
        result.source.append(
            {"journal": journal.path.name, "first_step": frame.step, "frames": 0, "interventions": 0}
            | {"outcome": end and end.outcome, "model": header.model, "meta": header.meta}
        )
    encoder = dataset.writer._streaming_encoder  # lerobot never says how far its encoder is
    while any(queue.qsize() > BACKLOG for queue in encoder._frame_queues.values()):
        time.sleep(0.005)
    dataset.add_frame(
        {IMAGES + name: image for name, image in frame.images.items()}
        | {STATE: frame.state, ACTION: frame.action, TASK: frame.task}
        | {INTERVENTION: np.array([frame.intervention])}
    )
    result.frames += 1
    result.interventions += frame.intervention
    result.source[-1]["frames"] += 1
    result.source[-1]["interventions"] += frame.intervention
