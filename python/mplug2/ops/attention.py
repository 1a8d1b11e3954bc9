"""Fused attention: self and cross, causal, padded, keys and values shared by groups of queries."""

from __future__ import annotations

import torch
from torch import Tensor

from mplug2.ops import reference
from mplug2.ops.registration import LOW, has_kernel, needs_grad, register, shape_text


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """out = softmax(scale q k^T) v over the keys that each query may see.

    Row b*G + g of q reads row b of k and v, which are never copied (G = rows of q / rows of k: beams, candidates).
    Views into a packed projection are taken as they are. A query that sees no key gives 0, lse -inf and zero gradient.

    Args:
        q: (B*G, S, N, H), any floating dtype, any strides, any H.
        k, v: (B, K, N, H), dtype of q.
        key_lengths: (B,) int64 or int32: keys j < key_lengths[b] may be seen.
        key_mask: (B, K) bool, any pattern: True may be seen.
        causal: query s sees keys j <= s + K - S: the last query sees all.
        scale: default H**-0.5.
        return_lse: also return lse = log sum exp of the scaled scores, (B*G, N, S) float32 (float64 for float64
            inputs), which carries no gradient.

    Returns:
        out (B*G, S, N, H), contiguous: `out.flatten(2)` is a view. With return_lse the pair (out, lse).

    Raises:
        RuntimeError, ValueError: a shape or dtype does not fit.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keep_lse = return_lse or (needs_grad(q, k, v) and has_kernel("attention_bwd", q))
    out, lse = _forward(q, k, v, key_lengths, key_mask, causal, scale, keep_lse)
    return (out, lse.detach()) if return_lse else out


def _check(q, k, v, key_lengths, key_mask):
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 4:
            letters = "[B*G, S, N, H]" if name == "q" else "[B, K, N, H]"
            raise ValueError(f"attention: {name} must have shape {letters}, got {shape_text(t.shape)}")
        if t.dtype != q.dtype:
            raise ValueError(f"attention: {name} must be {q.dtype} like q, got {t.dtype}")
    if k.shape != v.shape or k.shape[2:] != q.shape[2:]:
        raise ValueError(
            f"attention: k and v must have shape [B, K, N, H] = [*, *, {q.shape[2]}, {q.shape[3]}], "
            f"got {shape_text(k.shape)} and {shape_text(v.shape)}"
        )
    batch, keys = k.shape[:2]
    if q.shape[0] % batch if batch else q.shape[0]:
        raise ValueError(f"attention: q must have a multiple of k's rows, B = {batch}, got {q.shape[0]}")
    if key_lengths is not None and key_lengths.shape != (batch,):
        raise ValueError(f"attention: key_lengths must have shape [B] = [{batch}], got {shape_text(key_lengths.shape)}")
    if key_mask is not None and (key_mask.shape != (batch, keys) or key_mask.dtype != torch.bool):
        raise ValueError(
            f"attention: key_mask must be bool of shape [B, K] = [{batch}, {keys}], "
            f"got {key_mask.dtype} of {shape_text(key_mask.shape)}"
        )


def _reference(q, k, v, key_lengths, key_mask, causal, scale, return_lse):
    _check(q, k, v, key_lengths, key_mask)
    out = reference.attention(q, k, v, key_lengths, key_mask, causal, scale)
    lse = (
        reference.attention_lse(q, k, key_lengths, key_mask, causal, scale)
        if return_lse
        else q.new_empty(0, dtype=reference.accumulation_dtype(q))
    )
    return out, lse


def _fake(q, k, v, key_lengths, key_mask, causal, scale, return_lse):
    _check(q, k, v, key_lengths, key_mask)
    rows, queries, heads, _ = q.shape
    lse_shape = (rows, heads, queries) if return_lse else (0,)
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=reference.accumulation_dtype(q))


def _bwd_reference(dout, q, k, v, out, lse, key_lengths, key_mask, causal, scale):
    def forward(q, k, v):
        return reference.attention(q, k, v, key_lengths, key_mask, causal, scale)

    return reference.gradients(forward, (q, k, v), dout)


def _bwd_fake(dout, q, k, v, out, lse, key_lengths, key_mask, causal, scale):
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def _setup_context(ctx, inputs, output):
    q, k, v, key_lengths, key_mask, ctx.causal, ctx.scale, _ = inputs
    ctx.save_for_backward(q, k, v, *output, key_lengths, key_mask)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dout, dlse):
    if dout is None:
        return (None,) * 8
    grads = _backward(dout, *ctx.saved_tensors, ctx.causal, ctx.scale)
    return *grads, *(None,) * 5


_forward = register(
    "attention_fwd",
    reference=_reference,
    fake=_fake,
    backward=_autograd,
    setup_context=_setup_context,
    autocast=LOW,
)
_backward = register("attention_bwd", reference=_bwd_reference, fake=_bwd_fake)
