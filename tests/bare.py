"""Processes that do not find some packages, nor do those that they start: a machine with little on it."""

from __future__ import annotations

import os
from pathlib import Path

# What Python imports at its start.
SITE = """
import os, sys

class Bare:
    '''A finder that does not find what is not there.'''
    def __init__(self, inner):
        self.inner = inner
    def find_spec(self, name, path=None, target=None):
        absent = name.split(".")[0] in os.environ["ABSENT"].split(",")
        return None if absent else self.inner.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.inner, name)

sys.meta_path[:] = map(Bare, sys.meta_path)
"""


def without(packages: str, folder: Path, *path: Path) -> dict[str, str]:
    """The environment of a process that lacks `packages` (by commas). folder: a new one; path: further PYTHONPATH."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITE)
    found = os.pathsep.join(map(str, (folder, *path)))
    return os.environ | {"ABSENT": packages, "PYTHONPATH": found, "OMP_NUM_THREADS": "1"}
