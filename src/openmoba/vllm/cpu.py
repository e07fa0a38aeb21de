"""MoBA in the place of vLLM's CPU backend; models without MoBA settings get what they got."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from openmoba.vllm.current import current
from openmoba.vllm.layers import MobaLayer, write_rows


class Layer(MobaLayer, CPUAttentionBackendImpl):  # type: ignore[misc]
    """The attention of one layer."""

    settings = staticmethod(current)

    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
        """Write new tokens into the cache: the layers' own kernels pack keys in ways of their own."""
        if self.served.is_sparse(layer.layer_name):
            write_rows(key, value, kv_cache, slots)
        else:
            super().do_kv_cache_update(layer, key, value, kv_cache, slots)


class Backend(CPUAttentionBackend):  # type: ignore[misc]
    """What vLLM finds under `CPU_ATTN`."""

    @staticmethod
    def get_impl_cls() -> type[Any]:
        """Return the class of a layer's attention, by the model that is being made."""
        found: type[Any] = CPUAttentionBackend.get_impl_cls() if current() is None else Layer
        return found
