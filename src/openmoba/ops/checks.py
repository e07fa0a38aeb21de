"""What a call must satisfy, checked once, before any work: each failure is one ValueError with a way out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as are_transforms_active
from torch._C import _DisableFuncTorch
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.autograd.forward_ad import unpack_dual
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from openmoba.config import check_blocks
from openmoba.ops.arguments import Blocking

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_HAS_TRITON = find_spec("triton") is not None  # found once: compilers cannot trace the search
NO_FORWARD_MODE = (
    "openmoba: this implementation has no forward-mode derivatives (jvp, jacfwd, linearize, hessian); "
    "use impl='reference', or reverse mode (grad, vjp, jacrev)"
)
_FP32 = torch.finfo(torch.float32)
MIN_HEAD_WIDTH, MAX_HEAD_WIDTH = 8, 256


def check_call(q: Tensor, k: Tensor, v: Tensor, blocking: Blocking) -> None:
    """Raise ValueError unless the tensors and settings describe one MoBA call."""
    cu_q, cu_k, block_size, top_k = blocking
    # A block that holds whole sequences, and lists of any number of blocks, are as long as a compiler's symbols.
    check_blocks(
        1 if isinstance(block_size, torch.SymInt) else block_size, 1 if isinstance(top_k, torch.SymInt) else top_k
    )
    _check_kind({"q": q, "k": k, "v": v})
    _check_shapes(q, k, v, packed=cu_q is not None)
    if (cu_q is None) != (cu_k is None):
        given, missing = ("cu_seqlens_q", "cu_seqlens_k") if cu_k is None else ("cu_seqlens_k", "cu_seqlens_q")
        raise ValueError(f"{given} is given without {missing}; a packed call needs both (they may be the same)")
    if cu_q is not None and cu_k is not None:
        _check_boundaries(q, k, cu_q, cu_k)
    elif q.shape[1] > k.shape[1]:
        raise ValueError(
            f"q has {q.shape[1]} tokens but k only {k.shape[1]}; queries are the last positions of the keys, "
            "so k must hold at least as many tokens; the dimensions are [batch, tokens, heads, dim]"
        )


def check_given_shape(q: Tensor, k: Tensor, blocks: Tensor) -> int:
    """Return how many blocks each list has; ValueError unless there is one per query and head, or key/value head."""
    for name, x in (("q", q), ("k", k)):
        if not isinstance(x, Tensor) or x.dim() not in (3, 4):
            raise ValueError(f"{name} must be [batch, tokens, heads, dim] or packed [tokens, heads, dim]")
    if not isinstance(blocks, Tensor):
        raise ValueError(
            f"blocks must be a torch.Tensor, got {type(blocks).__name__}; moba_attention chooses blocks by itself"
        )
    if blocks.layout is not torch.strided or blocks.is_nested:
        raise ValueError(f"blocks is a sparse or nested tensor ({blocks.layout}); fill it up with -1, which names none")
    if blocks.dtype != torch.int32:
        raise ValueError(f"blocks must be int32, got {blocks.dtype}; use .int()")
    if blocks.device != q.device:
        raise ValueError(f"blocks is on {blocks.device} but q is on {q.device}; move it there")
    tokens, heads, kv_heads = q.shape[:-2], q.shape[-2], k.shape[-2]
    if blocks.dim() != q.dim() or blocks.shape[:-2] != tokens or blocks.shape[-2] not in (heads, kv_heads):
        raise ValueError(
            f"blocks must be {[*tokens]} and then {heads} or {kv_heads} heads and any number of blocks, got "
            f"{[*blocks.shape]}; a list per query head of q, or one per head of k"
        )
    return blocks.shape[-1]


def check_given(blocks: Tensor, q: Tensor, k: Tensor, blocking: Blocking) -> None:
    """Raise ValueError unless the lists name past blocks, or -1; assert it where values cannot be read yet."""
    if is_traced() or blocks.device.type != "cpu" or type(blocks) is not Tensor or type(q) is not Tensor:
        own_T11 = own_blocks(q, k, blocking)[:, None, None]
        good = (blocks >= -1) & (blocks < own_T11)
        _assert_all(good, "blocks must name past blocks, or -1 for none")
    else:
        check_given_values(blocks, q, k, blocking)


def is_traced() -> bool:
    """Say whether values cannot be read: under a compiler, a mode such as FakeTensor's, or a transform such as vmap."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or are_transforms_active()


