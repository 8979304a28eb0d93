"""The file of one recorded episode: appended record by record, and readable wherever writing stopped.

`session/episode_000000.journal` holds a Header, then the steps, then an End if there was time for one.
A record is its payload's length and a CRC-32 of length and payload, both little-endian uint32, then
the payload, msgpack. Reading stops at the first record that is cut or damaged and says how many bytes
it left. Pictures are compressed without loss by zlib, level 1: measured for one of 64 / 128 / 224 px,
0.05 / 0.11 / 0.25 ms and 1.3 / 3.5 / 7.7 kB rendered, 0.23 / 0.90 / 2.3 ms and 9.5 / 36 / 105 kB with a
camera's noise. (PNG took 2 to 21 times as long, for 14 % less to 15 % more.)

    A action_dim   P state_dim   J joints

Times are CLOCK_MONOTONIC seconds. Imports neither torch nor lerobot.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from vla.observation import Features

VERSION = 1
PREFIX = struct.Struct("<II")  # length of the payload, CRC-32 of length and payload
LENGTH = struct.Struct("<I")
SUFFIX = ".journal"
F4, F8 = np.dtype("<f4"), np.dtype("<f8")


class JournalError(ValueError):
    """A journal that cannot be read or written: got, expected, remedy."""


@dataclass
class Frame:
    """One policy step: what was seen, and what was done.

    step: number of the policy step; stamp: when its action began; mode: the controller's state ("RUN",
    "HOLD", …); images: camera -> (h, w, 3) uint8, taken at stamps[camera]; state: (P,) float32, measured
    at state_stamp; action: (A,) float32, executed, in the policy's units, NaN where there was none;
    command: (J,) float64, what the safety layer emitted; intervention: whether a person acted;
    lost: how many frames just before this one could not be recorded (set by the recorder).
    """

    step: int
    stamp: float
    mode: str
    task: str
    images: dict[str, np.ndarray]
    stamps: dict[str, float]
    state: np.ndarray
    state_stamp: float
    action: np.ndarray
    command: np.ndarray
    intervention: bool = False
    lost: int = 0


class Header(msgspec.Struct, frozen=True, tag="header", forbid_unknown_fields=True):
    """What an episode's numbers mean. meta: what else whoever began it wanted to say."""

    version: int
    software: str
    robot: str
    joints: tuple[str, ...]
    cameras: dict[str, tuple[int, int]]  # name -> (height, width)
    state_dim: int
    action_dim: int
    fps: int
    model: str  # sha256 of the weights that act; empty: none
    episode: int
    task: str
    begun: float
    meta: dict[str, Any] = {}

    @property
    def features(self) -> Features:
        return Features(dict(self.cameras), self.state_dim, self.action_dim, self.fps)


class Step(msgspec.Struct, tag="step", forbid_unknown_fields=True):
    """A Frame as bytes: state (P,) and action (A,) float32, command (J,) float64, pictures compressed."""

    step: int
    stamp: float
    mode: str
    task: str
    stamps: dict[str, float]
    state: bytes
    state_stamp: float
    action: bytes
    command: bytes
    intervention: bool
    lost: int
    images: dict[str, bytes] = {}


class End(msgspec.Struct, frozen=True, tag="end", forbid_unknown_fields=True):
    """How an episode ended, and how many of its last frames could not be recorded."""

    stamp: float
    outcome: dict[str, Any]
    lost: int = 0


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Header | Step | End).decode


def record(message: Header | Step | End) -> bytes:
    """A message as it stands in the file."""
    payload = _encode(message)
    return PREFIX.pack(len(payload), checksum(payload)) + payload


def checksum(payload: Any) -> int:
    """The length counts as well, or a run of zeros would pass as empty records."""
    return zlib.crc32(payload, zlib.crc32(LENGTH.pack(len(payload))))


def compress(image: Any) -> bytes:
    """Pixels (h, w, 3) uint8, contiguous, as bytes that `expand` gives back exactly."""
    return zlib.compress(image, 1)


