"""The newest of something, in memory that two processes share: one writes, one reads, and neither waits.

A ring of SLOTS records, each between two copies of its number. The writer fills the slot after the newest:
first the number behind it, then the record, then the number before it, and last the number of
the newest. A reader copies the newest slot and keeps it only if both numbers are still the one it came for. So a record
that is half written, or was written over meanwhile, is never returned, and a writer that dies leaves the
last whole record. This relies on stores being seen in their order, as on x86-64; elsewhere (ARM) every record
carries a checksum as well.
"""

from __future__ import annotations

import mmap
import os
import platform
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

SLOTS = 4
CHECKED = platform.machine() not in ("x86_64", "AMD64")
ATTEMPTS = 100  # a writer would have to go round the ring this often, each time while one record is copied


def open_memory(size: int) -> int:
    """A file of `size` bytes that has no name, in memory where the system has room there; its descriptor."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2 * size
    with tempfile.TemporaryFile(prefix="vla-", dir=memory if roomy else None) as file:
        descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor


class Newest:
    """The newest record of a NumPy structured type. Only one thread may write."""

    def __init__(self, fields: np.dtype, descriptor: int | None = None) -> None:
        """descriptor: of a file that another process has made for the same fields; None makes one."""
        slot = np.dtype([("before", "i8"), ("record", fields), ("crc", "u4"), ("behind", "i8")], align=True)
        ring = np.dtype([("newest", "i8"), ("slots", slot, SLOTS)], align=True)
        self.descriptor = open_memory(ring.itemsize) if descriptor is None else descriptor
        memory = np.frombuffer(mmap.mmap(self.descriptor, ring.itemsize), ring)
        self._newest = memory["newest"]  # (1,)
        slots = memory["slots"][0]
        self._before, self._behind, self._records = slots["before"], slots["behind"], slots["record"]
        self._crc = slots["crc"]
        self.number = int(self._newest[0])  # of the last one written or read; 0: none

    def write(self, **values: Any) -> None:
        """Publish a record: every field of it."""
        number = int(self._newest[0]) + 1
        slot = number % SLOTS
        self._behind[slot] = number
        for name, value in values.items():
            self._records[name][slot] = value
        if CHECKED:
            self._crc[slot] = zlib.crc32(self._records[slot : slot + 1].view(np.uint8))
        self._before[slot] = number
        self._newest[0] = number

    def read(self) -> Any | None:
        """A copy of the newest record (numpy.void: record["field"]), or None before the first."""
        for _ in range(ATTEMPTS):
            number = int(self._newest[0])
            if number == 0:
                return None
            slot = number % SLOTS
            whole = self._before[slot] == number
            copy, crc = self._records[slot : slot + 1].copy(), self._crc[slot]
            if (
                whole
                and self._behind[slot] == number
                and (not CHECKED or zlib.crc32(copy.view(np.uint8)) == crc)
            ):
                self.number = number
                return copy[0]
        raise RuntimeError("Shared memory. got: a writer that never pauses. expected: one record at a time.")

    def close(self) -> None:
        os.close(self.descriptor)
