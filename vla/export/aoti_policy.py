"""An exported folder whose policy is machine code by AOTInductor, run by torch; the text by ONNX Runtime.

A package holds native code: load only what comes from where you trust.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from vla.export.onnx_policy import ExportedPolicy
from vla.manifest import CheckpointError


class AotiPolicy(ExportedPolicy):
    """policy.pt2 on the CPU. threads are torch's, for the whole process."""

    graph = "policy.pt2"

    def __init__(self, folder: Path, threads: int = 0) -> None:
        super().__init__(folder, threads)
        built, here = self.manifest["cpu_capability"], torch.backends.cpu.get_cpu_capability()
        if built != here:  # the process would die of an illegal instruction
            raise CheckpointError(
                f"export {folder.name}: {self.graph} is code of another processor. got: {here}. "
                f"expected: {built}. remedy: export on this machine, or with --format=onnx."
            )
        if threads:
            torch.set_num_threads(threads)
        self.package = torch._inductor.aoti_load_package(str(folder / self.graph))

    @torch.inference_mode()
    def run(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        tensors = {name: torch.from_numpy(x) for name, x in feeds.items()}
        images = [tensors.pop(name) for name in feeds if name.startswith("images.")]
        return self.package(images, *tensors.values()).numpy()
