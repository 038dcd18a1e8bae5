"""Serving: constant-memory decoding engines. Knows spikelm; nothing in spikelm knows it."""
