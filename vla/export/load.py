"""Any folder that holds a policy, as a policy; torch is imported only for those that need it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vla.export.onnx_policy import ExportedPolicy
    from vla.policy import Policy


def is_export(path: str | Path) -> bool:
    """Whether a folder was written by scripts/export.py, by its files."""
    return any((Path(path) / name).is_file() for name in ("policy.onnx", "policy.pt2"))


def load_policy(
    path: str | Path, device: str = "auto", threads: int = 0, launch: str = "graph", dataset: str = ""
) -> Policy | ExportedPolicy:
    """A checkpoint's folder, a run's output folder, or an exported folder.

    device, launch, dataset: of a checkpoint, see vla.policy.Policy; exports run on the CPU. threads: of the processor;
    0: the runtime's choice.
    Raises CheckpointError when it is missing, damaged or of another kind.
    """
    if (Path(path) / "policy.onnx").is_file():
        from vla.export.onnx_policy import OnnxPolicy

        return OnnxPolicy.load(path, threads)
    if is_export(path):
        from vla.export.aoti_policy import AotiPolicy

        return AotiPolicy.load(path, threads)
    import torch

    from vla.policy import Policy

    if threads:
        torch.set_num_threads(threads)
    return Policy.load(path, device, launch, dataset)
