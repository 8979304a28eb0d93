"""A new run that begins with the weights of an earlier checkpoint, as far as they fit.

Matched by name and shape, so that heads, chunk sizes, cameras, state and action sizes may differ
and config.yaml may be of an older version. Two things are matched otherwise: the embeddings of
cameras by the cameras' names, and the text encoder whole or not at all, given the same vocabulary,
since half of it would mean nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from vla.config import untrained
from vla.model.lora import PARTS, plain_state
from vla.model.vla import VLA
from vla.training import checkpoint

CAMERAS = "tokens.image.camera"  # one row per camera, alphabetical
TEXT = "text.encoder."
POOLER = TEXT + "pooler."  # nobody reads it
Shape = tuple[int, ...]


@dataclass
class Report:
    """What a network took from a checkpoint and what it did not, by the names of its weights."""

    source: Path
    cameras: str
    text: str
    taken: dict[str, int] = field(default_factory=dict)  # numbers taken of each
    missing: list[str] = field(default_factory=list)  # in the network only
    reshaped: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)  # here, there
    unused: list[str] = field(default_factory=list)  # in the checkpoint only

    def __str__(self) -> str:
        total = len(self.taken) + len(self.missing) + len(self.reshaped)
        shapes = {
            _module(name): f"{name} {a} here, {b} there" for name, (a, b) in reversed(self.reshaped.items())
        }
        lines = {
            "taken": grouped(self.taken),
            "not in the checkpoint": grouped(self.missing),
            "of another shape": grouped(self.reshaped),
            "such as": "; ".join(reversed(shapes.values())),  # one of each module
            "in the checkpoint only": grouped(self.unused),
            "cameras": self.cameras,
            "text encoder": self.text,
            "statistics": "of the new dataset, which normalises states and actions from now on",
        }
        first = (
            f"init: {len(self.taken)} of {total} tensors, {sum(self.taken.values()):,} parameters, from "
            f"{self.source}; what is not taken begins as without it"
        )
        return "\n".join([first, *(f"  {what}: {line}" for what, line in lines.items() if line)])


def grouped(names: Iterable[str]) -> str:
    """`encoder.layers (32), head.out (2)`: names counted by module, a stack of layers as one."""
    return ", ".join(f"{module} ({n})" for module, n in Counter(map(_module, names)).items())


def _module(name: str) -> str:
    parts = name.split(".")
    end = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
    return ".".join(parts[: max(1, min(end, 3))])


@torch.no_grad()
def initialise_from(model: VLA, path: Path) -> Report:
    """Copy the deployed weights of checkpoint `path` into a network, as far as they fit.

    A network with adapters takes them as the weights below its adapters, which stay as they begin.
    Raises CheckpointError when the checkpoint is damaged; ValueError when nothing but text fits,
    or when weights that nobody trained would stay frozen below adapters.
    """
    checkpoint.verify(path)
    targets, source = plain_state(model), load_file(path / "model.safetensors")
    report = Report(path, _cameras(model, path, targets, source), _text(model, path, targets, source))
    for name, target in targets.items():
        if name not in source:
            report.missing.append(name)
        elif source[name].shape != target.shape:
            report.reshaped[name] = (tuple(target.shape), tuple(source[name].shape))
        else:
            target.copy_(source[name])
            report.taken[name] = target.numel()
    report.unused += [name for name in source if name not in targets]
    _require_enough(model, report, text_taken=any(name.startswith(TEXT) for name in targets))
    return report


def _cameras(model: VLA, path: Path, targets: dict[str, Tensor], source: dict[str, Tensor]) -> str:
    """Put the checkpoint's camera embeddings into this network's order, by name; says what happens."""
    here, there = model.tokens.image.cameras, sorted(checkpoint.load_features(path).cameras)
    known = [name for name in here if name in there]
    line = f"{', '.join(known) or 'none'} taken by name"
    if new := [name for name in here if name not in there]:
        line += f"; {', '.join(new)} new, not among the checkpoint's {', '.join(there)}"
    target, rows = targets[CAMERAS], source.get(CAMERAS)
    if not known:
        del targets[CAMERAS]
        source.pop(CAMERAS, None)
    elif rows is not None and rows.shape[1:] == target.shape[1:]:
        source[CAMERAS] = target.clone()
        for name in known:
            source[CAMERAS][here.index(name)] = rows[there.index(name)]
    return line


def _text(model: VLA, path: Path, targets: dict[str, Tensor], source: dict[str, Tensor]) -> str:
    """Complete `source` with the checkpoint's text encoder, or take text out of both; says which."""
    from transformers import AutoTokenizer

    tuned = {name: source.pop(name) for name in list(source) if name.startswith(TEXT)}
    text = {
        TEXT + n: t for file in (path / "text").glob("*.safetensors") for n, t in load_file(file).items()
    } | tuned
    mine = {name: targets.pop(name) for name in list(targets) if name.startswith(TEXT)}
    mine, text = ({n: t for n, t in each.items() if not n.startswith(POOLER)} for each in (mine, text))
    tied = {
        mine[name].data_ptr(): tensor for name, tensor in text.items() if name in mine
    }  # T5 saves one of two
    text = {name: text.get(name, tied.get(tensor.data_ptr())) for name, tensor in mine.items()} | text
    if AutoTokenizer.from_pretrained(path / "text").get_vocab() != model.text.tokenizer.get_vocab():
        differs = "vocabulary"
    elif {n: getattr(t, "shape", None) for n, t in text.items()} != {n: t.shape for n, t in mine.items()}:
        differs = "network"
    else:
        source |= {name: tensor for name, tensor in text.items() if tensor is not None}
        targets |= mine
        return "the checkpoint's" + (", tuned there" if tuned else "")
    return (
        f"as configured, for the checkpoint's has another {differs}{' and was tuned' if tuned else ''}; "
        f"take that with --model.text.encoder={path / 'text'}"
    )


def _require_enough(model: VLA, report: Report, text_taken: bool) -> None:
    if all(name.startswith(TEXT) for name in report.taken):
        raise ValueError(
            f"train.init: nothing of the checkpoint fits. got: {report}. expected: a checkpoint that shares "
            "names and shapes with this network. remedy: choose the model's sizes as there, or leave out train.init."
        )
    lora = model.config.lora
    for part in untrained(model.config) & set(lora.on if lora.rank else ()):
        places = tuple(f"{module}." for module in PARTS[part])
        left = [name for name in [*report.missing, *report.reshaped] if name.startswith(places)]
        if part == "text" and not text_taken:
            left = [name for name in plain_state(model) if name.startswith(places)]
        if left:
            raise ValueError(
                f"model.lora.on: weights below adapters that nobody trained. got: {grouped(left)} of {part}, which "
                f"{report.source} does not hold. expected: the whole {part} from the checkpoint, as it stays frozen. "
                f"remedy: choose its sizes as there, or take {part} out of model.lora.on."
            )
