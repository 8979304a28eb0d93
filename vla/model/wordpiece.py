"""A small BERT from scratch, with a vocabulary of WordPieces learned from the dataset's instructions.

WordPiece (Schuster and Nakajima 2012, as in Devlin et al. 2019): words that are frequent together are
one token, others fall into pieces, so that a word which no demonstration named is still read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vla.architecture import TextConfig
from vla.checks import ConfigError, require

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def scratch(config: TextConfig, instructions: Sequence[str] | None) -> tuple[Any, Any]:
    """Tokenizer and BERT of the configured sizes, of random weights; only the set of instructions counts.

    Raises ConfigError when there are no instructions to learn the vocabulary from.
    """
    from transformers import BertConfig, BertModel

    if not instructions:
        raise ConfigError(
            "model.text.encoder", "scratch, and no instructions",
            "the dataset's instructions, from which its vocabulary is learned",
            "give the network `instructions`, or the folder of a trained text encoder",
        )  # fmt: skip
    tokenizer = train_tokenizer(sorted(set(instructions)), config.vocabulary)
    sizes = BertConfig(
        vocab_size=len(tokenizer), hidden_size=config.width, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, intermediate_size=4 * config.width,
        max_position_embeddings=config.max_tokens, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return tokenizer, BertModel(sizes, add_pooling_layer=False)


def train_tokenizer(instructions: Sequence[str], vocabulary: int) -> Any:
    """A transformers tokenizer, [CLS] … [SEP], of at most `vocabulary` WordPieces.

    The trainer of tokenizers numbers letters in the order of a hash table that is another in every
    process, and that order breaks its ties. Named in advance, as if they were special, the letters
    keep their places; the vocabulary then goes into a tokenizer that knows them as letters.
    A word of known letters falls into pieces, one with another letter is [UNK]. Raises ConfigError
    when the letters alone are more than `vocabulary`.
    """
    from tokenizers.models import WordPiece
    from tokenizers.processors import TemplateProcessing
    from tokenizers.trainers import WordPieceTrainer
    from transformers import PreTrainedTokenizerFast

    draft = bert_tokenizer(WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    letters = sorted({letter for text in instructions for word in words(draft, text) for letter in word})
    letters = [*letters, *(f"##{letter}" for letter in letters)]  # at the beginning of a word, and inside
    least = len(SPECIAL) + len(letters)
    require(
        least <= vocabulary, "model.text.vocabulary", vocabulary,
        f"{least} or more, for the letters of the instructions alone",
    )  # fmt: skip
    trainer = WordPieceTrainer(
        vocab_size=vocabulary, special_tokens=[*SPECIAL, *letters], show_progress=False
    )
    draft.train_from_iterator(instructions, trainer)
    tokenizer = bert_tokenizer(WordPiece(draft.get_vocab(), unk_token="[UNK]"))
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(name, SPECIAL.index(name)) for name in ("[CLS]", "[SEP]")],
    )
    names = {f"{name[1:-1].lower()}_token": name for name in SPECIAL}  # pad_token="[PAD]", …
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def bert_tokenizer(model: Any) -> Any:
    """BERT's way from a text to words (lower case, no accents, punctuation apart), then `model`."""
    from tokenizers import Tokenizer
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer

    tokenizer = Tokenizer(model)
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    return tokenizer


def words(tokenizer: Any, text: str) -> list[str]:
    """The words of a text, before they fall into pieces."""
    normal = tokenizer.normalizer.normalize_str(text)
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal)]
