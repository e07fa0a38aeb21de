"""What the kernels need to know of a GPU, asked once."""

from __future__ import annotations

from functools import cache

import torch


@cache
def memory_bytes(device: torch.device) -> int:
    """Return all of a GPU's memory."""
    return int(torch.cuda.get_device_properties(device).total_memory)


@cache
def multiprocessors(device: torch.device) -> int:
    """Return how many this GPU has; 1 for Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def nvidia_capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability; (0, 0) for what is no NVIDIA GPU: AMD's numbers mean other things."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0, 0
    return torch.cuda.get_device_capability(device)


def most_registers(most: int | None) -> dict[str, int]:
    """Return the option that holds a kernel to so many registers per thread, an option of NVIDIA's compiler alone."""
    return {} if most is None or torch.version.hip is not None else {"maxnreg": most}
