"""A SpikeLM model as lm-evaluation-harness wants it.

Where the harness's own HFLM differs: it cuts a text at 2048 tokens from the left, here a text is read whole,
however long (``loglikelihood_rolling`` carries the state over the document instead of windows); it adds
log-probabilities in float32, here in float64; here shared beginnings are read once. Texts without context
begin after bos, else eos, else (byte tokenizers have neither) a line break.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from spikelm.checkpoint import load_model, load_tokenizer
from spikelm.errors import ConfigError, DataError, nearest
from spikelm.evaluation.tasks.reader import Reader
from spikelm.evaluation.tasks.writing import Request, write
from spikelm.generation import prompt_tokens
from spikelm.model import SpikeLM
from spikelm.sampling import Sampler
from spikelm.tokenizer import Tokenizer

MAX_NEW_TOKENS = 256
"""Tokens that a text may have where the task says nothing."""

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_NEUTRAL: Mapping[str, Any] = {"num_beams": 1, "num_return_sequences": 1, "n": 1, "use_cache": True}
"""Options of other samplers whose neutral value asks for nothing."""


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A model and its tokenizer behind the harness's three questions.

    Args:
        model: in evaluation mode.
        tokenizer: the model's own.
        batch_size: sequences read side by side.
        chunk: tokens of each read at once; changes speed and memory only.
        share: whether shared beginnings are read once, by copying the state at their end.
        seed: of sampled texts (tasks with ``do_sample``).
        advance: called with a number of tokens the model has just read, for progress.

    Attributes:
        reader: counts the tokens (``tokens_read``, ``tokens_asked``).

    Raises:
        ConfigError: a size below 1.
        DataError: the tokenizer has more tokens than the model.
    """

    def __init__(
        self,
        model: SpikeLM,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 16,
        chunk: int = 256,
        share: bool = True,
        seed: int = 0,
        advance: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("chunk", chunk)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; expected an integer of at least 1")
        if tokenizer.vocab_size > model.config.vocab_size:
            raise DataError(
                f"the tokenizer has {tokenizer.vocab_size} ids and the model only {model.config.vocab_size}; "
                "use the tokenizer the model was trained with"
            )
        self.words, self.seed = tokenizer, seed
        self._device = model.embedding.weight.device
        self.reader = Reader(
            model,
            vocab_size=model.config.vocab_size,
            device=self._device,
            batch_size=batch_size,
            chunk=chunk,
            share=share,
            advance=advance,
        )

    @property
    def prefix_token_id(self) -> int:
        """The token that a text without context begins after: bos, else eos, else a line break."""
        return prompt_tokens(self.words, "")[0]

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document; where there is none, the one that texts begin after."""
        end = self.words.eos_id
        return self.prefix_token_id if end is None else end

    @property
    def tokenizer_name(self) -> str:
        """What the tokenizer is, for the harness's caches."""
        return self.words.sha256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; special tokens in the text are recognised and none is added."""
        return self.words.encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Natural logarithm of the probability of each continuation, and whether it is the likeliest.

        Raises:
            DataError: a continuation without a token of its own.
        """
        for request in requests:
            if request.args[1] == "":
                raise DataError(f"the continuation of {request.args[0][-40:]!r} is empty; expected some text")
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        for texts, _, continuation in requests:
            if not continuation:
                raise DataError(
                    f"the tokenizer makes no token of the continuation {texts[1]!r} after {texts[0][-40:]!r}"
                )
        # A context of spaces alone is none: the harness moves them to the continuation.
        contexts = [context or [self.prefix_token_id] for _, context, _ in requests]
        scores = self.reader.score(
            [a + continuation for a, (_, _, continuation) in zip(contexts, requests, strict=True)],
            [len(context) for context in contexts],
        )
        answers = [(float(score.logprobs.sum()), bool(score.greedy.all())) for score in scores]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Natural logarithm of the probability of each text, the state carried from its first token on."""
        texts = [str(request.args[0]) for request in requests]
        tokens = [self.words.encode(text) for text in texts]
        kept = [index for index, ids in enumerate(tokens) if ids]
        prefix = self.prefix_token_id
        scores = self.reader.score([[prefix, *tokens[index]] for index in kept], [1] * len(kept))
        answers = [0.0] * len(texts)
        for index, score in zip(kept, scores, strict=True):
            answers[index] = float(score.logprobs.sum())
        for text, answer in zip(texts, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), answer)
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """A continuation of each context, up to one of its stop strings.

        Greedy unless the task asks to sample. What is drawn depends on the seed and on the place of the
        request in the list, not on the batch.

        Raises:
            ConfigError: an option of generation that this sampler does not have.
        """
        asked = [
            self._request(str(request.args[0]), request.args[1], stream)
            for stream, request in enumerate(requests)
        ]
        answers = write(self.reader, self.words, asked)
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    def _request(self, context: str, options: Mapping[str, Any], stream: int) -> Request:
        known = {*_LENGTHS, *_SAMPLING, *_NEUTRAL, "until", "do_sample"}
        for name, value in options.items():
            if name not in known:
                raise ConfigError(nearest("option of generation", name, known))
            if name in _NEUTRAL and value != _NEUTRAL[name]:
                raise ConfigError(f"{name} is {value!r}; this sampler has {_NEUTRAL[name]!r} only")
        given = {name: options[name] for name in _SAMPLING if options.get(name) is not None}
        sampled = options.get("do_sample")
        if sampled or (sampled is None and given.get("temperature")):
            sampler = Sampler(seed=self.seed, **given)
        else:
            penalty = given.get("repetition_penalty", 1.0)
            sampler = Sampler(temperature=0.0, seed=self.seed, repetition_penalty=penalty)
        until = options.get("until") or []
        length = next((options[name] for name in _LENGTHS if options.get(name) is not None), MAX_NEW_TOKENS)
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ConfigError(f"max_gen_toks is {length!r}; expected an integer of at least 1")
        return Request(
            tokens=prompt_tokens(self.words, context),
            sampler=sampler,
            max_tokens=length,
            stop=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
            stream=stream,
        )


def load(
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    **options: Any,
) -> HarnessModel:
    """The model of a checkpoint folder, for ``lm_eval.simple_evaluate(model=load(folder), ...)``.

    Args:
        folder: checkpoint folder.
        device: where to compute.
        dtype: of the weights; None keeps what is stored.
        options: see :class:`HarnessModel`.
    """
    words = load_tokenizer(folder)
    return HarnessModel(load_model(folder, device=device, dtype=dtype), words, **options)
