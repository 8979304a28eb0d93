"""One training step: draw, gather, augment, forward, backward, clip, AdamW, average.

Nothing in it waits for the device: learning rates lie in a table there, what it returns are tensors,
read by the loop only when it logs, and a loss that is not finite is noted there too. So on a GPU the
whole step is one CUDA graph (`vla.captured`); elsewhere the same code runs as written.

Everything random about a batch is drawn before it is split into parts (`train.accumulate`) or among
processes, so that neither changes what is learned. But dropout and the noise of the flow head.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vla.captured import Captured
from vla.compiling import keep_on_disk
from vla.config import Job, TrainConfig
from vla.data.augment import Augmentation
from vla.data.prefetch import Source
from vla.device import autocast, kernels
from vla.model.parameters import trains
from vla.model.vla import VLA, Drawn, parameter_groups
from vla.observation import Batch, Tokens
from vla.training.average import Average
from vla.training.feed import Feed
from vla.training.ranks import Ranks, whole
from vla.training.state import load_state, set_generator, state_of

Metrics = dict[str, Tensor]


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up to `lr`, then half a cosine down to zero at the last step.

    A run resumed with more steps stretches the cosine: its rate jumps up, and it is another run from there.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


class BatchLoss(nn.Module):
    """The network as a function of a batch: what is compiled, and what DDP wraps.

    Frozen, the text encoder has read every instruction once, at the start.
    """

    def __init__(self, model: VLA, words: Tokens, precision: str) -> None:
        super().__init__()
        self.model, self.words, self.precision = model, words, precision
        self.features = None if trains(model.text.encoder) else model.text.encode(words)

    def forward(
        self, batch: Batch, augmentation: Augmentation, drawn: Drawn, measure: bool
    ) -> tuple[Tensor, Metrics]:
        if self.features is not None:
            text = self.features[batch.task]
        else:
            text = self.model.text.encode(self.words[batch.task])
        with autocast(batch.state.device, self.precision):
            return self.model.loss(batch, text, augmentation, measure, drawn)


class TrainStep:
    """Owns the model, its optimiser and its average; `__call__` makes one step.

    generators: `samples` draws the frames, `noise` prefixes, missing cameras and augmentation; torch's own
    is left to dropout. On the CPU `noise` goes on where that one was when this was made.
    """

    def __init__(
        self, model: VLA, samples: Source, job: Job, tasks: list[str], ranks: Ranks | None = None
    ) -> None:
        self.model, self.job, self.config = model, job, job.train
        self.device = samples.device
        self.ranks = ranks or Ranks(self.device)
        cuda, steps = self.device.type == "cuda", job.train.steps
        groups = parameter_groups(model, job.model, job.train.weight_decay)
        self.optimizer = torch.optim.AdamW(
            groups, lr=job.train.lr, betas=job.train.betas, fused=True, capturable=cuda
        )
        exact = torch.float32 if cuda else torch.float64  # what the fused kernel reads there
        for group in self.optimizer.param_groups:
            group["lr"] = torch.zeros((), dtype=exact, device=self.device)
        words = model.text.tokenize(tasks)
        words = Tokens(words.x.to(self.device), words.pad.to(self.device))
        loss = BatchLoss(model, words, job.train.precision)
        unused = [model.text] if loss.features is not None else []
        self.loss = self.ranks.prepare(loss, self.optimizer, unused)
        if job.train.compile:
            keep_on_disk()
        self.loss_of: Any = torch.compile(self.loss) if job.train.compile else self.loss
        self.average = Average(model, job.train.ema_decay)  # of the weights as the ranks hold them
        self.rates = self._table([learning_rate(i, job.train) for i in range(steps)], exact)
        self.shares = self._table([self.average.share(i) for i in range(steps)], exact)
        # Of several ranks one may not have room for its frames: all draw alike, on the CPU.
        inside = samples.resident and self.ranks.count == 1
        drawer = torch.Generator(self.device if inside else "cpu").manual_seed(job.seed)
        noise = torch.Generator(self.device)
        if cuda:
            noise.manual_seed(job.seed + 1)
        else:
            noise.set_state(torch.get_rng_state())
        self.generators = {"samples": drawer, "noise": noise}
        self.feed = Feed(self.ranks.share(samples), job.train.batch_size, drawer)
        self.images = job.model.n_obs_steps * len(model.features.cameras)  # of a sample
        self.next = 0
        self.number = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.failed = torch.full((1,), -1, device=self.device)  # the first step that was not finite
        self.failed_index = torch.full((job.train.batch_size,), -1, device=self.device)  # and its frames
        captured = cuda and job.train.capture and self.ranks.count == 1
        drawn_inside = [g for g in self.generators.values() if g.device.type == "cuda"]
        plain = Captured(partial(self._step, False), self.device, drawn_inside)
        measured = Captured(partial(self._step, True), self.device, drawn_inside, pool=plain)
        self.run = (plain, measured) if captured else (plain.function, measured.function)

    def _table(self, values: list[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def __call__(self, step: int, measure: bool = True) -> Metrics:
        """Make step number `step` (from 0) and return its metrics as tensors on the device.

        measure: the network's too, not only loss and grad_norm. The next call may overwrite them.
        """
        if step != self.next:
            self.number.fill_(step)
        self.next = step + 1
        self.feed.advance()
        return self.run[measure]()

    def _step(self, measure: bool) -> Metrics:
        rate = self.rates.index_select(0, self.number)[0]
        for group in self.optimizer.param_groups:
            group["lr"].copy_(rate * group.get("lr_multiplier", 1.0))
        index, batch = self.feed.take()
        self.optimizer.zero_grad(set_to_none=True)
        metrics = self._backward(batch, *self._draw(len(index)), measure)
        norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip))
        self.optimizer.step()
        share = self.shares.index_select(0, self.number)[0]
        self.average.update(self.model, share if self.device.type == "cuda" else share.item())
        self._watch(metrics["loss"], norm, index)
        self.number += 1
        return metrics | {"grad_norm": norm}

    def _draw(self, batch: int) -> tuple[Augmentation, Drawn]:
        noise = self.generators["noise"]
        drawn = self.model.draw(batch, self.device, noise)
        return Augmentation.draw(batch, self.images, self.job.data, self.device, noise), drawn

    def _backward(self, batch: Batch, augmentation: Augmentation, drawn: Drawn, measure: bool) -> Metrics:
        """Gradients of the mean over all actions that count, part by part; loss and metrics are that mean too.

        batch: this rank's part of it; augmentation, drawn: of all of it.
        """
        own = self.ranks.part(len(drawn.prefix_length))
        augmentation, drawn = augmentation[own], drawn[own]
        size = len(batch.task) // self.config.accumulate
        parts = [slice(i * size, (i + 1) * size) for i in range(self.config.accumulate)]
        counted = ~(batch.action_is_pad | self.model.leading(drawn.prefix_length))  # (B, H)
        total = self.ranks.sum(counted.sum()).clamp(min=1)
        sums: Metrics = {}
        for part in parts:
            with self.ranks.without_sync(self.loss) if part != parts[-1] else nullcontext():
                loss, metrics = self.loss_of(batch[part], augmentation[part], drawn[part], measure)
                share = counted[part].sum() / total
                with kernels(self.device, self.config.precision):
                    (loss * share * self.ranks.count).backward()  # among ranks gradients are averaged
            for name, value in {"loss": loss.detach(), **metrics}.items():
                sums[name] = sums.get(name, 0) + value * share
        return self.ranks.sum(sums)

    def _watch(self, loss: Tensor, norm: Tensor, index: Tensor) -> None:
        """Note the first step whose loss or gradient is not finite, and its frames."""
        first = ~(loss.isfinite() & norm.isfinite()) & (self.failed < 0)  # (1,)
        self.failed.copy_(torch.where(first, self.number, self.failed))
        self.failed_index.copy_(torch.where(first, index.to(self.device), self.failed_index))

    def failure(self) -> tuple[int, list[int]] | None:
        """The first step that was not finite, from 0, and the frames of its batch; waits for the device."""
        step = int(self.failed.item())
        return None if step < 0 else (step, self.failed_index.tolist())

    def finite(self) -> bool:
        """Whether all weights are finite; waits for the device."""
        return all(bool(whole(p.isfinite().all())) for p in self.average.live(self.model))

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs to go on bit for bit, as flat named tensors."""
        return (
            state_of(self.model, self.optimizer, self.average, self.device)
            | self.feed.state()
            | {"random.noise": self.generators["noise"].get_state()}
        )

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` gave. Raises ValueError when it is of another version."""
        load_state(state, self.model, self.optimizer, self.average, self.device)
        self.feed.load_state(state)
        set_generator(self.generators["noise"], state["random.noise"])
