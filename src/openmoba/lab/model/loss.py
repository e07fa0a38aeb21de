"""Next-token cross-entropy without the logits of all positions at once.

    loss_t = logsumexp(W h_t) - (W h_t)[label_t]        in nats

With a vocabulary of 128K the fp32 logits of one 32K window are 17 GB; here they exist for one chunk of positions
at a time. For training, the gradient of a chunk is made right after its loss, so nothing is computed twice and
three matrix products remain: W h, and the gradients of h and W.
"""

# N positions, C model width, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from openmoba.lab.data.windows import IGNORED

ChunkGradient = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

# Logits of one chunk: 16 MB of fp32 stay near a CPU's caches, a GPU wants larger products.
LOGITS_PER_CHUNK = {"cpu": 1 << 22, "cuda": 1 << 26}


def attach_loss(model: Any) -> None:
    """Make `model(input_ids, labels, count=None, places=None)` return losses in nats, whatever wraps the model.

    With `position_ids` the tokens are a part of their windows, see `openmoba.lab.model.split`.

    Distributed wrappers act around a model's `forward`, so the loss has to be made inside of it. Without `count`
    the result is the loss per token, fp32 `[batch, tokens]`, 0 where the label is IGNORED; with it, the sum of
    the losses divided by `count`, to be differentiated. `labels[:, t]` is the token after `input_ids[:, t]`.

    `places` are the indices of the labels that are not IGNORED in the flattened batch, int64, or `slice(None)` if
    none is; without them they are looked for, and the host waits until the device has found them.
    """
    plain_forward = model.forward
    linear = has_linear_head(model)

    def forward(
        self: Any,
        input_ids: Tensor,
        labels: Tensor,
        count: Tensor | None = None,
        places: Tensor | slice | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
        if not linear:
            logit_NV = plain_forward(**inputs).logits.flatten(0, 1)
            losses = torch.nn.functional.cross_entropy(
                logit_NV.float(), labels.flatten(), ignore_index=IGNORED, reduction="none"
            )
            return losses.view(labels.shape) if count is None else losses.sum() / count
        hidden = self.base_model(**inputs).last_hidden_state
        head = self.get_output_embeddings()
        if hasattr(head, "unshard"):  # FSDP2 gathers weights, and takes note of it, where a module is called
            head(hidden[:, :0])
        return linear_loss(hidden, head.weight, head.bias, labels, count, places, self.chunk_gradient)

    model.forward = MethodType(forward, model)
    compile_loss(model, False)


def compile_loss(model: Any, compiled: bool) -> None:
    """Compile what `attach_loss` does with the logits of a chunk, in place, or take that back.

    Eagerly it is eight passes over the logits in fp32, a fifth of a training step of a model of 14 M parameters on a
    GPU; compiled, two reads and one write in 16 bits.
    """
    model.chunk_gradient = torch.compile(_chunk_gradient, dynamic=False) if compiled else _chunk_gradient


def linear_loss(
    hidden: Tensor,
    weight_VC: Tensor,
    bias_V: Tensor | None,
    labels: Tensor,
    count: Tensor | None = None,
    places: Tensor | slice | None = None,
    chunk_gradient: ChunkGradient | None = None,
) -> Tensor:
    """Compute the losses of `labels` `[batch, tokens]` under the logits `weight hidden + bias`, as `attach_loss` says.

    Positions with the label IGNORED are left out of the computation. `chunk_gradient` is `_chunk_gradient`, perhaps
    compiled.
    """
    if places is None:
        places = (labels.flatten() != IGNORED).nonzero()[:, 0]
    h_NC, label_N = hidden.flatten(0, 1)[places], labels.flatten()[places]
    if count is not None:
        own = chunk_gradient or _chunk_gradient
        return _MeanLoss.apply(h_NC, weight_VC, bias_V, label_N, count, own)  # type: ignore[no-any-return,no-untyped-call]
    losses = torch.zeros(labels.numel(), dtype=torch.float32, device=labels.device)
    loss_N = losses.new_empty(len(label_N))
    weight_VC, bias_V = _as_computed(weight_VC, h_NC), None if bias_V is None else _as_computed(bias_V, h_NC)
    for rows in _chunks(label_N, len(weight_VC)):
        logit_NV = torch.nn.functional.linear(_as_computed(h_NC[rows], h_NC), weight_VC, bias_V).float()
        loss_N[rows] = _losses(logit_NV, label_N[rows])[0]
    losses[places] = loss_N
    return losses.view(labels.shape)


def has_linear_head(model: Any) -> bool:
    """Tell whether the logits are the output embedding of the last hidden state, neither scaled nor capped.

    Those of a new model are too small for a cap to show, so they are looked at a thousand times as large.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        return False
    ids = torch.arange(4, device=head.weight.device)[None]
    training = model.training
    model.eval()
    with torch.no_grad(), head.register_forward_hook(lambda _, __, logits: 1000 * logits):
        expected = model(input_ids=ids, use_cache=False).logits
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        found = head(hidden)
    model.train(training)
    return torch.allclose(expected.float(), found.float(), rtol=1e-3, atol=1e-3 * float(found.abs().max()))


class _MeanLoss(torch.autograd.Function):
    """sum(losses) / count of a linear head; the gradients are made chunk by chunk in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        h_NC: Tensor,
        weight_VC: Tensor,
        bias_V: Tensor | None,
        label_N: Tensor,
        count: Tensor,
        chunk_gradient: ChunkGradient,
    ) -> Tensor:
        w_VC = _as_computed(weight_VC, h_NC)
        b_V = None if bias_V is None else _as_computed(bias_V, h_NC)
        total = torch.zeros((), dtype=torch.float32, device=h_NC.device)
        dh_NC = torch.empty_like(h_NC)
        dw_VC = torch.zeros_like(weight_VC)
        db_V = None if bias_V is None else torch.zeros_like(bias_V)
        for rows in _chunks(label_N, len(w_VC)):
            x_NC = _as_computed(h_NC[rows], h_NC)
            loss, d_NV = chunk_gradient(torch.nn.functional.linear(x_NC, w_VC, b_V), label_N[rows], count)
            total += loss
            dh_NC[rows] = d_NV @ w_VC
            dw_VC += d_NV.T @ x_NC
            if db_V is not None:
                db_V += d_NV.sum(0)
        ctx.save_for_backward(dh_NC, dw_VC, db_V)
        return total / count

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dh_NC, dw_VC, db_V = ctx.saved_tensors
        return dh_NC * dloss, dw_VC * dloss, None if db_V is None else db_V * dloss, None, None, None


