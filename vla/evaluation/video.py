"""Films of episodes: h264 in mp4, as every browser plays it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

VIDEOS = "videos"  # the folder of an evaluation's films, in its own
SMALLEST = 192  # shortest side in pixels: smaller pictures are enlarged, or their colours smear
HOLD_S = 0.8  # the last picture stays so long, so that one sees how it ended


class Film:
    """An mp4 that grows by one picture at a time, and so costs no memory."""

    def __init__(self, path: Path, fps: int) -> None:
        """path: written at once; fps: the environment's control rate, for real time."""
        self.path, self.fps = path, fps
        self.container: Any = None
        self.last: np.ndarray | None = None

    def add(self, picture: np.ndarray) -> None:
        """picture: (h, w, 3) uint8."""
        times = -(-SMALLEST // min(picture.shape[:2]))
        picture = picture.repeat(times, 0).repeat(times, 1)
        height, width = (side // 2 * 2 for side in picture.shape[:2])  # yuv420p halves both
        self.last = np.ascontiguousarray(picture[:height, :width])
        if self.container is None:
            self._open(width, height)
        self._encode(self.last)

    def close(self) -> Path | None:
        """Finish the file; None when it never got a picture."""
        if self.container is None or self.last is None:
            return None
        for _ in range(round(HOLD_S * self.fps)):
            self._encode(self.last)
        for packet in self.stream.encode():
            self.container.mux(packet)
        self.container.close()
        self.container = None
        return self.path

    def _open(self, width: int, height: int) -> None:
        import av  # here: only films need it, and importing it takes a while

        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.unlink(missing_ok=True)  # the worker of a killed evaluation may still have it open
        self.container = av.open(str(self.path), "w", options={"movflags": "faststart"})
        self.stream: Any = self.container.add_stream("h264", rate=self.fps)
        self.stream.width, self.stream.height, self.stream.pix_fmt = width, height, "yuv420p"
        self.stream.codec_context.thread_count = 1
        self.stream.options = {"crf": "24", "preset": "veryfast"}

    def _encode(self, picture: np.ndarray) -> None:
        import av

        for packet in self.stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")):
            self.container.mux(packet)
