"""Hopper's own path: kernels in Gluon, Triton's lower-level language, for the shapes where they are faster.

They do what Triton's kernels in `forward` and `backward` do, from the same arguments; Triton's are complete without
them. Gluon changes between versions of Triton: the kernels are used with the versions they were compiled with.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
import triton
from torch import Tensor

from openmoba.ops.triton.device import nvidia_capability
from openmoba.ops.triton.geometry import Geometry
from openmoba.ops.triton.launch import TESTED, is_tested
from openmoba.ops.triton.tuning import Kernel, Tile, backward_keys_tile

_KEYS = 128
_WIDTHS = (64, 128)
_ALIGNED = 16  # bytes of an address, elements of a stride: what makes a copy of 16 bytes provable


def serves(geometry: Geometry, *tensors: Tensor) -> bool:
    """Whether these kernels can be used."""
    return why_not(geometry, *tensors) is None


def why_not(geometry: Geometry, *tensors: Tensor) -> str | None:
    """Why these kernels cannot be used for such tensors, or None."""
    device, dtype = tensors[0].device, tensors[0].dtype
    if not is_available(device):
        return f"they need a Hopper GPU and {TESTED}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"they compute in 16 bits, not {dtype}"
    if geometry.width not in _WIDTHS:
        return f"head width {geometry.width} is not {' or '.join(map(str, _WIDTHS))}"
    if geometry.block_size % _KEYS:
        return f"block_size {geometry.block_size} is no multiple of {_KEYS}"
    distance = max(x.stride(-3) for x in tensors)
    if geometry.block_size * distance >= 2**31:
        return f"tokens {distance} elements apart take a block of {geometry.block_size} beyond 2^31"
    if not all(map(_is_aligned, tensors)):
        return f"strides are no multiples of {_ALIGNED} elements, or a tensor does not begin at a multiple of 16 bytes"
    return None


@cache
def is_available(device: torch.device) -> bool:
    """Whether this device and this Triton run the kernels; warns once of a Hopper GPU where Triton does not."""
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


def attend_past(geometry: Geometry) -> Kernel:
    """In the place of `forward._attend_past`."""
    from openmoba.ops.triton.hopper.forward import attend_past_resident, attend_past_streaming

    if geometry.block_size == _KEYS:
        tile = Tile(m=64, n=_KEYS, d=geometry.width, warps=4, stages=3, segment=1024)
        return Kernel(attend_past_resident, tile, _constants(tile) | {"STAGES": tile.stages})
    m, n = (64, _KEYS) if geometry.width == _WIDTHS[0] else (128, 64)
    tile = Tile(m=m, n=n, d=geometry.width, warps=4, stages=2, segment=512)
    return Kernel(attend_past_streaming, tile, _constants(tile))


def attend_own(geometry: Geometry) -> Kernel:
    """In the place of `forward._attend_own`."""
    from openmoba.ops.triton.hopper.own_queries import attend_own

    tile = Tile(m=64, n=64, d=geometry.width, warps=4, stages=2)
    return Kernel(attend_own, tile, _constants(tile) | _most_registers(geometry))


def key_gradients(geometry: Geometry, dtype: torch.dtype) -> Kernel:
    """In the place of `backward_keys.key_gradients`."""
    from openmoba.ops.triton.hopper.backward import key_gradients

    segment = backward_keys_tile(geometry, dtype).segment
    tile = Tile(m=64, n=_KEYS, d=geometry.width, warps=8, stages=3, segment=segment)
    return Kernel(key_gradients, tile, _constants(tile) | {"STAGES": tile.stages})


def own_key_gradients(geometry: Geometry) -> Kernel:
    """In the place of `backward_keys.own_key_gradients`."""
    from openmoba.ops.triton.hopper.backward import own_key_gradients

    tile = Tile(m=64, n=_KEYS, d=geometry.width, warps=8, stages=3)
    return Kernel(own_key_gradients, tile, _constants(tile) | {"STAGES": tile.stages})


def own_query_gradients(geometry: Geometry) -> Kernel:
    """In the place of `backward_queries.own_query_gradients`."""
    from openmoba.ops.triton.hopper.own_queries import own_query_gradients

    tile = Tile(m=64, n=32, d=geometry.width, warps=4, stages=2)
    return Kernel(own_query_gradients, tile, _constants(tile) | {"STAGES": tile.stages} | _most_registers(geometry))


def _constants(tile: Tile) -> dict[str, int]:
    return {"M": tile.m, "N": tile.n, "D": tile.d, "num_warps": tile.warps}


def _most_registers(geometry: Geometry) -> dict[str, int]:
    """Per thread, for three programs of four warps on a multiprocessor, or four of narrow heads."""
    return {"maxnreg": 128 if geometry.width == _WIDTHS[0] else 168}


def _is_aligned(x: Tensor) -> bool:
    return x.data_ptr() % _ALIGNED == 0 and all(stride % _ALIGNED == 0 for stride in x.stride()[:-1])
