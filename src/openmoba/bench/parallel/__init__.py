"""Timing one sequence over several devices, under torchrun: attention, its transfers alone, and training steps."""
