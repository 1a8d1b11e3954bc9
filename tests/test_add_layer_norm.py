"""add_layer_norm: kernels against the float64 truth, both outputs' gradients, and errors."""

import pytest
import torch

import emulated
from mplug2 import ops
from mplug2.ops import reference
from tolerances import LOCAL_LONG_SUM, assert_close

# Any width, and what the CUDA kernels take: multiples of 8 up to 4,096 in each of their layouts.
SHAPES = [(1, 8), (5, 2), (3, 97), (2, 5, 257), (7, 1025), (64, 768)]
SHAPES += [
    (5, 136),
    (257, 8),
    (7, 512),
    (3, 3, 768),
    (257, 1024),
    (3, 1032),
    (5, 1536),
    (2, 2056),
    (3, 4096),
    (2, 4104),
]
FORWARD, BACKWARD = "add_layer_norm_fwd", "add_layer_norm_bwd"


def _has_cuda_kernel(shape) -> bool:
    return shape[-1] % 8 == 0 and shape[-1] <= 4096


def _tensors(shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64) for s in (shape, shape, shape[-1:], shape[-1:])]


def _run(function, tensors, kind, dtype, device="cpu"):
    """Outputs and gradients, on the CPU, of values that are exact in `dtype`."""
    leaves = [t.to(dtype).to(device, kind).requires_grad_() for t in tensors]
    outs = function(*leaves, eps=1e-5)
    g = torch.Generator().manual_seed(1)
    douts = [torch.randn(out.shape, generator=g, dtype=torch.float64).to(dtype).to(device, kind) for out in outs]
    torch.autograd.backward(outs, douts)
    return [out.detach().cpu() for out in outs], [t.grad.cpu() for t in leaves]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients(backend, shape, which):
    dtype, tensors = backend.dtypes[which], _tensors(shape)
    with backend.launching(*[FORWARD, BACKWARD] if _has_cuda_kernel(shape) else []):
        outs, grads = _run(ops.add_layer_norm, tensors, dtype, dtype, backend.device)
    base_outs, base_grads = _run(reference.add_layer_norm, tensors, dtype, dtype)
    true_outs, true_grads = _run(reference.add_layer_norm, tensors, torch.float64, dtype)
    for triple in zip(outs, base_outs, true_outs, strict=True):
        assert_close(*triple)
    for triple in zip(grads, base_grads, true_grads, strict=True):
        assert_close(*triple, local=LOCAL_LONG_SUM)


def _backward_of(function, tensors, needing, loss):
    leaves = [t.detach().clone().requires_grad_(i in needing) for i, t in enumerate(tensors)]
    loss(*function(*leaves, eps=1e-5)).backward()
    return [leaf.grad for leaf in leaves]


def _compare_backward(backend, tensors, needing, loss):
    """Gradients of the inputs `needing` some, and of them alone, against the reference's."""
    dtype = tensors[0].dtype
    with backend.launching(FORWARD, BACKWARD):
        grads = _backward_of(ops.add_layer_norm, [t.to(backend.device) for t in tensors], needing, loss)
    base = _backward_of(reference.add_layer_norm, tensors, needing, loss)
    true = _backward_of(reference.add_layer_norm, [t.double() for t in tensors], needing, loss)
    for i, triple in enumerate(zip(grads, base, true, strict=True)):
        if i in needing:
            assert_close(triple[0].cpu(), *triple[1:], local=LOCAL_LONG_SUM, dtype=dtype)
        else:
            assert triple[0] is None


@pytest.mark.parametrize("output", [0, 1])
def test_gradient_of_one_output_alone(backend, output):
    tensors = [t.to(backend.dtypes[0]) for t in _tensors((4, 16))]
    _compare_backward(backend, tensors, (0, 1), lambda *outs: outs[output].square().sum())


@pytest.mark.parametrize("needing", [(0,), (1,), (2,), (3,), (0, 3)], ids=str)
def test_gradients_of_some_inputs_from_stride_0_gradients(backend, needing):
    tensors = [t.to(backend.dtypes[0]) for t in _tensors((5, 136))]
    _compare_backward(backend, tensors, needing, lambda normed, total: normed.sum() + 2 * total.sum())


