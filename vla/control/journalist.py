"""The recorder's process: takes frames out of the ring, compresses them, appends them to journals.

    python -m vla.control.journalist SESSION MEMORY PIPE      (descriptors; recorder.py starts it)

A record is written whole or not at all: what a full disk cut is taken back, the frame counts as lost, and
the next one that fits tells how many are missing before it. Header and End are kept and tried again. It
ends once the controller's end of the pipe is closed and everything before that is written.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from vla.control.recorder import LOST, PROBLEM, WRITTEN
from vla.control.ring import Receiver
from vla.data.journal import End, Header, Step, compress, episode_path, record

SYNC_EVERY = 1.0  # seconds; a power failure costs no more than that
RETRY_EVERY = 0.5
NICE = 10

_decode = msgspec.msgpack.Decoder(Header | Step | End).decode


class Episode:
    """An open journal. Its file appears with the first write that succeeds."""

    def __init__(self, path: Path, header: Header) -> None:
        self.path, self.header = path, header
        self._file = -1
        self._size = 0  # of what is whole
        self._torn = False  # there may be more behind it
        self._synced = time.monotonic()
        self._unsynced = False
        self._kept = record(header)  # what must come before anything else
        self.lost = 0  # frames since the last one written

    def write(self, step: Step) -> None:
        """Append a frame. Raises OSError when it could not be; it counts as lost then."""
        lost, step.lost = step.lost, step.lost + self.lost
        try:
            self._append(record(step))
        except OSError:
            self.lost += lost + 1
            raise
        self.lost = 0

    def end(self, end: End) -> None:
        """Append the End, or keep it for `retry`."""
        self._kept += record(End(end.stamp, end.outcome, end.lost + self.lost))
        self.retry()

    def retry(self) -> bool:
        """Write what was kept; whether there was anything. Raises OSError."""
        if self._kept:
            self._append(b"")
            return True
        return False

    def _append(self, data: bytes) -> None:
        if self._file < 0:
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
            with contextlib.suppress(OSError):  # says that it is being written; some file systems cannot
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if self._torn:
            os.ftruncate(self._file, self._size)
        self._torn = True
        whole = rest = memoryview(self._kept + data)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            with contextlib.suppress(OSError):  # else before the next one
                os.ftruncate(self._file, self._size)
                self._torn = False
            raise
        self._torn = False
        self._size += len(whole)
        self._kept = b""
        self._unsynced = True

    def sync(self, now: float) -> None:
        """Have the disk itself keep what was written, if that was last done a second ago. Raises OSError."""
        if self._unsynced and now >= self._synced + SYNC_EVERY:
            self._synced = now
            os.fdatasync(self._file)
            self._unsynced = False

    def close(self) -> None:
        """Raises OSError."""
        if self._file >= 0:
            try:
                self.sync(self._synced + SYNC_EVERY)
            finally:
                os.close(self._file)
                self._file = -1


class Journalist:
    """Obeys the ring's messages: B and a Header, F and a Step with its pictures, E and an End."""

    def __init__(self, session: Path, ring: Receiver) -> None:
        self.session, self.ring = session, ring
        self.episode: Episode | None = None
        self._over = False  # the episode has ended, its last words are not written yet

    def run(self) -> None:
        parent = os.getppid()
        with contextlib.suppress(EOFError):
            while True:
                message = self.ring.receive(RETRY_EVERY)
                if message is not None:
                    self._attempt(self._obey, message)
                elif os.getppid() != parent:
                    break  # killed, with its end of the pipe open in some child
                elif self.episode is not None:
                    self._attempt(self._retry)
                self._sync()
        self._attempt(self._finish)

    def _attempt(self, write: Callable[..., bool], *arguments: Any) -> None:
        """A problem stays until something has been written again."""
        try:
            if write(*arguments):
                self.ring.words[PROBLEM] = 0
        except OSError as problem:
            self.ring.words[PROBLEM] = problem.errno or -1

    def _obey(self, message: memoryview) -> bool:
        kind, body = bytes(message[:1]), message[1:]
        if kind == b"F":
            return self._frame(body)
        note = _decode(body)
        if isinstance(note, Header):
            self._attempt(self._finish)
            self.episode = Episode(episode_path(self.session, note.episode), note)
            return self.episode.retry()
        assert isinstance(note, End)
        assert self.episode is not None
        self._over = True
        self.episode.end(note)
        return self._finish()

    def _frame(self, body: memoryview) -> bool:
        length = int.from_bytes(body[:4], "little")
        step = _decode(body[4 : 4 + length])
        assert isinstance(step, Step)
        assert self.episode is not None
        position, images = 4 + length, {}
        for name, (h, w) in self.episode.header.cameras.items():
            images[name] = compress(body[position : position + 3 * h * w])
            position += 3 * h * w
        step.images = images
        try:
            self.episode.write(step)
        except OSError:
            self.ring.words[LOST] += 1
            raise
        self.ring.words[WRITTEN] += 1
        return True

    def _retry(self) -> bool:
        assert self.episode is not None
        wrote = self.episode.retry()
        return self._finish() if self._over else wrote

    def _finish(self) -> bool:
        """Close the open journal, whatever could not be written to it. Raises OSError."""
        episode, self.episode, self._over = self.episode, None, False
        if episode is None:
            return False
        try:
            episode.retry()
        finally:
            episode.close()
        return True

    def _sync(self) -> None:
        if self.episode is not None:
            try:
                self.episode.sync(time.monotonic())
            except OSError as problem:
                self.ring.words[PROBLEM] = problem.errno or -1


def main(session: str, memory: str, pipe: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the controller's business: this process ends after it
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with contextlib.suppress(OSError):  # the loop's priority is not ours
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    os.nice(NICE)
    Journalist(Path(session), Receiver(int(memory), int(pipe))).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