def _assert_all(good: Tensor, message: str) -> None:
    """Assert on the device, where a tracer sees it; all batches of vmap, which knows no assertions, at once."""
    if not are_transforms_active():
        torch._assert_async(good.all(), message)
        return
    while is_functorch_wrapped_tensor(good):
        good = get_unwrapped(good)
    with _DisableFuncTorch():
        torch._assert_async(good.all(), message)


def check_given_values(blocks: Tensor, q: Tensor, k: Tensor, blocking: Blocking) -> None:
    """Raise ValueError unless the lists name past blocks, or -1."""
    own_T11 = own_blocks(q, k, blocking)[:, None, None]
    bad = (blocks < -1) | (blocks >= own_T11)
    if bad.any():
        place = bad.nonzero()[0].tolist()
        own = int(own_T11[place[-3], 0, 0])
        past = f"its past blocks are 0 to {own - 1}" if own else "it has no past block"
        raise ValueError(
            f"blocks{place} is {int(blocks[tuple(place)])}, and the query's own block is {own}, which it reads anyway; "
            f"{past}, and -1 stands for none"
        )


def own_blocks(q: Tensor, k: Tensor, blocking: Blocking) -> Tensor:
    """Return the block that each query lies in, int64 `[T]`: queries are the last positions of their keys."""
    cu_q, cu_k, block_size, _ = blocking
    token_T = torch.arange(q.shape[-3], device=q.device)
    if cu_q is None or cu_k is None:
        return (token_T + k.shape[1] - q.shape[1]) // block_size
    sequence_T = torch.searchsorted(cu_q[1:], token_T.int(), right=True)
    before_S = cu_k.diff() - cu_q.diff() - cu_q[:-1]
    return (token_T + before_S[sequence_T]) // block_size


def check_parts(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    """Raise ValueError unless these are attention outputs and their log-sum-exps."""
    if len(outs) == 0 or len(outs) != len(lses):
        raise ValueError(f"merge_attention takes as many lses as outs, at least one, got {len(outs)} and {len(lses)}")
    for name, parts in (("outs", outs), ("lses", lses)):
        check_tensors(**{f"{name}[{i}]": x for i, x in enumerate(parts)})
        for i, x in enumerate(parts):
            if x.device != outs[0].device:
                raise ValueError(f"{name}[{i}] is on {x.device} but outs[0] on {outs[0].device}; move it there")
    first, dtype = outs[0], lses[0].dtype
    if first.dtype not in DTYPES:
        raise ValueError(f"outs must be float64, float32, float16 or bfloat16, got {first.dtype}")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"lses must be float32 or float64, got {dtype}; a rounded log-sum-exp is a wrong weight")
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.shape != first.shape or out.dtype != first.dtype:
            raise ValueError(
                f"outs[{i}] is {out.dtype} {tuple(out.shape)} but outs[0] {first.dtype} {tuple(first.shape)}; "
                "they must be alike"
            )
        if lse.shape != first.shape[:-1] or lse.dtype != dtype:
            raise ValueError(
                f"lses[{i}] must be {dtype} {tuple(first.shape[:-1])}, the outputs' shape without the last dimension, "
                f"got {lse.dtype} {tuple(lse.shape)}"
            )


def check_tensors(**named: object) -> None:
    """Raise ValueError unless these are tensors."""
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a torch.Tensor, got {type(x).__name__}")


