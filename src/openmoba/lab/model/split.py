"""Windows that several processes share, each with a part of the tokens (`train.context_parallel`)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor

from openmoba.hf.support import key_value_heads
from openmoba.lab.data.windows import IGNORED
from openmoba.parallel import Sharding, sharded

Batch = dict[str, Tensor]


def sharding_of_windows(group: Any, length: int, model: Any) -> Sharding:
    """Lay windows of so many tokens out over a group, as suits the heads of the model."""
    return Sharding.balanced(group, length, model.config.num_attention_heads, key_value_heads(model.config))


def cut(batch: Batch, sharding: Sharding | None) -> Batch:
    """Cut this process's part out of whole windows and say where its tokens lie; None leaves them whole.

    Args:
        batch: `input_ids` and `labels`, int64 `[batch, length]`.
    """
    if sharding is None:
        return batch
    ids, labels = sharding.shard(batch["input_ids"]), sharding.shard(batch["labels"], padding=IGNORED)
    return {"input_ids": ids, "labels": labels, "position_ids": sharding.positions.to(ids.device).expand(ids.shape)}


class SharedLosses:
    """Losses of whole windows, which several processes compute together: all of them are given the same windows.

    Args:
        model: after `openmoba.lab.model.loss.attach_loss`.
        sharding: of windows, as long as they may be.
    """

    def __init__(self, model: Any, sharding: Sharding) -> None:
        self._model, self._sharding, self.ranks = model, sharding, sharding.ranks

    def __call__(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of every token, `[batch, tokens]`, in every process."""
        sharding = replace(self._sharding, tokens=input_ids.shape[1])
        part = cut({"input_ids": input_ids, "labels": labels}, sharding)
        with in_force(sharding):
            return sharding.unshard(self._model(**part))


def in_force(sharding: Sharding | None) -> AbstractContextManager[None]:
    """Have models compute under a sharding; None: on whole windows."""
    return nullcontext() if sharding is None else sharded(sharding)
