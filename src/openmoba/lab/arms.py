"""The arms of a study: what attention each has at each step, what that costs, and how it is called.

An arm is a setting (`ArmConfig`, which records and recipes hold) of one of the kinds in `KINDS`. Whoever needs to know
how kinds differ asks the arm or its kind, so a new kind is a new entry there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from openmoba.config import MobaConfig, parse_full_layers
from openmoba.limits import check_share
from openmoba.ops.cost import causal_pairs, moba_pairs, moba_scores

Layers = int | tuple[int, ...] | str


@dataclass(frozen=True)
class Kind:
    """A kind of arm.

    Attributes:
        name: in records and recipes.
        full_layers: the layers that keep full attention while the others attend with MoBA.
        switch: the first step, of so many, that trains with full attention in every layer; None: no step does.
        label: in figures and tables, of an arm that a recipe calls by this kind; None: its name.
        setting: what of `ArmConfig` arms of this kind read, and no others.
    """

    name: str
    full_layers: Callable[[ArmConfig], Layers]
    switch: Callable[[ArmConfig, int], int] | None = None
    label: str | None = None
    setting: str | None = None


FULL = Kind("full", lambda arm: "all", lambda arm, steps: 0, "Full attention")
MOBA = Kind("moba", lambda arm: 0, label="MoBA")
HYBRID = Kind("hybrid", lambda arm: arm.full_layers, setting="full_layers")
TIME_HYBRID = Kind("time_hybrid", lambda arm: 0, lambda arm, steps: round(arm.switch_at * steps), setting="switch_at")

KINDS = {kind.name: kind for kind in (FULL, MOBA, HYBRID, TIME_HYBRID)}
"""Name -> kind."""

if TYPE_CHECKING:
    KindName = str
else:
    KindName = Literal[tuple(KINDS)]


@dataclass(frozen=True)
class ArmConfig:
    """The attention of a run: the only thing in which the arms of a study differ."""

    name: KindName = "moba"
    """full, moba, hybrid (some layers full, see `full_layers`), time_hybrid (MoBA, then full attention)."""
    block_size: int = 64
    """Tokens per MoBA block."""
    top_k: int = 3
    """Blocks each query reads, its own included."""
    full_layers: int | tuple[int, ...] | str = 1
    """hybrid: the layers that keep full attention: a count of last layers, indices, or "first:3", "last:3", or
    "spread:3" for layers evenly spread, the last among them."""
    switch_at: float = 0.9
    """time_hybrid: share of the steps after which MoBA turns into full attention."""
    warm_start: float = 0.0
    """All but full: share of the steps, at the start, that train with full attention before MoBA begins."""
    key_conv: int | None = None
    """Width in tokens, such as 4, of a convolution over the keys of every layer, full ones too; starts as the
    identity. Left out: none."""

    def __post_init__(self) -> None:
        if self.name not in KINDS:
            raise ValueError(f"unknown arm {self.name!r}; the arms are {', '.join(KINDS)}")
        check_share("arm.switch_at", self.switch_at, " of the steps")
        check_share("arm.warm_start", self.warm_start, " of the steps", one_too=False)
        MobaConfig(self.block_size, self.top_k, self.full_layers, self.key_conv)
        if isinstance(self.full_layers, str):
            object.__setattr__(self, "full_layers", parse_full_layers(self.full_layers))
        if self.kind is HYBRID and self.full_layers == "all":
            raise ValueError("arm.full_layers='all' is full attention; set arm.name to full")

    @classmethod
    def of(
        cls, block_size: int | None, top_k: int | None, full_layers: Layers | None = None, key_conv: int | None = None
    ) -> ArmConfig:
        """Make an arm whose attention never changes: full without blocks, a hybrid with full layers, else MoBA."""
        if block_size is None or top_k is None:
            return cls(FULL.name, key_conv=key_conv)
        if full_layers is None:
            return cls(MOBA.name, block_size, top_k, key_conv=key_conv)
        return cls(HYBRID.name, block_size, top_k, full_layers, key_conv=key_conv)

    @property
    def kind(self) -> Kind:
        """What the arm does with its settings."""
        return KINDS[self.name]

    def check_read(self) -> None:
        """Raise ValueError for a setting that another kind of arm reads, unless it is left at its default."""
        for kind in KINDS.values():
            if kind.setting is None or kind is self.kind:
                continue
            value = getattr(self, kind.setting)
            if value != getattr(ArmConfig, kind.setting):
                raise ValueError(
                    f"arm.{kind.setting}={value} is of arm.name={kind.name}, and arm.name is {self.name}; set arm.name "
                    f"to {kind.name}, or leave arm.{kind.setting} out"
                )

    def switch_step(self, steps: int) -> int:
        """Return the first step (from 0) of `steps` that trains with full attention; `steps` if none does."""
        return steps if self.kind.switch is None else self.kind.switch(self, steps)

    def moba_steps(self, steps: int) -> range:
        """Return the steps (from 0) of `steps` in which layers attend with MoBA; in the others all are full."""
        start, end = round(self.warm_start * steps), self.switch_step(steps)
        return range(start, max(start, end)) if end else range(0)

    def attention(self, step: int, steps: int) -> MobaConfig | None:
        """Return the attention of step `step` (from 0) of `steps`; None is full attention without key convolution."""
        full = step not in self.moba_steps(steps)
        if full and self.key_conv is None:
            return None
        layers = "all" if full else self.kind.full_layers(self)
        return MobaConfig(self.block_size, self.top_k, layers, self.key_conv)

    def sparsest(self, steps: int) -> MobaConfig | None:
        """Return the attention of the steps with MoBA, or of all if there are none."""
        return self.attention(self.moba_steps(steps).start, steps)

    def key_share(self, layers: int, length: int, steps: int) -> float:
        """Return the keys read in `steps` steps, over all layers, as a share of those that full attention reads."""
        share = attention_cost(self.sparsest(steps), layers, length)[0] / (layers * causal_pairs(length))
        return 1 - (1 - share) * len(self.moba_steps(steps)) / steps

    def without_blocks(self) -> ArmConfig:
        """Return the arm with full attention that shares all else, which is fair to compare with."""
        return ArmConfig(FULL.name, key_conv=self.key_conv)

    def label(self, called: str) -> str:
        """Return the name in figures and tables of an arm that its recipe calls `called`."""
        if called != self.name or self.kind.label is None:
            return called
        return self.kind.label + ("" if self.key_conv is None else " + key convolution")

    def describe(self, layers: int, steps: int) -> str:
        """Say in words what the layers of a model attend with."""
        kind = "full attention" if self.kind is FULL else MOBA.label
        return ", ".join(filter(None, (kind, self.settings(layers, steps))))

    def settings(self, layers: int | None, steps: int) -> str:
        """Say the settings in words; empty for full attention with nothing else.

        Args:
            layers: of the model; None where they are not known.
        """
        words = [] if self.key_conv is None else [f"key convolution over {self.key_conv} tokens"]
        attention, sparse = self.sparsest(steps), self.moba_steps(steps)
        if attention is None or self.kind is FULL:
            return ", ".join(words)
        if sparse.stop < steps:
            words.insert(0, f"full attention from step {sparse.stop + 1:,} on")
        if sparse.start:
            words.insert(0, f"full attention up to step {sparse.start:,}")
        if layers is not None and (full := sorted(attention.full_layer_indices(layers))):
            words.insert(0, f"{len(full)} of {layers} layers full ({', '.join(map(str, full))})")
        return ", ".join([f"blocks of {self.block_size:,}", f"top-{self.top_k}", *words])

    @property
    def short(self) -> str:
        """The arm in a column of a list: "hybrid 64/3 full 2"."""
        words = [self.name]
        if self.kind is not FULL:
            words.append(f"{self.block_size}/{self.top_k}")
        if self.kind is HYBRID:
            layers = self.full_layers
            words.append("full " + (",".join(map(str, layers)) if isinstance(layers, tuple) else str(layers)))
        if self.kind is not FULL and self.warm_start:
            words.append(f"warm {self.warm_start:g}")
        return " ".join(words + ([] if self.key_conv is None else [f"key-conv {self.key_conv}"]))


def attention_cost(attention: MobaConfig | None, layers: int, length: int) -> tuple[int, int]:
    """Return what one query head of each layer reads of one window, summed over `layers`: pairs, and centroid scores.

    Args:
        attention: as of `ArmConfig.attention`; None is full attention.
        length: tokens of the window.
    """
    if attention is None:
        return layers * causal_pairs(length), 0
    full = len(attention.full_layer_indices(layers))
    sparse, blocks = layers - full, (length, attention.block_size, attention.top_k)
    return full * causal_pairs(length) + sparse * moba_pairs(*blocks), sparse * moba_scores(*blocks)
