"""Text tokens: against transformers, padding, freezing, vocabularies of our own, clear errors."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import parity
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from toy_run import text_folder
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5Model,
)

from vla.config import ConfigError, TextConfig
from vla.model import text as text_module
from vla.model.text import TextCache, TextTokens, minilm, quietly

INSTRUCTIONS = ["touch the red ball", "", "push the blue block to the left of the bowl"]


@pytest.fixture(scope="module")
def text() -> TextTokens:
    return TextTokens(TextConfig())


def test_text_features_are_berts_hidden_states(text: TextTokens) -> None:
    bert = BertModel.from_pretrained(minilm())
    bert.eval()
    words = text.tokenize(INSTRUCTIONS)
    with torch.no_grad():
        expected = bert(input_ids=words.x, attention_mask=(~words.pad).long()).last_hidden_state
    tokens = text.encode(words)
    assert torch.equal(tokens.x, expected)
    assert torch.equal(tokens.pad, words.pad)


def test_tokens_are_padded_to_a_multiple_of_eight(text: TextTokens) -> None:
    words = text.tokenize(INSTRUCTIONS)
    assert words.x.shape == words.pad.shape == (3, 16)
    assert (~words.pad).sum(dim=1).tolist() == [6, 2, 12]  # with [CLS] and [SEP]
    assert text.tokenizer.decode(words.x[0, 1:5]) == INSTRUCTIONS[0]


def test_an_instruction_of_no_tokens_becomes_one_that_ends_it() -> None:
    text = TextTokens(TextConfig(encoder=text_folder()))  # like GPT-2's, its tokenizer adds nothing
    words = text.tokenize(["", "go to the red target"])
    assert (~words.pad).sum(1).tolist() == [1, 5]
    assert words.x[0, 0] == text.tokenizer.pad_token_id  # it has no token for the end
    assert text.encode(words).x.isfinite().all()
    text.tokenizer.eos_token = "reach"
    assert text.tokenize([""]).x[0, 0] == text.tokenizer.convert_tokens_to_ids("reach")


def test_a_long_instruction_is_never_cut(text: TextTokens) -> None:
    with pytest.raises(ConfigError, match="got 32, expected at least 42 for 'go go.*remedy: raise"):
        text.tokenize(["touch it", " ".join(["go"] * 40)])


def test_frozen_text_takes_no_gradient_and_no_dropout(text: TextTokens) -> None:
    text.train()
    words = text.tokenize(INSTRUCTIONS)
    tokens = text.encode(words)
    assert not tokens.x.requires_grad
    assert torch.equal(tokens.x, text.encode(words).x)
    assert not any(parameter.requires_grad for parameter in text.parameters())


def test_an_encoder_comes_by_its_hub_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From the hub's cache, where a folder of our own lies."""
    folder = tmp_path / "models--somebody--words"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    shutil.copytree(text_folder(), folder / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    named, local = (TextTokens(TextConfig(encoder=name)) for name in ("somebody/words", text_folder()))
    words = local.tokenize(INSTRUCTIONS)
    assert torch.equal(named.tokenize(INSTRUCTIONS).x, words.x)
    assert torch.equal(named.encode(words).x, local.encode(words).x)


def test_what_cannot_be_loaded_is_explained(tmp_path: Path) -> None:
    def broken(change: Callable[[Path], None]) -> str:
        shutil.rmtree(tmp_path / "broken", ignore_errors=True)
        folder = Path(shutil.copytree(text_folder(), tmp_path / "broken"))
        change(folder)
        return str(folder)

    def forget_words(folder: Path) -> None:
        for file in [*folder.glob("token*"), *folder.glob("vocab*")]:
            file.unlink()

    def tear(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"torn")

    for make, reason in (
        (lambda: broken(forget_words), "knows no words"),
        (lambda: broken(tear), "header too small"),
        (lambda: "./nowhere", "no such folder"),
    ):
        name = make()
        with pytest.raises(ValueError, match=f"model.text.encoder: .*{reason}.*expected: .*remedy: "):
            TextTokens(TextConfig(encoder=name))


def test_text_can_be_tuned() -> None:
    text = TextTokens(TextConfig(frozen=False)).train()
    assert text.encoder.training
    text.encode(text.tokenize(INSTRUCTIONS)).x.square().sum().backward()
    trainable = [parameter for parameter in text.parameters() if parameter.requires_grad]
    assert len(trainable) > 90
    assert all(parameter.grad is not None for parameter in trainable)


def test_a_saved_encoder_is_the_same_without_its_package(
    text: TextTokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text.save(tmp_path)
    monkeypatch.setattr(text_module, "MINILM_PACKAGE", "not_installed_here")
    copy = TextTokens(TextConfig(), tmp_path)
    words = text.tokenize(INSTRUCTIONS)
    assert torch.equal(copy.tokenize(INSTRUCTIONS).x, words.x)
    assert torch.equal(copy.encode(words).x, text.encode(words).x)


def test_minilm_comes_from_the_hub_when_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "MINILM_PACKAGE", "not_installed_here")
    assert minilm() == "sentence-transformers/all-MiniLM-L6-v2"
    with pytest.raises(ValueError, match=r"(?s)cannot be loaded.*remedy: install"):
        TextTokens(TextConfig())


def test_altered_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "MINILM_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"got: sha256 53aa5117.*remedy: reinstall"):
        minilm()


def test_the_cache_returns_what_the_encoder_does(text: TextTokens) -> None:
    cache = TextCache(text)
    tokens, expected = cache(INSTRUCTIONS), text.encode(text.tokenize(INSTRUCTIONS))
    assert torch.equal(tokens.pad, expected.pad)
    torch.testing.assert_close(tokens.x[~tokens.pad], expected.x[~expected.pad], atol=1e-5, rtol=1e-4)
    alone = cache(INSTRUCTIONS[:1])
    assert alone.x.shape[1] == 8
    assert torch.equal(alone.x[0, :6], tokens.x[0, :6])  # whoever else is asked for


def test_frozen_features_are_computed_once_per_instruction(text: TextTokens) -> None:
    cache, calls = TextCache(text), []
    handle = text.encoder.register_forward_hook(lambda *_: calls.append(1))
    first = cache([INSTRUCTIONS[0], INSTRUCTIONS[2], INSTRUCTIONS[0]])
    assert len(calls) == 2
    again = cache(INSTRUCTIONS)
    handle.remove()
    assert len(calls) == 3
    assert torch.equal(first.x[0], first.x[2])
    assert torch.equal(first.x[1], again.x[2])


def test_no_sequence_is_padded_beyond_max_tokens() -> None:
    text = TextTokens(TextConfig(max_tokens=13))
    assert text.tokenize(INSTRUCTIONS).x.shape == TextCache(text)(INSTRUCTIONS).x.shape[:2] == (3, 13)


def test_more_tokens_than_the_encoder_has_positions_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_tokens: got 65, expected at most the 64 positions"):
        TextTokens(TextConfig(encoder=text_folder(), max_tokens=65))


# Families: as they are on the hub, small and of random weights


def words_tokenizer(template: str, **special: str) -> PreTrainedTokenizerFast:
    """Whole words, and the special tokens where the template says."""
    names = [*special.values(), *sorted({word for text in INSTRUCTIONS for word in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    pairs = [(name, names.index(name)) for name in special.values() if name in template]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=pairs)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's: pieces of bytes, no padding, nothing added."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    tokenizer.train_from_iterator(INSTRUCTIONS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", bos_token="<end>")


def bert() -> tuple[Any, Any]:
    tokenizer = words_tokenizer(
        "[CLS] $A [SEP]", unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    return tokenizer, BertModel(BertConfig(vocab_size=len(tokenizer), **sizes))


def t5() -> tuple[Any, Any]:
    tokenizer = words_tokenizer("$A </s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    sizes = dict(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return tokenizer, T5Model(T5Config(vocab_size=len(tokenizer), **sizes))


def gpt2() -> tuple[Any, Any]:
    tokenizer = bytes_tokenizer()
    end = tokenizer.eos_token_id
    sizes = dict(n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=end, eos_token_id=end)
    return tokenizer, GPT2Model(GPT2Config(vocab_size=len(tokenizer), **sizes))


FAMILIES = {"bert": (bert, BertModel), "t5": (t5, T5EncoderModel), "gpt2": (gpt2, GPT2Model)}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder as the hub has it, and the model that transformers itself makes of it."""
    folder = tmp_path_factory.mktemp(request.param)
    build, kind = FAMILIES[request.param]
    torch.manual_seed(0)
    tokenizer, model = build()
    tokenizer.save_pretrained(folder)
    for parameter in model.parameters():  # transformers begins too near zero to tell tokens apart
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    with quietly():
        model.save_pretrained(folder)
        return folder, kind.from_pretrained(folder).eval()


def test_features_of_every_family_are_transformers_hidden_states(family: tuple[Path, Any]) -> None:
    folder, reference = family
    text = TextTokens(TextConfig(encoder=str(folder)))
    assert type(text.encoder) is type(reference)
    words = text.tokenize(INSTRUCTIONS)
    tokens = text.encode(words)
    assert tokens.x.shape == (*words.x.shape, text.width)
    for ids, pad, got in zip(words.x, words.pad, tokens.x, strict=True):
        assert pad.any() or len(ids) == text.config.max_tokens
        with torch.no_grad():  # alone, without padding and without a mask
            expected = reference(input_ids=ids[~pad][None]).last_hidden_state[0]
        parity(
            f"text tokens, {type(reference).__name__}", "transformers, each alone", got[~pad], expected, 1e-5
        )
    assert tokens.x[0, :4].std(dim=0).mean() > 0.3  # tokens are told apart


def test_padding_changes_no_family(family: tuple[Path, Any]) -> None:
    text = TextTokens(TextConfig(encoder=str(family[0])))
    words = text.tokenize(INSTRUCTIONS)
    x = text.encode(words).x[~words.pad]
    words.x[words.pad] = 3
    torch.testing.assert_close(text.encode(words).x[~words.pad], x, atol=1e-6, rtol=1e-6)


def test_every_family_is_saved_and_loaded(family: tuple[Path, Any], tmp_path: Path) -> None:
    text = TextTokens(TextConfig(encoder=str(family[0]), frozen=False))
    text.save(tmp_path)
    copy = TextTokens(TextConfig(encoder="no/such/model", frozen=False), tmp_path)
    assert type(copy.encoder) is type(text.encoder)
    assert torch.equal(copy.tokenize(INSTRUCTIONS).x, text.tokenize(INSTRUCTIONS).x)
    assert {n: p.shape for n, p in copy.state_dict().items()} == {
        n: p.shape for n, p in text.state_dict().items()
    }
    text.eval(), copy.eval()
    words = text.tokenize(INSTRUCTIONS)
    assert torch.equal(copy.encode(words).x, text.encode(words).x)


def test_every_family_can_be_tuned(family: tuple[Path, Any]) -> None:
    text = TextTokens(TextConfig(encoder=str(family[0]), frozen=False)).train()
    assert text.encoder.training
    tokens = text.encode(text.tokenize(INSTRUCTIONS))
    tokens.x[~tokens.pad].mul(torch.arange(text.width)).sum().backward()
    for name, parameter in text.named_parameters():
        assert not parameter.requires_grad or (parameter.grad is not None and parameter.grad.any()), name


# From scratch

SCRATCH = TextConfig(
    encoder="scratch", frozen=False, lr_multiplier=1.0, width=32, layers=2, heads=4, vocabulary=200
)


def scratch(instructions: list[str] = INSTRUCTIONS, **options: Any) -> TextTokens:
    torch.manual_seed(0)
    return TextTokens(replace(SCRATCH, **options), instructions=instructions)


def test_scratch_is_a_bert_of_the_configured_sizes() -> None:
    text = scratch()
    assert isinstance(text.encoder, BertModel)
    sizes = text.encoder.config
    got = sizes.hidden_size, sizes.num_hidden_layers, sizes.num_attention_heads, sizes.max_position_embeddings
    assert got == (32, 2, 4, SCRATCH.max_tokens)
    assert text.width == 32
    words = text.tokenize(INSTRUCTIONS)
    expected = ["[CLS]", *INSTRUCTIONS[0].split(), "[SEP]", "[PAD]", "[PAD]"]
    assert text.tokenizer.convert_ids_to_tokens(words.x[0, :8]) == expected
    assert (~words.pad).sum(dim=1).tolist() == [6, 2, 12]  # every word of the instructions is one token
    with torch.no_grad():
        reference = text.encoder.eval()(input_ids=words.x[:1, :6]).last_hidden_state[0]
        torch.testing.assert_close(text.encode(words).x[0, :6], reference, atol=1e-6, rtol=1e-5)


def test_scratch_is_the_same_whatever_the_order_of_instructions() -> None:
    instructions = [*INSTRUCTIONS, *(f"stack {colour} on {shape}" for colour in "abcd" for shape in "wxyz")]
    first = scratch(instructions, vocabulary=66)
    assert len(first.tokenizer) == 66  # so that the trainer had to choose
    for seed in range(4):
        order = torch.randperm(len(instructions), generator=torch.Generator().manual_seed(seed)).tolist()
        other = scratch([instructions[i] for i in order] + instructions[:3], vocabulary=66)
        assert other.tokenizer.get_vocab() == first.tokenizer.get_vocab()
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_unseen_words_fall_into_pieces_or_are_unknown() -> None:
    text = scratch()
    tokens = {name: text.tokenizer.tokenize(name) for name in ("Rebuttal", "bed", "jazz", "日本", "red" * 60)}
    assert len(tokens["Rebuttal"]) > 1
    assert "".join(piece.removeprefix("##") for piece in tokens["Rebuttal"]) == "rebuttal"
    assert "".join(piece.removeprefix("##") for piece in tokens["bed"]) == "bed"
    assert tokens["jazz"] == tokens["red" * 60] == ["[UNK]"]
    assert set(tokens["日本"]) == {"[UNK]"}
    strange = text.tokenize(["日本 jazz \x00 \t !?", "", "Rebuttal, [SEP] [PAD] naïve"])
    assert text.eval().encode(strange).x.isfinite().all()


def test_scratch_comes_back_from_its_folder(tmp_path: Path) -> None:
    text = scratch().eval()
    text.save(tmp_path)
    copy = TextTokens(SCRATCH, tmp_path).eval()  # needs no instructions
    assert [n for n, _ in copy.named_parameters()] == [n for n, _ in text.named_parameters()]
    words = text.tokenize([*INSTRUCTIONS, "unheard of 日本"])
    assert torch.equal(copy.tokenize([*INSTRUCTIONS, "unheard of 日本"]).x, words.x)
    assert torch.equal(copy.encode(words).x, text.encode(words).x)


@pytest.mark.parametrize("instructions", [None, []])
def test_scratch_needs_instructions(instructions: list[str] | None) -> None:
    with pytest.raises(
        ConfigError, match=r"got 'scratch, and no instructions', expected the dataset's.*remedy"
    ):
        TextTokens(SCRATCH, instructions=instructions)


def test_a_vocabulary_too_small_for_the_letters_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.text\.vocabulary: got 20, expected \d\d or more"):
        scratch(vocabulary=20)


def test_scratch_learns_from_end_to_end() -> None:
    text = scratch().train()
    tokens = text.encode(text.tokenize(INSTRUCTIONS))
    tokens.x[~tokens.pad].mul(torch.arange(32)).sum().backward()
    for name, parameter in text.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
