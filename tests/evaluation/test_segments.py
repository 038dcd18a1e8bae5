from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spikelm.errors import ConfigError
from spikelm.evaluation.segments import Segment, carried, disjoint, strided


def documents(lengths: list[int]) -> list[np.ndarray]:
    return [np.arange(length, dtype=np.int32) for length in lengths]


def scored(segments: list[Segment]) -> list[tuple[int, int]]:
    """(document, position) of every scored target."""
    return [(s.document, s.first + i) for s in segments for i in range(s.skip, len(s.targets))]


def test_disjoint_by_hand() -> None:
    a, b, c = list(disjoint(documents([6]), 2))
    assert (a.inputs.tolist(), a.targets.tolist(), a.skip) == ([0, 1], [1, 2], 0)
    assert (b.inputs.tolist(), b.targets.tolist(), b.first) == ([2, 3], [3, 4], 3)
    assert (c.inputs.tolist(), c.targets.tolist(), c.first) == ([4], [5], 5)


def test_strided_by_hand() -> None:
    windows = list(strided(documents([8]), 4, 2))
    assert [w.inputs.tolist() for w in windows] == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6]]
    assert [w.targets.tolist()[w.skip :] for w in windows] == [[1, 2, 3, 4], [5, 6], [7]]


def test_carried_by_hand() -> None:
    (only,) = carried(documents([0, 1, 4]))
    assert (only.document, only.inputs.tolist(), only.targets.tolist()) == (2, [0, 1, 2], [1, 2, 3])


@given(st.lists(st.integers(0, 40), max_size=5), st.integers(1, 12), st.data())
def test_every_token_but_the_first_is_scored_once(
    lengths: list[int], length: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, length))
    docs = documents(lengths)
    expected = [(d, i) for d, n in enumerate(lengths) for i in range(1, n)]
    windows = list(strided(docs, length, stride))
    assert sorted(scored(windows)) == expected
    assert sorted(scored(list(carried(docs)))) == expected
    for w in windows:
        assert 0 <= w.skip < len(w.inputs) <= length
        assert (w.targets == docs[w.document][w.first : w.first + len(w.targets)]).all()
        assert (w.inputs == docs[w.document][w.first - 1 : w.first - 1 + len(w.inputs)]).all()
        if w.first > 1:  # a later window: what it scores has seen at least length - stride + 1 tokens
            assert w.skip == length - stride


def test_stride_of_the_length_is_disjoint() -> None:
    docs = documents([17, 3, 30])
    for a, b in zip(strided(docs, 5, 5), disjoint(docs, 5), strict=True):
        assert (a.document, a.first, a.skip, a.inputs.tolist()) == (b.document, b.first, 0, b.inputs.tolist())


@pytest.mark.parametrize(("length", "stride"), [(4, 0), (4, 5), (0, 0), (4, -1)])
def test_bad_stride(length: int, stride: int) -> None:
    with pytest.raises(ConfigError, match="stride"):
        list(strided(documents([5]), length, stride))
