"""Small facts about the machine and its files that several parts need."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path


def cores() -> int:
    """Processor cores this process may use, which in a container or under taskset are not all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sha256(path: Path) -> str:
    """The digest of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_writable(folder: str | Path) -> None:
    """Make a folder and raise ValueError when nothing can be written there, before hours of work."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"output: got {str(folder)!r} ({error.strerror or error}), expected a folder that can be written to. "
            "remedy: choose another one with --output, or correct its permissions."
        ) from None
