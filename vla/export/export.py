"""From a checkpoint's folder to an exported one; see `export`.

manifest.json    what goes in, how far it is from the checkpoint, on what it was built, and the seal
policy.onnx      the policy with normalisation and action limits inside (policy.pt2 of aoti)
text.onnx        the text encoder, for one instruction
tokenizer.json   as the package tokenizers reads it
config.yaml      the checkpoint's whole job, for evaluation in closed loop
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from vla.checks import one_of
from vla.data.normalize import Statistics
from vla.export import formats
from vla.export.graph import input_names, trace_policy, trace_text
from vla.export.load import is_export, load_policy
from vla.export.onnx_policy import VERSION
from vla.export.parity import parity
from vla.manifest import read_manifest, seal
from vla.model.text import MULTIPLE
from vla.policy import Policy
from vla.provenance import machine, versions
from vla.training import checkpoint

WORST = 1e-3  # of an action's range, that a float32 export may differ from its checkpoint
EXACT = ("onnx", "aoti")  # formats held to it


class ExportError(ValueError):
    """An export that cannot be made or is wrong: got, expected, remedy."""


def export(source: str | Path, format: str, folder: Path, dataset: str = "") -> dict[str, Any]:
    """Write a checkpoint in a format of formats.FORMATS into `folder`, in one piece; returns its manifest.

    source: a checkpoint's folder or a run's output folder; dataset: of a mixture, whose policy.
    An earlier export in `folder` is replaced.
    Raises ConfigError for an unknown format, CheckpointError for a damaged checkpoint, ExportError when
    the network has something that cannot be exported or when a float32 export is not its equal.
    """
    one_of("--format", format, formats.FORMATS)
    if folder.exists() and not is_export(folder) and any(folder.iterdir()):
        raise ExportError(
            f"export: got --output={str(folder)!r} with other files in it, expected a new folder, or an "
            "earlier export to replace. remedy: choose another one."
        )
    source = checkpoint.find(source)
    model, job, statistics = checkpoint.load_model(source, dataset)
    reference = Policy(model, replace(job, train=replace(job.train, precision="fp32")), "cpu", source)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(reference, format, partial)
        shutil.copy2(source / "config.yaml", partial)
        described = describe(reference, format)
        seal(partial, described)
        described["parity"] = measured(partial, reference, statistics, format)
        seal(partial, described)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return read_manifest(folder, "export")


def write(policy: Policy, format: str, folder: Path) -> None:
    """The graphs and the tokenizer."""
    model, (finish_policy, finish_text) = policy.model, formats.FORMATS[format]
    tokenizer = getattr(model.text.tokenizer, "backend_tokenizer", None)
    if tokenizer is None:
        raise ExportError(
            f"export: got a tokenizer without a fast version ({type(model.text.tokenizer).__name__}), expected "
            "one that the package tokenizers reads. remedy: train with model.text.encoder=minilm or scratch."
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    path, inputs = folder / formats.POLICY, input_names(model)
    if format == "aoti":
        formats.require_compiler()
    traced = explained("the policy", model, lambda: trace_policy(model))
    if format == "aoti":
        path = folder / formats.PACKAGE
        explained("the policy", model, lambda: formats.compile_aoti(traced, path))
    else:
        explained("the policy", model, lambda: formats.write_onnx(traced, path, inputs, "chunk"))
        finish_policy(path)
    text = folder / formats.TEXT
    program = explained("the text encoder", model, lambda: trace_text(model))
    explained(
        "the text encoder", model, lambda: formats.write_onnx(program, text, ["ids", "pad"], "features")
    )
    finish_text(text)


def explained[T](what: str, model: Any, make: Callable[[], T]) -> T:
    """What torch's exporters made. Raises ExportError in place of what they raise, which is of any kind."""
    try:
        return make()
    except Exception as error:
        config = model.config
        kind = type(model.text.encoder).__name__
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise ExportError(
            f"export: {what} cannot be exported. got: {type(error).__name__} ({reason}) with attention "
            f"{config.attention.kind}, backbone {config.image.backbone}, head {config.head}, text encoder {kind}. "
            "expected: operations with fixed shapes but for batch and words. remedy: run the checkpoint itself, or "
            "train with model.attention.kind=full, the scratch backbone and model.text.encoder=minilm."
        ) from error


def describe(policy: Policy, format: str) -> dict[str, Any]:
    """What the manifest says: the input schema, the source and the machine."""
    text, source = policy.model.text, policy.checkpoint
    assert source is not None
    tokenizer = text.tokenizer
    end = tokenizer.pad_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    inputs = policy.inputs
    return {
        "version": VERSION,
        "format": format,
        "inputs": {
            "names": input_names(policy.model),
            "features": asdict(inputs.features),
            "chunk_size": inputs.chunk_size,
            "n_obs_steps": inputs.n_obs_steps,
            "max_prefix": inputs.max_prefix,
            "may_miss": inputs.may_miss,
            "text": {
                "width": text.width, "max_tokens": text.config.max_tokens, "multiple": MULTIPLE,
                "pad": tokenizer.pad_token_id, "end": end,
            },
        },
        "source": {
            "checkpoint": source.name,
            "step": read_manifest(source)["step"],
            "weights_sha256": policy.model_sha256,
        },
        "machine": machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": versions() | {name: metadata.version(name) for name in ("onnx", "onnxscript", "onnxruntime")},
    }  # fmt: skip


def measured(folder: Path, reference: Policy, statistics: Statistics, format: str) -> dict[str, Any]:
    """The parity of the folder. Raises ExportError when a float32 format's is worse than WORST."""
    found = parity(load_policy(folder), reference, statistics)
    worst = found["max_of_range"]
    if format in EXACT and not worst <= WORST:
        raise ExportError(
            f"export: the {format} policy is not its checkpoint's equal. got: chunks that differ by "
            f"{worst:.1e} of an action's range. expected: at most {WORST:.0e}. remedy: run the checkpoint itself, "
            "and report this with its config.yaml."
        )
    return found
