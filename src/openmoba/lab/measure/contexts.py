"""The trailing loss with the context cut short: the same tokens, fewer before them.

    window of 8 tokens, trailing 2, context 4:      . . . . x x y y     x is read, y is read and has loss

Loss by position compares other text at every position; here the text is the same, and what changes is how far the
model can look back. The tokens of the shorter context stand at the positions from 0 on, as in a window of that length.
"""

# W windows

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from openmoba.lab.data.windows import Windows
from openmoba.lab.measure.losses import Sums, TokenLosses, window_losses
from openmoba.lab.progress import Progress


def context_losses(
    losses: TokenLosses,
    windows: Windows,
    contexts: Sequence[int],
    trailing: int,
    batch_size: int,
    device: torch.device,
    progress: Progress | None = None,
) -> dict[int, Sums]:
    """Measure the loss of the last `trailing` positions of full windows, seen from their last so many tokens alone.

    Args:
        windows: some of which reach the full length; the others have no such loss.
        contexts: tokens, those with loss included.
        batch_size: windows of the full length per forward pass; shorter ones go together in larger batches.

    Returns:
        The losses of each context.
    """
    found = {}
    # A graph for every length would take longer to compile than all these passes take without one.
    with torch.compiler.set_stance("force_eager"):
        for context in contexts:
            cut, together = windows.last(context), batch_size * (windows.length // context)
            loss_WT, labelled_WT = (x[:, -trailing:] for x in window_losses(losses, cut, together, device, progress))
            total_W, count_W = np.zeros(len(windows)), np.zeros(len(windows), dtype=np.int64)
            total_W[windows.full], count_W[windows.full] = loss_WT.sum(1, dtype=np.float64), labelled_WT.sum(1)
            found[context] = Sums(total_W, count_W, windows.documents)
    return found
