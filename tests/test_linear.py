"""linear: every epilogue against the float64 truth, the activations over their whole range, and errors."""

import pytest
import torch

from mplug2 import ops
from mplug2.ops import reference
from tolerances import LOCAL_LONG_SUM, assert_close

ACTIVATIONS = [None, "gelu", "quick_gelu"]


def _run(function, tensors, kind, dtype, activation):
    leaves = {name: t.to(dtype).to(kind).requires_grad_() for name, t in tensors.items()}
    out = function(**leaves, activation=activation)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype).to(kind)
    out.backward(dout)
    return out, {name: t.grad for name, t in leaves.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("parts", [(), ("bias",), ("residual",), ("bias", "residual")], ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 5), (2, 9, 33, 17), (97, 64, 130)], ids=str)
def test_output_and_gradients(shape, parts, activation, dtype):
    *rows, width, out_width = shape
    g = torch.Generator().manual_seed(0)
    shapes = {"x": (*rows, width), "weight": (out_width, width), "bias": (out_width,), "residual": (*rows, out_width)}
    tensors = {
        name: torch.randn(s, generator=g, dtype=torch.float64) * (width**-0.5 if name == "weight" else 1)
        for name, s in shapes.items()
        if name in ("x", "weight", *parts)
    }
    out, grads = _run(ops.linear, tensors, dtype, dtype, activation)
    name = activation or "none"
    base_out, base_grads = _run(reference.linear, tensors, dtype, dtype, name)
    true_out, true_grads = _run(reference.linear, tensors, torch.float64, dtype, name)
    assert_close(out, base_out, true_out)
    for key, grad in grads.items():
        assert_close(grad, base_grads[key], true_grads[key], local=LOCAL_LONG_SUM)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_activation_and_its_slope_over_the_whole_range(activation):
    x = torch.cat([torch.linspace(-12, 12, 20001), torch.tensor([-3e38, -1e4, -88.0, 88.0, 1e4, 3e38, -0.0])])
    runs = []
    for function, name, dtype in (
        (ops.linear, activation, torch.float32),
        (reference.linear, activation, torch.float32),
        (reference.linear, activation, torch.float64),
    ):
        leaf = x.to(dtype)[:, None].requires_grad_()
        out = function(leaf, torch.ones(1, 1, dtype=dtype), activation=name)
        out[torch.isfinite(out)].sum().backward()
        runs.append((out, leaf.grad))
    inside = x.abs() <= 12  # beyond, values of 1e38 would hide every error
    for actual, base, true in zip(*runs, strict=True):
        assert_close(actual[inside], base[inside], true[inside])
        torch.testing.assert_close(actual[~inside], true[~inside].float())


def test_infinities_and_nan_go_through():
    x = torch.tensor([[float("inf")], [float("nan")]])
    for activation in ACTIVATIONS:
        out = ops.linear(x, torch.ones(1, 1), activation=activation)
        assert out[0] == float("inf")
        assert out[1].isnan()


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (3, 0)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_empty(shape, activation):
    x = torch.zeros(shape, requires_grad=True)
    weight, bias = torch.ones(5, shape[-1], requires_grad=True), torch.ones(5, requires_grad=True)
    out = ops.linear(x, weight, bias, activation=activation)
    assert out.shape == (*shape[:-1], 5)
    out.sum().backward()
    assert weight.grad.count_nonzero() == 0


def test_inputs_are_not_written():
    x, weight, residual = torch.randn(3, 4), torch.randn(5, 4), torch.randn(3, 5)
    copies = [t.clone() for t in (x, weight, residual)]
    ops.linear(x, weight, activation="gelu", residual=residual)
    assert all(torch.equal(a, b) for a, b in zip((x, weight, residual), copies, strict=True))


def test_errors_name_the_tensor():
    x, weight = torch.zeros(3, 8), torch.ones(5, 8)
    with pytest.raises(ValueError, match="activation must be None, 'gelu' or 'quick_gelu', got 'relu'"):
        ops.linear(x, weight, activation="relu")
    with pytest.raises(RuntimeError, match=r"linear: weight must have shape \[out, D\] = \[\*, 8\], got \[8, 5\]"):
        ops.linear(x, weight.t())
    with pytest.raises(RuntimeError, match=r"linear: bias must have shape \[out\] = \[5\], got \[8\]"):
        ops.linear(x, weight, torch.zeros(8))
    with pytest.raises(RuntimeError, match=r"linear: residual must have the shape of the output"):
        ops.linear(x, weight, residual=x)
    with pytest.raises(RuntimeError, match="weight must be float32 like the first argument, got bfloat16"):
        ops.linear(x, weight.bfloat16())