def check_cache(name: str, keys: Tensor, layout: str) -> None:
    """Raise ValueError unless these are the keys of a cache, `layout` with four dimensions, in a dtype of keys."""
    check_tensors(**{name: keys})
    if keys.dim() != 4 or keys.dtype not in DTYPES:
        raise ValueError(f"{name} must be a float cache {layout}, got {keys.dtype} {tuple(keys.shape)}")


def check_rows(lengths: Tensor, starts: Tensor | None, like: Tensor) -> None:
    """Raise ValueError unless these are one number for each row of a cache, where the cache is."""
    for name, x in (("lengths", lengths), ("starts", starts)):
        if x is None and name == "starts":
            continue
        check_tensors(**{name: x})
        assert x is not None
        if x.device != like.device:
            raise ValueError(f"{name} must be on the cache's device {like.device}, got {x.device}; move it there")
        if x.dtype != torch.int32 or x.shape != like.shape[:1]:
            raise ValueError(f"{name} must be int32 [{like.shape[0]}], got {x.dtype} {tuple(x.shape)}")


def check_scale(q: Tensor, scale: float | None) -> float:
    """Return the factor on the logits, `D**-0.5` if none is given; ValueError unless it is positive and finite.

    So it must be in fp32, in which implementations take it: a smaller one would be 0, and masked logits NaN.
    """
    if scale is None:
        return float(q.shape[-1] ** -0.5)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not _FP32.tiny <= scale <= _FP32.max:
        raise ValueError(
            f"scale must be an int or float, positive and finite in single precision, got {scale!r}; "
            "leave it out for head_dim ** -0.5"
        )
    return float(scale)


def check_triton(q: Tensor) -> None:
    """Raise ValueError unless Triton can run kernels on q."""
    if not _HAS_TRITON:
        raise ValueError("impl='triton' needs the triton package, which is not installed; use impl='reference'")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if q.device.type != "cuda" and not (interpreted and q.device.type in ("cpu", "meta")):
        raise ValueError(f"impl='triton' needs CUDA tensors, got {q.device}; use impl='auto'")
    if interpreted and q.dtype == torch.bfloat16:
        raise ValueError("Triton's interpreter computes bfloat16 wrongly; use float16 or float32")


def _check_kind(tensors: dict[str, Tensor]) -> None:
    check_tensors(**tensors)
    q = tensors["q"]
    for name, x in tensors.items():
        if x.layout is not torch.strided or x.is_nested:
            raise ValueError(
                f"{name} is a sparse or nested tensor ({x.layout}); pack sequences with cu_seqlens_q and _k"
            )
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} has dtype {x.dtype}; use float64, float32, float16 or bfloat16")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {x.dtype} but q has {q.dtype}; cast them to one dtype")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} but q is on {q.device}; move them to one device")


def check_head_width(width: int) -> None:
    """Raise ValueError if heads are narrower or wider than any implementation takes."""
    if width < MIN_HEAD_WIDTH:
        raise ValueError(
            f"head width must be {MIN_HEAD_WIDTH} to {MAX_HEAD_WIDTH}, got {width}; pad the heads with zeros, and keep "
            f"the logits by scale={width}**-0.5"
        )
    if width > MAX_HEAD_WIDTH:
        raise ValueError(f"head width must be {MIN_HEAD_WIDTH} to {MAX_HEAD_WIDTH}, got {width}; use narrower heads")


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, packed: bool) -> None:
    dims, layout = (3, "[tokens, heads, dim]") if packed else (4, "[batch, tokens, heads, dim]")
    for name, x in (("q", q), ("k", k)):
        if x.dim() != dims:
            way_out = "drop cu_seqlens for a batch" if packed else "a packed batch needs cu_seqlens_q and _k"
            raise ValueError(f"{name} must be {layout}, got shape {tuple(x.shape)}; {way_out}")
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q has head width {q.shape[-1]} but k has {k.shape[-1]}; they must be equal")
    check_head_width(q.shape[-1])
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(f"q's {heads} heads must be a multiple of k's {kv_heads} heads")
    if not packed and q.shape[0] != k.shape[0]:
        raise ValueError(f"q has batch {q.shape[0]} but k has {k.shape[0]}; they must be equal")


