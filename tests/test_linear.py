"""linear: every epilogue against the float64 truth, the activations over their whole range, and errors."""

from contextlib import nullcontext

import pytest
import torch

from mplug2 import ops
from mplug2.ops import reference
from tolerances import LOCAL_LONG_SUM, assert_close, assert_close_together, draws

ACTIVATIONS = [None, "gelu", "quick_gelu"]
FORWARD, BACKWARD = "linear_fwd", "linear_bwd"


def _run(function, tensors, kind, dtype, activation, device="cpu", needing=("x", "weight", "bias", "residual")):
    """Output and gradients by name, on the CPU, of values that are exact in `dtype`."""
    leaves = {name: t.to(dtype).to(device, kind).requires_grad_(name in needing) for name, t in tensors.items()}
    out = function(**leaves, activation=activation)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    out.backward(dout.to(device, kind))
    return out.detach().cpu(), {name: t.grad.cpu() for name, t in leaves.items() if name in needing}


def _tensors(shape, parts=("bias", "residual"), seed=0):
    *rows, width, out_width = shape
    g = torch.Generator().manual_seed(seed)
    shapes = {"x": (*rows, width), "weight": (out_width, width), "bias": (out_width,), "residual": (*rows, out_width)}
    return {
        name: torch.randn(s, generator=g, dtype=torch.float64) * (width**-0.5 if name == "weight" else 1)
        for name, s in shapes.items()
        if name in ("x", "weight", *parts)
    }


def _launches(tensors, activation):
    """The kernels of ours that an epilogue takes: alone, bias and residual are part of the product."""
    if tensors["weight"].shape[0] % 8:
        return []
    has_pass = activation is not None or ("bias" in tensors and "residual" in tensors)
    return [FORWARD, BACKWARD] if has_pass else [BACKWARD]


def _compare(backend, several, dtype, activation, needing=("x", "weight", "bias", "residual")):
    runs = []
    for tensors in several:
        needing = [name for name in needing if name in tensors]
        launches = _launches(tensors, activation)
        if needing == ["residual"]:
            launches.remove(BACKWARD)  # its gradient is dout
        with backend.launching(*launches):
            actual = _run(ops.linear, tensors, dtype, dtype, activation, backend.device, needing)
        name = activation or "none"
        baseline = _run(reference.linear, tensors, dtype, dtype, name, needing=needing)
        truth = _run(reference.linear, tensors, torch.float64, dtype, name, needing=needing)
        runs.append([{"out": out, **grads} for out, grads in (actual, baseline, truth)])
    assert_close_together(runs)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("parts", [(), ("bias",), ("residual",), ("bias", "residual")], ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 5), (2, 9, 33, 17), (97, 64, 130), (5, 16, 8), (3, 37, 24, 264)], ids=str)
def test_output_and_gradients(backend, shape, parts, activation, which):
    _compare(
        backend, draws(lambda seed: _tensors(shape, parts, seed), backend.most_draws), backend.dtypes[which], activation
    )


@pytest.mark.parametrize("needing", [("x",), ("weight",), ("bias",), ("residual",), ("x", "bias")], ids=str)
def test_gradients_of_some_inputs(backend, needing):
    _compare(
        backend,
        draws(lambda seed: _tensors((5, 16, 24), seed=seed), backend.most_draws),
        backend.dtypes[0],
        "quick_gelu",
        needing,
    )


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_activation_and_its_slope_over_the_whole_range(backend, activation, which):
    dtype = backend.dtypes[which]
    far = torch.tensor([-3e38, -6e4, -1e4, -88.0, 88.0, 1e4, 6e4, 3e38, -0.0])
    x = torch.cat([torch.linspace(-12, 12, 20001), far]).to(dtype)
    x = x[x.isfinite()]
    runs = []
    with backend.launching(FORWARD, BACKWARD):
        for function, name, kind, device in (
            (ops.linear, activation, dtype, backend.device),
            (reference.linear, activation, dtype, "cpu"),
            (reference.linear, activation, torch.float64, "cpu"),
        ):
            leaf = x.to(device, kind)[:, None].requires_grad_()
            out = function(leaf, torch.ones(8, 1, dtype=kind, device=device), activation=name)
            out[torch.isfinite(out)].sum().backward()
            runs.append((out.detach().cpu(), leaf.grad.cpu()))
    inside = x.abs() <= 12  # beyond, large values would hide every error
    for actual, base, true in zip(*runs, strict=True):
        assert_close(actual[inside], base[inside], true[inside])
        torch.testing.assert_close(actual[~inside], true[~inside].to(dtype))


