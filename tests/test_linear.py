"""linear: every epilogue against the float64 truth, the activations over their whole range, and errors."""

from contextlib import nullcontext
from itertools import product

import pytest
import torch

from mplug2 import ops, proofs
from mplug2.ops import reference
from tolerances import LOCAL_LONG_SUM, assert_close, assert_close_together, draws

ACTIVATIONS = [None, "gelu", "quick_gelu"]
FORWARD, BACKWARD = "linear_fwd", "linear_bwd"
PRODUCT = "linear_fwd_product"


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
@pytest.mark.parametrize(
    "shape", [(1, 3, 5), (2, 9, 33, 17), (97, 64, 130), (5, 16, 8), (7, 40, 70), (3, 37, 24, 264)], ids=str
)
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


def _far(shape, small):
    """Zeros of more than 2^31 elements that take no memory, whose last rows and columns are `small`."""
    import emulated

    assert shape[0] * shape[1] > 2**31
    far = emulated.sparse(*shape, dtype=small.dtype)
    far[-small.shape[0] :, -small.shape[1] :] = small
    return far


def test_forward_pass_past_2_to_the_31():
    """The pass alone, its last block of 1,024 chunks."""
    import emulated

    emulated.load()
    pre, residual = (t.bfloat16() for t in torch.randn(2, 1, 1024 * 8, generator=torch.Generator().manual_seed(0)))
    out, shape = torch.empty_like(pre), (2**18 + 1, 1024 * 8)
    torch.ops.mplug2_samples.linear_fwd_pass(pre, residual, out)
    tensors = [_far(shape, t) for t in (pre, residual, torch.zeros_like(out))]
    with emulated.blocks(shape[0] - 1, shape[0]):
        torch.ops.mplug2_samples.linear_fwd_pass(*tensors)
    assert torch.equal(tensors[2][-1:], out)


