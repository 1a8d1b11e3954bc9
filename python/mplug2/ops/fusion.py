"""Absorbed cross-attention: few queries over many tokens, whose keys and values are never made."""

from __future__ import annotations

import torch
from torch import Tensor

from mplug2.ops import reference
from mplug2.ops.registration import LOW, needs_grad, register, shape_text


def fusion(
    q: Tensor,
    x: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None = None,
    *,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """out = softmax(scale q k^T) v over the seen keys; k = x key_weight^T, v = x value_weight^T + value_bias.

    Keys and values are never made. As in latent attention each head's query goes through its rows of key_weight and
    attends over x itself, and what it gathers there goes through the head's rows of value_weight: less work than
    projecting x while an item has fewer queries than a head has dimensions, G*S < H. There is no bias of the keys: it
    adds the same to all scores of a query, which the softmax does not see. Row b*G + g of q reads row b of x. A query
    that sees no key gives 0 and zero gradient.

    Args:
        q: (B*G, S, N, H), any floating dtype, any H.
        x: (B, K, D), dtype of q.
        key_weight, value_weight: (N*H, D), dtype of q, as of a linear layer: halves of a packed one are taken as views.
        value_bias: (N*H,).
        key_lengths: (B,) int64 or int32: keys j < key_lengths[b] may be seen.
        key_mask: (B, K) bool, any pattern: True may be seen.
        scale: default H**-0.5.

    Returns:
        out (B*G, S, N, H), contiguous: `out.flatten(2)` is a view.

    Raises:
        RuntimeError, ValueError: a shape or dtype does not fit.
    """
    _check(q, x, key_weight, value_weight)
    _check_optional(x, key_weight, value_bias, key_lengths, key_mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if key_lengths is not None:
        within = torch.arange(x.shape[1], device=x.device) < key_lengths[:, None]
        key_mask = within if key_mask is None else within & key_mask
    if key_mask is not None:
        x = x.masked_fill(~key_mask[..., None], 0)  # their weight is 0, but memory there may hold NaN
    out, _, _ = _forward(q, x, key_weight, value_weight, key_mask, scale, needs_grad(q, x, key_weight, value_weight))
    if value_bias is None:
        return out
    bias = value_bias.to(out.dtype).view(q.shape[2:])
    if key_mask is not None:
        groups = q.shape[0] // max(1, x.shape[0])
        bias = bias * key_mask.any(1).repeat_interleave(groups)[:, None, None, None]
    return out + bias


def _check(q, x, key_weight, value_weight):
    for name, t, letters in (("q", q, "[B*G, S, N, H]"), ("x", x, "[B, K, D]")):
        if t.dim() != letters.count(",") + 1:
            raise ValueError(f"fusion: {name} must have shape {letters}, got {shape_text(t.shape)}")
    batch, _, width = x.shape
    if q.shape[0] % batch if batch else q.shape[0]:
        raise ValueError(f"fusion: q must have a multiple of x's rows, B = {batch}, got {q.shape[0]}")
    inner = q.shape[2] * q.shape[3]
    for name, t in (("key_weight", key_weight), ("value_weight", value_weight)):
        if t.shape != (inner, width):
            raise ValueError(f"fusion: {name} must have shape [N*H, D] = [{inner}, {width}], got {shape_text(t.shape)}")


def _check_optional(x, key_weight, value_bias, key_lengths, key_mask):
    batch, keys, _ = x.shape
    if value_bias is not None and value_bias.shape != key_weight.shape[:1]:
        raise ValueError(
            f"fusion: value_bias must have shape [N*H] = [{key_weight.shape[0]}], got {shape_text(value_bias.shape)}"
        )
    if key_lengths is not None and (key_lengths.shape != (batch,) or key_lengths.dtype.is_floating_point):
        raise ValueError(
            f"fusion: key_lengths must be integers of shape [B] = [{batch}], "
            f"got {key_lengths.dtype} of {shape_text(key_lengths.shape)}"
        )
    if key_mask is not None and (key_mask.shape != (batch, keys) or key_mask.dtype != torch.bool):
        raise ValueError(
            f"fusion: key_mask must be bool of shape [B, K] = [{batch}, {keys}], "
            f"got {key_mask.dtype} of {shape_text(key_mask.shape)}"
        )


def _saved_shapes(q, x):
    """Of weights and context."""
    batch, keys, width = x.shape
    rows = q.shape[0] // max(1, batch) * q.shape[1] * q.shape[2]
    return (batch, rows, (keys + 7) // 8 * 8), (batch, rows, width)


def _reference(q, x, key_weight, value_weight, key_mask, scale, return_saved):
    _check(q, x, key_weight, value_weight)
    out, *saved = reference.fusion(q, x, key_weight, value_weight, key_mask, scale)
    return out, *(saved if return_saved else (q.new_empty(0), q.new_empty(0)))


def _fake(q, x, key_weight, value_weight, key_mask, scale, return_saved):
    _check(q, x, key_weight, value_weight)
    saved = _saved_shapes(q, x) if return_saved else ((0,), (0,))
    return q.new_empty(q.shape), *map(q.new_empty, saved)


def _bwd_fake(dout, q, x, key_weight, value_weight, weights, context, scale):
    return tuple(t.new_empty(t.shape) for t in (q, x, key_weight, value_weight))


def _setup_context(ctx, inputs, output):
    q, x, key_weight, value_weight, _, ctx.scale, _ = inputs
    ctx.save_for_backward(q, x, key_weight, value_weight, *output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx, dout, dweights, dcontext):
    if dout is None:
        return (None,) * 7
    return *_backward(dout, *ctx.saved_tensors, ctx.scale), None, None, None


_forward = register(
    "fusion_fwd",
    reference=_reference,
    fake=_fake,
    backward=_autograd,
    setup_context=_setup_context,
    autocast=LOW,
)
_backward = register("fusion_bwd", reference=reference.fusion_bwd, fake=_bwd_fake)
