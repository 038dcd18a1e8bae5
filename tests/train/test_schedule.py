"""Learning rates against their definitions."""

from __future__ import annotations

import pytest

from spikelm.train.schedule import learning_rate

NAMES = ("cosine", "wsd", "exponential")


def rates(name: str, **options: float) -> list[float]:
    chosen = {"steps": 100, "lr": 1e-2, "min_lr": 1e-4, "warmup": 10, **options}
    return [learning_rate(step, name=name, **chosen) for step in range(int(chosen["steps"]))]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [*NAMES, "constant"])
def test_warmup_is_linear_and_reaches_the_peak(name: str) -> None:
    got = rates(name)
    assert got[:10] == pytest.approx([1e-2 * (i + 1) / 10 for i in range(10)])
    assert max(got) == pytest.approx(1e-2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("warmup", [0, 1, 10, 99])
def test_falls_to_the_minimum_at_the_last_step(name: str, warmup: int) -> None:
    got = rates(name, warmup=warmup)
    assert got[-1] == pytest.approx(1e-4)
    after = got[warmup:]
    assert all(a >= b for a, b in zip(after, after[1:], strict=False))


def test_shapes() -> None:
    assert rates("constant")[50] == 1e-2
    assert rates("cosine", warmup=0)[49] == pytest.approx((1e-2 + 1e-4) / 2)
    assert rates("exponential", warmup=0)[49] == pytest.approx(1e-3)
    wsd = rates("wsd", decay=0.2)
    assert wsd[79] == 1e-2 and wsd[89] == pytest.approx((1e-2 + 1e-4) / 2)
    assert rates("wsd", decay=0.0)[-1] == 1e-2
    assert rates("wsd", decay=1.0, warmup=0)[49] == pytest.approx((1e-2 + 1e-4) / 2)


def test_exponential_to_zero_stays_positive() -> None:
    assert all(rate > 0 for rate in rates("exponential", min_lr=0.0))


def test_one_step() -> None:
    for name in ("cosine", "exponential"):
        assert learning_rate(0, name=name, steps=1, lr=1.0, min_lr=0.1, warmup=0) == pytest.approx(0.1)


def test_beyond_the_end_stays_at_the_minimum() -> None:
    assert learning_rate(500, name="cosine", steps=100, lr=1.0, min_lr=0.1) == pytest.approx(0.1)
