"""Generation with real models: chunks, state, stop strings, ends, what is refused."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spikelm.checkpoint import save_checkpoint
from spikelm.cli import main
from spikelm.config import ModelConfig
from spikelm.data.decode_stream import TextStream
from spikelm.errors import ConfigError, DataError
from spikelm.generation import Piece, StopStrings, generate, prompt_tokens
from spikelm.meter import Meter
from spikelm.model import SpikeLM
from spikelm.recurrence import Context
from spikelm.sampling import Sampler
from spikelm.tokenizer import Tokenizer

BYTES = Tokenizer.bytes()
GREEDY = Sampler(temperature=0)


def small_model(vocab_size: int = 256, **options: Any) -> SpikeLM:
    torch.manual_seed(1)
    model = SpikeLM(ModelConfig(vocab_size=vocab_size, hidden_size=16, num_hidden_layers=2, **options))
    with torch.no_grad():  # initial weights alone give an almost uniform distribution
        for name, value in model.named_parameters():
            if name.startswith(("head", "embedding.weight")):
                value.normal_()
    return model.double()


@pytest.fixture(scope="module")
def model() -> SpikeLM:
    return small_model()


@pytest.fixture(scope="module")
def spiking() -> SpikeLM:
    return small_model(placement="before", neuron={"name": "adaptive", "k": 3.0}).float()


def run(model: SpikeLM, prompt: str | list[int] = "The ", tokens: int = 12, **options: Any) -> list[Piece]:
    options.setdefault("sampler", Sampler(seed=0))
    return list(generate(model, options.pop("tokenizer", BYTES), prompt, tokens, **options))


def ids(pieces: list[Piece]) -> list[int]:
    return [piece.token for piece in pieces]


def text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


# --- the same tokens as the model itself ------------------------------------------------------------------


def test_greedy_is_the_argmax_of_the_whole_sequence(model: SpikeLM) -> None:
    pieces = run(model, sampler=GREEDY)
    sequence = torch.tensor([BYTES.encode("The ") + ids(pieces)])
    logits, _ = model(sequence)
    assert logits[0, 3:-1].argmax(-1).tolist() == ids(pieces)
    expected = logits[0, 3:-1].log_softmax(-1).gather(-1, sequence[0, 4:, None]).squeeze(-1)
    torch.testing.assert_close(torch.tensor([p.logprob for p in pieces]).double(), expected.double())


@pytest.mark.parametrize("chunk", [1, 3, 7, 512])
def test_chunks_change_nothing(model: SpikeLM, chunk: int) -> None:
    prompt = "A longer prompt in several chunks."
    assert run(model, prompt, chunk=chunk)[-1].token == run(model, prompt)[-1].token
    assert ids(run(model, prompt, chunk=chunk)) == ids(run(model, prompt))


def test_prefill_reports_progress(model: SpikeLM) -> None:
    done: list[int] = []
    run(model, "0123456789", 1, chunk=4, on_prefill=done.append)
    assert done == [4, 8, 10]


def test_same_seed_same_text_and_other_seed_other_text(model: SpikeLM) -> None:
    texts = [ids(run(model, sampler=Sampler(seed=seed))) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_tokens_and_text_are_equal_prompts(model: SpikeLM) -> None:
    assert ids(run(model, list(b"The "))) == ids(run(model, "The "))


def test_spiking_model_and_meter(spiking: SpikeLM) -> None:
    meter = Meter()
    pieces = run(spiking, tokens=5, ctx=Context(meter=meter))
    assert len(pieces) == 5
    summary = meter.summary()
    assert 0 < summary["total"]["firing_rate"] < 1
    counts = {entry["tokens"] for path, entry in summary["projections"].items() if path != "head"}
    assert counts == {4 + 4}  # the prompt and every generated token but the last


def test_model_returns_to_its_mode(model: SpikeLM) -> None:
    model.train()
    try:
        pieces = generate(model, BYTES, "a", 5, GREEDY)
        assert model.training  # nothing happens before the first piece is asked for
        next(pieces)
        assert not model.training and not torch.is_inference_mode_enabled()
        pieces.close()  # type: ignore[attr-defined]
        assert model.training
        run(model)
        assert model.training
    finally:
        model.eval()


# --- where a text begins and ends -------------------------------------------------------------------------


def test_empty_prompts_start_somewhere(model: SpikeLM) -> None:
    trained = Tokenizer.train_bpe(["abc " * 20], 260)
    assert prompt_tokens(BYTES, "") == prompt_tokens(BYTES, []) == [10]
    assert prompt_tokens(trained, "") == [trained.eos_id]
    assert ids(run(model, "")) == ids(run(model, "\n"))


def test_lengths_and_finish_reasons(model: SpikeLM) -> None:
    assert run(model, tokens=0) == []
    pieces = run(model, tokens=4)
    assert [piece.finish_reason for piece in pieces] == [None, None, None, "length"]


def test_end_of_document_ends_the_text() -> None:
    tokenizer = Tokenizer.train_bpe(["abc abc " * 20], 262)
    model = small_model(tokenizer.vocab_size)
    ends = Sampler(temperature=0, logit_bias={tokenizer.eos_id: 1e6})
    (piece,) = run(model, tokenizer=tokenizer, sampler=ends)
    assert (piece.text, piece.token, piece.finish_reason) == ("", tokenizer.eos_id, "eos")
    pieces = run(model, tokens=3, tokenizer=tokenizer, sampler=ends, ignore_eos=True)
    assert ids(pieces) == [tokenizer.eos_id] * 3 and pieces[-1].finish_reason == "length"


def test_a_padded_vocabulary_is_never_sampled() -> None:
    model = small_model(300)
    with torch.no_grad():
        model.head.linear.weight[256:] *= 100.0
    pieces = run(model, tokens=50, sampler=Sampler(temperature=5.0, seed=0))
    assert max(ids(pieces)) < 256
    assert all(piece.logprob <= 0 for piece in pieces)


class Scripted(torch.nn.Module):
    """A model in the shape of SpikeLM that wants to say one text, whatever the prompt."""

    def __init__(self, script: bytes, vocab_size: int = 256) -> None:
        super().__init__()
        self.config = ModelConfig(vocab_size=vocab_size, hidden_size=8, num_hidden_layers=1)
        self.script = script
        self.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))

    def init_state(
        self, batch: int, device: Any = None, dtype: Any = None, max_len: int | None = None
    ) -> Any:
        return {"position": torch.zeros(batch, dtype=torch.int64)}

    def forward(self, tokens: torch.Tensor, state: Any, ctx: Any, last_only: bool = False) -> Any:
        logits = torch.zeros(1, self.config.vocab_size)
        logits[0, self.script[int(state["position"])]] = 50.0
        state = {"position": state["position"] + 1}
        return (logits[:, None] if tokens.dim() == 2 else logits), state


def say(script: bytes, **options: Any) -> list[Piece]:
    return list(generate(Scripted(script), BYTES, "x", len(script), GREEDY, **options))  # type: ignore[arg-type]


def test_characters_are_never_split() -> None:
    pieces = say("aé日\U0001f600".encode())
    assert [piece.text for piece in pieces] == ["a", "", "é", "", "", "日", "", "", "", "\U0001f600"]
    assert text(say("日".encode()[:2])) == "\ufffd"


def test_stop_strings_span_pieces() -> None:
    pieces = say(b"one END two", stop=("END",))
    assert text(pieces) == "one " and pieces[-1].finish_reason == "stop" and len(pieces) == 7
    assert text(say(b"one EN two", stop=("END",))) == "one EN two"
    assert text(say(b"one EN", stop=("END",))) == "one EN"
    assert say(b"one EN", stop=("END",))[-1].finish_reason == "length"
    assert text(say("aé日b".encode(), stop=("日",))) == "aé"


class Unfinished:
    """The part of a tokenizer that generation needs; no token of it ever completes a character."""

    vocab_size, eos_id, bos_id = 4, None, None

    def __init__(self) -> None:
        self.decoded = 0

    def decode_stream(self) -> TextStream:
        return TextStream(self.decode)

    def decode(self, tokens: list[int]) -> str:
        self.decoded += len(tokens)
        return "\ufffd" * len(tokens)


def test_a_token_costs_the_same_at_any_length() -> None:
    """Work is counted: lines of Python run and tokens decoded between two pieces."""
    penalised = Sampler(temperature=0, repetition_penalty=1.1, frequency_penalty=1e-6)
    lines = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal lines
        lines += event == "line" and "spikelm" in frame.f_code.co_filename
        return trace

    for tokenizer in (BYTES, Unfinished()):
        model = Scripted(b"\x01" * 3000, tokenizer.vocab_size)
        pieces = generate(model, tokenizer, [1, 2], 3000, penalised, stop=("\x01\x01END",))  # type: ignore[arg-type]
        work = []
        before = sys.gettrace()
        for number, _ in enumerate(pieces, 1):
            if number in (200, 2800):
                lines, decoded = 0, getattr(tokenizer, "decoded", 0)
                sys.settrace(trace)
            elif number in (264, 2864):  # a multiple of what may wait for a character
                sys.settrace(before)
                work.append((lines, getattr(tokenizer, "decoded", 0) - decoded))
        assert work[0] == work[1] and work[0][0] > 0


@settings(deadline=None)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_agree_with_a_search_in_the_whole(whole: str, stop: list[str], data: Any) -> None:
    found = [at for at in map(whole.find, stop) if at >= 0]
    tail, given_out, stopped, at = StopStrings(stop), "", False, 0
    while at < len(whole) and not stopped:
        step = data.draw(st.integers(1, 3))
        piece, stopped = tail.push(whole[at : at + step], last=at + step >= len(whole))
        given_out += piece
        at += step
    assert stopped == bool(found)
    # Pieces of several characters may hold a later string whole before an earlier, longer one is complete.
    expected = whole[: min(found)] if found else whole
    assert given_out == expected or (stopped and given_out.startswith(expected))


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"max_tokens": math.nan}, "max_tokens is nan"),
        ({"chunk": 0}, "chunk is 0"),
        ({"stop": "END"}, "stop is 'END'"),
        ({"stop": [""]}, "stop is"),
        ({"stop": [3]}, "stop is"),
    ],
)
def test_bad_values_are_refused_at_once(model: SpikeLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(model, BYTES, "a", **({"max_tokens": 3, "sampler": GREEDY} | options))


@pytest.mark.parametrize("prompt", [[256], [-1], [True], ["a"], [1.5]])
def test_bad_prompt_tokens_are_refused(model: SpikeLM, prompt: Any) -> None:
    with pytest.raises(DataError, match="expected ids from 0 to 255"):
        generate(model, BYTES, prompt, 3, GREEDY)


def test_bad_text_and_foreign_tokenizers_are_refused(model: SpikeLM) -> None:
    with pytest.raises(DataError, match="lone surrogate"):
        generate(model, BYTES, "a\udc80", 3, GREEDY)
    with pytest.raises(DataError, match="tokenizer has 257 ids and the model only 256"):
        generate(model, Tokenizer.train_bpe(["a"], 257), "a", 3, GREEDY)


# --- the command ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(spiking: SpikeLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("run") / "model", spiking, BYTES)


def test_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "out.json"
    words = ["generate", str(checkpoint), "--prompt", "The ", "--max-tokens", "9", "--seed", "4", "--spikes"]
    assert main([*words, "--json", str(report)]) == 0
    plain = capsys.readouterr()
    assert main([*words, "--stream"]) == 0
    assert capsys.readouterr().out == plain.out
    result = json.loads(report.read_text())
    assert plain.out == result["prompt"] + result["text"] + "\n"
    assert "tokens/s" in plain.err and "state" in plain.err
    assert result["prompt_tokens"] == 4 and len(result["tokens"]) == 9 and result["seed"] == 4
    assert result["finish_reason"] == "length" and result["state_bytes"] > 0
    assert 0 < result["spikes"]["total"]["firing_rate"] < 1


def test_command_reads_prompts_from_files(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("The ")
    options = ["--max-tokens", "5", "--temperature", "0", "--json", "-"]
    assert main(["generate", str(checkpoint), "--prompt-file", str(path), *options]) == 0
    from_file = json.loads(capsys.readouterr().out)
    assert main(["generate", str(checkpoint), "--prompt", "The ", *options]) == 0
    assert from_file["text"] == json.loads(capsys.readouterr().out)["text"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--top-p", "nan"], "top_p is nan"),
        (["--max-tokens", "-3"], "max_tokens is -3"),
        (["--prompt", "a", "--prompt-file", "b"], "not both"),
        (["--prompt-file", "absent.txt"], "there is no file absent.txt"),
        (["--device", "nowhere"], "device 'nowhere' cannot be used here"),
        (["--dtype", "int8"], "dtype 'int8'"),
    ],
)
def test_command_refuses_in_one_sentence(
    checkpoint: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(checkpoint), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_command_refuses_what_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tmp_path / "absent")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
