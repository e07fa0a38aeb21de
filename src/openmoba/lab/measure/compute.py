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

from dataclasses import dataclass
from typing import Any

from openmoba.config import MobaConfig
from openmoba.lab.arms import ArmConfig, attention_cost

PFLOPS_DAY = 8.64e19
"""Floating-point operations in a day at 10^15 per second."""


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


def training_compute(
    shape: Shape, arm: ArmConfig, step: int, steps: int, batch_size: int, seconds: float
) -> dict[str, float]:
    """Count the compute of the first `step` of `steps` steps, by all conventions.

    Args:
        batch_size: windows per step.
        seconds: accelerator seconds measured.
    """
    sparse_steps = min(step, arm.switch_step(steps))
    sparse_windows, full_windows = sparse_steps * batch_size, (step - sparse_steps) * batch_size
    tokens = step * batch_size * shape.length
    attention = full_windows * attention_flops(shape, None)
    if sparse_windows:
        attention += sparse_windows * attention_flops(shape, arm.attention(0, steps))
    head = 2 * shape.vocab * shape.hidden
    all_scores = shape.layers * (4 * shape.heads * shape.head_dim + 3 * shape.heads) * shape.length
    return {
        "6nd": 6 * shape.non_embedding * tokens / PFLOPS_DAY,
        "chinchilla": 3 * tokens * (2 * shape.non_embedding + 2 * head + all_scores) / PFLOPS_DAY,
        "causal_exact": (3 * tokens * (2 * shape.non_embedding + head) + attention) / PFLOPS_DAY,
        "accelerator_seconds": seconds,
    }


def attention_flops(shape: Shape, attention: MobaConfig | None) -> int:
    """Return the operations of all layers' attention on one window, forward and backward, scoring included."""
    pairs, scores = attention_cost(attention, shape.layers, shape.length)
    return shape.heads * shape.head_dim * (12 * pairs + 2 * scores)
