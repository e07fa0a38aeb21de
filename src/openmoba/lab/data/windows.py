"""Windows: runs of tokens cut from inside one document, with the token that follows each as its label."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from openmoba.lab.data.store import TokenStore

IGNORED = -100
"""Label of a position that carries no loss."""

Window = dict[str, Tensor]


@dataclass(frozen=True)
class Windows(Dataset[Window]):
    """Windows of some documents of a store.

    An item is `{"input_ids": [length], "labels": [length]}`, int64; label t is the token after input t. Texts
    give whole windows only. Conversations are padded at the end, which causal attention never sees, and only
    the assistant's tokens are labels.

    Attributes:
        starts, ends: int64 `[windows]`: first input token, and end of its document, in the store.
    """

    store: TokenStore
    starts: np.ndarray
    ends: np.ndarray
    length: int

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Window:
        start = int(self.starts[index])
        end = min(start + self.length + 1, int(self.ends[index]))
        token_T = torch.from_numpy(self.store.tokens[start:end].astype(np.int64))
        label_T = token_T[1:]
        if self.store.written is not None:
            written_T = torch.from_numpy(self.store.written[start + 1 : end].copy())
            label_T = label_T.masked_fill(~written_T, IGNORED)
        padding = self.length - len(label_T)
        return {
            "input_ids": torch.nn.functional.pad(token_T[:-1], (0, padding)),
            "labels": torch.nn.functional.pad(label_T, (0, padding), value=IGNORED),
        }

    @property
    def full(self) -> np.ndarray:
        """Which windows reach the full length, bool `[windows]`."""
        full: np.ndarray = self.ends - self.starts > self.length
        return full

    @property
    def documents(self) -> np.ndarray:
        """The document that each window comes from, as its number in the store, int64 `[windows]`."""
        return np.searchsorted(self.store.starts, self.starts, side="right") - 1

    def labelled(self, last: int) -> np.ndarray:
        """Tell which windows have a label among their last positions, bool `[windows]`."""
        some = [bool((self[i]["labels"][-last:] != IGNORED).any()) for i in range(len(self))]
        return np.asarray(some, dtype=bool)

    def last(self, count: int) -> Windows:
        """Return the last `count` positions of every window that reaches the full length, as windows of that length."""
        starts = self.starts[self.full] + self.length - count
        return Windows(self.store, starts, self.ends[self.full], count)

    def spread(self, count: int) -> Windows:
        """Pick `count` of these windows, evenly spread over them."""
        chosen = np.linspace(0, len(self) - 1, count).round().astype(np.int64)
        return Windows(self.store, self.starts[chosen], self.ends[chosen], self.length)


@dataclass(frozen=True)
class TrainingWindows(Dataset[Window]):
    """`count` windows in the order of training: one seeded permutation of all windows after the other.

    The order depends on the windows and the seed alone, not on how many devices share the work or on where a
    resumed run begins.

    Attributes:
        loss_tokens: the number of last positions of each window that carry loss; None for all.
    """

    windows: Windows
    count: int
    seed: int
    loss_tokens: int | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Window:
        epoch, place = divmod(index, len(self.windows))
        window = self.windows[int(_order(len(self.windows), self.seed, epoch)[place])]
        if self.loss_tokens is not None:
            window["labels"][: -self.loss_tokens] = IGNORED
        return window


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def cut_windows(store: TokenStore, documents: np.ndarray, length: int) -> Windows:
    """Cut all windows of the given documents, in order, none of them overlapping another's labels.

    Args:
        documents: int64, numbers of documents.
    """
    first, end = store.starts[documents], store.starts[documents + 1]
    labels = np.maximum(end - first - 1, 0)
    counts = labels // length if store.written is None else -(-labels // length)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    windows = Windows(store, np.repeat(first, counts) + number * length, np.repeat(end, counts), length)
    if store.written is None:
        return windows
    taught = windows.labelled(length)
    return Windows(store, windows.starts[taught], windows.ends[taught], length)
