"""A function of tensors that stay where they are: called on the CPU, replayed as one CUDA graph on a GPU.

A small policy's step is a few hundred kernels of some microseconds each, so that launching them one by
one takes longer than running them. A graph launches all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

WARM = 3  # calls before the capture, in which libraries choose kernels and lazy state is made


class Captured[Output]:
    """`function` behind one launch.

    It takes nothing, reads and writes tensors that stay where they are, never waits for the device
    (no .item(), no copies from or to pageable memory), and returns tensors. On a GPU the first WARM
    calls run it for real; then it is captured once, and from then on replayed into the same outputs,
    which the next call overwrites. Elsewhere every call runs it.

    generators: those it draws from beside the device's own, so that each replay draws new numbers.
    pool: the memory of another graph that never runs at the same time, whose outputs are not read
    after this one ran.
    """

    def __init__(
        self,
        function: Callable[[], Output],
        device: torch.device,
        generators: Sequence[torch.Generator] = (),
        pool: Captured | None = None,
    ) -> None:
        self.function, self.device, self.generators = function, device, generators
        self.graph: torch.cuda.CUDAGraph | None = None
        self.shared, self.warm = pool, 0
        self._stream: torch.cuda.Stream | None = None

    def __call__(self) -> Output:
        if self.device.type != "cuda":
            return self.function()
        if self.graph is None and self.warm < WARM:
            self.warm += 1
            return self._aside()
        if self.graph is None:
            self._capture()
        assert self.graph is not None
        self.graph.replay()
        return self.outputs

    @property
    def stream(self) -> torch.cuda.Stream:
        """One of its own, on its device, as torch asks: left to choose, torch captures on the current device."""
        if self._stream is None:
            self._stream = self.shared.stream if self.shared else torch.cuda.Stream(self.device)
        return self._stream

    def _aside(self) -> Output:
        stream = self.stream
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            output = self.function()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        return output

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        torch.cuda.synchronize(self.device)
        pool = self.shared.graph.pool() if self.shared and self.shared.graph else None
        # Other threads may use the device meanwhile (a prefetch that pins memory): only what this one
        # does must be capturable.
        with torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"):
            self.outputs = self.function()
        self.graph = graph
