"""Foreign checkpoints: how their tensors are named and laid out, and what model they describe."""
