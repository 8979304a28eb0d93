"""What a number was measured on: versions and machine, without names or paths of either."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from vla.system import cores

PACKAGES = (
    "torch", "numpy", "timm", "transformers", "gymnasium", "mujoco", "metaworld", "lerobot", "onnxruntime", "ruckig",
    "websockets",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Python's version and those of the packages that matter, without importing them."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """The processor's model and cores, memory and GPU; nothing that names the machine or its user."""
    model = platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        names = [line for line in information.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    torch = sys.modules.get("torch")  # without it, no GPU was used
    gpu = torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None
    memory_gb = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    return {"cpu": model, "cores": cores(), "memory_gb": memory_gb, "gpu": gpu, "system": platform.system()}


def portable(value: Any) -> Any:
    """A configuration without absolute paths: those below the working folder become relative,
    of others the last name is kept.
    """
    if isinstance(value, dict):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable(item) for item in value]
    if isinstance(value, Path | str) and os.path.isabs(value):
        path = Path(value)
        return path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else path.name
    return value.as_posix() if isinstance(value, Path) else value
