"""Dense causal attention: what MoBA is when `top_k` covers every block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from openmoba.ops.arguments import Blocking
from openmoba.ops.attend import attend
from openmoba.ops.operation import refuse_second_derivatives

# On Hopper, cuDNN's kernel takes 0.6 of the time of the flash kernel that SDPA prefers by default.
_CUDA_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def dense_attention(q_BTHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, scale: float) -> Tensor:
    """Attend causally over all keys, queries aligned to the end of the keys, `[B, T, H, D]`.

    SDPA wherever it is causal without an explicit mask, whose memory would be quadratic; else MoBA with one block,
    which every query owns.
    """
    queries, keys = q_BTHD.shape[1], k_BSHD.shape[1]
    # Lengths may be symbols of a compiler, and SDPA takes no comparison of such, but what a branch on it decides.
    options: dict[str, Any] = {}
    if queries == keys:
        options["is_causal"] = True
    elif queries > 1:
        impl = _one_block(q_BTHD)
        if impl is not None:
            q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_BTHD, k_BSHD, v_BSHD))
            return attend(impl, q, k, v, None, Blocking(None, None, keys, 1), scale)[0]
        options["attn_mask"] = _lower_right(queries, keys)
    if q_BTHD.shape[2] != k_BSHD.shape[2]:
        options["enable_gqa"] = True
    q_BHTD, k_BHSD, v_BHSD = (x.transpose(1, 2) for x in (q_BTHD, k_BSHD, v_BSHD))
    with _backends(q_BTHD):
        out_BHTD = scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, scale=scale, **options)
    fused = None if torch.compiler.is_compiling() else out_BHTD.grad_fn
    if fused is not None and fused.name().startswith("ScaledDotProduct"):
        fused.register_hook(_refuse_second)
    return out_BHTD.transpose(1, 2)


class _Final(torch.autograd.Function):
    """Passes a gradient on that cannot be differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        return None

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        refuse_second_derivatives(ctx)


def _refuse_second(gradients: tuple[Tensor | None, ...], _: Any) -> tuple[Tensor | None, ...] | None:
    """Refuse a second backward of a fused kernel, of which torch says only that it is not implemented."""
    if not torch.is_grad_enabled():  # which it is with create_graph alone
        return None
    return tuple(x if x is None else _Final.apply(x) for x in gradients)  # type: ignore[no-untyped-call]


def _one_block(q: Tensor) -> str | None:
    """Name what computes some but not all queries of a sequence where SDPA needs a mask to be causal: on CPU, and under
    compilers, which cannot trace what says so on CUDA. None: SDPA.
    """
    if q.device.type != "cuda":
        return "cpu"
    return "triton" if torch.compiler.is_compiling() and q.dtype != torch.float64 else None


def _backends(q: Tensor) -> AbstractContextManager[object]:
    """Prefer cuDNN. Compilers know `sdpa_kernel`, which also switches on what the caller has switched off."""
    if q.device.type != "cuda":
        return nullcontext()
    if torch.compiler.is_compiling():
        context: AbstractContextManager[object] = sdpa_kernel(_CUDA_BACKENDS, set_priority=True)
        return context
    return _preferred()


@contextmanager
def _preferred() -> Iterator[None]:
    """Order `_CUDA_BACKENDS`, in less time than `sdpa_kernel` takes, which shows at short lengths.

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
