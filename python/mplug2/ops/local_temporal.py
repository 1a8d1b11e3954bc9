"""Local temporal modelling: a bottleneck with a depthwise convolution over time, tokens left in place."""

from __future__ import annotations

from torch import Tensor

from mplug2.ops import reference
from mplug2.ops.registration import LOW, needs_grad, register, shape_text


def local_temporal(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    *,
    num_prefix_tokens: int = 1,
    eps: float = 1e-5,
) -> Tensor:
    """out = x + up(QuickGELU(conv(down(LN(x))))), QuickGELU(z) = z sigmoid(1.702 z).

    conv mixes each channel of a token with the same token of the frames before and after, zero padded at both ends of a
    video. The first num_prefix_tokens of each frame (CLS) pass through unchanged.

    Args:
        x: (B, T, L, D): videos, frames, tokens of a frame (prefix first), width; any floating dtype, any strides.
        ln_weight, ln_bias: (D,), dtype of x as all parameters.
        down_weight, down_bias: (D/2, D) and (D/2,); any hidden width will do.
        conv_weight, conv_bias: (D/2, 3) and (D/2,); conv_weight[:, 1] multiplies the frame itself, [:, 0] the one
        before.
        up_weight, up_bias: (D, D/2) and (D,).
        num_prefix_tokens: 0..L.
        eps: of the layer normalisation.

    Returns:
        (B, T, L, D), contiguous.

    Raises:
        RuntimeError, ValueError: a shape or dtype does not fit.
    """
    tensors = (x, ln_weight, ln_bias, down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias)
    out, _ = _forward(*tensors, num_prefix_tokens, eps, needs_grad(*tensors))
    return out


def _check(
    x, ln_weight, ln_bias, down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias, num_prefix_tokens
):
    if x.dim() != 4:
        raise ValueError(f"local_temporal: x must have shape [B, T, L, D], got {shape_text(x.shape)}")
    width, hidden = x.shape[-1], down_weight.shape[0]
    expected = {
        "ln_weight": (ln_weight, "[D]", (width,)),
        "ln_bias": (ln_bias, "[D]", (width,)),
        "down_weight": (down_weight, "[D/2, D]", (hidden, width)),
        "down_bias": (down_bias, "[D/2]", (hidden,)),
        "conv_weight": (conv_weight, "[D/2, 3]", (hidden, 3)),
        "conv_bias": (conv_bias, "[D/2]", (hidden,)),
        "up_weight": (up_weight, "[D, D/2]", (width, hidden)),
        "up_bias": (up_bias, "[D]", (width,)),
    }
    for name, (t, letters, shape) in expected.items():
        if t.shape != shape:
            raise ValueError(
                f"local_temporal: {name} must have shape {letters} = {shape_text(shape)}, got {shape_text(t.shape)}"
            )
        if t.dtype != x.dtype:
            raise ValueError(f"local_temporal: {name} must be {x.dtype} like x, got {t.dtype}")
    if not 0 <= num_prefix_tokens <= x.shape[2]:
        raise ValueError(f"local_temporal: num_prefix_tokens must be in 0..L = {x.shape[2]}, got {num_prefix_tokens}")


def _reference(x, *args):
    *weights, num_prefix_tokens, eps, return_hidden = args
    _check(x, *weights, num_prefix_tokens)
    hidden = reference.local_temporal_hidden(x, *weights[:4], eps).reshape(-1, weights[2].shape[0])
    return (
        reference.local_temporal(x, *weights, num_prefix_tokens, eps).contiguous(),
        hidden if return_hidden else hidden.new_empty(0, hidden.shape[1]),
    )


def _fake(x, *args):
    *weights, num_prefix_tokens, _, return_hidden = args
    _check(x, *weights, num_prefix_tokens)
    rows = x.shape[0] * x.shape[1] * x.shape[2] if return_hidden else 0
    return x.new_empty(x.shape), x.new_empty(rows, weights[2].shape[0])


def _bwd_reference(dout, x, hidden, *args):
    *weights, num_prefix_tokens, eps = args

    def forward(x, *weights):
        return reference.local_temporal(x, *weights, num_prefix_tokens, eps)

    return reference.gradients(forward, (x, *weights), dout)


def _bwd_fake(dout, x, hidden, *args):
    return tuple(t.new_empty(t.shape) for t in (x, *args[:8]))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.num_prefix_tokens, ctx.eps, _ = inputs
    ctx.save_for_backward(tensors[0], output[1], *tensors[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx, dout, dhidden):
    if dout is None:
        return (None,) * 12
    return *_backward(dout, *ctx.saved_tensors, ctx.num_prefix_tokens, ctx.eps), None, None, None


_forward = register(
    "local_temporal_fwd",
    reference=_reference,
    fake=_fake,
    backward=_autograd,
    setup_context=_setup_context,
    autocast=LOW,
)
_backward = register("local_temporal_bwd", reference=_bwd_reference, fake=_bwd_fake)
