"""The seal of a folder: sha256 of every file in it, and of the manifest that says so.

Checkpoints and exports carry one. safetensors and ONNX alone load a flipped bit without a word.
Imports neither torch nor anything that does.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from vla.system import sha256

MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint or an export that is missing, damaged or of another kind: got, expected, remedy."""


def seal(path: Path, content: dict[str, Any]) -> None:
    """Write the manifest: content, the hash of every file in the folder, and that of the manifest itself."""
    files = sorted(p for p in path.rglob("*") if p.is_file() and p != path / MANIFEST)
    content = content | {"sha256": {p.relative_to(path).as_posix(): sha256(p) for p in files}}
    (path / MANIFEST).write_text(json.dumps(content | {"manifest": _seal(content)}, indent=2))


def read_manifest(path: Path, what: str = "checkpoint") -> dict[str, Any]:
    """Raises CheckpointError when it is missing or damaged. what: the kind of folder, for the message."""
    try:
        content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if content.pop("manifest") == _seal(content):
            return content
        got = "another content than it was written with"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        got = f"{type(error).__name__}: {error}"
    raise CheckpointError(
        f"{what} {path.name}: {MANIFEST} is damaged. got: {got}. expected: the file as it was written. "
        f"remedy: copy the {what} again, or use an older one."
    )


def verify(path: Path, what: str = "checkpoint") -> dict[str, str]:
    """Check every file against the manifest; returns the hashes. Raises CheckpointError."""
    hashes: dict[str, str] = read_manifest(path, what)["sha256"]
    for name, expected in hashes.items():
        file = path / name
        got = sha256(file) if file.is_file() else "no such file"
        if got != expected:
            raise CheckpointError(
                f"{what} {path.name}: {name} is damaged. got: {got[:16]}. expected: sha256 {expected[:16]}…. "
                f"remedy: copy the {what} again, or use an older one."
            )
    return hashes


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
