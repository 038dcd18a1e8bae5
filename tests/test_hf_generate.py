"""transformers' generate() and forward arguments: caches, padding, packed prompts, columns of logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from spikelm.errors import ConfigError, ShapeError
from spikelm.hf import (
    RecurrentCache,
    SpikeLMForCausalLM,
)

from .wrapped import LIF, SD, TWIN, small, tokens


@pytest.mark.parametrize("options", [SD, LIF, TWIN], ids=["sd", "lif", "twin"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_with_state_equals_generate_without(options: dict[str, object], beams: int) -> None:
    """Every step from the state must give what recomputing the whole text gives."""
    model = small(**options).double()
    ids = tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    arguments = {
        "attention_mask": mask,
        "max_new_tokens": 8,
        "do_sample": False,
        "num_beams": beams,
        "pad_token_id": 0,
    }
    cached = model.generate(ids, use_cache=True, **arguments)
    plain = model.generate(ids, use_cache=False, **arguments)
    assert torch.equal(cached, plain)
    assert cached.shape == (2, 14)


def test_generate_feeds_one_token_a_step_and_the_state_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    model, lengths, sizes = small(**LIF), [], set()
    forward = SpikeLMForCausalLM.forward

    def spy(self: SpikeLMForCausalLM, input_ids: Tensor, **kwargs: object) -> object:
        output = forward(self, input_ids, **kwargs)
        lengths.append(input_ids.shape[1])
        from spikelm.state import state_bytes

        sizes.add(state_bytes(output.past_key_values.state))
        return output

    monkeypatch.setattr(SpikeLMForCausalLM, "forward", spy)
    model.generate(tokens(1, 5), max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert lengths == [5, 1, 1, 1, 1, 1]
    assert len(sizes) == 1


def test_a_recurrent_cache_is_given_and_taken(tmp_path: Path) -> None:
    model, ids = small(**LIF).double(), tokens(2, 10)
    whole = model(ids).logits
    first = model(ids[:, :6], use_cache=True)
    assert isinstance(first.past_key_values, RecurrentCache) and first.past_key_values.get_seq_length() == 6
    second = model(ids[:, 6:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, rtol=0, atol=1e-12)


def test_generate_goes_on_from_a_cache_given_the_whole_text_or_the_new_tokens() -> None:
    model, ids = small(**LIF).double(), tokens(1, 10)
    arguments = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    whole = model.generate(ids, **arguments)[:, 10:]
    for given in (ids, ids[:, 6:]):
        cache = model(ids[:, :6], use_cache=True).past_key_values
        mask = torch.ones(1, 10, dtype=torch.long)
        again = model.generate(given, past_key_values=cache, attention_mask=mask, **arguments)
        assert torch.equal(again[:, -4:], whole)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_with_padding_equals_without(side: str, use_cache: bool) -> None:
    model, ids = small(**SD).double(), tokens(1, 6)
    arguments = {
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        "use_cache": use_cache,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    plain = model.generate(ids, **arguments)
    pad = torch.zeros(1, 3, dtype=torch.long)
    order = [pad, ids] if side == "left" else [ids, pad]
    mask = torch.cat([torch.ones_like(part) * int(part is ids) for part in order], 1)
    rows, masks = [torch.cat(order, 1), tokens(1, 9)], [mask, torch.ones(1, 9, dtype=torch.long)]
    padded = model.generate(torch.cat(rows), attention_mask=torch.cat(masks), **arguments)
    assert torch.equal(padded.sequences[0, 9:], plain.sequences[0, 6:])
    for got, wanted in zip(padded.logits, plain.logits, strict=True):
        torch.testing.assert_close(got[:1], wanted, rtol=0, atol=1e-5)


def test_positions_that_say_zero_start_a_document() -> None:
    model = small(**LIF).double()
    first, second = tokens(1, 5), tokens(1, 4)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    packed = model(torch.cat([first, second], 1), position_ids=positions).logits
    apart = torch.cat([model(first).logits, model(second).logits], 1)
    torch.testing.assert_close(packed, apart, rtol=0, atol=1e-12)
    cache = model(first, use_cache=True).past_key_values
    fresh = model(second, past_key_values=cache, position_ids=positions[:, 5:]).logits
    torch.testing.assert_close(fresh, apart[:, 5:], rtol=0, atol=1e-12)
    goes_on = model(second, past_key_values=cache, position_ids=positions[:, 5:] + 5).logits
    whole = model(torch.cat([first, second], 1)).logits[:, 5:]
    torch.testing.assert_close(goes_on, whole, rtol=0, atol=1e-12)
    # Positions of padding count from anywhere; they must not wipe the state.
    mask = torch.tensor([[1] * 5 + [0] * 2])
    padded = torch.cat([first, tokens(1, 2)], 1)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 0]])
    cache = model(padded, attention_mask=mask, position_ids=positions, use_cache=True).past_key_values
    torch.testing.assert_close(model(second, past_key_values=cache).logits, whole, rtol=0, atol=1e-12)
    with pytest.raises(ShapeError, match="position_ids"):
        model(first, position_ids=torch.arange(3)[None])


def test_generate_resets_a_packed_prompt_where_positions_say_so() -> None:
    model = small(**SD).double()
    first, second = tokens(1, 5), tokens(1, 4)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    arguments = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    arguments |= {"output_logits": True, "return_dict_in_generate": True}
    plain = model.generate(second, **arguments)
    for use_cache in (True, False):
        packed = model.generate(
            torch.cat([first, second], 1), position_ids=positions, use_cache=use_cache, **arguments
        )
        assert torch.equal(packed.sequences[:, 9:], plain.sequences[:, 4:])
        for got, wanted in zip(packed.logits, plain.logits, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"output_attentions": True}, "output_attentions"),
        ({"inputs_embeds": torch.zeros(1, 4, 16)}, "inputs_embeds"),
        ({"token_type_ids": torch.ones(1, 4)}, "token_type_ids"),
        ({"seq_idx": torch.zeros(1, 4)}, "position_ids"),
        ({"cu_seq_lens_q": torch.tensor([0, 4])}, "position_ids"),
        ({"is_causal": False}, "is_causal"),
        ({"attention_maks": torch.ones(1, 4)}, "attention_mask"),
    ],
)
def test_arguments_that_would_change_the_result_are_refused(arguments: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        small(**SD)(tokens(1, 4), **arguments)


def test_arguments_that_ask_for_nothing_are_taken() -> None:
    model, ids = small(**SD), tokens(1, 4)
    plain = model(ids).logits
    nothing = {
        "inputs_embeds": None,
        "output_attentions": False,
        "output_hidden_states": None,
        "is_causal": True,
    }
    assert torch.equal(model(ids, **nothing).logits, plain)
    packed = {"position_ids": torch.arange(4)[None], "seq_idx": torch.zeros(1, 4), "max_length_q": 4}
    assert torch.equal(model(ids, **packed).logits, plain)
    assert isinstance(model(ids, return_dict=False), tuple)


def test_hidden_states_asked_for_by_the_configuration_are_refused() -> None:
    model = small(**SD)
    model.config.output_hidden_states = True
    with pytest.raises(ConfigError, match="output_hidden_states"):
        model(tokens(1, 4))
    with pytest.raises(ConfigError, match="output_hidden_states"):
        small(**SD).generate(
            tokens(1, 4),
            max_new_tokens=2,
            pad_token_id=0,
            output_hidden_states=True,
            return_dict_in_generate=True,
        )


@pytest.mark.parametrize("options", [SD, LIF], ids=["sd", "lif"])
def test_logits_to_keep(options: dict[str, object]) -> None:
    model, ids = small(**options).double(), tokens(2, 9)
    whole = model(ids, labels=ids)
    for keep, wanted in (
        (0, whole.logits),
        (1, whole.logits[:, -1:]),
        (4, whole.logits[:, -4:]),
        (torch.tensor([0, 5, 2]), whole.logits[:, [0, 5, 2]]),
    ):
        torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, wanted, rtol=0, atol=1e-12)
        both = model(ids, labels=ids, logits_to_keep=keep)
        torch.testing.assert_close(both.logits, wanted, rtol=0, atol=1e-12)
        torch.testing.assert_close(both.loss, whole.loss)
    with pytest.raises(ShapeError, match="logits_to_keep"):
        model(ids, logits_to_keep=torch.zeros(2, 3, dtype=torch.long))
    # One column means the last real one, with labels or without.
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    for labels in (None, ids):
        last = model(ids, attention_mask=mask, labels=labels, logits_to_keep=1).logits
        wanted = torch.stack([whole.logits[0, 5], whole.logits[1, 8]])[:, None]
        torch.testing.assert_close(last, wanted, rtol=0, atol=1e-12)
