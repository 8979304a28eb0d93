"""CUDA tensors on a machine without a GPU: torch's fake tensors, which have a device and no content.

They refuse what a CUDA graph must not do: to mix devices, to read a value back (.item(), nonzero, boolean
indices), and here also to bring a tensor over from the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
Generator = torch.Generator


class OnCuda(Generator):
    """Says that it draws there."""

    device = CUDA


class NoHost(TorchDispatchMode):
    """Refuses copies between host and device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if function._schema.name in ("aten::_to_copy", "aten::copy_"):
            read = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            if read | {output.device.type} == {"cpu", "cuda"}:
                raise RuntimeError(f"{function} between host and device: got {read}, {output.device}")
        return output


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """Within it torch believes in a GPU. Generators and the fused optimiser, which need one, are replaced."""
    for name, value in {
        "_lazy_init": lambda: None,
        "mem_get_info": lambda device: (2**40, 2**40),
        "get_rng_state": lambda device: torch.get_rng_state(),
        "is_bf16_supported": lambda *_: True,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(
        torch, "Generator", lambda device="cpu": OnCuda() if "cuda" in str(device) else Generator()
    )
    monkeypatch.setattr(torch, "_fused_adamw_", fused_adamw)
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def fused_adamw(*lists: list[Tensor], lr: Tensor, **_: Any) -> None:
    """It has no fake: every tensor that it reads lies on the GPU."""
    assert {tensor.device for tensor in (lr, *(x for each in lists for x in each))} == {CUDA}


def to_cuda(module: nn.Module, mode: FakeTensorMode) -> None:
    """`module.to`, which does not take fake tensors."""
    for part in module.modules():
        for name, tensor in [*part._buffers.items(), *part._parameters.items()]:
            if tensor is None:
                continue
            moved = mode.from_tensor(tensor.detach()).to(CUDA)
            if name in part._parameters:
                part._parameters[name] = nn.Parameter(moved, requires_grad=tensor.requires_grad)
            else:
                part._buffers[name] = moved


def backward_of(module: nn.Module) -> Callable[..., None]:
    """In the place of Tensor.backward: gradients of the right shapes."""

    def backward(self: Tensor, *_: Any, **__: Any) -> None:
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)

    return backward
