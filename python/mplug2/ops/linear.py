"""Linear layer with its activation and residual in one pass over the product."""

from __future__ import annotations

import math

from torch import Tensor

from mplug2.ops import reference
from mplug2.ops.registration import LOW, needs_grad, register, shape_text

ACTIVATIONS = (None, "gelu", "quick_gelu")


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """out = activation(x weight^T + bias) + residual.

    Args:
        x: (..., D), any floating dtype, any strides.
        weight: (out, D), dtype of x.
        bias: (out,), dtype of x.
        activation: None, "gelu" (z Phi(z), the exact one) or "quick_gelu" (z sigmoid(1.702 z)).
        residual: (..., out), dtype of x; added after the activation.

    Returns:
        (..., out), contiguous.

    Raises:
        ValueError: an unknown activation.
        RuntimeError, ValueError: a shape or dtype does not fit.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"linear: activation must be None, 'gelu' or 'quick_gelu', got {activation!r}")
    keep_pre = activation is not None and needs_grad(x, weight, bias)
    out, _ = _forward(x, weight, bias, activation or "none", residual, keep_pre)
    return out


def _check(x, weight, bias, residual):
    if weight.dim() != 2 or weight.shape[1:] != x.shape[-1:]:
        raise ValueError(
            f"linear: weight must have shape [out, D] = [*, {x.shape[-1]}], got {shape_text(weight.shape)}"
        )
    out_shape = (*x.shape[:-1], weight.shape[0])
    expected = {"weight": (weight, weight.shape), "bias": (bias, out_shape[-1:]), "residual": (residual, out_shape)}
    for name, (t, shape) in expected.items():
        if t is not None and t.shape != shape:
            raise ValueError(f"linear: {name} must have shape {shape_text(shape)}, got {shape_text(t.shape)}")
        if t is not None and t.dtype != x.dtype:
            raise ValueError(f"linear: {name} must be {x.dtype} like x, got {t.dtype}")
    return out_shape


def _reference(x, weight, bias, activation, residual, return_pre):
    _check(x, weight, bias, residual)
    pre = reference.linear(x, weight, bias)
    out = reference.ACTIVATIONS[activation](pre)
    if residual is not None:
        out = out + residual
    elif out is pre and return_pre:
        out = pre.clone()
    return out.contiguous(), pre.contiguous() if return_pre else pre.new_empty(0)


def _fake(x, weight, bias, activation, residual, return_pre):
    shape = _check(x, weight, bias, residual)
    return x.new_empty(shape), x.new_empty(shape if return_pre else (0,))


def _bwd_reference(dout, x, weight, pre, activation):
    num_rows = math.prod(x.shape[:-1])
    rows, drows = x.reshape(num_rows, x.shape[-1]), dout.reshape(num_rows, dout.shape[-1])
    if activation != "none":
        (drows,) = reference.gradients(reference.ACTIVATIONS[activation], (pre.reshape(drows.shape),), drows)
    return (drows @ weight).view(x.shape), drows.t() @ rows, drows.sum(0)


def _bwd_fake(dout, x, weight, pre, activation):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.activation, residual, _ = inputs
    ctx.has_bias, ctx.has_residual = bias is not None, residual is not None
    ctx.save_for_backward(x, weight, output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, dout, dpre):
    if dout is None:
        return (None,) * 6
    if not any(ctx.needs_input_grad[:3]):  # the residual alone: pre was not kept
        return None, None, None, None, dout, None
    dx, dweight, dbias = _backward(dout, *ctx.saved_tensors, ctx.activation)
    return dx, dweight, dbias if ctx.has_bias else None, None, dout if ctx.has_residual else None, None


_forward = register(
    "linear_fwd",
    reference=_reference,
    fake=_fake,
    backward=_autograd,
    setup_context=_setup_context,
    autocast=LOW,
)
_backward = register("linear_bwd", reference=_bwd_reference, fake=_bwd_fake)
