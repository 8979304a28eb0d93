"""A one-way channel between two processes whose sender never waits and calls nothing of the system.

The sender copies a message into a ring of bytes in shared memory; when there is no room the message is
refused. The receiver looks every POLL seconds and takes what was there one look ago, so that it never
depends on the order in which a processor shows another one's stores. (Waking it through a pipe doubled
the sender's cost and let it take the sender's core: 12 ms at worst against 0.2.) A pipe that nothing is
written to tells the receiver that the sender has closed it or died; all that was sent before is still
received. Linux (memfd).
"""

from __future__ import annotations

import mmap
import os
import select
import time
from collections.abc import Sequence

import numpy as np

POLL = 0.05
WORDS = 16  # int64 at the front: 8 that only the receiver writes, 8 that only the sender does
CONSUMED, SENT = 0, 8  # words that count bytes from the ring's birth
WORD = 8  # bytes; a message is its length as a word, then itself, padded to whole words
TURN = -1  # in place of a length: the next message is at the beginning


class Full(Exception):
    """No room for the message now."""


class Ring:
    """Either end. words: WORDS int64; CONSUMED and SENT are the ring's, the rest is free."""

    def __init__(self, memory: int, pipe: int) -> None:
        self.memory, self.pipe = memory, pipe
        whole = memoryview(mmap.mmap(memory, 0))
        self.words = whole[: WORDS * WORD].cast("q")
        self._bytes = whole[WORDS * WORD :]
        self._lengths = self._bytes.cast("q")
        self.size = len(self._bytes)

    def close(self) -> None:
        """Close the pipe, which the other end notices, and the memory's descriptor."""
        for descriptor in (self.pipe, self.memory):
            if descriptor >= 0:
                os.close(descriptor)
        self.pipe = self.memory = -1


class Sender(Ring):
    """Makes the ring. receiver: descriptors for the other end, to be handed to its process and the second closed."""

    def __init__(self, size: int) -> None:
        """size: bytes, at least."""
        memory = os.memfd_create("ring")
        os.truncate(memory, padded(size) + WORDS * WORD)
        reading, writing = os.pipe()
        super().__init__(memory, writing)
        self._bytes[:] = bytes(self.size)  # so that no later send waits for memory
        self._sent = 0
        self.receiver = (memory, reading)

    @property
    def taken(self) -> float:
        """The share of the ring that waits for the receiver."""
        return (self._sent - self.words[CONSUMED]) / self.size

    def send(self, first: bytes, arrays: Sequence[np.ndarray] = ()) -> None:
        """Hand over `first` and the arrays' bytes (uint8, any strides) as one message, or raise Full.

        Raises ValueError for a message of more than half the ring.
        """
        length = len(first)
        for array in arrays:
            length += array.size
        room = padded(length) + WORD
        if room > self.size // 2:  # might never fit, however empty the ring
            raise ValueError(f"got a message of {length} bytes, expected at most half of {self.size}.")
        place, start = self._sent % self.size, self._sent
        if turn := place + room > self.size:  # a message is never cut in two
            start += self.size - place
        if start + room - self.words[CONSUMED] > self.size:
            raise Full
        if turn:
            self._lengths[place // WORD] = TURN
            place = 0
        self._lengths[place // WORD] = length
        place += WORD
        self._bytes[place : place + len(first)] = first
        place += len(first)
        for array in arrays:
            flat = array.data if array.flags.c_contiguous else np.ascontiguousarray(array).data
            self._bytes[place : place + array.size] = flat.cast("B")
            place += array.size
        self._sent = start + room
        self.words[SENT] = self._sent  # last


class Receiver(Ring):
    """The other end, in another process."""

    def __init__(self, memory: int, pipe: int) -> None:
        super().__init__(memory, pipe)
        self._seen = self._done = 0

    def receive(self, timeout: float) -> memoryview | None:
        """The next message, valid until the next call; None after `timeout` s. EOFError: there will be none."""
        self.words[CONSUMED] = self._done
        deadline = time.monotonic() + timeout
        while self._done == self._seen:
            seen = self.words[SENT]
            over = bool(select.select([self.pipe], [], [], POLL)[0])
            self._seen = self.words[SENT] if over else seen
            if self._done == self._seen and over:
                raise EOFError
            if self._done == self._seen and time.monotonic() >= deadline:
                return None
        place = self._done % self.size
        if self._lengths[place // WORD] == TURN:
            self._done += self.size - place
            place = 0
        length = self._lengths[place // WORD]
        self._done += padded(length) + WORD
        return self._bytes[place + WORD : place + WORD + length]


def padded(length: int) -> int:
    return -(-length // WORD) * WORD
