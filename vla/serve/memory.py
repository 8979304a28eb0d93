"""Memory for messages, kept between them: a third of the processor time of a round trip, or less."""

from __future__ import annotations

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_memory() -> None:
    """Have malloc keep what is freed, up to 64 MB, in this process.

    By default glibc hands pieces of a few hundred kilobytes, which pictures are, back to the kernel; the
    next message then pays for a page fault every 4 kB, ten times what copying it costs. Where there is
    no mallopt, nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(M_TRIM_THRESHOLD, 64 * 2**20)
