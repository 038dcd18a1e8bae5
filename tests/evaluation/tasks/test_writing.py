"""Texts written side by side are those written alone."""

from __future__ import annotations

from typing import Any

import pytest

from spikelm.evaluation.tasks.reader import Reader
from spikelm.evaluation.tasks.writing import Request, write
from spikelm.generation import generate
from spikelm.model import SpikeLM
from spikelm.sampling import Sampler
from spikelm.tokenizer import Tokenizer

from .conftest import small

PROMPTS = ["the cat sat on a mat", "the cat sat on a hill and", "some dogs", "the cat sat on a mat", "x"]


def alone(model: SpikeLM, tokenizer: Tokenizer, prompt: str, length: int, sampler: Sampler) -> str:
    pieces = list(generate(model, tokenizer, prompt, length, sampler, planned=False))
    return "".join(piece.text for piece in pieces)


def requests(tokenizer: Tokenizer, **options: Any) -> list[Request]:
    given = {"sampler": Sampler(temperature=0.0, seed=0), "max_tokens": 9, **options}
    return [
        Request(tokens=tokenizer.encode(prompt), stream=number, **given)
        for number, prompt in enumerate(PROMPTS)
    ]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_greedy_texts_are_those_of_generate(bpe: Tokenizer, share: bool, batch_size: int) -> None:
    model = small("int8", bpe.vocab_size)
    reader = Reader(model, vocab_size=bpe.vocab_size, batch_size=batch_size, share=share)
    sampler = Sampler(temperature=0.0, seed=0)
    expected = [alone(model, bpe, prompt, 9, sampler) for prompt in PROMPTS]
    assert len(set(expected)) == 4 and all(expected)
    assert write(reader, bpe, requests(bpe)) == expected


def test_shared_prompts_are_read_once(bpe: Tokenizer) -> None:
    reader = Reader(small("int8", bpe.vocab_size), vocab_size=bpe.vocab_size)
    prompt = bpe.encode("the cat sat on a mat and some dogs ran over green hills while rain fell softly")
    one = Request(tokens=prompt, sampler=Sampler(temperature=0.0, seed=0), max_tokens=1)
    write(reader, bpe, [one] * 7)
    assert reader.tokens_read == len(prompt) and reader.tokens_asked == 7 * len(prompt)


def test_sampled_texts_depend_on_seed_and_place_alone(bpe: Tokenizer) -> None:
    model = small("int8", bpe.vocab_size)
    texts = []
    for batch_size, seed in ((1, 5), (16, 5), (16, 6)):
        reader = Reader(model, vocab_size=bpe.vocab_size, batch_size=batch_size)
        texts.append(write(reader, bpe, requests(bpe, sampler=Sampler(temperature=1.0, seed=seed))))
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][0] != texts[0][3]  # the same prompt at another place of the list


def test_stop_strings_end_a_text_and_only_that(bpe: Tokenizer) -> None:
    model = small("int8", bpe.vocab_size)
    reader = Reader(model, vocab_size=bpe.vocab_size)
    whole = write(reader, bpe, requests(bpe))
    stop = whole[1][2:5]
    cut = write(reader, bpe, requests(bpe, stop=(stop,)))
    assert cut == [text.partition(stop)[0] for text in whole] and cut[1] == whole[1][:2]


def test_the_end_token_ends_a_text(bpe: Tokenizer) -> None:
    model = small("int8", bpe.vocab_size)
    reader = Reader(model, vocab_size=bpe.vocab_size)
    end = bpe.eos_id
    assert end is not None
    always = Sampler(temperature=0.0, seed=0, logit_bias={end: 1e6})
    assert write(reader, bpe, requests(bpe, sampler=always)) == [""] * len(PROMPTS)


def test_memory_that_grows_has_room_for_the_answer(bpe: Tokenizer) -> None:
    layers = [{"mixer": {"name": "attention", "num_heads": 2}, "channel": {"name": "swiglu"}}]
    model = small("float", bpe.vocab_size, layers=layers).double()
    reader = Reader(model, vocab_size=bpe.vocab_size, batch_size=2)
    sampler = Sampler(temperature=0.0, seed=0)
    assert write(reader, bpe, requests(bpe)) == [alone(model, bpe, p, 9, sampler) for p in PROMPTS]
