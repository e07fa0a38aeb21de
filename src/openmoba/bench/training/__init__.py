"""The speed of training: a step of the laboratory, optimizer included, by size, arm, length and micro-batch."""
