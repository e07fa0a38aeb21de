"""What autocast makes of a call: inputs in its dtype, as `scaled_dot_product_attention` has them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def autocast_dtype(q: Tensor) -> torch.dtype | None:
    """Return what autocast has attention computed in on q's device; None where it is off, or q is no tensor."""
    device = q.device.type if isinstance(q, Tensor) else "meta"
    on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def lowered(x: Tensor, dtype: torch.dtype, cast: Callable[..., Tensor] = Tensor.to) -> Tensor:
    """Return what autocast makes of an input of SDPA: fp64, and what is no float, stay."""
    lowers = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
    return cast(x, dtype=dtype) if lowers else x
