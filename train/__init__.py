"""Training: trainer, optimisers, schedules. Knows spikelm; nothing in spikelm knows it."""
