"""What a backend is, and which one a call gets.

A backend is a module with the functions of `Backend`; one that decodes has those of `Decoder`, and over a block table
those of `PagedDecoder`. To add one, write the module, import it in `backend`, and name it in `IMPLEMENTATIONS`. Modules
are imported when an operation first runs, so that importing openmoba needs torch alone.

`impl` picks speed, never meaning:

    "reference"  the specification: dense mask, any device, fp64, differentiable any number of times
    "cpu"        torch operations on CPU tensors, memory linear in tokens
    "triton"     CUDA kernels; on CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1)
    "auto"       "cpu" or "triton" by device; "reference" for fp64 and for other devices
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Protocol

from torch import Tensor, float64

from openmoba.ops.arguments import Blocking, KeyCache, KeyPages
from openmoba.ops.checks import check_triton

IMPLEMENTATIONS = ("auto", "reference", "cpu", "triton")
DECODERS = ("auto", "reference", "triton")


class Backend(Protocol):
    """Choosing and attending; shapes as in `openmoba.ops.api`, all contents checked, last dimensions contiguous.

    Results are new and contiguous. Under a compiler autograd records nothing in here, not even by `enable_grad`.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor | None, blocking: Blocking, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output, its log-sum-exp, and the choice.

        `blocks`: int32 `[..., H or Hkv, top_k - 1]`, the past blocks to read as the user gave them: in any order and
        with any strides, -1 for none, a repeated one counts once. None: the `top_k - 1` that score best.
        The log-sum-exp is fp32 `q.shape[:-1]`, natural. The choice is int32 in whatever form the backward reads.
        """

    def backward(
        self,
        d_out: Tensor,
        d_lse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        choice: Tensor,
        blocking: Blocking,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v, contiguous; `d_lse` fp32, contiguous, or None for zeros."""

    def select(self, q: Tensor, k: Tensor, blocking: Blocking) -> Tensor:
        """Return the chosen blocks, int32 `[*q.shape[:-1], top_k - 1]`, best first, -1 for none; `top_k >= 2`."""

    def choice_shape(self, q: Tensor, k: Tensor, blocks: Tensor | None, blocking: Blocking) -> tuple[int, ...]:
        """Return the shape of the forward's choice; lengths may be symbols of a compiler."""


class Decoder(Protocol):
    """Decoding over a paged cache; shapes as in `openmoba.ops.decode` and `openmoba.ops.pages`."""

    def decode(self, q: Tensor, cache: KeyCache, v_cache: Tensor, top_k: int, scale: float) -> Tensor:
        """Return the attention output of the last tokens, contiguous, in the shape of q."""

    def complete_pages(self, cache: KeyCache, new: int) -> None:
        """Write the centroids of the pages that the last `new` tokens completed."""


class PagedDecoder(Protocol):
    """Attention over a block table; shapes as in `openmoba.ops.paged`, last dimensions contiguous."""

    def attend_paged(self, q: Tensor, cache: KeyPages, v_pages: Tensor, top_k: int, scale: float) -> Tensor:
        """Return the attention output of the new tokens, contiguous, in the shape of q."""

    def complete_paged(self, cache: KeyPages) -> None:
        """Write the centroids of the blocks that the new tokens complete."""


@cache
def backend(name: str) -> Backend:
    """Import the backend of an implementation."""
    if name == "triton":
        from openmoba.ops.triton import attention

        return attention
    if name == "cpu":
        from openmoba.ops import cpu

        return cpu
    raise ValueError(f"there is no backend {name!r}; use 'cpu' or 'triton'")


@cache
def decoder(name: str) -> Decoder:
    """Import the backend that decodes; torch operations do it in `openmoba.ops.reference`."""
    if name == "triton":
        from openmoba.ops.triton import decode

        return decode
    raise ValueError(f"there is no backend {name!r} that decodes; use 'triton'")


@cache
def paged_decoder(name: str) -> PagedDecoder:
    """Import the backend that attends over a block table; torch operations do it in `openmoba.ops.paged_reference`."""
    if name == "triton":
        from openmoba.ops.triton import paged

        return paged
    raise ValueError(f"there is no backend {name!r} that attends over a block table; use 'triton'")


def implementation(q: Tensor, impl: str, known: Sequence[str] = IMPLEMENTATIONS) -> tuple[str, str]:
    """Resolve `impl` for this tensor, with the reason; ValueError if an explicit choice cannot run."""
    if impl not in known:
        raise ValueError(f"impl must be one of {', '.join(known)}, got {impl!r}")
    if impl == "auto":
        return _automatic(q, known)
    if impl == "cpu" and q.device.type not in ("cpu", "meta"):
        raise ValueError(f"impl='cpu' needs CPU tensors, got {q.device}; use impl='auto'")
    if impl == "triton":
        check_triton(q)
    if impl in ("cpu", "triton") and q.dtype == float64:
        raise ValueError(f"impl={impl!r} does not compute in float64; use impl='reference'")
    return impl, "asked for"


def _automatic(q: Tensor, known: Sequence[str]) -> tuple[str, str]:
    device = q.device.type
    if q.dtype == float64:
        return "reference", "only the reference computes in float64"
    if device == "cuda":
        check_triton(q)
        return "triton", "CUDA tensors"
    if device in ("cpu", "meta") and "cpu" in known:
        return "cpu", f"{device} tensors"
    return "reference", f"no kernels for {device} tensors"
