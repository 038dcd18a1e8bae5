"""``python -m spikelm``: the command line without the installed script."""

from __future__ import annotations

from spikelm.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