def _chunk_gradient(logit_NV: Tensor, label_N: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Sum a chunk's losses; return that and the gradient of sum / count by its logits, in their dtype."""
    losses, lse_N = _losses(logit_NV.float(), label_N)
    hit_NV = label_N[:, None] == torch.arange(logit_NV.shape[1], device=logit_NV.device)
    d_NV = (logit_NV.float() - lse_N[:, None]).exp_().sub_(hit_NV.float()).div_(count)  # softmax - one-hot
    return losses.sum(), d_NV.to(logit_NV.dtype)


def _losses(logit_NV: Tensor, label_N: Tensor) -> tuple[Tensor, Tensor]:
    """Compute losses and logsumexps of a chunk, fp32 `[N]`."""
    lse_N = logit_NV.logsumexp(-1)
    return lse_N - logit_NV.gather(-1, label_N[:, None])[:, 0], lse_N


def _as_computed(x: Tensor, hidden: Tensor) -> Tensor:
    """Cast `x` to the precision of the products: autocast's where it is on, else the hidden states'."""
    device = hidden.device.type
    return x.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype)


def _chunks(label_N: Tensor, vocabulary: int) -> Iterator[slice]:
    step = max(64, LOGITS_PER_CHUNK[label_N.device.type] // vocabulary)
    return (slice(start, start + step) for start in range(0, len(label_N), step))
