"""Features of instructions in an exported folder: its tokenizer.json and text.onnx, no torch.

N instructions   L text tokens   W the encoder's width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

from vla.checks import require


@dataclass(frozen=True)
class TextSizes:
    """How instructions become tokens: pad and end are token ids, `end` alone stands for an empty
    instruction; lengths are rounded up to `multiple`, and never above max_tokens.
    """

    width: int
    max_tokens: int
    multiple: int
    pad: int
    end: int


class TextFeatures:
    """Each instruction encoded once and on its own, as vla.model.text.TextCache does."""

    def __init__(self, folder: Path, sizes: TextSizes, threads: int = 0) -> None:
        self.sizes = sizes
        self.tokenizer: Tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.session = session(folder / "text.onnx", threads)
        self.features: dict[str, np.ndarray] = {}

    def __call__(self, instructions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """N instructions -> features (N, L, W) float32 and their padding (N, L) bool."""
        for instruction in dict.fromkeys(instructions):
            if instruction not in self.features:
                self.features[instruction] = self.encode(self.tokenize(instruction))
        rows = [self.features[instruction] for instruction in instructions]
        longest = self.padded(max(map(len, rows)))
        x = np.zeros((len(rows), longest, self.sizes.width), np.float32)
        pad = np.ones((len(rows), longest), bool)
        for i, row in enumerate(rows):
            x[i, : len(row)], pad[i, : len(row)] = row, False
        return x, pad

    def tokenize(self, instruction: str) -> list[int]:
        """Token ids, at least one. Raises ConfigError when there are more than max_tokens."""
        ids = self.tokenizer.encode(instruction).ids or [self.sizes.end]
        require(
            len(ids) <= self.sizes.max_tokens, "model.text.max_tokens", self.sizes.max_tokens,
            f"at least {len(ids)} for {instruction!r}",
            "raise model.text.max_tokens, or shorten the instruction",
        )  # fmt: skip
        return ids

    def encode(self, ids: list[int]) -> np.ndarray:
        """n ids -> their features (n, W); the padding is computed with and dropped."""
        length = self.padded(len(ids))
        padded = np.full((1, length), self.sizes.pad, np.int64)
        padded[0, : len(ids)] = ids
        pad = np.arange(length)[None] >= len(ids)
        return np.asarray(self.session.run(None, {"ids": padded, "pad": pad})[0])[0, : len(ids)]

    def padded(self, length: int) -> int:
        """Rounded up to the next multiple, but to no more than max_tokens."""
        return min(-(-length // self.sizes.multiple) * self.sizes.multiple, self.sizes.max_tokens)


def session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """A graph ready to run on the CPU; threads: 0 leaves the number to ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    # Waiting threads sleep: spinning would take the processor from the control loop beside it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
