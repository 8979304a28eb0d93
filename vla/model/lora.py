"""Low-rank adapters (Hu et al. 2021, "LoRA") through peft: W x becomes W x + alpha / rank · B A x.

A part of the network that carries adapters keeps its own weights frozen: A and B train beside all
its linear layers, B beginning at zero, so that the network begins as it was. They are merged into
W for deployment (`merged`): a policy is a plain network and needs no peft, which is imported here
and only for rank > 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vla.architecture import LoraConfig, ModelConfig
from vla.checks import ConfigError, require

# Parts of the configuration -> modules of the network.
PARTS: dict[str, tuple[str, ...]] = {
    "text": ("text.encoder",),
    "image": ("tokens.image.backbone",),
    "trunk": ("encoder", "decoder"),
}
# Of text encoders and backbones: made for one vector, while all tokens are kept.
UNREAD = ("pooler", "attn_pool", "head")
# Of linformer attention: not called as layers, their weights are read in part.
READ_IN_PART = (".attention.keys", ".attention.values")
ADAPTER = ".lora_"  # in the name of every adapter's parameter, in no other
BASE = ".base_layer"  # what peft puts into the names of the weights it wraps


def is_adapted(config: ModelConfig, part: str) -> bool:
    """Whether a part of the configuration carries adapters."""
    return config.lora.rank > 0 and part in config.lora.on


def adapt(model: nn.Module, config: LoraConfig) -> None:
    """Freeze the configured parts of a VLA and put adapters on all their linear layers; rank 0: nothing.

    Raises ConfigError when peft is not installed.
    """
    if config.rank == 0:
        return
    for part in dict.fromkeys(config.on):
        for name in PARTS[part]:
            _inject(model.get_submodule(name), config)
    model.train(model.training)  # a frozen part that begins to train leaves evaluation mode


def require_adapters(config: LoraConfig) -> None:
    """Raise ConfigError when adapters are asked for and peft is not installed."""
    if config.rank > 0:
        _peft(config)


def _inject(module: nn.Module, config: LoraConfig) -> None:
    peft = _peft(config)
    names = [
        n
        for n, child in module.named_modules()
        if is_linear(child) and not n.startswith(UNREAD) and not n.endswith(READ_IN_PART)
    ]
    require(
        bool(names), "model.lora.on", list(config.on), f"parts with linear layers, {type(module).__name__} has none",
        "take image out of it, or a transformer as backbone",
    )  # fmt: skip
    conv1d = any(_is_conv1d(module.get_submodule(name)) for name in names)
    peft.inject_adapter_in_model(
        peft.LoraConfig(
            r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=names,
            fan_in_fan_out=conv1d, bias="none",
        ),
        module,
    )  # fmt: skip


def _peft(config: LoraConfig) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            "model.lora.rank", config.rank, "0, as the package peft is not installed",
            'pip install "vla[lora]", or set model.lora.rank=0',
        ) from error  # fmt: skip
    return peft


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, which keeps its weight the other way round, (in, out)."""
    return type(module).__name__ == "Conv1D"


def plain_name(name: str) -> str:
    """The name that a weight has in the network without adapters."""
    return name.replace(BASE, "")


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """module.state_dict() as it was before `adapt`."""
    return {plain_name(name): tensor for name, tensor in module.state_dict().items() if ADAPTER not in name}


@torch.no_grad()
def merged(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` as the network without adapters has it: W + alpha / rank · B A, under plain names.

    state: of model.state_dict()'s names, possibly averaged.
    """
    merged = {plain_name(name): tensor for name, tensor in state.items() if ADAPTER not in name}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            layer: Any = module
            for adapter, scaling in layer.scaling.items():
                a, b = (
                    state[f"{name}.lora_{matrix}.{adapter}.weight"] for matrix in "AB"
                )  # (r, in), (out, r)
                delta = scaling * (b @ a)  # (out, in)
                merged[f"{name}.weight"] = merged[f"{name}.weight"] + (
                    delta.T if layer.fan_in_fan_out else delta
                )
    return merged
