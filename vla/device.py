"""Where tensors live and in which precision they are multiplied."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vla.config import ConfigError


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. Raises ConfigError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError("device", name, "auto, cpu, cuda or cuda:<n>") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        got = f"{torch.cuda.device_count()} CUDA GPUs on this machine"
        raise ConfigError("device", name, f"a device that is there ({got})", "use device=cpu, or auto")
    return device


def multiplies_in(device: torch.device, precision: str) -> str:
    """fp32 or bf16; `auto` is bf16 where the device multiplies it in hardware."""
    if precision != "auto":
        return precision
    on_cpu = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return "bf16" if on_cpu or device.type == "cuda" else "fp32"


@contextlib.contextmanager
def kernels(device: torch.device, precision: str) -> Iterator[None]:
    """Choose attention's kernel, for the way forward and, where layers are computed again, the way back.

    In bf16 on the CPU attention runs as written instead of in the fused kernel, whose backward
    takes more than half of a training step (measured: 2.2 times as many samples a second).
    """
    if device.type == "cpu" and multiplies_in(device, precision) == "bf16":
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # sums in bf16, CPU included
        with sdpa_kernel(SDPBackend.MATH):
            yield
    else:
        yield


@contextlib.contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """Run matrix products in the precision, and attention in its kernel."""
    enabled = multiplies_in(device, precision) == "bf16"
    with torch.autocast(device.type, torch.bfloat16, enabled=enabled), kernels(device, precision):
        yield
