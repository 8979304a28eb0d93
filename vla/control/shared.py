"""The newest of something, in memory that two processes share: one writes, one reads, and neither waits.

A ring of SLOTS records, each between two copies of its number. The writer fills the slot after the newest:
first the number behind it, then the record, then the number before it, and last the number of
the newest. A reader copies the newest slot and keeps it only if both numbers are still the one it came for. So a record
that is half written, or was written over meanwhile, is never returned, and a writer that dies leaves the
last whole record. This relies on stores being seen in their order, as on x86-64.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

SLOTS = 4
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
        slot = np.dtype([("before", "i8"), ("record", fields), ("behind", "i8")], align=True)
        ring = np.dtype([("newest", "i8"), ("slots", slot, SLOTS)], align=True)
        self.descriptor = open_memory(ring.itemsize) if descriptor is None else descriptor
        memory = np.frombuffer(mmap.mmap(self.descriptor, ring.itemsize), ring)
        self._newest = memory["newest"]  # (1,)
        slots = memory["slots"][0]
        self._before, self._behind, self._records = slots["before"], slots["behind"], slots["record"]
        self.number = int(self._newest[0])  # of the last one written or read; 0: none

    def write(self, **values: Any) -> None:
        """Publish a record: every field of it."""
        number = int(self._newest[0]) + 1
        slot = number % SLOTS
        self._behind[slot] = number
        for name, value in values.items():
            self._records[name][slot] = value
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
            record = self._records[slot : slot + 1].copy()[0]
            if whole and self._behind[slot] == number:
                self.number = number
                return record
        raise RuntimeError("Shared memory. got: a writer that never pauses. expected: one record at a time.")

    def close(self) -> None:
        os.close(self.descriptor)