def test_offset_far_above_the_spread_keeps_its_digits(backend):
    dtype = backend.dtypes[-1]
    x = (torch.randn(4, 1024, generator=torch.Generator().manual_seed(0)) + 300).to(dtype)
    args = [t.to(dtype) for t in (torch.zeros(4, 1024), torch.ones(1024), torch.zeros(1024))]
    with backend.launching(FORWARD):
        actual, _ = ops.add_layer_norm(*(t.to(backend.device) for t in (x, *args)), eps=1e-5)
    base, _ = reference.add_layer_norm(x, *args, eps=1e-5)
    true, _ = reference.add_layer_norm(x.double(), *(t.double() for t in args), eps=1e-5)
    assert_close(actual.cpu(), base, true)


VIEWS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every other row": lambda t: t.repeat_interleave(2, 0)[::2],
    "columns of a wider tensor": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "2 bytes past an aligned address": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t),
    "expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_views_give_the_bits_of_their_copies(backend, view):
    x, residual, weight, bias = (t.to(backend.device, backend.dtypes[0]) for t in _tensors((6, 264)))
    x, residual = view(x), view(residual)
    weight, bias = (torch.cat([t.new_zeros(3), t])[3:] for t in (weight, bias))
    dnormed, dsum = view(residual), view(x)
    with backend.launching(FORWARD, BACKWARD):
        normed, total = ops.add_layer_norm(x, residual, weight, bias, eps=1e-5)
        grads = torch.ops.mplug2.add_layer_norm_bwd(dnormed, dsum, view(total), weight, bias, 1e-5)
    # NOTE: not .contiguous(), which leaves a misaligned tensor where it is.
    copies = [t.clone(memory_format=torch.contiguous_format) for t in (x, residual, weight, bias)]
    expected, copied_total = ops.add_layer_norm(*copies, eps=1e-5)
    assert torch.equal(normed, expected)
    assert torch.equal(total, copied_total)
    copies = [t.clone(memory_format=torch.contiguous_format) for t in (dnormed, dsum, view(total), weight, bias)]
    for grad, expected in zip(grads, torch.ops.mplug2.add_layer_norm_bwd(*copies, 1e-5), strict=True):
        assert torch.equal(grad, expected)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (0,)])
def test_empty(backend, shape):
    options = {"device": backend.device, "dtype": backend.dtypes[0], "requires_grad": True}
    x, residual = (torch.zeros(shape, **options) for _ in range(2))
    weight, bias = (torch.ones(shape[-1], **options) for _ in range(2))
    normed, total = ops.add_layer_norm(x, residual, weight, bias, eps=1e-5)
    assert normed.shape == total.shape == shape
    (normed.sum() + total.sum()).backward()
    assert weight.grad.shape == bias.grad.shape == shape[-1:]
    assert weight.grad.count_nonzero() == bias.grad.count_nonzero() == 0


@pytest.mark.parametrize("width", [136, 2048])
def test_nan_stays_in_its_rows(backend, width):
    x, residual, weight, bias = (t.to(backend.device, backend.dtypes[0]) for t in _tensors((6, width)))
    dnormed, dsum = residual.clone(), x.clone()
    clean = ops.add_layer_norm(x, residual, weight, bias, eps=1e-5)
    clean_dx = torch.ops.mplug2.add_layer_norm_bwd(dnormed, dsum, clean[1], weight, bias, 1e-5)[0]
    rows = torch.tensor([1, 4], device=backend.device)
    others = [0, 2, 3, 5]
    x[rows, 7] = torch.nan
    with backend.launching(FORWARD, BACKWARD):
        normed, total = ops.add_layer_norm(x, residual, weight, bias, eps=1e-5)
        dx = torch.ops.mplug2.add_layer_norm_bwd(dnormed, dsum, total, weight, bias, 1e-5)[0]
    assert normed[rows].isnan().all()
    assert dx[rows].isnan().all()
    assert total.isnan().sum() == 2
    for actual, expected in ((normed, clean[0]), (total, clean[1]), (dx, clean_dx)):
        assert torch.equal(actual[others], expected[others])


