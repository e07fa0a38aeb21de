"""Kernels for Hopper in Gluon, Triton's lower-level language, for the shapes where these are the faster ones.

Gluon changes between versions of Triton: the kernels are used with the versions they were compiled with, and imported
where they are used.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from openmoba.ops.triton.family import Family, Kernel, Tile
from openmoba.ops.triton.geometry import Geometry
from openmoba.ops.triton.hopper import tuning
from openmoba.ops.triton.host.device import most_registers, nvidia_capability
from openmoba.ops.triton.host.direct import TESTED, is_tested

_ALIGNED = 16  # bytes of an address, elements of a stride: what makes a copy of 16 bytes provable


def why_not(geometry: Geometry, *tensors: Tensor) -> str | None:
    """Return why these kernels cannot be used for such tensors, or None."""
    device, dtype = tensors[0].device, tensors[0].dtype
    if not is_available(device):
        return f"they need a Hopper GPU and {TESTED}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"they compute in 16 bits, not {dtype}"
    if geometry.width not in tuning.WIDTHS:
        return f"head width {geometry.width} is not {' or '.join(map(str, tuning.WIDTHS))}"
    if geometry.block_size % tuning.KEYS:
        return f"block_size {geometry.block_size} is no multiple of {tuning.KEYS}"
    if geometry.split:
        return f"blocks of {geometry.block_size} tokens lie in several pages, of {geometry.split}"
    distance = max(x.stride(-3) for x in tensors)
    if geometry.block_size * distance >= 2**31:
        return f"tokens {distance} elements apart take a block of {geometry.block_size} beyond 2^31"
    if not all(map(_is_aligned, tensors)):
        return f"strides are no multiples of {_ALIGNED} elements, or a tensor does not begin at a multiple of 16 bytes"
    return None


@cache
def is_available(device: torch.device) -> bool:
    """Say whether this device and this Triton run the kernels; warn once of a Hopper GPU where Triton does not."""
    if nvidia_capability(device) != (9, 0):
        return False
    if not is_tested(triton.__version__):
        warnings.warn(
            f"MoBA has faster kernels for this GPU, and they need {TESTED}; with Triton {triton.__version__} the "
            "portable ones run",
            stacklevel=2,
        )
        return False
    return True


def attend_past(geometry: Geometry, dtype: torch.dtype) -> Kernel:
    """Return the kernel of the past blocks, forward."""
    from openmoba.ops.triton.hopper.forward import attend_past_resident, attend_past_streaming

    tile = tuning.attend_past(geometry, dtype)
    if geometry.block_size == tuning.KEYS:
        return _kernel(attend_past_resident, tile, STAGES=tile.stages)
    return _kernel(attend_past_streaming, tile)


def attend_own(geometry: Geometry, dtype: torch.dtype) -> Kernel:
    """Return the kernel of the own block and the merge, forward."""
    from openmoba.ops.triton.hopper.own_queries import attend_own

    return _kernel(attend_own, tuning.attend_own(geometry, dtype))


def key_gradients(geometry: Geometry, dtype: torch.dtype) -> Kernel:
    """Return the kernel of dK and dV from past rows, and of the pairs' shares of dQ."""
    from openmoba.ops.triton.hopper.keys import key_gradients

    tile = tuning.key_gradients(geometry, dtype)
    return _kernel(key_gradients, tile, STAGES=tile.stages)


def own_key_gradients(geometry: Geometry, dtype: torch.dtype) -> Kernel:
    """Return the kernel of the own block's dK and dV, added to those of the past."""
    from openmoba.ops.triton.hopper.keys import own_key_gradients

    tile = tuning.own_key_gradients(geometry, dtype)
    return _kernel(own_key_gradients, tile, STAGES=tile.stages)


def own_query_gradients(geometry: Geometry, dtype: torch.dtype) -> Kernel:
    """Return the kernel of the own block's dQ, added to that of the past."""
    from openmoba.ops.triton.hopper.own_queries import own_query_gradients

    tile = tuning.own_query_gradients(geometry, dtype)
    return _kernel(own_query_gradients, tile, STAGES=tile.stages)


def _kernel(function: Any, tile: Tile, **constants: int) -> Kernel:
    sizes = {"M": tile.m, "N": tile.n, "D": tile.d, "num_warps": tile.warps}
    return Kernel(function, tile, sizes | constants | most_registers(tile.registers))


def _is_aligned(x: Tensor) -> bool:
    return x.data_ptr() % _ALIGNED == 0 and all(stride % _ALIGNED == 0 for stride in x.stride()[:-1])


def over(others: Family) -> Family:
    """Return the family of these kernels, with those of another one for the steps that have none here."""
    return replace(
        others,
        name="Hopper's own",
        why_not=why_not,
        attend_past=attend_past,
        attend_own=attend_own,
        key_gradients=key_gradients,
        own_key_gradients=own_key_gradients,
        own_query_gradients=own_query_gradients,
    )
