"""The sampler: distributions against transformers, draws, reproducibility, what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikelm.errors import ConfigError, ShapeError, StateError
from spikelm.sampling import History, Sampler, sample, token_logprobs

HISTORY = [[0, 3, 3, 5], [1, 1, 2, 9]]


def random_logits(rows: int = 2, size: int = 40, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, size) * scale


def theirs(logits: torch.Tensor, history: list[list[int]], **options: Any) -> torch.Tensor:
    """The same distribution by transformers' processors, in their order."""
    from transformers import generation as g

    steps: list[Any] = []
    if "repetition_penalty" in options:
        steps.append(g.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    if "temperature" in options:
        steps.append(g.TemperatureLogitsWarper(options["temperature"]))
    if "top_k" in options:
        steps.append(g.TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        steps.append(g.TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        steps.append(g.MinPLogitsWarper(options["min_p"]))
    values = logits.double()
    for step in steps:
        values = step(torch.tensor(history), values)
    return values.softmax(-1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"repetition_penalty": 1.3},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 0.8},
    ],
)
def test_distribution_is_that_of_transformers(options: dict[str, Any]) -> None:
    logits = random_logits(2, 40)
    ours = Sampler(**options).probabilities(logits, HISTORY)
    torch.testing.assert_close(ours, theirs(logits, HISTORY, **options), rtol=1e-12, atol=1e-14)
    assert ours.dtype == torch.float64


def test_top_p_of_a_large_flat_vocabulary() -> None:
    logits = torch.randn(2, 5000) * torch.tensor([[0.01], [4.0]])  # more and fewer than 1024 candidates
    ours = Sampler(top_p=0.9).probabilities(logits, HISTORY)
    torch.testing.assert_close(ours, theirs(logits, HISTORY, top_p=0.9), rtol=1e-10, atol=1e-15)
    everything = Sampler(top_p=1 - 1e-16).probabilities(logits, HISTORY)
    torch.testing.assert_close(everything, logits.double().softmax(-1))


def test_equals_are_kept_together() -> None:
    logits = torch.tensor([[1.0, 0.0, 0.0, 0.0, -5.0]])
    for sampler in (Sampler(top_k=2), Sampler(top_p=0.6)):
        assert (sampler.probabilities(logits, [[]]) > 0).tolist() == [[True, True, True, True, False]]


def test_penalties_and_bias_change_the_logits_as_stated() -> None:
    logits = torch.zeros(2, 10)
    sampler = Sampler(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={7: 2.0})
    expected = torch.zeros(2, 10, dtype=torch.float64)
    expected[:, 7] = 2.0
    expected[0, 3], expected[0, 5] = -0.5 - 0.5, -0.5 - 0.25
    expected[1, 2], expected[1, 9] = -0.75, -0.75
    found = sampler.probabilities(logits, HISTORY, prompt_lengths=[1, 2])
    torch.testing.assert_close(found, expected.softmax(-1))
    assert logits.eq(0).all()  # the model's logits are left alone


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 39), max_size=40),
    st.lists(st.integers(0, 39), max_size=40),
    st.sampled_from([0.8, 1.0, 1.3]),
    st.sampled_from([-0.4, 0.0, 0.5]),
    st.sampled_from([-0.1, 0.0, 0.25]),
)
def test_a_kept_history_equals_the_plain_tokens(
    prompt: list[int], generated: list[int], repetition: float, presence: float, frequency: float
) -> None:
    history = History(prompt)
    for token in generated:
        history.append(token)
    assert len(history) == len(prompt) + len(generated)
    penalties = {"presence_penalty": presence, "frequency_penalty": frequency}
    sampler = Sampler(repetition_penalty=repetition, seed=1, **penalties)
    logits, plain, lengths = random_logits(1), [prompt + generated], [len(prompt)]
    assert torch.equal(
        sampler.probabilities(logits, [history]), sampler.probabilities(logits, plain, prompt_lengths=lengths)
    )
    assert torch.equal(sampler(logits, [history]), sampler(logits, plain, prompt_lengths=lengths))


