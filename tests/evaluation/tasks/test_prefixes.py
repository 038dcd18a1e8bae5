"""The tree of shared prefixes: every sequence is read whole, every worthwhile stretch once."""

from __future__ import annotations

import random

import numpy as np
import pytest

from spikelm.evaluation.tasks.prefixes import Edge, Tokens, separate, shared


def arrays(*sequences: list[int]) -> list[Tokens]:
    return [np.array(tokens, dtype=np.int64) for tokens in sequences]


def read(roots: list[Edge], sequences: list[Tokens]) -> tuple[dict[int, list[int]], int]:
    """What each sequence is read as, and how many tokens were read altogether."""
    found: dict[int, list[int]] = {}
    count = 0
    waiting: list[tuple[Edge, list[int]]] = [(edge, []) for edge in roots]
    while waiting:
        edge, before = waiting.pop()
        assert edge.start == len(before) and edge.length > 0
        piece = sequences[edge.sequences[0]][edge.start : edge.stop].tolist()
        for index in edge.sequences:
            assert sequences[index][edge.start : edge.stop].tolist() == piece
        count += edge.length
        text = before + piece
        below = [index for child in edge.children for index in child.sequences]
        assert len(below) == len(set(below)) and set(below) <= set(edge.sequences)
        for index in set(edge.sequences) - set(below):
            assert index not in found
            found[index] = text
        waiting += [(child, text) for child in edge.children]
    return found, count


def test_choices_share_their_question() -> None:
    sequences = arrays([*range(20), 50], [*range(20), 51, 52], [*range(20), 51, 53])
    roots = shared(sequences, least=2)
    found, count = read(roots, sequences)
    assert found == {i: tokens.tolist() for i, tokens in enumerate(sequences)}
    assert len(roots) == 1 and roots[0].stop == 20
    assert count == 20 + 1 + 2 + 2  # token 51 alone would save one token only


def test_examples_are_shared_by_all_questions_and_questions_by_their_choices() -> None:
    examples, questions = list(range(100)), [[200 + i] * 30 for i in range(3)]
    sequences = arrays(*[[*examples, *q, c] for q in questions for c in (7, 8)])
    _, count = read(shared(sequences), sequences)
    assert count == 100 + 3 * 30 + 6


def test_equal_sequences_and_prefixes_of_others() -> None:
    base = list(range(40))
    sequences = arrays(base, base, base[:20], [*base, 1], [*base[:20], 9], [5])
    found, count = read(shared(sequences), sequences)
    assert found == {i: tokens.tolist() for i, tokens in enumerate(sequences)}
    assert count == 20 + 20 + 1 + 1 + 1


@pytest.mark.parametrize("least", [1, 4, 16])
def test_random_sequences_are_read_whole(least: int) -> None:
    rng = random.Random(least)
    sequences = arrays(*[[rng.randrange(2) for _ in range(rng.randint(1, 12))] for _ in range(300)])
    found, count = read(shared(sequences, least), sequences)
    assert found == {i: tokens.tolist() for i, tokens in enumerate(sequences)}
    assert count < sum(len(tokens) for tokens in sequences)
    if least == 1:  # then the tree is the trie: as many tokens as there are different prefixes
        assert count == len({tuple(t[: i + 1]) for t in sequences for i in range(len(t))})


def test_large_token_ids_sort_as_numbers() -> None:
    sequences = arrays([70_000] * 30 + [1], [70_000] * 30 + [256], [255] * 3)
    found, count = read(shared(sequences), sequences)
    assert len(found) == 3 and count == 30 + 2 + 3


def test_nothing_is_shared_where_nothing_should_be() -> None:
    sequences = arrays([1, 2, 3], [1, 2, 3])
    assert read(separate(sequences), sequences)[1] == 6
    assert shared([]) == [] == separate([])