def test_the_same_bits_every_time(backend):
    tensors, dtype = _tensors((257, 768)), backend.dtypes[0]
    outs, grads = _run(ops.add_layer_norm, tensors, dtype, dtype, backend.device)
    for _ in range(3):
        outs_again, grads_again = _run(ops.add_layer_norm, tensors, dtype, dtype, backend.device)
        for one, other in zip(outs + grads, outs_again + grads_again, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("width", [136, 1024, 2048])
def test_the_same_bits_in_any_order_of_warps(width):
    x, residual, weight, bias = (t.bfloat16() for t in _tensors((37, width)))

    def run():
        normed, total = emulated.ops.add_layer_norm_fwd(x, residual, weight, bias, 1e-5)
        return normed, total, *emulated.ops.add_layer_norm_bwd(normed, residual, total, weight, bias, 1e-5)

    emulated.load()
    with emulated.device(num_multiprocessors=1):
        first = run()
        for order in [("plain", 0), ("skewed", 1), ("skewed", 2), ("random", 0), ("random", 1)]:
            with emulated.schedule(*order):
                for one, other in zip(first, run(), strict=True):
                    assert torch.equal(one, other)


def test_opcheck(backend):
    x, residual, weight, bias = (t.to(backend.device, backend.dtypes[0]) for t in _tensors((3, 16)))
    inputs = [t.clone().requires_grad_() for t in (x, residual, weight, bias)]
    with backend.launching(FORWARD, BACKWARD):
        torch.library.opcheck(torch.ops.mplug2.add_layer_norm_fwd.default, (*inputs, 1e-5))
        torch.library.opcheck(torch.ops.mplug2.add_layer_norm_bwd.default, (x, residual, x, weight, bias, 1e-5))


def test_errors_name_the_tensor(backend):
    x, weight = torch.zeros(3, 8, device=backend.device), torch.ones(8, device=backend.device)
    with pytest.raises(RuntimeError, match=r"add_layer_norm: residual must have the shape of x, \[3, 8\], got \[8\]"):
        ops.add_layer_norm(x, x[0], weight, weight, eps=1e-5)
    with pytest.raises(RuntimeError, match=r"add_layer_norm: weight must have shape \[D\] = \[8\], got \[7\]"):
        ops.add_layer_norm(x, x, weight[:7], weight, eps=1e-5)
    with pytest.raises(RuntimeError, match="residual must be float32 like the first argument, got float64"):
        ops.add_layer_norm(x, x.double(), weight, weight, eps=1e-5)


@pytest.mark.gpu
def test_tensors_on_two_devices():
    x, weight = torch.zeros(3, 8), torch.ones(8)
    with pytest.raises(RuntimeError, match="weight must be on cpu like the first argument, got cuda:0"):
        ops.add_layer_norm(x, x, weight.cuda(), weight, eps=1e-5)


def test_elements_past_2_to_the_31():
    def forward(x, residual):
        return emulated.ops.add_layer_norm_fwd(x, residual, weight, bias, 1e-5)

    def backward(dnormed, dsum, total):
        return emulated.ops.add_layer_norm_bwd(dnormed, dsum, total, weight, bias, 1e-5)[0]

    x, residual, weight, bias = (t.bfloat16() for t in _tensors((9, 4096)))
    normed, total = forward(x, residual)
    dx = backward(residual, x, total)
    with emulated.device(num_multiprocessors=1), emulated.counts() as counts:
        backward(residual, x, forward(x, residual)[1])
    fwd, bwd = (counts.of(name).grid[0] for name in (FORWARD, f"{BACKWARD}_rows"))  # blocks of one multiprocessor
    assert max(fwd, bwd) < 9

    # The rows of one block of a grid of 2^16 and some, among many more rows that nobody touches and that take no
    # memory. The launch that adds the parts of the weight gradients has no block of this number.
    block, grid = 300, (2**16 // (fwd * bwd) + 1) * fwd * bwd
    rows = torch.arange(9) * grid + block
    assert rows[-1] * 4096 > 2**31
    large = [torch.empty(rows[-1] + 1, 4096, dtype=torch.bfloat16) for _ in range(2)]
    large[0][rows], large[1][rows] = x, residual
    with emulated.blocks(block, block + 1):
        with emulated.device(num_multiprocessors=grid // fwd):
            large_normed, large_total = forward(*large)
        with emulated.device(num_multiprocessors=grid // bwd):
            large_dx = backward(large[1], large[0], large_total)
    assert torch.equal(large_total[rows], total)
    assert torch.equal(large_normed[rows], normed)
    assert torch.equal(large_dx[rows], dx)
