"""``python -m spikelm.train CONFIG [KEY=VALUE]... [--json FILE] [--check]``: one rank, whatever starts it.

    torchrun --standalone --nproc-per-node 2 -m spikelm.train CONFIG
    deepspeed --num_gpus 2 --module spikelm.train CONFIG
    accelerate launch -m spikelm.train CONFIG

The same program as ``spikelm train``; the option ``--local_rank=N`` of the DeepSpeed launcher is understood.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one rank; the exit code is that of ``spikelm train``."""
    from spikelm.cli import main as program

    return program(["train", *without_local_rank(sys.argv[1:] if argv is None else argv)])


def without_local_rank(words: Sequence[str]) -> list[str]:
    """The words without the launcher's ``--local_rank=N``, which goes into LOCAL_RANK unless that is set."""
    kept = []
    for word in words:
        name, _, value = word.partition("=")
        if name in {"--local_rank", "--local-rank"} and value:
            os.environ.setdefault("LOCAL_RANK", value)
        else:
            kept.append(word)
    return kept


if __name__ == "__main__":
    raise SystemExit(main())
