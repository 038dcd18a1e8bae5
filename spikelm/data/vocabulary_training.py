"""Vocabularies made from text: byte-level BPE, and characters; the content of a ``tokenizer.json`` each."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, cast

from spikelm.data import vocabulary
from spikelm.data.plain_text import checked, split_lines
from spikelm.errors import DataError


def check_training(vocab_size: int, special_tokens: Sequence[str]) -> None:
    """Refuse sizes and special tokens that cannot be, before any text is read.

    Raises:
        DataError: ``vocab_size`` leaves no room for the bytes, or the special tokens repeat.
    """
    least = 256 + len(special_tokens)
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < least:
        raise DataError(
            f"vocab_size is {vocab_size!r}; expected an integer of at least {least} "
            f"(256 for the bytes, {len(special_tokens)} for special tokens)"
        )
    if len(set(special_tokens)) != len(special_tokens) or "" in special_tokens:
        raise DataError(f"special tokens must be different and not empty; got {list(special_tokens)}")


def bpe(
    texts: Iterable[str],
    vocab_size: int,
    special_tokens: Sequence[str],
    min_frequency: int,
    show_progress: bool,
) -> dict[str, Any]:
    """See :meth:`spikelm.tokenizer.Tokenizer.train_bpe`."""
    check_training(vocab_size, special_tokens)
    library = tokenizers_library()
    core = library.Tokenizer(library.models.BPE())
    core.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=show_progress,
    )
    core.train_from_iterator((part for text in texts for part in split_lines(checked(text))), trainer)
    return cast(dict[str, Any], json.loads(core.to_str()))


def characters(
    texts: Iterable[str], vocab_size: int | None, special_tokens: Sequence[str], min_frequency: int
) -> dict[str, Any]:
    """See :meth:`spikelm.tokenizer.Tokenizer.characters`."""
    check_training(256 + len(special_tokens) if vocab_size is None else vocab_size, special_tokens)
    seen: Counter[str] = Counter()
    for text in texts:
        seen.update(checked(text))
    wanted = (char for char, count in seen.items() if ord(char) >= 128 and count >= min_frequency)
    ordered = sorted(wanted, key=lambda char: (-seen[char], char))
    if vocab_size is not None:
        ordered = ordered[: vocab_size - 256 - len(special_tokens)]
    return vocabulary.character_spec(ordered, special_tokens)


def tokenizers_library() -> Any:
    """The package ``tokenizers``.

    Raises:
        DataError: it is not installed.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise DataError(
            "this tokenizer needs the package 'tokenizers', which is not installed: pip install tokenizers"
        ) from error
    return tokenizers
