"""What a trainer knows of its data: samples with a global number, and nothing of where they come from.

Sample g is a pure function of (data, seed, g). So batch size, accumulation, ranks and resuming decide who
computes a sample and when, and never which tokens are in it. :class:`~spikelm.data.blocks.TokenBlocks` (a
tokenised source), :class:`~spikelm.data.mixture.Mixture`, :class:`~spikelm.data.stream.Stream` (tokenised on
the fly) and :class:`~spikelm.data.lanes.Lanes` (state carried over documents) are such samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from spikelm.data.store import check_tokens
from spikelm.errors import DataError

if TYPE_CHECKING:
    import torch

    from spikelm.tokenizer import Tokenizer

IGNORE = -100
"""Target that counts in no loss (torch's default ``ignore_index``)."""

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples of a training or evaluation step, on the CPU unless moved.

    Attributes:
        inputs: int64 [B, T], tokens.
        targets: int64 [B, T], the token that follows each input, or -100 where none is to be predicted.
        reset: bool [B, T], true where a document begins: the state starts anew before that token.
        samples: int64 [B], global numbers of the samples.
        target_bytes: int64 [B], UTF-8 bytes that the counted targets of each row stand for.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    reset: torch.Tensor
    samples: torch.Tensor
    target_bytes: torch.Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``."""
        return Batch(
            inputs=self.inputs.to(device),
            targets=self.targets.to(device),
            reset=self.reset.to(device),
            samples=self.samples.to(device),
            target_bytes=self.target_bytes.to(device),
        )


class Samples(Protocol):
    """Training samples. Methods are called by one thread at a time; only :meth:`state` may come from another.

    Attributes:
        block_length: tokens T of a sample.
        num_tokens, num_bytes: of all text, or None where it is not known before it was read.
        carried: whether sample g goes on where sample g - B ended, so that a trainer with B samples a step
            must give row r the state that row r of the step before left behind.
    """

    block_length: int
    num_tokens: int | None
    num_bytes: int | None
    carried: bool

    def gather(self, seed: int, samples: Int64) -> Batch:
        """The samples with these global numbers, int64 [M], in the order of ``seed``.

        Raises:
            DataError: the data is damaged or holds a token outside the vocabulary.
        """
        ...

    def fingerprint(self) -> Any:
        """JSON value that is another one when the samples may be others."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON values for the log of a run: what is read, and how much there is of it."""
        ...

    def epochs(self, seed: int, samples: int) -> dict[str, float]:
        """How often each source has been read once samples 0 to ``samples - 1`` were used; by name."""
        ...

    def batch(self, seed: int, first_sample: int, batch_size: int) -> Batch:
        """Samples ``first_sample`` to ``first_sample + batch_size - 1`` of the order of ``seed``."""
        if first_sample < 0 or batch_size < 1:
            raise DataError(
                f"asked for {batch_size} samples from {first_sample}; expected at least 1 sample from 0 on"
            )
        return self.gather(seed, np.arange(first_sample, first_sample + batch_size, dtype=np.int64))

    def state(self, seed: int, first_sample: int) -> dict[str, Any]:
        """JSON values that let :meth:`restore` find ``first_sample`` without reading all before it.

        It is the same however the samples before were asked for. Nothing where every sample is found at once.
        """
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` gave in an earlier process; without it samples are only found later.

        Raises:
            DataError: it is not such a state.
        """
        return

    def close(self) -> None:
        """End threads that read ahead; samples can still be asked for, which starts them again."""
        return


def make_batch(
    window: Int64,
    begins: npt.NDArray[np.bool_],
    samples: Int64,
    tokenizer: Tokenizer,
    separated: bool,
    where: str,
    offsets: Int64 | None = None,
) -> Batch:
    """Inputs, targets and resets from stretches of text.

    Args:
        window: int64 [B, T + 1], the T inputs of each sample and the token after them.
        begins: bool [B, T + 1], where a document begins.
        samples: int64 [B], global numbers.
        tokenizer: of the tokens.
        separated: whether an end-of-document token stands between documents. Otherwise a document's last
            token would have to predict an unrelated document's first, and its target is -100.
        where: what to call the text in a message.
        offsets: int64 [B], position in the text of each row's first token, for the message.

    Raises:
        DataError: a token is outside the vocabulary.
    """
    import torch

    if window.max() >= tokenizer.vocab_size:
        for row, tokens in enumerate(window):
            check_tokens(tokens, tokenizer.vocab_size, where, 0 if offsets is None else int(offsets[row]))
    targets = window[:, 1:].copy()
    nbytes = tokenizer.token_bytes[targets]
    if not separated:
        hidden = begins[:, 1:]
        targets[hidden] = IGNORE
        nbytes[hidden] = 0
    return Batch(
        inputs=torch.from_numpy(window[:, :-1].copy()),
        targets=torch.from_numpy(targets),
        reset=torch.from_numpy(begins[:, :-1].copy()),
        samples=torch.from_numpy(np.array(samples, dtype=np.int64)),
        target_bytes=torch.from_numpy(nbytes.sum(axis=1)),
    )


def check_block_length(block_length: Any) -> int:
    """``block_length`` if it is a positive integer.

    Raises:
        DataError: it is not.
    """
    if isinstance(block_length, bool) or not isinstance(block_length, int) or block_length < 1:
        raise DataError(f"block_length is {block_length!r}; expected a positive integer")
    return block_length
