"""What a model's attention should be: block size, top-k, and which layers stay full."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MobaConfig:
    """MoBA for a whole decoder, full attention kept in some of its layers.

    Attributes:
        block_size: tokens per block, >= 1.
        top_k: blocks each query reads, its own included, >= 1.
        full_layers: the layers that keep full attention: a count of *last* layers (the layer-wise hybrid of
            arXiv 2502.13189, section 3.2) or the explicit layer indices.
    """

    block_size: int
    top_k: int
    full_layers: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        check_blocks(self.block_size, self.top_k)
        if isinstance(self.full_layers, bool) or not isinstance(self.full_layers, int | Iterable):
            raise ValueError(f"full_layers must be a count or layer indices, got {self.full_layers!r}")
        if isinstance(self.full_layers, int):
            if self.full_layers < 0:
                raise ValueError(f"full_layers as a count must be >= 0, got {self.full_layers}")
        else:
            object.__setattr__(self, "full_layers", tuple(sorted(set(self.full_layers))))

    def full_layer_indices(self, num_layers: int) -> frozenset[int]:
        """Indices of the full-attention layers in a model of `num_layers` layers."""
        if isinstance(self.full_layers, int):
            if self.full_layers > num_layers:
                raise ValueError(
                    f"full_layers={self.full_layers} exceeds the model's {num_layers} layers; "
                    f"use full_layers={num_layers} for full attention everywhere"
                )
            return frozenset(range(num_layers - self.full_layers, num_layers))
        outside = [i for i in self.full_layers if not 0 <= i < num_layers]
        if outside:
            raise ValueError(f"full_layers {outside} are not layers of a model with layers 0..{num_layers - 1}")
        return frozenset(self.full_layers)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form, as stored in a model's `config.json`."""
        full = self.full_layers if isinstance(self.full_layers, int) else list(self.full_layers)
        return {"block_size": self.block_size, "top_k": self.top_k, "full_layers": full}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MobaConfig:
        """Inverse of `to_dict`; unknown or missing keys are an error."""
        unknown = sorted(set(values) - {"block_size", "top_k", "full_layers"})
        missing = sorted({"block_size", "top_k"} - set(values))
        if unknown or missing:
            raise ValueError(f"not a MoBA configuration: unknown keys {unknown}, missing keys {missing}")
        full = values.get("full_layers", 0)
        return cls(values["block_size"], values["top_k"], full if isinstance(full, int) else tuple(full))


def check_blocks(block_size: int, top_k: int) -> None:
    """Raise ValueError unless both are whole numbers >= 1."""
    for name, value in (("block_size", block_size), ("top_k", top_k)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name} must be an int, got {value!r}")
        if value < 1:
            way_out = "; top_k=1 attends within the block" if name == "top_k" else ""
            raise ValueError(f"{name} must be >= 1, got {value}{way_out}")
