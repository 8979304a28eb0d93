"""One shape of call to the network, behind buffers that stay where they are: what a GPU needs for one launch.

    B batch            T n_obs_steps      C cameras      L text tokens, W their width
    H chunk_size       A action_dim       P state_dim    h, w the cameras' own sizes

A small network is a few hundred kernels of some microseconds, and launching them one by one takes ten times
as long as running them. So everything from uint8 pictures to robot units is one graph (vla/captured.py) over
buffers of fixed sizes: one copy brings all inputs, one takes the chunk back, and nothing else crosses. The
processor runs the same code over the same buffers, of which the device's are then the host's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vla.captured import Captured
from vla.compiling import compiled
from vla.device import autocast, multiplies_in
from vla.model.vla import VLA
from vla.observation import IMAGES, STATE, Observation, Tokens

Fields = dict[str, tuple[tuple[int, ...], torch.dtype]]  # name -> shape and type

# eager: kernel by kernel. graph: captured on a GPU, a second's work; elsewhere as eager. compiled: fused
# first, on whatever device, which takes 20 s and more unless it is on disk (vla/compiling.py). auto: compiled on
# a GPU, elsewhere eager.
LAUNCHES = ("auto", "eager", "graph", "compiled")
ALIGNED = 256  # bytes, as CUDA's own allocations: kernels load whole vectors
CASTS = (nn.Linear, nn.Conv2d)  # what autocast multiplies in bf16; subclasses may do more with their weights
PREFIX, PREFIX_LENGTH, ABSENT = "prefix", "prefix_length", "absent"  # inputs that LeRobot has no key for


@dataclass(frozen=True)
class Shape:
    """What must be the same for a graph to be used again. images: (h, w) of each camera, by name."""

    batch: int
    words: int
    images: tuple[tuple[int, int], ...]


def deployed(model: VLA, device: torch.device, precision: str) -> VLA:
    """The network as it runs: on the device, its weights in the type they are multiplied in.

    Casting them at every call, as autocast does, would read and write all of them each time, in a kernel each.
    The answers are the same bits. Another network than `model` where that changes anything; the text encoder,
    which runs outside autocast, is shared.
    """
    if multiplies_in(device, precision) == "bf16":
        model = copy.deepcopy(model, {id(model.text): model.text})
        for name, module in model.named_modules():
            if type(module) in CASTS and not name.startswith("text."):
                module.to(torch.bfloat16)
    return model.to(device).eval()


def input_fields(model: VLA, shape: Shape) -> Fields:
    """The inputs of a call: (B, T, h, w, 3) uint8 of each camera, the state (B, T, P), the prefix (B, H, A) and its
    length (B,), and the absent cameras (B, C) where training dropped some.
    """
    config, features, b = model.config, model.features, shape.batch
    fields: Fields = {
        IMAGES + name: ((b, config.n_obs_steps, *size, 3), torch.uint8)
        for name, size in zip(sorted(features.cameras), shape.images, strict=True)
    }
    fields[STATE] = (b, config.n_obs_steps, features.state_dim), torch.float32
    fields[PREFIX] = (b, config.chunk_size, features.action_dim), torch.float32
    fields[PREFIX_LENGTH] = (b,), torch.int64
    if config.camera_dropout > 0:
        fields[ABSENT] = (b, len(features.cameras)), torch.bool
    return fields


class Buffers:
    """Arrays side by side in one piece of the host's memory, and again in the device's."""

    def __init__(self, fields: Fields, device: torch.device) -> None:
        """On the CPU both sides are the same memory."""
        starts, end = {}, 0
        for name, (shape, dtype) in fields.items():
            starts[name] = end
            end += -(-math.prod(shape) * dtype.itemsize // ALIGNED) * ALIGNED
        on_host = device.type == "cpu"
        self.host = torch.zeros(end, dtype=torch.uint8, pin_memory=not on_host)
        self.device = self.host if on_host else torch.zeros(end, dtype=torch.uint8, device=device)

        def view(memory: Tensor, name: str) -> Tensor:
            shape, dtype = fields[name]
            size = math.prod(shape) * dtype.itemsize
            return memory[starts[name] : starts[name] + size].view(dtype).view(shape)

        self.arrays = {name: view(self.host, name).numpy() for name in fields}
        self.tensors = {name: view(self.device, name) for name in fields}

    def send(self) -> None:
        """To the device, in one copy; the host's side may be written again once the device was waited for."""
        if self.device is not self.host:
            self.device.copy_(self.host, non_blocking=True)


class Pass:
    """From what the buffers and `text` hold to a chunk; what a graph captures. Knows nothing of who calls it, so
    that a retired policy gives its memory back at once.
    """

    def __init__(
        self, model: VLA, precision: str, device: torch.device, shape: Shape, compiles: bool
    ) -> None:
        self.precision, self.device = precision, device
        self.cameras = sorted(model.features.cameras)
        self.buffers = Buffers(input_fields(model, shape), device)
        self.text = Tokens(
            torch.zeros(shape.batch, shape.words, model.text.width, device=device),
            torch.ones(shape.batch, shape.words, dtype=torch.bool, device=device),
        )
        self.network = compiled(model.predict_chunk) if compiles else model.predict_chunk

    def __call__(self) -> Tensor:
        """The chunk (B, H, A), on the device."""
        inputs = self.buffers.tensors
        images = {name: inputs[IMAGES + name].permute(0, 1, 4, 2, 3) for name in self.cameras}
        observation = Observation(images, inputs[STATE], self.text, inputs.get(ABSENT))
        with autocast(self.device, self.precision):
            return self.network(observation, inputs[PREFIX], inputs[PREFIX_LENGTH]).float()


class StaticCall:
    """`VLA.predict_chunk` for one shape, from arrays to an array. model: as `deployed`; launch: one of LAUNCHES."""

    def __init__(self, model: VLA, precision: str, device: torch.device, shape: Shape, launch: str) -> None:
        self.device = device
        self.shown: Tokens | None = None  # the instruction that the pass is told
        self.passed = Pass(model, precision, device, shape, launch == "compiled")
        self.run = self.passed if launch == "eager" else Captured(self.passed, device)
        answer = (shape.batch, model.config.chunk_size, model.features.action_dim)
        self.answer = torch.zeros(answer, pin_memory=device.type != "cpu")

    def tell(self, text: Tokens) -> None:
        """Show another instruction: features (B, up to L, W) on the device, which a known one's object repeats."""
        if text is self.shown:
            return
        words, told = text.x.shape[1], self.passed.text
        told.x[:, :words] = text.x
        told.pad[:, :words] = text.pad
        told.pad[:, words:] = True  # what lies there is finite, and not attended to
        self.shown = text

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """The chunk (B, H, A) float32, an array of the caller's own. inputs: of `input_fields`."""
        buffers = self.passed.buffers
        for name, array in buffers.arrays.items():
            np.copyto(array, inputs[name], casting="unsafe")
        buffers.send()
        chunk = self.run()
        if self.device.type == "cpu":
            return chunk.numpy()
        self.answer.copy_(chunk, non_blocking=True)
        torch.cuda.current_stream(self.device).synchronize()
        return self.answer.numpy().copy()
