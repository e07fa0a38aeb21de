"""How exact an implementation must be: compared with fp64, at most twice as wrong as plain PyTorch."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from openmoba.ops.reference import attention_given_selection, attention_mask


def with_gradients(attention, tensors):
    """Output and gradients of `attention(q, k, v)` for `tensors` = q, k, v, d_out."""
    *inputs, d_out = tensors
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = attention(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, d_out.to(out.dtype))]


def assert_as_exact_as_plain(actual, tensors, selected, block_size):
    """Compare output and gradients `actual` with fp64 given the same selection.

    Plain is SDPA with the explicit mask in the same precision. It may be exact by chance (one key, one element), so
    one rounding of the result and one of the fp32 sums that cancel in a gradient are free.
    """
    q, k = tensors[:2]
    scale = q.shape[-1] ** -0.5
    mask = attention_mask(selected, k.shape[1], block_size)
    plain = with_gradients(lambda q, k, v: _masked(q, k, v, mask, scale), tensors)
    oracle = with_gradients(
        lambda q, k, v: attention_given_selection(q, k, v, selected, block_size, scale), [x.double() for x in tensors]
    )
    for name, a, p, o in zip(("out", "dq", "dk", "dv"), actual, plain, oracle, strict=True):
        rounding = torch.finfo(q.dtype).eps * o.norm() + torch.finfo(torch.float32).eps * o.numel() ** 0.5 * o.shape[-1]
        assert (a.double() - o).norm() <= 2 * (p.double() - o).norm() + rounding, name


def _masked(q, k, v, mask, scale):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True).transpose(1, 2)
