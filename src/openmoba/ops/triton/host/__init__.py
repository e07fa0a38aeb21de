"""Launching from the host: launches worked out once, replayed, and what the kernels need to know of a GPU."""
