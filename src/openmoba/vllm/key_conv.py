"""Key convolution in vLLM's models, which have none: its weights, and where it enters their attention.

vLLM's attention modules have one projection, `qkv_proj`, for queries, keys and values side by side. An operation behind
it convolves the keys where they lie. vLLM's compiler takes it as it takes attention: as one whole, at which graphs are
split, since what it does depends on the batch. The weights are a child of the attention module by the name that
checkpoints have, `...self_attn.key_conv.weight`, and so vLLM's own loaders fill them; under tensor parallelism each
process has the filters of its key heads.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import custom_op
from torch.nn.modules.module import register_module_module_registration_hook
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention.attention import Attention, get_attention_context
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.utils import set_weight_attrs

from openmoba.ops.raw_keys import NewTokens, convolve_paged, new_raw_keys
from openmoba.vllm.current import current

# N tokens of a batch, its padding included, C channels of the process's Hkv key heads of width D, W width of
# the convolution, Z pages of P tokens

OPERATION = "openmoba::convolve_projected_keys"
"""In torch's registry."""


class KeyConvolution(nn.Module):
    """The filters of one layer, and the raw keys beside its cache.

    Attributes:
        weight: `[C, W]`, as in `openmoba.hf.key_conv`; NaN until it is loaded.
        raw_keys: see `openmoba.ops.raw_keys`, once there is a cache.
        batch: the last one whose keys were convolved.
    """

    latest: tuple[Any, NewTokens] | None = None
    """The last batch of all layers, and where its new tokens lie."""

    def __init__(self, first: int, channels: int, width: int) -> None:
        """Make it for keys that are the `channels` from `first` on of what is projected."""
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels, width), float("nan")), requires_grad=False)
        self.keys = slice(first, first + channels)
        self.raw_keys: Tensor | None = None
        self.batch: Any = None

    def convolve(self, qkv: Tensor, batch: Any, kv_cache: Tensor, slots: Tensor) -> None:
        """Convolve the keys of a batch in place; padding behind its tokens is left alone.

        Args:
            qkv: `[N, ...]`, as projected.
            batch: what vLLM says of it.
            kv_cache: `[Z, Hkv, P, 2 * D]`, of the layer.
            slots: int64 `[N or more]`, where the cache holds each token.
        """
        pages, _, page_size, _ = kv_cache.shape
        if self.raw_keys is None or len(self.raw_keys) != pages + 1:  # vLLM has made another cache
            self.raw_keys = new_raw_keys(pages, self.weight, qkv.dtype)
        tokens = batch.num_actual_tokens
        if KeyConvolution.latest is None or KeyConvolution.latest[0] is not batch:
            where = (batch.block_table, batch.seq_lens, batch.query_start_loc, slots[:tokens])
            KeyConvolution.latest = batch, NewTokens(*where, page_size, self.weight.shape[1] - 1)
        convolve_paged(qkv[:tokens, self.keys], self.weight, self.raw_keys, KeyConvolution.latest[1])
        self.batch = batch


@custom_op(OPERATION, mutates_args=("qkv",), schema="(Tensor(a!) qkv, str layer_name) -> ()")
@eager_break_during_capture  # type: ignore[untyped-decorator]
def convolve_projected_keys(qkv: Tensor, layer_name: str) -> None:
    """Convolve the keys of the batch that vLLM is computing; without one it measures memory, or warms up."""
    batch, layer, kv_cache, slots = get_attention_context(layer_name)
    if batch is not None:
        layer.impl.key_conv.convolve(qkv, batch, kv_cache, slots)


@cache
def install_key_convolution() -> None:
    """Have attention layers get a key convolution as they become part of a model that asks for it; once."""
    register_module_module_registration_hook(_give)


def _give(parent: nn.Module, _: str, child: nn.Module | None) -> None:
    """Give `parent` a convolution if `child` is vLLM's attention.

    Raises:
        ValueError: its keys are not projected as in other models.
    """
    settings = current() if isinstance(child, Attention) else None
    if settings is None or settings.key_conv is None:
        return
    assert isinstance(child, Attention)
    projection = getattr(parent, "qkv_proj", None)
    if not isinstance(projection, QKVParallelLinear):
        raise ValueError(
            f"this model has a key convolution, and vLLM's {type(parent).__name__} has no projection qkv_proj whose "
            "keys could be convolved; generate with openmoba generate"
        )
    width, layer_name = projection.head_size, child.layer_name
    convolution = KeyConvolution(projection.num_heads * width, projection.num_kv_heads * width, settings.key_conv)

    def load(weight: Tensor, stored: Tensor) -> None:
        parts = projection.total_num_kv_heads // projection.num_kv_heads
        default_weight_loader(weight, stored.tensor_split(parts)[projection.tp_rank // projection.num_kv_head_replicas])

    def convolve(_: nn.Module, __: Any, output: Any) -> None:
        qkv, bias = output
        assert bias is None, "keys are convolved with their bias, which vLLM adds before in all of its decoders"
        torch.ops.openmoba.convolve_projected_keys(qkv, layer_name)

    set_weight_attrs(convolution.weight, {"weight_loader": load})
    projection.register_forward_hook(convolve)
    parent.key_conv = child.impl.key_conv = convolution
    splits = get_current_vllm_config().compilation_config.splitting_ops
    if splits and OPERATION not in splits:
        splits.append(OPERATION)
