"""Residual addition and layer normalisation in one pass."""

from __future__ import annotations

from torch import Tensor

from mplug2.ops import reference
from mplug2.ops.registration import FULL, register, shape_text


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """sum = x + residual; normed = (sum - mean) / sqrt(variance + eps) * weight + bias over the last dimension.

    Args:
        x, residual: (..., D), one shape and one floating dtype; float32 under autocast.
        weight, bias: (D,), dtype of x.
        eps: added to the variance.

    Returns:
        (normed, sum), both of the shape and dtype of x, contiguous.

    Raises:
        RuntimeError, ValueError: a shape or dtype does not fit.
    """
    return _forward(x, residual, weight, bias, eps)


def _check(x, residual, weight, bias):
    if residual.shape != x.shape:
        raise ValueError(
            f"add_layer_norm: residual must have the shape of x, {shape_text(x.shape)}, "
            f"got {shape_text(residual.shape)}"
        )
    for name, t in (("residual", residual), ("weight", weight), ("bias", bias)):
        if t is not residual and t.shape != x.shape[-1:]:
            raise ValueError(
                f"add_layer_norm: {name} must have shape [D] = {shape_text(x.shape[-1:])}, got {shape_text(t.shape)}"
            )
        if t.dtype != x.dtype:
            raise ValueError(f"add_layer_norm: {name} must be {x.dtype} like x, got {t.dtype}")


def _reference(x, residual, weight, bias, eps):
    _check(x, residual, weight, bias)
    normed, total = reference.add_layer_norm(x, residual, weight, bias, eps)
    return normed.contiguous(), total.contiguous()


def _fake(x, residual, weight, bias, eps):
    _check(x, residual, weight, bias)
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _bwd_reference(dnormed, dsum, total, weight, bias, eps):
    def normalise(total, weight, bias):
        return reference.layer_norm(total, weight, bias, eps)

    dtotal, dweight, dbias = reference.gradients(normalise, (total, weight, bias), dnormed)
    return (dtotal + dsum).contiguous(), dweight, dbias


def _bwd_fake(dnormed, dsum, total, weight, bias, eps):
    return total.new_empty(total.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _setup_context(ctx, inputs, output):
    _, _, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight, bias)


def _autograd(ctx, dnormed, dsum):
    dx, dweight, dbias = _backward(dnormed, dsum, *ctx.saved_tensors, ctx.eps)
    return dx, dx, dweight, dbias, None


_forward = register(
    "add_layer_norm_fwd",
    reference=_reference,
    fake=_fake,
    backward=_autograd,
    setup_context=_setup_context,
    autocast=FULL,
)
_backward = register("add_layer_norm_bwd", reference=_bwd_reference, fake=_bwd_fake)
