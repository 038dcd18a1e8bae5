"""The state under transformers' two names for it, old and new, whichever release is installed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.generation import utils as generation
from transformers.modeling_outputs import CausalLMOutputWithPast

from spikelm.errors import ConfigError, StateError
from spikelm.hf import RecurrentCache, SpikeLMConfig, SpikeLMForCausalLM
from spikelm.hf_cache import CACHE_NAME

NAMES = ("cache", "past_key_values")
GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def small() -> SpikeLMForCausalLM:
    torch.manual_seed(3)
    neuron = {"placement": "after", "neuron": {"name": "lif"}, "embedding_neuron": {"name": "heaviside"}}
    model = SpikeLMForCausalLM(SpikeLMConfig(vocab_size=23, hidden_size=16, num_hidden_layers=2, **neuron))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 23, shape, generator=torch.Generator().manual_seed(1))


def test_the_output_has_the_installed_release_s_name_and_the_old_one_reads_it() -> None:
    assert CACHE_NAME in {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
    assert CACHE_NAME in generation.ALL_CACHE_NAMES, "where generate() looks"
    model, ids = small(), tokens(2, 6)
    output = model(ids, use_cache=True)
    assert list(output) == ["logits", CACHE_NAME]
    assert isinstance(output[CACHE_NAME], RecurrentCache)
    assert output.past_key_values is output[CACHE_NAME] is getattr(output, CACHE_NAME)
    assert list(model(ids, use_cache=False)) == ["logits"]
    made = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    assert made.past_key_values is getattr(made, CACHE_NAME)
    assert made.past_key_values.get_seq_length() == 9


@pytest.mark.parametrize("name", NAMES)
def test_forward_goes_on_under_either_name(name: str) -> None:
    model, ids = small(), tokens(2, 10)
    whole = model(ids).logits[:, 6:]
    cache = model(ids[:, :6], use_cache=True).past_key_values
    output = model(ids[:, 6:], use_cache=True, **{name: cache})
    torch.testing.assert_close(output.logits, whole, rtol=0, atol=1e-12)
    assert output.past_key_values.get_seq_length() == 10
    assert cache.get_seq_length() == 6, "the given state is left alone"


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_generate_goes_on_under_either_name(name: str, beams: int) -> None:
    """The logits of the whole text, from the new tokens alone."""
    model, ids, lengths = small(), tokens(1, 10), []
    arguments = {**GREEDY, "num_beams": beams, "output_logits": True, "return_dict_in_generate": True}
    whole = model.generate(ids, **arguments)
    for given in (ids, ids[:, 6:]):
        cache = model(ids[:, :6], use_cache=True).past_key_values
        cache.reorder_cache(torch.zeros(beams, dtype=torch.long))
        mask = torch.ones(1, 10, dtype=torch.long)
        hook = model.register_forward_pre_hook(
            lambda module, args, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True
        )
        again = model.generate(given, attention_mask=mask, **{name: cache}, **arguments)
        hook.remove()
        assert torch.equal(again.sequences[:, -4:], whole.sequences[:, -4:])
        for got, wanted in zip(again.logits, whole.logits, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    assert lengths == 2 * [4, 1, 1, 1]


@pytest.mark.parametrize("name", NAMES)
def test_inputs_for_generation_carry_the_installed_release_s_name(name: str) -> None:
    model, ids = small(), tokens(1, 6)
    cache = model(ids, use_cache=True).past_key_values
    inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **{name: cache})
    assert inputs[CACHE_NAME] is cache
    assert set(inputs) & set(NAMES) == {CACHE_NAME}
    assert torch.equal(inputs["input_ids"], ids[:, -1:])


def test_both_names_mean_one_state() -> None:
    model, ids = small(), tokens(1, 6)
    cache, other = (model(ids, use_cache=True).past_key_values for _ in range(2))
    alone = model(ids, cache=cache).logits
    assert torch.equal(model(ids, cache=cache, past_key_values=cache).logits, alone)
    assert torch.equal(model(ids, cache=cache, past_key_values=None).logits, alone)
    both = {"cache": cache, "past_key_values": other}
    for take in (model, model.prepare_inputs_for_generation, model.generate):
        with pytest.raises(ConfigError, match="cache and past_key_values were both passed"):
            take(ids, **both)


@pytest.mark.parametrize("name", NAMES)
def test_another_model_s_cache_is_refused(name: str) -> None:
    model, ids = small(), tokens(1, 6)
    for take in (model, model.prepare_inputs_for_generation, model.generate):
        with pytest.raises(StateError, match="DynamicCache; expected a RecurrentCache"):
            take(ids, **{name: DynamicCache()})


def test_predictions_of_the_trainer_hold_logits_and_no_state(tmp_path: Path) -> None:
    ids = tokens(4, 6)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, use_cache=True, report_to=[], disable_tqdm=True
    )
    model = small()
    predicted = Trainer(model=model, args=arguments).predict(rows)
    assert predicted.predictions.shape == (4, 6, 23)
    torch.testing.assert_close(torch.as_tensor(predicted.predictions), model(ids).logits.detach())


def test_assisted_decoding_is_refused_in_one_sentence() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=23, eos_token_id=None, **sizes)).double().eval()
    with pytest.raises(StateError, match="cannot be an assistant"):
        llama.generate(tokens(1, 6), assistant_model=small(), **GREEDY)
    with pytest.raises(ValueError, match="stateful"):
        small().generate(tokens(1, 6), assistant_model=llama, **GREEDY)


@pytest.mark.skipif(
    not hasattr(generation, "DeferredStopCheck"),
    reason=f"transformers {transformers.__version__} decides at every step whether to stop",
)
def test_a_late_stop_is_not_taken_back_from_a_state_that_is_returned() -> None:
    """On some devices generate() computes one step too many, and takes it back where the cache can."""
    cache = small()(tokens(1, 6), use_cache=True).past_key_values
    ask = generation.DeferredStopCheck.is_supported
    device = torch.device("mps")
    assert not ask(device, cache, cache_is_returned=True, is_assistant=False)
    assert ask(device, cache, cache_is_returned=False, is_assistant=False)