def test_a_draw_costs_the_same_at_any_length() -> None:
    """Work is counted: how often tokens of the history are hashed, compared or converted for a draw."""
    touched = 0

    def counted(name: str) -> Any:
        def method(self: int, *others: Any) -> Any:
            nonlocal touched
            touched += 1
            return getattr(int, name)(self, *others)

        return method

    names = ("__hash__", "__eq__", "__lt__", "__gt__", "__le__", "__ge__", "__int__", "__index__")
    Token = type("Token", (int,), {name: counted(name) for name in names})
    sampler = Sampler(repetition_penalty=1.2, presence_penalty=0.1, frequency_penalty=0.1, seed=0)
    logits, history = random_logits(1), History([Token(1), Token(2)])
    for length in (10, 10_000):
        while len(history) < length:
            history.append(Token(len(history) % 7))
        touched = 0
        sampler(logits, [history])
        assert touched == 0
        assert len(history.seen.ids) == len(history.generated.times) == 7
    sampler(logits, [[Token(3)] * 10_000])
    assert touched >= 10_000  # the count sees what reading everything costs


def test_greedy() -> None:
    logits = random_logits(3)
    sampler = Sampler(temperature=0)
    history: list[list[int]] = [[], [1], [2]]
    assert torch.equal(sampler(logits, history), logits.argmax(-1))
    assert torch.equal(sampler.probabilities(logits, history).argmax(-1), logits.argmax(-1))
    assert torch.equal(sampler.probabilities(logits, history).sum(-1), torch.ones(3, dtype=torch.float64))
    penalised = Sampler(temperature=0, repetition_penalty=10.0)
    assert penalised(torch.tensor([[2.0, 1.0, -1.0]]), [[0]]).tolist() == [1]


@pytest.mark.parametrize("temperature", [1e-300, 1e-3])
def test_tiny_temperatures_are_greedy(temperature: float) -> None:
    logits = random_logits(4)
    assert torch.equal(Sampler(temperature=temperature, seed=1)(logits, [[]] * 4), logits.argmax(-1))


def test_draws_follow_the_distribution() -> None:
    sampler = Sampler(temperature=1.2, top_p=0.9, seed=3)
    logits, n = random_logits(1, 12, 1.5), 20_000
    expected = sampler.probabilities(logits, [[]])[0]
    drawn = sampler(logits.expand(n, -1), [[]] * n)
    counts = torch.bincount(drawn, minlength=12).double()
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    chi2 = ((counts - n * expected)[kept] ** 2 / (n * expected)[kept]).sum()
    freedom = int(kept.sum()) - 1
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom)


def test_uniform_numbers_are_uniform_and_independent() -> None:
    sampler = Sampler(seed=11)
    by_position = torch.tensor([sampler.uniform(0, i) for i in range(5000)])
    by_stream = torch.tensor([sampler.uniform(i, 0) for i in range(5000)])
    for numbers in (by_position, by_stream):
        assert numbers.min() >= 0 and numbers.max() < 1
        assert abs(numbers.mean() - 0.5) < 0.02 and abs(numbers.var() - 1 / 12) < 0.005
    assert abs(torch.corrcoef(torch.stack([by_position, by_stream]))[0, 1]) < 0.05


# --- the same request gives the same token anywhere -------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_rows_do_not_depend_on_the_batch(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 6))
    options = st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0, 0.5, 1.0, 2.0]),
            "top_p": st.sampled_from([0.3, 0.95, 1.0]),
            "top_k": st.sampled_from([0, 1, 7]),
            "min_p": st.sampled_from([0.0, 0.05]),
            "repetition_penalty": st.sampled_from([1.0, 1.2]),
            "frequency_penalty": st.sampled_from([0.0, 0.3]),
            "seed": st.integers(-5, 5),
        }
    )
    samplers = [Sampler(**data.draw(options)) for _ in range(rows)]
    history = [data.draw(st.lists(st.integers(0, 2999), max_size=5)) for _ in range(rows)]
    logits = torch.randn(rows, 3000) * data.draw(st.sampled_from([0.1, 4.0]))
    together = sample(logits, samplers, history)
    alone = [sample(logits[i : i + 1], [samplers[i]], [history[i]]) for i in range(rows)]
    assert together.tolist() == [int(token) for token in alone]


def test_streams_seeds_and_positions_draw_differently() -> None:
    logits = torch.zeros(1, 1000)

    def draw(seed: int, stream: int, position: int) -> int:
        return int(Sampler(seed=seed)(logits, [[0] * position], streams=[stream]))

    draws = {draw(*key) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0), (2**80, 0, 0)]}
    assert len(draws) == 6
    assert draw(5, 6, 7) == draw(5, 6, 7)
    batch = Sampler(seed=0)(torch.zeros(50, 1000), [[]] * 50)
    assert len(set(batch.tolist())) > 40  # rows of one call are streams of their own


