"""Dense causal attention: what MoBA is when `top_k` covers every block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from openmoba.ops import library

# On Hopper, cuDNN's kernel takes 0.6 of the time of the flash kernel that SDPA prefers by default.
_CUDA_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def dense_attention(q_BTHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, scale: float) -> Tensor:
    """Causal softmax attention, queries aligned to the end of the keys, `[B, T, H, D]`.

    SDPA wherever it is causal without an explicit mask, whose memory would be quadratic. On CPU it is not with
    some but not all queries of a sequence; that is MoBA with one block, which every query owns.
    """
    queries, keys = q_BTHD.shape[1], k_BSHD.shape[1]
    square = queries == keys
    if not square and queries > 1 and q_BTHD.device.type != "cuda":
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_BTHD, k_BSHD, v_BSHD))
        return library.attention("cpu", q, k, v, None, None, keys, 1, scale)
    mask = None if square or queries == 1 else _lower_right(queries, keys)
    q_BHTD, k_BHSD, v_BHSD = (x.transpose(1, 2) for x in (q_BTHD, k_BSHD, v_BSHD))
    grouped = q_BTHD.shape[2] != k_BSHD.shape[2]
    with _backends(q_BTHD):
        out_BHTD = scaled_dot_product_attention(
            q_BHTD, k_BHSD, v_BHSD, attn_mask=mask, is_causal=square, scale=scale, enable_gqa=grouped
        )
    return out_BHTD.transpose(1, 2)


def _backends(q: Tensor) -> AbstractContextManager[object]:
    """cuDNN first. Compilers know `sdpa_kernel`, which also switches on what the caller has switched off."""
    if q.device.type != "cuda":
        return nullcontext()
    if torch.compiler.is_compiling():
        context: AbstractContextManager[object] = sdpa_kernel(_CUDA_BACKENDS, set_priority=True)
        return context
    return _preferred()


@contextmanager
def _preferred() -> Iterator[None]:
    """The order of `_CUDA_BACKENDS`, in less time than `sdpa_kernel` takes, which shows at short lengths.

    Backends that the caller has switched off stay off. The order is the process's, as it is with `sdpa_kernel`.
    """
    before = torch._C._get_sdp_priority_order()
    order = [backend.value for backend in _CUDA_BACKENDS]
    torch._C._set_sdp_priority_order([*order, *(other for other in before if other not in order)])
    try:
        yield
    finally:
        torch._C._set_sdp_priority_order(before)


def _lower_right(queries: int, keys: int) -> Tensor:
    from torch.nn.attention.bias import causal_lower_right  # imports triton where it is installed

    mask: Tensor = causal_lower_right(queries, keys)
    return mask
