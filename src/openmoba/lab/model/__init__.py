"""The decoder: sizes, weights, checkpoints, compiling, and the loss."""
