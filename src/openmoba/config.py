"""What a model's attention should be: block size, top-k, and which layers stay full."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from openmoba.limits import check_count


@dataclass(frozen=True)
class MobaConfig:
    """MoBA for a whole decoder, full attention kept in some of its layers.

    Attributes:
        block_size: tokens per block, >= 1.
        top_k: blocks each query reads, its own included, >= 1.
        full_layers: the layers that keep full attention, as `parse_full_layers` reads them: a count of *last* layers
            (the layer-wise hybrid of arXiv 2502.13189, section 3.2), the layers' indices, or a text such as
            "spread:3" or "all".
        key_conv: width in tokens, >= 2, of the convolution that every layer's keys pass, full layers too
            (`openmoba.ops.key_conv`); None for none.
    """

    block_size: int
    top_k: int
    full_layers: int | str | tuple[int, ...] = 0
    key_conv: int | None = None

    def __post_init__(self) -> None:
        check_blocks(self.block_size, self.top_k)
        object.__setattr__(self, "full_layers", parse_full_layers(self.full_layers))
        if self.key_conv is not None and (type(self.key_conv) is not int or self.key_conv < 2):
            raise ValueError(f"key_conv is a width >= 2 in tokens, or None for none, got {self.key_conv!r}")
        check_count("key_conv", self.key_conv, 2)

    def full_layer_indices(self, num_layers: int) -> frozenset[int]:
        """Return the indices of the full-attention layers in a model of `num_layers` layers.

        Layers "spread:N" are cut into N groups as even as possible, of which each ends in a full layer: with 12
        layers and N = 3 these are 3, 7 and 11, with N = 5 they are 1, 3, 6, 8 and 11.

        Raises:
            ValueError: the model does not have these layers.
        """
        if self.full_layers == "all":
            return frozenset(range(num_layers))
        if not isinstance(self.full_layers, tuple):
            count = count_full_layers(self.full_layers)
            if count > num_layers:
                raise ValueError(
                    f"full_layers={self.full_layers} exceeds the model's {num_layers} layers; "
                    f"use full_layers={num_layers} for full attention everywhere"
                )
            if isinstance(self.full_layers, int):
                return frozenset(range(num_layers - count, num_layers))
            spread = self.full_layers.startswith("spread")
            return frozenset((i + 1) * num_layers // count - 1 if spread else i for i in range(count))
        outside = [i for i in self.full_layers if not 0 <= i < num_layers]
        if outside:
            raise ValueError(f"full_layers {outside} are not layers of a model with layers 0..{num_layers - 1}")
        return frozenset(self.full_layers)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form, as stored in a model's `config.json`."""
        full = list(self.full_layers) if isinstance(self.full_layers, tuple) else self.full_layers
        values = {"block_size": self.block_size, "top_k": self.top_k, "full_layers": full}
        return values if self.key_conv is None else values | {"key_conv": self.key_conv}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MobaConfig:
        """Read what `to_dict` returned; unknown or missing keys are an error."""
        unknown = sorted(set(values) - {"block_size", "top_k", "full_layers", "key_conv"})
        missing = sorted({"block_size", "top_k"} - set(values))
        if unknown or missing:
            said = [f"no {', '.join(missing)}"] * bool(missing) + [f"unknown {', '.join(unknown)}"] * bool(unknown)
            raise ValueError(
                f"MoBA settings {values} have {' and '.join(said)}; they take block_size and top_k, and may have "
                "full_layers and key_conv"
            )
        return cls(values["block_size"], values["top_k"], values.get("full_layers", 0), values.get("key_conv"))


def parse_full_layers(layers: Any) -> int | str | tuple[int, ...]:
    """Bring each way to say which layers of a model keep full attention into one form.

    Args:
        layers: a count of last layers; indices; or a text: "none", "all", "3" or "last:3", "first:3", "spread:3" (see
            `MobaConfig.full_layer_indices`), or indices such as "0,15,31".

    Returns:
        A count of last layers, indices in order, or "all", "first:COUNT" or "spread:COUNT".

    Raises:
        ValueError: none of these.
    """
    found = _parse_text(layers) if isinstance(layers, str) else layers
    if isinstance(found, str):
        return found
    if isinstance(found, int) and not isinstance(found, bool):
        if found < 0:
            raise ValueError(f"full_layers as a count must be >= 0, got {found}")
        return found
    indices = tuple(found) if isinstance(found, Iterable) else (None,)
    if not all(isinstance(index, int) and not isinstance(index, bool) for index in indices):
        raise ValueError(
            'full_layers must be a count of last layers, layer indices, "none", "all", "last:COUNT", '
            f'"first:COUNT", "spread:COUNT" or a text of indices like "0,15,31", got {layers!r}'
        )
    return tuple(sorted(set(indices)))


def count_full_layers(layers: int | str | tuple[int, ...]) -> int:
    """Count the layers that a form of `parse_full_layers` names; "all" does not say it."""
    if isinstance(layers, str):
        return int(layers.partition(":")[2])
    return layers if isinstance(layers, int) else len(layers)


def _parse_text(text: str) -> int | str | tuple[int | None, ...]:
    kind, _, number = text.partition(":") if ":" in text else ("last", "", text)
    if text in ("none", "all"):
        return 0 if text == "none" else text
    if kind in ("last", "first", "spread") and number.isascii() and number.isdecimal():
        count = int(number)
        return count if kind == "last" or count == 0 else f"{kind}:{count}"
    parts = text.split(",")
    return tuple(int(part) if part.strip().isascii() and part.strip().isdecimal() else None for part in parts)


def check_blocks(block_size: int, top_k: int) -> None:
    """Raise ValueError unless both are whole numbers >= 1, of 32 bits."""
    for name, value in (("block_size", block_size), ("top_k", top_k)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name} must be an int, got {value!r}")
        if value < 1:
            way_out = "; top_k=1 attends within the block" if name == "top_k" else ""
            raise ValueError(f"{name} must be >= 1, got {value}{way_out}")
        check_count(name, value, 1)