def test_a_seed_is_drawn_and_can_be_used_again() -> None:
    first, second = Sampler(), Sampler()
    assert first.seed != second.seed
    logits = torch.zeros(20, 500)
    again = Sampler(seed=first.seed)
    assert torch.equal(first(logits, [[]] * 20), again(logits, [[]] * 20))


def test_logprobs_are_the_models_own() -> None:
    logits = random_logits(3)
    tokens = torch.tensor([0, 5, 9])
    expected = logits.double().log_softmax(-1)[torch.arange(3), tokens]
    torch.testing.assert_close(token_logprobs(logits, tokens), expected)


def test_half_precision_logits() -> None:
    logits = random_logits(2).bfloat16()
    torch.testing.assert_close(
        Sampler().probabilities(logits, HISTORY), logits.double().softmax(-1), rtol=1e-12, atol=0
    )


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", value) for value in (-1, math.nan, math.inf, True, "1", None)],
        *[("top_p", value) for value in (0, 1.1, -0.5, math.nan, True)],
        *[("top_k", value) for value in (-1, 1.5, True, "5", math.nan)],
        *[("min_p", value) for value in (-0.1, 1.1, math.nan, False)],
        *[("repetition_penalty", value) for value in (0, -1, math.inf, True)],
        *[("presence_penalty", value) for value in (math.nan, True)],
        *[("frequency_penalty", value) for value in (math.inf, "x")],
        *[("seed", value) for value in (1.5, True, "7", math.nan)],
        *[("logit_bias", value) for value in ([1], {-1: 1.0}, {"1": 1.0}, {True: 1.0}, {1: math.nan})],
    ],
)
def test_bad_parameters_are_refused_in_one_sentence(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}.* is .*; expected ") as caught:
        Sampler(**{name: value})
    assert "\n" not in str(caught.value)


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = torch.full((1, 5), -math.inf)
    logits[0, 3] = -1000.0
    for options in ({}, {"top_p": 0.5}, {"top_k": 2}, {"min_p": 1.0}, {"temperature": 0}):
        assert Sampler(**options)(logits, [[]]).tolist() == [3]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_damaged_logits_are_refused(bad: float) -> None:
    logits = torch.zeros(3, 4)
    logits[1, 2] = bad
    for temperature in (0, 1):
        with pytest.raises(StateError, match="row 1 are NaN or infinite"):
            Sampler(temperature=temperature)(logits, [[]] * 3)
    with pytest.raises(StateError, match="row 0"):
        Sampler()(torch.full((1, 4), -math.inf), [[]])


@pytest.mark.parametrize("temperature", [0, 1e-3, 1])
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1e308},
        {"repetition_penalty": 5e-324},
        {"presence_penalty": 1.7e308, "frequency_penalty": 1.7e308},
        {"presence_penalty": -1.7e308, "frequency_penalty": -1.7e308},
        {"logit_bias": dict.fromkeys(range(4), -1.7e308), "repetition_penalty": 10.0},
    ],
)
def test_huge_penalties_leave_a_token_to_choose(options: dict[str, Any], temperature: float) -> None:
    sampler = Sampler(temperature=temperature, seed=0, **options)
    for logits in (torch.tensor([[-3.0, -4, -5, -6, -math.inf]]), torch.tensor([[3.0, 4, 5, 6, -math.inf]])):
        for history in ([0, 1, 2, 3], [0, 1, 2, 3] * 3):
            found = sampler.probabilities(logits, [history])
            assert torch.isfinite(found).all() and found.sum() == pytest.approx(1)
            assert found[0, 4] == 0  # what the model forbids stays forbidden
            assert int(sampler(logits, [history])) < 4


def test_misshapen_input_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"\(2, 0\); expected a vocabulary of at least one token"):
        Sampler()(torch.zeros(2, 0), [[], []])
    with pytest.raises(ShapeError, match="history holds tokens 2 to 4"):
        Sampler(repetition_penalty=2)(torch.zeros(1, 4), [History([2, 4])])
    with pytest.raises(ShapeError, match=r"\(4,\)"):
        Sampler()(torch.zeros(4), [[]])
    with pytest.raises(ShapeError, match="one of each per row"):
        Sampler()(torch.zeros(2, 4), [[]])
    with pytest.raises(ShapeError, match="history holds tokens"):
        Sampler(repetition_penalty=2)(torch.zeros(1, 4), [[4]])
    with pytest.raises(ShapeError, match="history holds tokens"):
        Sampler(presence_penalty=2)(torch.zeros(1, 4), [[-1]])
    with pytest.raises(ConfigError, match="logit_bias names token 4"):
        Sampler(logit_bias={4: 1.0})(torch.zeros(1, 4), [[]])
