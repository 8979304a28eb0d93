"""The parameters: how they begin, how they are optimised, how many there are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from vla.config import ModelConfig
from vla.model.lora import ADAPTER, is_linear

EMBEDDING_STD = 0.5  # the order of the sinusoids (0.7) and of the projected tokens they are added to
STACKS = ("layers", "blocks")  # what a stack of residual layers is called, here and in timm
BRANCH_ENDS = ("out", "proj", "fc2")  # and the linear layer that ends a residual branch


@torch.no_grad()
def initialise(modules: Iterable[nn.Module]) -> None:
    """Set every parameter of these modules.

    Linear layers keep the variance of their input (LeCun et al. 1998): weights normal with
    variance 1 / fan_in, biases 0. Convolutions are followed by a ReLU (He et al. 2015).
    """
    for module in modules:
        match module:
            case nn.Linear():
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            case nn.Conv2d():
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            case nn.LayerNorm() | nn.GroupNorm():
                module.reset_parameters()
            case _:
                for parameter in module.parameters(recurse=False):
                    nn.init.normal_(parameter, std=EMBEDDING_STD)
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)


@torch.no_grad()
def scale_branches(stack: nn.Module) -> None:
    """Divide the last linear layer of each residual branch by √n, n the branches of the stack.

    All branches together then add as much as the input brought (Radford et al. 2019). It serves
    post-norm too: each norm divides the identity path by √(1 + branch variance), over the stack
    (1 + 1/n)^(n/2) ≤ √e whatever the depth, where branches of variance one make it 2^(n/2) and
    the gradient vanishes (Xiong et al. 2020). Liu et al. 2020 (Admin) and Wang et al. 2022
    (DeepNorm) shrink that ratio by scaling the identity up, which would change the formula.
    """
    modules = [(name.rpartition(".")[2], module) for name, module in stack.named_modules()]
    ends = [module for name, module in modules if name in BRANCH_ENDS and isinstance(module, nn.Linear)]
    for end in ends:
        end.weight.div_(len(ends) ** 0.5)


def initialise_network(model: nn.Module, keep: Iterable[nn.Module] = ()) -> None:
    """Initialise everything of `model` but the modules in `keep`, which brought their own weights."""
    kept = {id(module) for root in keep for module in root.modules()}
    own = [module for module in model.modules() if id(module) not in kept]
    initialise(own)
    for module in own:
        for name, child in module.named_children():
            if name in STACKS:
                scale_branches(child)


def parameter_groups(model: nn.Module, config: ModelConfig, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for AdamW: `params`, `weight_decay`, and `lr_multiplier` for the training step to apply.

    Only weights of linear and convolutional layers decay; norms, biases and embeddings do not.
    The image backbone and the text encoder carry their multipliers from `config`; their adapters,
    which begin at zero and have nothing to keep, do not.
    """
    matrices = {
        id(module.weight) for module in model.modules() if is_linear(module) or isinstance(module, nn.Conv2d)
    }
    multipliers = {
        "tokens.image.backbone.": config.image.lr_multiplier,
        "text.encoder.": config.text.lr_multiplier,
    }
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            multiplier = next(
                (m for prefix, m in multipliers.items() if name.startswith(prefix) and ADAPTER not in name),
                1.0,
            )
            decay = weight_decay if id(parameter) in matrices else 0.0
            groups.setdefault((multiplier, decay), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_multiplier": multiplier}
        for (multiplier, decay), parameters in groups.items()
    ]


def trains(module: nn.Module) -> bool:
    """Whether anything in it takes a gradient: all of it, or the adapters of a frozen module."""
    return any(parameter.requires_grad for parameter in module.parameters())


def count_parameters(model: nn.Module) -> int:
    """The number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