def expand(data: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    return np.frombuffer(zlib.decompress(data), np.uint8).reshape(shape)


def to_step(frame: Frame) -> Step:
    """A frame without its pictures, as it travels."""
    return Step(
        step=int(frame.step),
        stamp=float(frame.stamp),
        mode=str(frame.mode),
        task=str(frame.task),
        stamps={name: float(stamp) for name, stamp in frame.stamps.items()},
        state=np.asarray(frame.state, F4).tobytes(),
        state_stamp=float(frame.state_stamp),
        action=np.asarray(frame.action, F4).tobytes(),
        command=np.asarray(frame.command, F8).tobytes(),
        intervention=bool(frame.intervention),
        lost=int(frame.lost),
    )


def to_frame(step: Step, header: Header) -> Frame:
    """The inverse of `to_step` with compressed pictures."""
    return Frame(
        step=step.step,
        stamp=step.stamp,
        mode=step.mode,
        task=step.task,
        images={name: expand(step.images[name], (*size, 3)) for name, size in header.cameras.items()},
        stamps=step.stamps,
        state=np.frombuffer(step.state, F4),
        state_stamp=step.state_stamp,
        action=np.frombuffer(step.action, F4),
        command=np.frombuffer(step.command, F8),
        intervention=step.intervention,
        lost=step.lost,
    )


def records(data: Any) -> Iterator[tuple[int, Header | Step | End]]:
    """Every whole record from the front, with the offset behind it; stops at the first that is not.

    Raises JournalError for a whole record that is none of this version.
    """
    view, position = memoryview(data), 0
    while position + PREFIX.size <= len(view):
        length, expected = PREFIX.unpack_from(view, position)
        payload = view[position + PREFIX.size : position + PREFIX.size + length]
        if len(payload) != length or checksum(payload) != expected:
            return
        try:
            message = _decode(payload)
        except msgspec.DecodeError as problem:
            raise JournalError(
                f"A record that this version does not know. got: {problem} at byte {position}. expected: a "
                f"journal of version {VERSION}. remedy: read it with the software that wrote it."
            ) from None
        position += PREFIX.size + length
        yield position, message


@dataclass(frozen=True)
class Journal:
    """One recorded episode, finished or cut. end: None when it was not finished; ignored: bytes behind
    the last whole record; ends: where its frames end in the file.
    """

    path: Path
    header: Header
    end: End | None
    ignored: int
    ends: tuple[int, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.ends)

    @classmethod
    def open(cls, path: str | Path) -> Journal:
        """Read what there is. Raises JournalError when not even a header is, or one of another version."""
        path = Path(path)
        header, end, ends, whole = None, None, [], 0
        data = contents(path)
        for whole, message in records(data):
            if isinstance(message, Step) and header is not None:
                ends.append(whole)
            elif isinstance(message, End):
                end = message
            elif isinstance(message, Header) and header is None:
                header = message
        if header is not None and header.version != VERSION:
            raise JournalError(
                f"{path} has another format. got: version {header.version}. expected: version {VERSION}. "
                "remedy: read it with the software that wrote it."
            )
        if header is None:
            raise JournalError(
                f"{path} is no journal. got: {len(data)} bytes without a whole header. expected: a file that "
                "scripts/control.py recorded. remedy: leave it out, nothing of it can be read."
            )
        return cls(path, header, end, len(data) - whole, tuple(ends))

    def frames(self) -> Iterator[Frame]:
        """The recorded frames, one at a time: an episode may be larger than memory."""
        data, wanted = contents(self.path), set(self.ends)
        for position, message in records(data):
            if position in wanted and isinstance(message, Step):
                yield to_frame(message, self.header)


def contents(path: Path) -> Any:
    """A file's bytes, mapped; an empty file cannot be."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""


def episode_path(session: str | Path, episode: int) -> Path:
    return Path(session) / f"episode_{episode:06d}{SUFFIX}"


def journals(session: str | Path) -> list[Path]:
    """The session's journals, oldest first."""
    return sorted(Path(session).glob(f"episode_[0-9]*{SUFFIX}"))
