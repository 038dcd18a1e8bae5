"""Text to token blocks: sources, the tokenised store and the order of samples."""
