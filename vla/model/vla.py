"""The network: a = Decoder(Encoder([f_v ; f_l ; f_s])).

    B batch            T n_obs_steps (history)      C cameras
    H chunk_size       A action_dim                 P state_dim
    L text tokens      D d_model                    S memory length

What departs from the Transformer of Vaswani et al. 2017: the encoder reads one sequence of image,
text and state tokens, the image tokens being conditioned on the instruction before that
(`image.conditioning: film`, or `none`); the decoder's input is not the shifted target but one
learned "open" token per action, so that all H actions come out of one pass (`decoding: parallel`;
`autoregressive` is the original). Being causal, it can continue actions that are already committed
to the robot: the first d tokens then carry those (a committed prefix), drawn at random in training,
given at inference.

Normalisation lives inside: uint8 images and raw state go in, robot units come out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vla.architecture import ModelConfig
from vla.checks import require
from vla.data.normalize import MixedStatistics, Normalizer, Statistics
from vla.model.auxiliary import PositionHead
from vla.model.cut import require_cuttable
from vla.model.decoding import DECODINGS
from vla.model.fusion import FUSIONS
from vla.model.heads import HEADS, Kinds, average, over_dimensions
from vla.model.image import Augment
from vla.model.long_attention import ATTENTIONS
from vla.model.lora import adapt
from vla.model.parameters import count_parameters, initialise_network, parameter_groups
from vla.model.text import TextTokens
from vla.model.tokens import MultimodalTokens
from vla.model.transformer import Decoder
from vla.observation import ACTION, Batch, Features, Observation, Tokens

__all__ = ["VLA", "Drawn", "count_parameters", "parameter_groups"]


@dataclass(frozen=True)
class Drawn:
    """What training draws for each sample of a batch.

    prefix_length: (B,) int64, how many of its actions are given; absent: (B, C) bool, cameras not shown.
    """

    prefix_length: Tensor
    absent: Tensor | None

    def __getitem__(self, part: slice) -> Drawn:
        return Drawn(self.prefix_length[part], None if self.absent is None else self.absent[part])


class VLA(nn.Module):
    """Vision, language and state to a chunk of actions.

    statistics: of the data it is trained on, for normalisation and for the limits of actions. A network
    with those of several datasets is for training only: vla.model.cut makes one dataset's policy of it.
    text_folder: a text encoder saved by `text.save`, instead of the configured one. It belongs to
    a checkpoint, which also brings the image weights: nothing is fetched from a hub then.
    instructions: of the data; a text encoder from scratch learns its words from them.
    Raises ConfigError and ValueError when a backbone or encoder cannot be built.
    """

    real: Tensor | None

    def __init__(
        self,
        config: ModelConfig,
        features: Features,
        statistics: Statistics | MixedStatistics,
        text_folder: str | Path | None = None,
        instructions: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.features = config, features
        require(
            config.camera_dropout == 0 or len(features.cameras) > 1,
            "model.camera_dropout", config.camera_dropout, f"0 with one camera ({', '.join(features.cameras)})",
            "set model.camera_dropout=0, or train on a dataset with more cameras",
        )  # fmt: skip
        self.text = TextTokens(config.text, text_folder, instructions)
        self.tokens = MultimodalTokens(config, features, statistics, self.text.width, text_folder is None)
        layer: dict[str, Any] = {
            name: getattr(config, name)
            for name in ("d_model", "n_heads", "d_ff", "dropout", "norm", "activation", "checkpointing")
        } | {"chunks": config.feed_forward_chunks}
        n_image = config.n_obs_steps * len(features.cameras) * self.tokens.image.count
        longest = n_image + config.text.max_tokens + config.n_obs_steps
        attention = partial(ATTENTIONS[config.attention.kind], config=config.attention, length=longest)
        self.encoder = FUSIONS[config.fusion](
            config.n_encoder_layers, n_image=n_image, n_state=config.n_obs_steps, attention=attention, **layer
        )
        self.normalizer = Normalizer(statistics[ACTION], config.normalization)
        mixed = list(statistics.features.values()) if isinstance(statistics, MixedStatistics) else []
        require_cuttable(config, [set(f.cameras) for f in mixed])
        sizes = [f.action_dim for f in mixed]
        real = torch.arange(features.action_dim) < torch.tensor(sizes)[:, None]  # (datasets, A)
        self.register_buffer("real", real if sizes else None, persistent=False)
        self.actions = DECODINGS[config.decoding](config, self.normalizer)
        self.decoder = Decoder(config.n_decoder_layers, **layer)
        self.head = HEADS[config.head](config, self.normalizer)
        foreign = [] if config.image.backbone == "scratch" else [self.tokens.image.backbone]
        initialise_network(self, keep=[self.text, *foreign])
        self.auxiliary = None
        if config.auxiliary > 0:  # behind the others, whose weights begin as they do without it
            self.auxiliary = PositionHead(config, statistics)
            initialise_network(self.auxiliary)
        adapt(self, config.lora)

    def encode(self, observation: Observation, augment: Augment | None = None) -> Tokens:
        """The memory, (B, S, D) with its padding."""
        return self.encoder(self.tokens(observation, augment))

    def forward(
        self, observation: Observation, actions: Tensor, committed: Tensor, augment: Augment | None = None
    ) -> Tensor:
        """Hidden states of the action tokens (B, H, D); row t depends on actions 0 … t only.

        actions: (B, H, A) normalised. Parallel decoding reads them where committed (B, H) bool is True,
        autoregressive reads all but the last: the pass of teacher forcing.
        """
        memory = self.encode(observation, augment)
        return self.decoder(self.actions(actions, committed), memory)

    def loss(
        self,
        batch: Batch,
        text: Tokens,
        augment: Augment | None = None,
        measure: bool = True,
        drawn: Drawn | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Behaviour cloning: the head's loss over the actions that are neither padding nor prefix.

        text: the features of each sample's instruction (B, L, W); augment: see ImageTokens; drawn: as
        `draw` gave it, drawn here when there is none.
        Returns the scalar and numbers to log, all on the device, none unless `measure`: action_error,
        the mean absolute error in robot units, for which the head must decode. Autoregressive decoding
        is measured on the demonstrated actions before each, which parallel decoding does not see.
        With `model.auxiliary` its loss is added, and position_error is the mean absolute error of the batch's
        environment_state in the data's units (metres).
        """
        kinds = self.kinds(batch)
        target = self.normalizer.normalize(batch.action, batch.source)  # (B, H, A)
        drawn = drawn or self.draw(len(target), target.device)
        committed = self.leading(drawn.prefix_length)  # (B, H)
        absent = both_absent(batch.absent, drawn.absent)
        observation = Observation(batch.images, batch.state, text, absent, batch.source)
        memory = self.encode(observation, augment)
        hidden = self.decoder(self.actions(target, committed), memory)  # (B, H, D)
        ignore = batch.action_is_pad | committed  # (B, H)
        loss, metrics = self.head.loss(hidden, target, ignore, kinds), {}
        if self.auxiliary is not None:
            assert batch.environment_state is not None  # its statistics were there
            error, metrics["position_error"] = self.auxiliary.loss(memory, batch.environment_state, ignore)
            loss = loss + self.config.auxiliary * error
        if not measure:
            return loss, {}
        with torch.no_grad():
            chunk = self.head.decode(hidden, prefix=(target, committed), kinds=kinds)
            error = (self.normalizer.unnormalize(chunk, batch.source) - batch.action).abs()  # (B, H, A)
            return loss, {"action_error": average(over_dimensions(error, kinds), ignore)} | metrics

    def kinds(self, batch: Batch) -> Kinds | None:
        """Which dimensions the actions of a mixture have; None with one dataset."""
        if batch.source is None or self.real is None:
            return None
        return Kinds(batch.source, self.real[batch.source][:, None])

    def predict_chunk(
        self,
        observation: Observation,
        prefix: Tensor | None = None,
        prefix_length: Tensor | None = None,
        sample: bool = False,
    ) -> Tensor:
        """The next H actions (B, H, A) in robot units, float32, inside the limits of the data.

        prefix: (B, H, A) robot units, of which the first prefix_length (B,) int64 are already
        committed; they come back unchanged in their places, and the rest continues them.
        sample: draw from the head's distribution instead of taking its one deterministic answer.
        """
        shape = (len(observation.state), self.config.chunk_size, self.features.action_dim)
        if prefix is None or prefix_length is None:
            prefix, prefix_length = observation.state.new_zeros(shape), observation.state.new_zeros(shape[:1])
        committed = self.leading(prefix_length)  # (B, H)
        known = torch.where(committed[..., None], self.normalizer.normalize(prefix), 0)  # (B, H, A)
        memory = self.encode(observation)
        chunk = self.actions.generate(self.decoder, self.head, memory, known, committed, sample)
        chunk = self.normalizer.clip(self.normalizer.unnormalize(chunk))
        return torch.where(committed[..., None], prefix, chunk)

    def draw(self, batch: int, device: torch.device, generator: torch.Generator | None = None) -> Drawn:
        """Prefixes and missing cameras as configured; in evaluation mode there are none.

        generator: torch's of the device when none is given.
        """
        lengths = self._draw_prefixes(batch, device, generator)
        return Drawn(lengths, self._draw_absent(batch, device, generator))

    def _draw_absent(
        self, batch: int, device: torch.device, generator: torch.Generator | None
    ) -> Tensor | None:
        """(B, C) bool, one camera of the configured share of samples; None when not training."""
        if not self.training or self.config.camera_dropout == 0:
            return None
        cameras = len(self.features.cameras)
        some = torch.rand(batch, 1, device=device, generator=generator) < self.config.camera_dropout
        which = torch.randint(cameras, (batch, 1), device=device, generator=generator)
        return some & (torch.arange(cameras, device=device) == which)

    def _draw_prefixes(self, batch: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
        """Prefix lengths (B,) int64: mostly 0, else uniform in 1 … drawn_prefix; 0 when not training."""
        longest = self.actions.drawn_prefix
        if not self.training or longest == 0:
            return torch.zeros(batch, dtype=torch.int64, device=device)
        some = torch.rand(batch, device=device, generator=generator) < self.config.prefix_probability
        lengths = torch.randint(1, longest + 1, (batch,), device=device, generator=generator)
        return torch.where(some, lengths, 0)

    def leading(self, length: Tensor) -> Tensor:
        """(B,) -> (B, H) bool: True for the first `length` action tokens of each sample."""
        return torch.arange(self.config.chunk_size, device=length.device) < length[:, None]


def both_absent(lacking: Tensor | None, dropped: Tensor | None) -> Tensor | None:
    """Cameras (B, C) that a dataset lacks or that were dropped; never all: then none is dropped."""
    if lacking is None or dropped is None:
        return dropped if lacking is None else lacking
    absent = lacking | dropped
    return torch.where(absent.all(dim=1, keepdim=True), lacking, absent)
