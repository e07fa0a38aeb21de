"""Key convolution: every key also sees the few keys before it (after arXiv 2511.11571).

    k'_t = k_t + silu(sum_d w_d * k_(t-d)),  d = 0 .. W - 1, channel by channel

`w = 0` is the identity. Its gradient is not zero there, since silu has the slope 1/2 at zero, so it trains from a
start at zero. Keys before the first token of a sequence count as zero.

Plain torch: it is its own specification, runs in any precision, and `torch.compile` makes one kernel of it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

# B batch, T tokens, C channels of all key/value heads, W width


def key_convolution(
    k_BTC: Tensor, weight_CW: Tensor, goes_on_BT: Tensor | None = None, before_BPC: Tensor | None = None
) -> Tensor:
    """Return the convolved keys `[B, T, C]` in the dtype of `k_BTC`.

    Args:
        k_BTC: keys as projected, before norm and rotation.
        weight_CW: one filter per channel; column d weighs the key d tokens before. Cast to the keys' dtype.
        goes_on_BT: bool `[B or 1, T]`, False where a token begins a sequence; None: each row is one sequence. With
            keys before the first token, `[B or 1, W - 1 + T]`, for these too.
        before_BPC: the W - 1 keys before the first token, zeros where there are none; None: all zeros.
    """
    reach = weight_CW.shape[1] - 1
    weights = weight_CW.to(k_BTC.dtype).unbind(1)
    same = None if goes_on_BT is None else [x[:, -k_BTC.shape[1] :] for x in _same_sequence(goes_on_BT, reach)]
    sum_BTC = k_BTC * weights[0]
    for d, past_BTC in enumerate(_shifted(k_BTC, reach, before_BPC), 1):
        if same is not None:
            # Replaced, not multiplied by zero: a NaN in another sequence must not come here.
            past_BTC = torch.where(same[d - 1][..., None], past_BTC, 0)
        sum_BTC = sum_BTC + past_BTC * weights[d]
    return k_BTC + silu(sum_BTC)


def _shifted(k_BTC: Tensor, reach: int, before_BPC: Tensor | None) -> list[Tensor]:
    """Return the key d tokens before each, for d = 1 .. reach."""
    tokens = k_BTC.shape[1]
    if before_BPC is None and tokens > reach:  # cheaper, its derivative too
        return [pad(k_BTC, (0, 0, d, -d)) for d in range(1, reach + 1)]
    k_all_BTC = pad(k_BTC, (0, 0, reach, 0)) if before_BPC is None else torch.cat([before_BPC, k_BTC], 1)
    return [k_all_BTC[:, reach - d : reach - d + tokens] for d in range(1, reach + 1)]


def _same_sequence(goes_on_BT: Tensor, reach: int) -> list[Tensor]:
    """Tell whether the token d before is of the same sequence, bool as `goes_on_BT` for d = 1 .. reach."""
    same = [goes_on_BT]
    for _ in range(1, reach):
        same.append(goes_on_BT & pad(same[-1], (1, 0), value=True)[:, :-1])
    return same
