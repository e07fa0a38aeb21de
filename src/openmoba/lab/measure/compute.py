"""Compute of training, in PFLOP/s-days, by four conventions, and the parameters it is counted from.

Symbols: N parameters without embeddings, D tokens, T window length, L layers, H query heads, d head width, V
vocabulary, C model width. A multiply-add is two operations; the backward pass counts twice the forward pass.

    6nd             6 N D: blind to attention and to the output head (Kaplan et al., arXiv 2001.08361; the x axis of
                    arXiv 2502.13189)
    chinchilla      3 D (2 N + 4 V C + L (4 H d + 3 H) T): embedding, output head, and all T x T scores and their
                    softmax, for either attention (arXiv 2203.15556, appendix F)
    causal_exact    3 D (2 N + 2 V C) + W (12 H d pairs + 2 H d scores) summed over layers, W windows: attention as
                    it is, the causal half or MoBA's pairs; choosing blocks has no backward pass
                    Key convolution adds one multiply-add a token for each of its weights, so N holds all of it.
    accelerator_seconds   measured seconds of training steps times devices
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from openmoba.config import MobaConfig
from openmoba.lab.arms import ArmConfig, attention_cost
from openmoba.records.disk import Row

PFLOPS_DAY = 8.64e19
"""Floating-point operations in a day at 10^15 per second."""
PFLOPS_DAYS = "PFLOP/s-days"


@dataclass(frozen=True)
class Shape:
    """What the compute of a decoder depends on."""

    total: int
    non_embedding: int
    hidden: int
    layers: int
    heads: int
    head_dim: int
    vocab: int
    length: int

    @classmethod
    def of(cls, model: Any, length: int) -> Shape:
        """Read the shape of a transformers decoder, trained on windows of `length` tokens."""
        config = model.config
        tables = {id(t.weight): t.weight for t in (model.get_input_embeddings(), model.get_output_embeddings())}
        total = sum(parameter.numel() for parameter in model.parameters())
        heads = config.num_attention_heads
        return cls(
            total=total,
            non_embedding=total - sum(table.numel() for table in tables.values()),
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocab=model.get_output_embeddings().weight.shape[0],
            length=length,
        )

    @property
    def parameters(self) -> dict[str, int]:
        """As recorded in a run's result."""
        return {"total": self.total, "non_embedding": self.non_embedding}


@dataclass(frozen=True)
class Spent:
    """The training that compute is counted of: the first `step` of `steps` steps of `batch_size` windows each.

    Attributes:
        seconds: accelerator seconds measured.
    """

    shape: Shape
    arm: ArmConfig
    step: int
    steps: int
    batch_size: int
    seconds: float

    @property
    def tokens(self) -> int:
        """Tokens trained."""
        return self.step * self.batch_size * self.shape.length

    @property
    def attention(self) -> int:
        """Operations of the attention as it is, at each step."""
        moba = self.arm.moba_steps(self.steps)
        sparse_steps = len(range(moba.start, min(self.step, moba.stop)))
        full = (self.step - sparse_steps) * attention_flops(self.shape, None)
        sparse = sparse_steps * attention_flops(self.shape, self.arm.sparsest(self.steps))
        return self.batch_size * (full + sparse)


def _six_nd(spent: Spent) -> float:
    return 6 * spent.shape.non_embedding * spent.tokens / PFLOPS_DAY


def _chinchilla(spent: Spent) -> float:
    shape = spent.shape
    tables = 4 * shape.vocab * shape.hidden
    scores = shape.layers * (4 * shape.heads * shape.head_dim + 3 * shape.heads) * shape.length
    return 3 * spent.tokens * (2 * shape.non_embedding + tables + scores) / PFLOPS_DAY


def _causal_exact(spent: Spent) -> float:
    shape = spent.shape
    products = 3 * spent.tokens * (2 * shape.non_embedding + 2 * shape.vocab * shape.hidden)
    return (products + spent.attention) / PFLOPS_DAY


@dataclass(frozen=True)
class Axis:
    """One measure of what training costs, which losses are drawn over and laws are fitted in.

    Attributes:
        name: in records and on the command line.
        head: its name in text, tables and charts.
        caption: of a chart's axis, without the unit.
        unit: of its values, in words.
        form: how its values are written.
        count: the value for a training so far; records hold it under `name`.
        read: where `count` is None, the value from what an evaluation record holds.
    """

    name: str
    head: str
    caption: str
    unit: str = PFLOPS_DAYS
    form: str = ".2e"
    count: Callable[[Spent], float] | None = None
    read: Callable[[Row], float] | None = None

    def known(self, row: Row) -> bool:
        """Tell whether an evaluation record has the value; one from before it was counted does not."""
        return self.read is not None or self.name in row["compute"]

    def value(self, row: Row) -> float:
        """Return the value of an evaluation record; ValueError if it does not have it."""
        if self.read is not None:
            return self.read(row)
        if not self.known(row):
            raise ValueError(
                f"a record of step {row['step']} does not hold the compute by {self.name}; train its run again, or "
                f"choose one that it holds: {', '.join(row['compute'])}"
            )
        return float(row["compute"][self.name])

    def amount(self, value: float) -> str:
        """Write a value with its unit."""
        return f"{value:{self.form}} {self.unit}"


SIX_ND = "6nd"
"""The convention of compute that studies compare by first; it counts no attention."""

AXES = {
    axis.name: axis
    for axis in (
        Axis(SIX_ND, "6ND", "Compute by 6ND, 6·N·tokens", count=_six_nd),
        Axis("chinchilla", "Chinchilla", "Compute by Chinchilla, with embeddings and softmax", count=_chinchilla),
        Axis(
            "causal_exact", "causal-exact", "Compute by causal-exact, attention at its real reads", count=_causal_exact,
        ),
        Axis(
            "accelerator_seconds", "accelerator seconds", "Measured accelerator time", "seconds", ",.0f",
            lambda spent: spent.seconds,
        ),
    )
}  # fmt: skip
"""Name -> axis of compute. A new one is an entry here."""

if TYPE_CHECKING:
    AxisName = str
else:
    AxisName = Literal[tuple(AXES)]


def training_compute(
    shape: Shape, arm: ArmConfig, step: int, steps: int, batch_size: int, seconds: float
) -> dict[str, float]:
    """Count the compute of the first `step` of `steps` steps, by all conventions that records hold.

    Args:
        batch_size: windows per step.
        seconds: accelerator seconds measured.
    """
    spent = Spent(shape, arm, step, steps, batch_size, seconds)
    return {axis.name: axis.count(spent) for axis in AXES.values() if axis.count is not None}


def attention_flops(shape: Shape, attention: MobaConfig | None) -> int:
    """Return the operations of all layers' attention on one window, forward and backward, scoring included."""
    pairs, scores = attention_cost(attention, shape.layers, shape.length)
    return shape.heads * shape.head_dim * (12 * pairs + 2 * scores)
