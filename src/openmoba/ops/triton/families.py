"""Which family of kernels a call gets, and why not another."""

from __future__ import annotations

from torch import Tensor

from openmoba.ops.triton import hopper, portable
from openmoba.ops.triton.family import Family
from openmoba.ops.triton.geometry import Geometry

FAMILIES = (
    hopper.over(portable.FAMILY),
    portable.FAMILY,
)
"""The first that can be used is; the last one always can."""


def family_of(geometry: Geometry, *tensors: Tensor) -> Family:
    """Return the family that a call with these tensors gets."""
    return next(family for family in FAMILIES if family.why_not(geometry, *tensors) is None)


def explain(geometry: Geometry, *tensors: Tensor) -> str:
    """Name the family that a call gets, and what keeps it from those before."""
    chosen, obstacles = family_of(geometry, *tensors), ""
    for family in FAMILIES[: FAMILIES.index(chosen)]:
        obstacles += f", not {family.name}: {family.why_not(geometry, *tensors)}"
    return f"{chosen.name} kernels{obstacles}"
