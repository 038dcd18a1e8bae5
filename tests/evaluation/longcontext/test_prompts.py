"""Prompts: as long as asked, always the same, and solvable from their text alone."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable

import pytest

from spikelm.data.source import open_source
from spikelm.errors import DataError
from spikelm.evaluation.longcontext.needle import needle, passkey
from spikelm.evaluation.longcontext.prompt import NOISE, Haystack, Prompt, fitted, hidden, made_word
from spikelm.evaluation.longcontext.ruler import RULER
from spikelm.tokenizer import Tokenizer

from .conftest import PROSE

BYTES = Tokenizer.bytes()
BPE = Tokenizer.train_bpe([PROSE, " ".join(NOISE)] * 3, 400)


def solve_niah(text: str) -> list[str]:
    """Values of the keys that the question names."""
    asked = re.findall(r"What are all the special magic \w+ for (.*?) mentioned", text)[0].split(", ")
    found = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", text)
    return [value for key, value in found if key in asked]


def solve_vt(text: str) -> list[str]:
    """Follow the assignments in the order in which they stand."""
    (value,) = set(re.findall(r"assigned the value (\d+)", text))
    known: dict[str, str] = {}
    for name, right in re.findall(r"VAR ([A-Z]{5}) = (VAR [A-Z]{5}|\d+)\.", text):
        known[name] = known.get(right.removeprefix("VAR "), "undefined") if "VAR" in right else right
    return [name for name, got in known.items() if got == value]


def solve_cwe(text: str) -> list[str]:
    counts = Counter(re.findall(r"\d+\. (\w+)", text))
    return [word for word, _ in counts.most_common(10)]


def solve_fwe(text: str) -> list[str]:
    counts = Counter(text.split("\n")[1].split())
    assert len({n for _, n in counts.most_common(4)}) == 4  # no tie about who is among the first three
    return [word for word, _ in counts.most_common(3)]


SOLVERS: dict[str, Callable[[str], list[str]]] = {
    **{name: solve_niah for name in RULER if name.startswith("niah")},
    "vt": solve_vt,
    "cwe": solve_cwe,
    "fwe": solve_fwe,
}


def made(kind: str, length: int, tokenizer: Tokenizer, haystack: Haystack, seed: int = 0) -> Prompt:
    return RULER[kind](random.Random(seed), length, tokenizer, haystack)


@pytest.mark.parametrize(("tokenizer", "length"), [(BYTES, 2048), (BYTES, 9000), (BPE, 2000)])
@pytest.mark.parametrize("kind", RULER)
def test_ruler_prompts_fill_their_length_and_can_be_solved(
    kind: str, tokenizer: Tokenizer, length: int, haystack: Haystack
) -> None:
    prompts = [made(kind, length, tokenizer, haystack, seed) for seed in range(3)]
    for prompt in prompts:
        assert prompt.tokens == tokenizer.encode(prompt.text)
        assert 0.9 * length <= len(prompt.tokens) <= length
        assert sorted(SOLVERS[kind](prompt.text)) == sorted(prompt.answers)
        question = prompt.text.split("\n")[-1]
        assert not any(answer in question for answer in prompt.answers)
    assert len({prompt.text for prompt in prompts}) == 3
    assert made(kind, length, tokenizer, haystack, 1) == prompts[1]


def test_ruler_variants_are_what_their_names_say(haystack: Haystack) -> None:
    texts = {kind: made(kind, 9000, BYTES, haystack) for kind in RULER}
    count = {
        kind: len(re.findall("One of the special magic", p.text))
        for kind, p in texts.items()
        if "niah" in kind
    }
    assert [count[f"niah_single_{n}"] for n in (1, 2, 3)] == [1, 1, 1]
    assert count["niah_multikey_1"] == count["niah_multivalue"] == count["niah_multiquery"] == 4
    assert count["niah_multikey_2"] > 50 and count["niah_multikey_3"] > 40
    assert [len(texts[f"niah_multi{what}"].answers) for what in ("value", "query")] == [4, 4]
    assert (
        "The grass is green." in texts["niah_single_1"].text and "travellers" in texts["niah_single_2"].text
    )
    assert re.fullmatch(r"[0-9a-f-]{36}", texts["niah_single_3"].answers[0])
    words = Counter(re.findall(r"\d+\. (\w+)", texts["cwe"].text))
    assert set(words.values()) == {30, 3}  # as in RULER where there is room
    assert set(Counter(re.findall(r"\d+\. (\w+)", made("cwe", 2048, BYTES, haystack).text)).values()) == {
        6,
        1,
    }


@pytest.mark.parametrize("tokenizer", [BYTES, BPE])
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_a_needle_lies_at_its_depth(tokenizer: Tokenizer, depth: float, haystack: Haystack) -> None:
    prompt = needle(random.Random(4), 3000, tokenizer, haystack, depth)
    (fact,) = re.findall(r"The secret word of \w+ is (\w+)\.", prompt.text)
    assert prompt.answers == (fact,) and prompt.depth == depth
    assert prompt.text.count(fact) == 1
    where = prompt.text.index("The secret word") / prompt.text.rindex(" The secret word")
    assert where == pytest.approx(depth, abs=0.05)
    assert 2800 <= len(prompt.tokens) <= 3000
    assert prompt.text.endswith(re.findall(r"The secret word of \w+ is", prompt.text)[0])


def test_needles_of_one_seed_differ_in_depth_alone(haystack: Haystack) -> None:
    texts = [needle(random.Random(4), 3000, BYTES, haystack, depth).text for depth in (0.0, 0.5)]
    fact = re.compile(r"The secret word of \w+ is \w+\. ")
    assert fact.sub("", texts[0]) == fact.sub("", texts[1]) and texts[0] != texts[1]


def test_passkey(haystack: Haystack) -> None:
    prompts = [passkey(random.Random(seed), 2000, BYTES, haystack) for seed in range(20)]
    for prompt in prompts:
        (key,) = set(re.findall(r"(\d{5})", prompt.text))
        assert prompt.answers == (key,) and prompt.text.endswith("The pass key is")
        assert 1900 <= len(prompt.tokens) <= 2000
    depths = [prompt.text.index("The pass key is") / len(prompt.text) for prompt in prompts]
    assert min(depths) < 0.3 and max(depths) > 0.7


def test_lengths_that_are_too_short_are_refused(haystack: Haystack) -> None:
    for kind in RULER:
        with pytest.raises(DataError, match="50 tokens are too few: the task alone takes"):
            made(kind, 50, BYTES, haystack)


def test_fitting_stops_at_the_last_piece_that_fits() -> None:
    for length in (10, 11, 100, 1234):
        text, tokens = fitted(BYTES, length, lambda n: "ab " * n)
        assert len(text) == len(tokens) == 3 * (length // 3)
    uneven = [3, 50, 1, 1, 40, 200, 7] * 40

    def build(n: int) -> str:
        return "".join("x" * uneven[i % len(uneven)] for i in range(n))

    _, tokens = fitted(BYTES, 3000, build)
    assert 2700 <= len(tokens) <= 3000


def test_hiding_keeps_the_order_of_equal_places() -> None:
    assert hidden(["a", "b"], [(0.5, "X"), (0.0, "W"), (0.55, "Y"), (1.0, "Z")]) == "W a X Y b Z"


def test_a_haystack_needs_sentences(tmp_path: object) -> None:
    from pathlib import Path

    assert isinstance(tmp_path, Path)
    (tmp_path / "x.txt").write_text("short.\n\n" + "x" * 400)
    with pytest.raises(DataError, match="no sentence of 20 to 300 characters"):
        _ = Haystack(open_source(str(tmp_path / "x.txt"))).sentences


def test_made_words_are_no_words() -> None:
    rng = random.Random(0)
    words = {made_word(rng) for _ in range(1000)}
    assert len(words) > 950 and all(re.fullmatch(r"([bdfgklmnprstvz][aeiou]){3}", word) for word in words)