def test_infinities_and_nan_go_through(backend):
    x = torch.tensor([[float("inf")], [float("nan")], [float("-inf")]], dtype=backend.dtypes[0], device=backend.device)
    for activation in ACTIVATIONS:
        out = ops.linear(x, x.new_ones(8, 1), activation=activation)
        assert (out[0] == float("inf")).all()
        assert out[1].isnan().all()
        assert (out[2] == (float("-inf") if activation is None else 0)).all()


VIEWS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every other row": lambda t: t.repeat_interleave(2, 0)[::2],
    "columns of a wider tensor": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "2 bytes past an aligned address": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t),
    "expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_views_give_the_bits_of_their_copies(backend, view, activation):
    """Of what our passes read: residual, dout and pre."""
    tensors = {name: t.to(backend.device, backend.dtypes[0]) for name, t in _tensors((6, 16, 24)).items()}
    x, weight, bias, residual = tensors.values()
    residual = view(residual)
    # NOTE: not .contiguous(), which leaves a misaligned tensor where it is.
    copy = residual.clone(memory_format=torch.contiguous_format)
    with backend.launching(FORWARD):
        out, pre = torch.ops.mplug2.linear_fwd(x, weight, bias, activation, residual, True)
    expected, expected_pre = torch.ops.mplug2.linear_fwd(x, weight, bias, activation, copy, True)
    assert torch.equal(out, expected)
    assert torch.equal(pre, expected_pre)
    assert torch.equal(ops.linear(x, weight, residual=residual), ops.linear(x, weight, residual=copy))
    pre = view(pre)
    with backend.launching(BACKWARD):
        grads = torch.ops.mplug2.linear_bwd(residual, x, weight, pre, activation)
    pre = pre.clone(memory_format=torch.contiguous_format)
    for grad, expected in zip(grads, torch.ops.mplug2.linear_bwd(copy, x, weight, pre, activation), strict=True):
        assert torch.equal(grad, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_views_of_the_product_s_operands(backend, activation):
    dtype, tensors = backend.dtypes[0], _tensors((4, 16, 24), ("bias",))
    tensors["x"] = tensors["x"].t().contiguous().t()
    tensors["weight"] = torch.cat([tensors["weight"]] * 2, 1)[:, :16]
    _compare(backend, [tensors], dtype, activation)


@pytest.mark.parametrize("forward", ["cpu", "emulated"])
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_forward_by_one_layer_and_backward_by_another(forward, activation):
    """Every layer saves the same pre."""
    import emulated

    emulated.load()
    layers = {"cpu": torch.ops.mplug2, "emulated": emulated.ops}
    backward = "cpu" if forward == "emulated" else "emulated"
    tensors, dtype = _tensors((29, 16, 24), ("bias",)), torch.bfloat16
    x, weight, bias = (t.to(dtype) for t in tensors.values())
    out, pre = layers[forward].linear_fwd(x, weight, bias, activation, None, True)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    grads = layers[backward].linear_bwd(dout, x, weight, pre, activation)
    _, base = _run(reference.linear, tensors, dtype, dtype, activation)
    _, true = _run(reference.linear, tensors, torch.float64, dtype, activation)
    for name, grad in zip(tensors, grads, strict=True):
        assert_close(grad, base[name], true[name], local=LOCAL_LONG_SUM)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_stride_0_gradients(backend, activation):
    grads = []
    for function, kind in ((ops.linear, backend.dtypes[0]), (reference.linear, torch.float64)):
        device = backend.device if function is ops.linear else "cpu"
        tensors = {name: t.to(backend.dtypes[0]).to(device, kind) for name, t in _tensors((5, 16, 24)).items()}
        leaves = {name: t.requires_grad_() for name, t in tensors.items()}
        function(**leaves, activation=activation or ("none" if function is reference.linear else None)).sum().backward()
        grads.append({name: t.grad.cpu() for name, t in leaves.items()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name].to(grad.dtype), atol=0.05, rtol=0.02)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (3, 0)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_empty(backend, shape, activation):
    options = {"device": backend.device, "dtype": backend.dtypes[0], "requires_grad": True}
    x, weight, bias = torch.zeros(shape, **options), torch.ones(8, shape[-1], **options), torch.ones(8, **options)
    out = ops.linear(x, weight, bias, activation=activation)
    assert out.shape == (*shape[:-1], 8)
    out.sum().backward()
    assert weight.grad.count_nonzero() == 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_inputs_are_not_written(backend, activation):
    tensors = {name: t.to(backend.device, backend.dtypes[0]) for name, t in _tensors((3, 16, 24)).items()}
    copies = {name: t.clone() for name, t in tensors.items()}
    for parts in (("residual",), ("bias",), ("bias", "residual")):
        ops.linear(**{name: tensors[name] for name in ("x", "weight", *parts)}, activation=activation)
    x, weight, _, dout = tensors.values()
    pre = torch.nn.functional.linear(x, weight)
    copies["pre"] = pre.clone()
    torch.ops.mplug2.linear_bwd(dout, x, weight, pre, activation or "none")
    for name, t in {**tensors, "pre": pre}.items():
        assert torch.equal(t, copies[name]), name


def test_the_same_bits_every_time(backend):
    tensors, dtype = _tensors((301, 16, 264)), backend.dtypes[0]
    first = _run(ops.linear, tensors, dtype, dtype, "quick_gelu", backend.device)
    schedules = [nullcontext()] * 2
    if backend.name == "emulated":
        import emulated

        schedules = [emulated.schedule("plain"), emulated.schedule("skewed", 1), emulated.schedule("random", 7)]
    for schedule in schedules:
        with schedule:
            again = _run(ops.linear, tensors, dtype, dtype, "quick_gelu", backend.device)
        assert torch.equal(first[0], again[0])
        for name, grad in first[1].items():
            assert torch.equal(grad, again[1][name]), name


def test_errors_name_the_tensor(backend):
    x, weight = torch.zeros(3, 8, device=backend.device), torch.ones(5, 8, device=backend.device)
    with pytest.raises(ValueError, match="activation must be None, 'gelu' or 'quick_gelu', got 'relu'"):
        ops.linear(x, weight, activation="relu")
    with pytest.raises(RuntimeError, match=r"linear: weight must have shape \[out, D\] = \[\*, 8\], got \[8, 5\]"):
        ops.linear(x, weight.t())
    with pytest.raises(RuntimeError, match=r"linear: bias must have shape \[out\] = \[5\], got \[8\]"):
        ops.linear(x, weight, x.new_zeros(8))
    with pytest.raises(RuntimeError, match=r"linear: residual must have the shape of the output"):
        ops.linear(x, weight, residual=x)
    with pytest.raises(RuntimeError, match="weight must be float32 like the first argument, got bfloat16"):
        ops.linear(x, weight.bfloat16())
    with pytest.raises(RuntimeError, match=r"linear: pre must have the shape of dout, \[3, 5\], got \[0\]"):
        torch.ops.mplug2.linear_bwd(x.new_zeros(3, 5), x, weight, x.new_zeros(0), "gelu")
