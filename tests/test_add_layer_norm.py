"""add_layer_norm: kernels against the float64 truth, both outputs' gradients, and errors."""

import pytest
import torch

from mplug2 import ops
from mplug2.ops import reference
from tolerances import LOCAL_LONG_SUM, assert_close

SHAPES = [(1, 8), (5, 2), (3, 97), (2, 5, 257), (7, 1025), (64, 768)]


def _run(function, tensors, kind, dtype):
    leaves = [t.to(dtype).to(kind).requires_grad_() for t in tensors]
    outs = function(*leaves, eps=1e-5)
    g = torch.Generator().manual_seed(1)
    douts = [torch.randn(out.shape, generator=g, dtype=torch.float64).to(dtype).to(kind) for out in outs]
    torch.autograd.backward(outs, douts)
    return outs, [t.grad for t in leaves]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients(shape, dtype):
    g = torch.Generator().manual_seed(0)
    width = shape[-1]
    tensors = [torch.randn(s, generator=g, dtype=torch.float64) for s in (shape, shape, (width,), (width,))]
    outs, grads = _run(ops.add_layer_norm, tensors, dtype, dtype)
    base_outs, base_grads = _run(reference.add_layer_norm, tensors, dtype, dtype)
    true_outs, true_grads = _run(reference.add_layer_norm, tensors, torch.float64, dtype)
    for triple in zip(outs, base_outs, true_outs, strict=True):
        assert_close(*triple)
    for triple in zip(grads, base_grads, true_grads, strict=True):
        assert_close(*triple, local=LOCAL_LONG_SUM)


@pytest.mark.parametrize("output", [0, 1])
def test_gradient_of_one_output_alone(output):
    x, residual = (torch.randn(4, 16, requires_grad=True) for _ in range(2))
    weight, bias = torch.ones(16), torch.zeros(16)
    ops.add_layer_norm(x, residual, weight, bias, eps=1e-5)[output].square().sum().backward()
    copies = [t.detach().clone().requires_grad_() for t in (x, residual)]
    reference.add_layer_norm(*copies, weight, bias, eps=1e-5)[output].square().sum().backward()
    torch.testing.assert_close(x.grad, copies[0].grad)
    torch.testing.assert_close(residual.grad, copies[1].grad)


def test_offset_far_above_the_spread_keeps_its_digits():
    x = torch.randn(4, 1024, generator=torch.Generator().manual_seed(0)) + 300
    args = (torch.zeros(4, 1024), torch.ones(1024), torch.zeros(1024))
    actual, _ = ops.add_layer_norm(x, *args, eps=1e-5)
    base, _ = reference.add_layer_norm(x, *args, eps=1e-5)
    true, _ = reference.add_layer_norm(x.double(), *(t.double() for t in args), eps=1e-5)
    assert_close(actual, base, true)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (0,)])
def test_empty(shape):
    x, residual = (torch.zeros(shape, requires_grad=True) for _ in range(2))
    weight, bias = (torch.ones(shape[-1], requires_grad=True) for _ in range(2))
    normed, total = ops.add_layer_norm(x, residual, weight, bias, eps=1e-5)
    assert normed.shape == total.shape == shape
    (normed.sum() + total.sum()).backward()
    assert weight.grad.count_nonzero() == 0


def test_errors_name_the_tensor():
    x, weight = torch.zeros(3, 8), torch.ones(8)
    with pytest.raises(RuntimeError, match=r"add_layer_norm: residual must have the shape of x, \[3, 8\], got \[8\]"):
        ops.add_layer_norm(x, x[0], weight, weight, eps=1e-5)
    with pytest.raises(RuntimeError, match=r"add_layer_norm: weight must have shape \[D\] = \[8\], got \[7\]"):
        ops.add_layer_norm(x, x, weight[:7], weight, eps=1e-5)
    with pytest.raises(RuntimeError, match="residual must be float32 like the first argument, got float64"):
        ops.add_layer_norm(x, x.double(), weight, weight, eps=1e-5)
