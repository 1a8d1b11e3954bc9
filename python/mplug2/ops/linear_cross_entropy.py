"""Cross-entropy of a linear layer's logits that are never held whole."""

from __future__ import annotations

from torch import Tensor

from mplug2.ops import reference
from mplug2.ops.registration import LOW, register, shape_text

REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """loss = cross-entropy of z = x weight^T + bias against targets, z made and dropped a chunk of rows at a time.

    Per row: lse(z) - (1 - a) z[t] - a/V sum z, with a = label_smoothing; 0 where t = ignore_index.

    Args:
        x: (..., D), any floating dtype.
        weight: (V, D), dtype of x.
        targets: (...) int64, in 0..V-1 or ignore_index. Another one is an error on the CPU. On a GPU, whose kernel does
            not wait to tell, its row's loss is NaN, and so are that row's gradient and those of weight and bias; where
            the reference serves there, PyTorch's own assertion ends the process's work on the device.
        bias: (V,), dtype of x.
        ignore_index: target of rows that count for nothing.
        reduction: "mean" over the rows that count (NaN if there are none), "sum", or "none".
        label_smoothing: 0..1.

    Returns:
        float32 (float64 for float64 inputs): a scalar, or with "none" the shape of targets.

    Raises:
        ValueError: an unknown reduction.
        RuntimeError, ValueError: a shape, a dtype or a target does not fit.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"linear_cross_entropy: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if targets.shape != x.shape[:-1]:
        raise ValueError(
            f"linear_cross_entropy: targets must have shape {shape_text(x.shape[:-1])}, got {shape_text(targets.shape)}"
        )
    wanted = targets.reshape(-1)
    rows = x.reshape(wanted.shape[0], x.shape[-1])
    loss, _ = _forward(rows, weight, wanted, bias, ignore_index, label_smoothing)
    if reduction == "none":
        return loss.view(targets.shape)
    return loss.sum() if reduction == "sum" else loss.sum() / (wanted != ignore_index).sum()


def _check(x, weight, targets, bias):
    if x.dim() != 2 or weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"linear_cross_entropy: weight must have shape [V, D] = [*, {x.shape[-1]}], got {shape_text(weight.shape)}"
        )
    if targets.shape != x.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: targets must have shape [M] = [{x.shape[0]}], got {shape_text(targets.shape)}"
        )
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != x.dtype:
            raise ValueError(f"linear_cross_entropy: {name} must be {x.dtype} like x, got {t.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: bias must have shape [V] = [{weight.shape[0]}], got {shape_text(bias.shape)}"
        )


def _reference(x, weight, targets, bias, ignore_index, label_smoothing):
    _check(x, weight, targets, bias)
    return reference.linear_cross_entropy(x, weight, targets, bias, ignore_index, label_smoothing)


def _fake(x, weight, targets, bias, ignore_index, label_smoothing):
    _check(x, weight, targets, bias)
    dtype = reference.accumulation_dtype(x)
    return x.new_empty(x.shape[0], dtype=dtype), x.new_empty(x.shape[0], dtype=dtype)


def _bwd_fake(dloss, x, weight, targets, bias, lse, ignore_index, label_smoothing):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _setup_context(ctx, inputs, output):
    x, weight, targets, bias, ctx.ignore_index, ctx.label_smoothing = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight, targets, bias, output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, dloss, dlse):
    if dloss is None:
        return (None,) * 6
    dx, dweight, dbias = _backward(dloss, *ctx.saved_tensors, ctx.ignore_index, ctx.label_smoothing)
    return dx, dweight, None, dbias if ctx.has_bias else None, None, None


_forward = register(
    "linear_cross_entropy_fwd",
    reference=_reference,
    fake=_fake,
    backward=_autograd,
    setup_context=_setup_context,
    autocast=LOW,
)
_backward = register("linear_cross_entropy_bwd", reference=reference.linear_cross_entropy_bwd, fake=_bwd_fake)