def _check_boundaries(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor) -> None:
    for name, cu in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        check_tensors(**{name: cu})
        if cu.dtype != torch.int32 or cu.dim() != 1 or cu.shape[0] < 1:
            raise ValueError(
                f"{name} must be int32 of shape [sequences + 1], got {cu.dtype} {tuple(cu.shape)}; use .int()"
            )
        if cu.device != q.device:
            raise ValueError(f"{name} is on {cu.device} but q is on {q.device}; move it there")
    if cu_q.shape != cu_k.shape:
        raise ValueError(f"cu_seqlens_q describes {cu_q.shape[0] - 1} sequences but cu_seqlens_k {cu_k.shape[0] - 1}")
    # Under a compiler and in fake tensors there are no values yet; the operation checks them when it runs.
    plain = not torch.compiler.is_compiling() and type(cu_q) is Tensor and type(cu_k) is Tensor
    if cu_q.device.type == "cpu" and plain:
        check_boundary_values(cu_q, cu_k, q.shape[0], k.shape[0])
    elif cu_q.device.type == "cuda":
        _assert_on_device(cu_q, cu_k, q.shape[0], k.shape[0])


def check_boundary_values(cu_q: Tensor, cu_k: Tensor, queries: int, keys: int) -> None:
    """Raise ValueError unless the values describe packed sequences of `queries` and `keys` tokens in all."""
    for name, of, cu, tokens in (("cu_seqlens_q", "q", cu_q, queries), ("cu_seqlens_k", "k", cu_k, keys)):
        values = cu.tolist()
        if values[0] != 0:
            raise ValueError(f"{name} must start at 0, got {values[0]}")
        for i, (start, end) in enumerate(pairwise(values)):
            if end < start:
                raise ValueError(f"{name} must not decrease, got {start} then {end} at index {i + 1}")
        if values[-1] != tokens:
            raise ValueError(f"{name} must end at {of}'s token count {tokens}, got {values[-1]}")
    for i, (queries_i, keys_i) in enumerate(zip(cu_q.diff().tolist(), cu_k.diff().tolist(), strict=True)):
        if queries_i > keys_i:
            raise ValueError(
                f"sequence {i} has {queries_i} queries but {keys_i} keys; queries are the last positions of the keys"
            )


def _assert_on_device(cu_q: Tensor, cu_k: Tensor, queries: int, keys: int) -> None:
    """Assert the same conditions on the device: reading the values would wait for the GPU."""
    fits = (cu_q[0] == 0) & (cu_k[0] == 0) & (cu_q[-1] == queries) & (cu_k[-1] == keys)
    ordered = (cu_q.diff() >= 0).all() & (cu_q.diff() <= cu_k.diff()).all()
    torch._assert_async(
        fits & ordered,
        "cu_seqlens must start at 0, not decrease, end at the token count, and give no sequence more queries than keys",
    )


def needs_gradient(*tensors: Tensor) -> bool:
    """Tell whether a result of these would be differentiated, in either mode."""
    backward = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return backward or _has_tangent(*tensors)


def refuse_forward_mode(*tensors: Tensor) -> None:
    """Raise NotImplementedError if a fast implementation would lose forward-mode derivatives of these, as 0."""
    if _has_tangent(*tensors):
        raise NotImplementedError(NO_FORWARD_MODE)


def _has_tangent(*tensors: Tensor) -> bool:
    if torch.compiler.is_compiling():  # transforms are not compiled
        return False
    return any(unpack_dual(x).tangent is not None for x in tensors)  # type: ignore[no-untyped-call]
