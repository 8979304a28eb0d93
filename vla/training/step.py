"""One training step: draw, gather, augment, forward, backward, clip, AdamW, average.

Nothing in it waits for the device: the metrics it returns are tensors, read by the loop only
when it logs.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vla.config import Job, TrainConfig
from vla.data.augment import augment
from vla.data.samples import Samples
from vla.device import autocast, kernels
from vla.model.parameters import trains
from vla.model.vla import VLA, parameter_groups
from vla.observation import Tokens


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up to `lr`, then half a cosine down to zero at the last step.

    A run resumed with more steps stretches the cosine: its rate jumps up, and it is another run from there.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


class Average:
    """Exponential moving average of the trainable weights; what a checkpoint deploys.

    The decay ramps up as (1 + step) / (10 + step) so that early weights are forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    @staticmethod
    def live(model: nn.Module) -> list[Tensor]:
        return [p.detach() for p in model.parameters() if p.requires_grad]

    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        live = self.live(model)
        averages = list(self.weights.values())
        torch._foreach_lerp_(averages, live, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]


class TrainStep:
    """Owns the model, its optimiser and its average; `__call__` makes one step."""

    def __init__(self, model: VLA, samples: Samples, job: Job, tasks: list[str]) -> None:
        self.model, self.samples, self.config = model, samples, job.train
        self.device = samples.device
        self.augment = partial(augment, config=job.data)
        groups = parameter_groups(model, job.model, job.train.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=job.train.lr, betas=job.train.betas, fused=True)
        self.average = Average(model, job.train.ema_decay)
        self.generator = torch.Generator(self.device).manual_seed(job.seed)
        words = model.text.tokenize(tasks)
        self.words = Tokens(words.x.to(self.device), words.pad.to(self.device))
        self.features = None if trains(model.text.encoder) else model.text.encode(self.words)
        self.loss_of = torch.compile(self._loss) if job.train.compile else self._loss

    def _loss(self, batch: Any, measure: bool) -> tuple[Tensor, dict[str, Tensor]]:
        if self.features is not None:  # frozen: every instruction was encoded once, at the start
            text = self.features[batch.task]
        else:
            text = self.model.text.encode(self.words[batch.task])
        with autocast(self.device, self.config.precision):
            return self.model.loss(batch, text, self.augment, measure)

    def __call__(self, step: int, measure: bool = True) -> dict[str, Tensor]:
        """Make step number `step` (from 0) and return its metrics as tensors on the device.

        measure: the network's too, not only loss and grad_norm.
        """
        rate = learning_rate(step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_multiplier", 1.0)
        batch = self.samples.batch(self.samples.draw(self.config.batch_size, self.generator))
        loss, metrics = self.loss_of(batch, measure)
        self.optimizer.zero_grad(set_to_none=True)
        with kernels(self.device, self.config.precision):
            loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.average.update(self.model, step)
        return {"loss": loss.detach(), "grad_norm": norm, **metrics}

    def finite(self) -> bool:
        """Whether all weights are finite; waits for the device."""
        return all(bool(p.isfinite().all()) for p in self.average.live(self.model))

    def _fixed(self) -> dict[str, Tensor]:
        """What the optimiser does not train: frozen weights, running statistics; none of the text encoder."""
        everything = self.model.state_dict()
        names = everything.keys() - self.average.weights.keys()
        return {n: everything[n] for n in sorted(names) if not n.startswith("text.encoder.")}

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs to go on bit for bit, as flat named tensors.

        But what text/ of a checkpoint holds: the text encoder's weights that do not train.
        """
        names = {id(p): n for n, p in self.model.named_parameters()}
        state = {f"weights.{n}": p.detach() for n, p in self.model.named_parameters() if p.requires_grad}
        state |= {f"fixed.{n}": tensor for n, tensor in self._fixed().items()}
        for parameter, slots in self.optimizer.state.items():
            state |= {f"adamw.{key}.{names[id(parameter)]}": value for key, value in slots.items()}
        state |= {f"average.{n}": w for n, w in self.average.weights.items()}
        state |= {"random.samples": self.generator.get_state(), "random.torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["random.cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` gave. Raises ValueError when it is of another version."""
        wanted = {f"fixed.{n}" for n in self._fixed()} | {f"weights.{n}" for n in self.average.weights}
        if missing := sorted(wanted - state.keys()):
            raise ValueError(
                f"The training state is of another version. got: none of {missing[:3]}. expected: the weights "
                "of this version's network. remedy: resume with the version that wrote it, or begin a new "
                "run with train.init."
            )
        with torch.no_grad():
            for name, tensor in self._fixed().items():
                tensor.copy_(state[f"fixed.{name}"])
            for name, parameter in self.model.named_parameters():
                if not parameter.requires_grad:
                    continue
                parameter.copy_(state[f"weights.{name}"])
                self.average.weights[name].copy_(state[f"average.{name}"])
                self.optimizer.state[parameter] = {
                    key: state[f"adamw.{key}.{name}"].to(parameter.device)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                    if f"adamw.{key}.{name}" in state
                }
        self.generator.set_state(state["random.samples"].cpu())
        torch.set_rng_state(state["random.torch"].cpu())
        if "random.cuda" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random.cuda"].cpu(), self.device)
