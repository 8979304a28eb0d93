"""Frames of a video by their time, decoded with PyAV."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np


def frames_at(path: Path, seconds: np.ndarray, fps: int, seek: bool = False) -> Iterator[np.ndarray]:
    """The frame nearest to each of `seconds` (ascending), decoding the video once.

    seek: from the key frame before the first one, instead of from the video's beginning.

    Raises ValueError when no frame lies within half a frame's time.
    """
    import av

    wanted = iter(seconds.tolist())
    second = next(wanted, None)
    half = 0.5 / fps
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE" if seek else "AUTO"  # a few frames are decoded before threads have begun
        if seek and stream.time_base:
            container.seek(int((seconds[0] + half / 2) / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            now = float(frame.time or 0.0)
            if second is None or second <= now - half:
                break
            if second < now + half:
                image = frame.to_ndarray(format="rgb24")
                while second is not None and second < now + half:
                    yield image
                    second = next(wanted, None)
    if second is not None:
        raise ValueError(
            f"A frame is missing in {path}. got: none at {second:.3f} s. expected: one every {1 / fps:.3f} s. "
            "remedy: copy or record the dataset again."
        )
