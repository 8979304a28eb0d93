"""Records what a controlled robot saw and did, without ever holding up the loop that controls it.

The controller's `Recorder` copies a frame into shared memory (ring.py) and goes on; journalist.py, a
process of its own, compresses and writes. A full ring costs frames, which are counted and marked in
the journal; a dead recorder or a full disk costs the recording and nothing else. If the controller
dies, what it handed over is still written.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

import vla
from vla.control.ring import Full, Sender
from vla.data.journal import VERSION, End, Frame, Header, JournalError, journals, to_step
from vla.observation import Features

BUFFER_SECONDS = 5.0  # of frames that fit into the ring: what a slow disk may take at once
LEAST_BUFFER = 2**20  # bytes
LARGEST_NOTE = 2**16  # bytes of `meta` or `outcome`
LARGEST_STEP = 2**13  # bytes of a frame without its pictures
# Words of the ring that tell how the recorder fares.
WRITTEN, LOST, PROBLEM = 1, 2, 3
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

UINT8 = np.dtype("uint8")

_encode = msgspec.msgpack.Encoder().encode


class Recorder:
    """The controller's side. `begin`, `add` and `end` neither wait nor raise; one thread calls them.

    dropped: frames for which there was no room or nobody to take them; refused: frames that do not fit
    the robot, or came outside an episode, the last for the reason in `misfit`.
    """

    def __init__(
        self,
        session: str | Path,
        features: Features,
        joints: tuple[str, ...],
        robot: str,
        buffer_seconds: float = BUFFER_SECONDS,
    ) -> None:
        """Start the recorder process; a session that exists is continued with its next episode.

        Raises JournalError when the folder cannot be written to.
        """
        self.features, self.joints, self.robot = features, tuple(joints), robot
        self.session = Path(session)
        try:
            self.session.mkdir(parents=True, exist_ok=True)
            writable = os.access(self.session, os.W_OK | os.X_OK)
        except OSError:
            writable = False
        if not writable:
            raise JournalError(
                f"No place to record. got: {str(session)!r}. expected: a folder that can be written to. "
                "remedy: choose another session, or correct its permissions."
            )
        taken = [int(path.stem.rpartition("_")[2]) for path in journals(self.session)]
        self.episode = max(taken, default=-1)  # the last one begun
        self.dropped = self.refused = self._accepted = 0
        self.misfit = ""
        self._open = False
        self._gone = False  # nobody reads the ring any more
        self._unmarked = 0  # dropped frames that no later frame tells of yet
        self._dropping = False
        self._notes: deque[bytes] = deque()  # begins and ends that found no room: never dropped, sent first
        self._shapes = {name: (*size, 3) for name, size in sorted(features.cameras.items())}
        self._sizes = ((features.state_dim,), (features.action_dim,), (len(self.joints),))
        frame = sum(h * w * 3 for h, w in features.cameras.values()) + LARGEST_STEP
        self._ring = Sender(max(LEAST_BUFFER, 4 * frame, int(buffer_seconds * features.fps * frame)))
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        memory, pipe = self._ring.receiver
        command = [
            sys.executable,
            "-P",
            "-m",
            "vla.control.journalist",
            str(self.session),
            str(memory),
            str(pipe),
        ]
        source = str(Path(vla.__file__).parents[1])
        path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, pass_fds=(memory, pipe), env=environment, stdin=subprocess.DEVNULL
        )  # its errors go where the controller's do
        os.close(pipe)
        return process

    def begin(self, task: str, model: str = "", **meta: Any) -> int:
        """Begin an episode (an open one ends first) and return its number. model: sha256 of the weights."""
        if self._open:
            self.end({"ended": "another episode began"})
        self.episode += 1
        self._open = True
        f = self.features
        self._note(
            b"B",
            Header(
                version=VERSION,
                software=vla.__version__,
                robot=self.robot,
                joints=self.joints,
                cameras={name: (int(h), int(w)) for name, (h, w) in sorted(f.cameras.items())},
                state_dim=int(f.state_dim),
                action_dim=int(f.action_dim),
                fps=int(f.fps),
                model=model,
                episode=self.episode,
                task=readable(task)[:1000],  # frames carry their own
                begun=time.monotonic(),
                meta=plain(meta),
            ),
        )
        return self.episode

    def add(self, frame: Frame) -> bool:
        """Hand a frame over, copied: its arrays may be used again. False: it will be missing."""
        try:
            self._require_fit(frame)
            step = to_step(frame)
            step.lost = self._unmarked
            meta = _encode(step)
            if len(meta) > LARGEST_STEP:
                raise ValueError(
                    f"got {len(meta)} bytes beside the pictures, expected at most {LARGEST_STEP}"
                )
        except Exception as problem:  # whatever it is, the loop goes on
            self.misfit = ascii(str(problem))[1:-1]
            self.refused += 1
            self._unmarked += self._open
            return False
        pictures = [frame.images[name] for name in self._shapes]
        if self._flush() and self._send(b"F" + len(meta).to_bytes(4, "little") + meta, pictures):
            self._accepted += 1
            self._unmarked = 0
            self._dropping = False
            return True
        self.dropped += 1
        self._unmarked += 1
        self._dropping = True
        return False

    def end(self, outcome: dict[str, Any]) -> None:
        """End the open episode, if there is one. outcome: plain values, such as {"success": True}."""
        if self._open:
            self._open = False
            self._note(b"E", End(time.monotonic(), plain(outcome), self._unmarked))
            self._unmarked = 0

    @property
    def written(self) -> int:
        """Frames that the operating system has."""
        return self._ring.words[WRITTEN]

    @property
    def lost(self) -> int:
        """Frames that are in no journal: dropped, refused, not taken by the disk, or died with the recorder."""
        failed = self._ring.words[LOST]
        died = self._accepted - self.written - failed if self._process.returncode is not None else 0
        return self.dropped + self.refused + failed + died

    @property
    def state(self) -> str:
        """ "ok", "slow (n dropped)", "disk full (n lost)", "dead (…)" …; after a loss "ok (n lost)"."""
        code = self._process.poll()
        if code is not None:
            self._gone = True
            what = "closed" if self._ring.pipe < 0 and code == 0 else "dead"
            return f"{what} (exit code {code}, {self.lost} lost, {self.written} written)"
        if problem := self._ring.words[PROBLEM]:
            what = "disk full" if problem in FULL else f"disk error: {os.strerror(problem)}"
            return f"{what} ({self.lost} lost)"
        if self._dropping or self._ring.taken > 0.5:
            return f"slow ({self.dropped} dropped)"
        if self.refused:
            return f"misfit ({self.refused} refused: {self.misfit})"
        return f"ok ({self.lost} lost)" if self.lost else "ok"

    def close(self, timeout: float = 10.0) -> None:
        """End the open episode and wait until all is written; a recorder that takes longer is killed.

        Waits: not for the loop.
        """
        self.end({"ended": "the recorder was closed"})
        deadline = time.monotonic() + timeout
        while not self._flush() and not self._gone and time.monotonic() < deadline:
            time.sleep(0.01)
        if self._ring.pipe < 0:
            return
        self._ring.close()
        try:
            self._process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._gone = True

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _require_fit(self, frame: Frame) -> None:
        """Raise ValueError unless a frame is this robot's, and now is its time."""
        if not self._open:
            raise ValueError("no episode has begun")
        for name, shape in self._shapes.items():
            image = frame.images.get(name)
            if image is None or image.shape != shape or image.dtype != UINT8:
                got = None if image is None else (image.shape, str(image.dtype))
                raise ValueError(f"camera {name}: got {got}, expected {shape} uint8")
        got = (frame.state.shape, frame.action.shape, frame.command.shape)
        if got != self._sizes:
            raise ValueError(f"state, action, command: got shapes {got}, expected {self._sizes}")

    def _note(self, kind: bytes, message: Header | End) -> None:
        self._notes.append(kind + _encode(message))
        self._flush()

    def _flush(self) -> bool:
        """Send what waits; True when nothing does any more."""
        while self._notes and self._send(self._notes[0]):
            self._notes.popleft()
        return not self._notes

    def _send(self, first: bytes, pictures: list[np.ndarray] | None = None) -> bool:
        if self._gone:
            return False
        try:
            self._ring.send(first, pictures or [])
        except Full:
            return False
        return True


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """The values as msgpack takes them; what it cannot take, or is too much, becomes text."""
    try:
        encoded = msgspec.msgpack.encode(values, enc_hook=of_numpy)
        if len(encoded) <= LARGEST_NOTE:
            return msgspec.msgpack.decode(encoded, type=dict[str, Any])
    except (ValueError, TypeError, OverflowError, RecursionError):
        pass
    return {"unreadable": ascii(values)[:1000]}


def of_numpy(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else repr(value)


def readable(text: str) -> str:
    """The text, with what is no character (half a surrogate pair) written out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