def test_backward_pass_past_2_to_the_31():
    """The pass alone, its last block of 16 rows and 256 columns."""
    import emulated

    emulated.load()
    dout, pre = (t.bfloat16() for t in torch.randn(2, 16, 256, generator=torch.Generator().manual_seed(0)))
    dpre, parts = torch.empty_like(pre), torch.empty(1, 256)
    torch.ops.mplug2_samples.linear_bwd_pass(dout, pre, dpre, parts)
    rows, width = shape = 2**11 + 16, 2**20
    tensors = [_far(shape, t) for t in (dout, pre, torch.zeros_like(dpre))]
    far_parts = emulated.sparse(rows // 16, width, dtype=torch.float32)
    blocks = rows // 16 * width // 256
    with emulated.blocks(blocks - 1, blocks):
        torch.ops.mplug2_samples.linear_bwd_pass(*tensors, far_parts)
    assert torch.equal(tensors[2][-16:, -256:], dpre)
    assert torch.equal(far_parts[-1:, -256:], parts)


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


# ---- the product with its epilogue in one kernel: GPUs of capability 8.x ---------------------------------------------
@pytest.fixture
def product_rows(backend):
    """Rows that, added to a few, make a product of enough tiles for such a GPU. On a CPU plain sums stand in for
    CUTLASS's loop: what is run of ours is the host code and the epilogue."""
    if backend.name == "emulated":
        import emulated

        with emulated.device(num_multiprocessors=1):
            yield 0
        return
    properties = torch.cuda.get_device_properties(backend.device)
    if properties.major != 8:
        pytest.skip("the GPU is not of capability 8.x")
    yield 128 * properties.multi_processor_count


on_gpus = pytest.mark.parametrize("backend", ["emulated", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)


def _served(backend):
    if backend.name == "emulated":
        library = torch.ops.mplug2_emulated_cuda
    else:
        library = torch.ops.mplug2_cuda
    return {instance.name: instance.served for instance in proofs.instances(library)}


def _forms(backend, function):
    """How often each form served while `function` ran, without those that did not."""
    before = _served(backend)
    function()
    return {name: times - before[name] for name, times in _served(backend).items() if times > before[name]}


@on_gpus
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("parts", [(), ("bias",), ("residual",), ("bias", "residual")], ids=str)
@pytest.mark.parametrize("shape", [(1, 8, 8), (129, 40, 264), (3, 37, 24, 16)], ids=str)
def test_product_with_its_epilogue(backend, product_rows, shape, parts, activation, which):
    *rows, depth, width = shape
    shape = (*rows[:-1], rows[-1] + product_rows, depth, width)
    several = draws(lambda seed: _tensors(shape, parts, seed), backend.most_draws)
    kind = ("bf16", "fp16")[which]
    forms = _forms(backend, lambda: _compare(backend, several, backend.dtypes[which], activation))
    served = f"{PRODUCT}_{kind}" if activation or "residual" in parts else f"{FORWARD}_{kind}"
    assert forms == {served: len(several), f"{BACKWARD}_{kind}": len(several)}


@on_gpus
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_product_keeps_pre_and_writes_nothing_else(backend, product_rows, activation):
    tensors = _tensors((5 + product_rows, 16, 24))
    x, weight, bias, residual = (t.to(backend.device, backend.dtypes[0]) for t in tensors.values())
    kept = [t.clone() for t in (x, weight, bias, residual)]
    name = activation or "none"

    def run(return_pre):
        return torch.ops.mplug2.linear_fwd(x, weight, bias, name, residual, return_pre)

    assert set(_forms(backend, lambda: run(True))) == {f"{PRODUCT}_bf16"}
    (out, pre), (alone, none) = run(True), run(False)
    assert torch.equal(out, alone)
    assert none.shape == (0,)
    assert all(map(torch.equal, (x, weight, bias, residual), kept))
    truth = reference.linear(x.cpu().double(), weight.cpu().double(), bias.cpu().double())
    assert_close(pre.cpu(), reference.linear(x, weight, bias).cpu(), truth)


@on_gpus
def test_product_rounds_once(backend, product_rows):
    """Sums are exact in float32, so out has one right value, which a pass over a rounded product would miss."""
    g = torch.Generator().manual_seed(0)
    rows, depth, width = 64 + product_rows, 16, 24
    shapes = ((rows, depth), (width, depth), (width,), (rows, width))
    x, weight, bias, residual = (torch.randint(-64, 65, s, generator=g).to(torch.float64) / 16 for s in shapes)
    given = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    given = {name: t.to(backend.device, torch.bfloat16) for name, t in given.items()}
    out, pre = torch.ops.mplug2.linear_fwd(given["x"], given["weight"], given["bias"], "none", given["residual"], True)
    exact = x @ weight.t() + bias
    assert torch.equal(pre.cpu(), exact.to(torch.bfloat16))
    assert torch.equal(out.cpu(), (exact + residual).to(torch.bfloat16))
    assert not torch.equal(out.cpu(), (exact.to(torch.bfloat16).double() + residual).to(torch.bfloat16))


@on_gpus
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_product_of_views_gives_the_bits_of_their_copies(backend, product_rows, view):
    tensors = {n: t.to(backend.device, backend.dtypes[0]) for n, t in _tensors((6 + product_rows, 16, 24)).items()}
    for name in ("x", "residual"):
        views = {n: view(t) if n == name else t for n, t in tensors.items()}
        copies = {n: t.clone(memory_format=torch.contiguous_format) for n, t in views.items()}
        outs = []

        def run(views=views, copies=copies, outs=outs):
            outs += (ops.linear(**given, activation="gelu") for given in (views, copies))

        assert _forms(backend, run) == {f"{PRODUCT}_bf16": 2}
        assert torch.equal(*outs)


DISPATCH = {
    "8.0": ({}, {}, PRODUCT),
    "8.6": ({"capability": 86, "max_shared_bytes": 99 * 1024}, {}, PRODUCT),
    "8.9": ({"capability": 89, "max_shared_bytes": 99 * 1024}, {}, PRODUCT),
    "9.0": ({"capability": 90}, {}, FORWARD),
    "12.0": ({"capability": 120}, {}, FORWARD),
    "as many tiles as multiprocessors": ({"num_multiprocessors": 4}, {}, PRODUCT),
    "fewer": ({"num_multiprocessors": 5}, {}, FORWARD),
    "D no multiple of 8": ({}, {"depth": 20}, FORWARD),
    "bias alone": ({}, {"activation": None}, FORWARD),
    "weights that are a view": ({}, {"weight": VIEWS["columns of a wider tensor"]}, FORWARD),
    "transposed weights": ({}, {"weight": VIEWS["transposed"]}, FORWARD),
    "misaligned weights": ({}, {"weight": VIEWS["2 bytes past an aligned address"]}, FORWARD),
    "misaligned bias": ({}, {"bias": VIEWS["2 bytes past an aligned address"]}, FORWARD),
}


@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
@pytest.mark.parametrize(("gpu", "change", "form"), DISPATCH.values(), ids=DISPATCH.keys())
def test_form_by_capability_and_call(backend, gpu, change, form):
    """129 rows and 264 columns are 2 x 2 tiles."""
    import emulated

    change = {"depth": 24, "activation": "quick_gelu", **change}
    depth, activation = change.pop("depth"), change.pop("activation")
    tensors = {n: t.to(torch.bfloat16) for n, t in _tensors((129, depth, 264), ("bias",)).items()}
    tensors = {name: change.get(name, lambda t: t)(t) for name, t in tensors.items()}
    with emulated.device(**{"num_multiprocessors": 1, **gpu}):
        forms = _forms(backend, lambda: ops.linear(**tensors, activation=activation))
    assert forms == {f"{form}_bf16": 1}


@pytest.mark.parametrize("activation", ["none", "gelu", "quick_gelu"])
def test_epilogue_in_float32(activation):
    """activation(sum + bias) + residual against float64, before anything is rounded to 16 bits."""
    import emulated

    emulated.load()
    g = torch.Generator().manual_seed(0)
    sums = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([-3e38, -1e4, 1e4, 3e38])])
    for (bias, residual), sign in product(((0.0, 0.0), (1.5, 0.0), (0.0, 2.25), (-0.75, -3.5)), (1, -1)):
        some = [torch.full_like(sums, sign * value) for value in (bias, residual)]
        shuffled = sums[torch.randperm(len(sums), generator=g)]
        out = torch.empty_like(sums)
        torch.ops.mplug2_samples.linear_epilogue(shuffled, *some, activation, out)
        z = (shuffled + some[0]).double()  # of which the activation is taken, in float32
        value = reference.ACTIVATIONS[activation](z)
        assert (out - (value + some[1])).abs().le(2e-6 * (value.abs() + some[1].abs()) + 3e-7).all()
