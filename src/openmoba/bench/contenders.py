"""Who is timed: openmoba, dense attention, and sparse peers where they are installed.

Every call takes `[B, T, heads, D]` tensors that lie ready, and returns `[B, T, H, D]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import openmoba
from openmoba.bench.cases import Case
from openmoba.bench.inputs import Inputs
from openmoba.ops.reference import attention_mask

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to compute attention.

    Attributes:
        label: name in figures and tables.
        kind: "dense" (causal attention over everything), "moba" (chooses blocks and attends), or "mask" (attends
            to a choice it is given).
        devices: where it runs.
        build: case, inputs and (for "mask") the chosen blocks -> the call to time.
        module: what must be importable.
        version: of the library, as recorded.
        longest: tokens up to which it is timed; None for no limit.
    """

    label: str
    kind: Literal["dense", "moba", "mask"]
    devices: tuple[str, ...]
    build: Callable[[Case, Inputs, Tensor | None], Call]
    module: str
    version: Callable[[], str]
    longest: int | None = 2**18  # time that grows with the square of the length

    def missing(self, device: torch.device) -> str | None:
        """Say why it cannot run on this machine; None if it can."""
        if device.type not in self.devices:
            return f"runs on {', '.join(self.devices)}"
        root = self.module.partition(".")[0]
        if find_spec(root) is None or find_spec(self.module) is None:
            return f"{self.module} is not installed"
        return None


def _moba(case: Case, inputs: Inputs, _: Tensor | None) -> Call:
    def call() -> Tensor:
        return openmoba.moba_attention(inputs.q, inputs.k, inputs.v, block_size=case.block_size, top_k=case.top_k)

    return call


def _given(case: Case, inputs: Inputs, selected_BTHR: Tensor | None) -> Call:
    assert selected_BTHR is not None

    def call() -> Tensor:
        return openmoba.block_attention(inputs.q, inputs.k, inputs.v, selected_BTHR, block_size=case.block_size)

    return call


def _sdpa(backend: SDPBackend | None) -> Callable[[Case, Inputs, Tensor | None], Call]:
    def build(case: Case, inputs: Inputs, _: Tensor | None) -> Call:
        grouped = case.heads != case.kv_heads

        def attend() -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)

        def call() -> Tensor:
            if backend is None:
                return attend()
            with sdpa_kernel(backend):
                return attend()

        return call

    return build


def _sdpa_mask(case: Case, inputs: Inputs, selected_BTHR: Tensor | None) -> Call:
    """Make SDPA that is given MoBA's mask; neither the choice nor the mask is timed."""
    assert selected_BTHR is not None
    mask = attention_mask(selected_BTHR, case.tokens, case.block_size)
    grouped = case.heads != case.kv_heads

    def call() -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped).transpose(1, 2)

    return call


def _fa4(_: Case, inputs: Inputs, __: Tensor | None) -> Call:
    attend = import_module("flash_attn.cute").flash_attn_func

    def call() -> Tensor:
        out = attend(inputs.q, inputs.k, inputs.v, causal=True)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    return call


def _flash_moba(case: Case, inputs: Inputs, _: Tensor | None) -> Call:
    attend = import_module("flash_moba").flash_moba_varlen_func
    ends = torch.arange(case.batch + 1, dtype=torch.int32, device=inputs.q.device) * case.tokens
    lengths = (ends, ends, case.tokens, case.tokens)

    def call() -> Tensor:
        q, k, v = (x.flatten(0, 1) for x in (inputs.q, inputs.k, inputs.v))
        out: Tensor = attend(q, k, v, *lengths, case.block_size, case.top_k, causal=True)
        return out.view(inputs.q.shape)

    return call


def _flex(case: Case, inputs: Inputs, selected_BTHR: Tensor | None) -> Call:
    from openmoba.bench.flex import flex_call

    assert selected_BTHR is not None
    return flex_call(case, inputs, selected_BTHR)


def _package(*names: str) -> Callable[[], str]:
    def found() -> str:
        for name in names:
            try:
                return f"{name} {version(name)}"
            except PackageNotFoundError:
                continue
        return ""

    return found


def _torch() -> str:
    return f"torch {torch.__version__}"


def _cudnn() -> str:
    return f"cuDNN {torch.backends.cudnn.version()}"  # type: ignore[no-untyped-call]


def _openmoba() -> str:
    return f"openmoba {openmoba.__version__}"


CONTENDERS = {
    "sdpa_cudnn": Contender("SDPA/cuDNN", "dense", ("cuda",), _sdpa(SDPBackend.CUDNN_ATTENTION), "torch", _cudnn),
    "sdpa_flash": Contender("SDPA/flash", "dense", ("cuda",), _sdpa(SDPBackend.FLASH_ATTENTION), "torch", _torch),
    "sdpa": Contender("SDPA", "dense", ("cpu",), _sdpa(None), "torch", _torch),
    "fa4": Contender(
        "FlashAttention 4", "dense", ("cuda",), _fa4, "flash_attn.cute", _package("flash-attn-4", "flash-attn")
    ),
    "moba": Contender("openmoba", "moba", ("cuda", "cpu"), _moba, "torch", _openmoba, None),
    "given": Contender("openmoba, same choice", "mask", ("cuda", "cpu"), _given, "torch", _openmoba, None),
    "flash_moba": Contender(
        "FlashMoBA", "moba", ("cuda",), _flash_moba, "flash_moba", _package("flash-moba", "flash_moba"), None
    ),
    "flex": Contender("FlexAttention, same choice", "mask", ("cuda",), _flex, "torch", _torch),
    "sdpa_mask": Contender("SDPA, same choice", "mask", ("cpu",), _sdpa_mask, "torch", _torch, 2**12),
}
"""Name -> contender. Dense ones come first, so that a row can say how it compares with the best of them."""

_GROUPED = "_grouped"


def contender_label(name: str) -> str:
    """Return a contender's name in figures and tables; the decode benchmark has some of its own."""
    if name.endswith(_GROUPED):
        return f"{contender_label(name.removesuffix(_GROUPED))} with grouped queries"
    return CONTENDERS[name].label if name in CONTENDERS else {"sdpa_efficient": "SDPA/memory-efficient"}[name]
