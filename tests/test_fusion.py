"""fusion: absorbed cross-attention against the definition with keys and values, in float64; masks, views, errors."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from mplug2 import ops
from tolerances import LOCAL_LONG_SUM, assert_close

FORWARD, BACKWARD = "fusion_fwd", "fusion_bwd"
NAMES = ("q", "x", "key_weight", "value_weight", "value_bias")

# (B, G, S, K, N, H, D)
SHAPES = [
    (2, 1, 5, 33, 3, 64, 96),
    (2, 5, 1, 97, 2, 64, 128),
    (1, 2, 3, 257, 2, 16, 48),
    (3, 1, 25, 7, 4, 16, 64),
    (1, 1, 2, 1025, 2, 32, 64),
    (2, 1, 4, 1, 2, 8, 16),
    (4, 2, 3, 16, 5, 5, 41),
]
MASKS = ["none", "lengths", "mask", "both", "empty"]


def _explicit(q, x, key_weight, value_weight, value_bias=None, *, key_lengths=None, key_mask=None, scale=None):
    """The definition in the dtype given, with all keys, values and scores."""
    (rows, _, heads, head_dim), (batch, keys) = q.shape, x.shape[:2]
    k, v = (
        F.linear(x, weight, bias).unflatten(-1, (heads, head_dim)).repeat_interleave(rows // batch, 0)
        for weight, bias in ((key_weight, None), (value_weight, value_bias))
    )
    seen = torch.ones(batch, keys, dtype=torch.bool)
    if key_lengths is not None:
        seen &= torch.arange(keys) < key_lengths[:, None]
    if key_mask is not None:
        seen &= key_mask
    seen = seen.repeat_interleave(rows // batch, 0)[:, None, None]
    scores = torch.einsum("bsnh,bknh->bnsk", q, k) * (head_dim**-0.5 if scale is None else scale)
    weights = scores.masked_fill(~seen, torch.finfo(q.dtype).min).softmax(-1) * seen
    return torch.einsum("bnsk,bknh->bsnh", weights, v)


def _masks(kind, batch, keys):
    g = torch.Generator().manual_seed(3)
    lengths = torch.randint(min(2, keys), keys + 1, (batch,), generator=g)
    mask = torch.rand(batch, keys, generator=g) > 0.4
    mask[:, :2] = True
    if kind == "empty":
        lengths[0], mask[-1] = 0, False
    return {
        "key_lengths": lengths if kind in ("lengths", "both", "empty") else None,
        "key_mask": mask if kind in ("mask", "both", "empty") else None,
    }


def _tensors(shape, spread=1.0):
    batch, groups, queries, keys, heads, head_dim, width = shape
    g = torch.Generator().manual_seed(0)
    sizes = {
        "q": (batch * groups, queries, heads, head_dim), "x": (batch, keys, width),
        "key_weight": (heads * head_dim, width), "value_weight": (heads * head_dim, width),
        "value_bias": (heads * head_dim,),
    }  # fmt: skip
    tensors = {name: torch.randn(size, generator=g, dtype=torch.float64) for name, size in sizes.items()}
    tensors["q"] *= spread
    for name in ("key_weight", "value_weight"):
        tensors[name] /= width**0.5
    return tensors


def _run(function, tensors, kind, dtype, device="cpu", **options):
    """Output and gradients by name, on the CPU, of values that are exact in `dtype`."""
    leaves = {name: t.to(dtype).to(device, kind).requires_grad_() for name, t in tensors.items()}
    options = {name: o.to(device) if isinstance(o, torch.Tensor) else o for name, o in options.items()}
    out = function(**leaves, **options)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    out.backward(dout.to(device, kind))
    return out.detach().cpu(), {name: t.grad.cpu() for name, t in leaves.items()}


def _compare(backend, shape, dtype, spread=1.0, **options):
    tensors = _tensors(shape, spread)
    with backend.launching(FORWARD, BACKWARD):
        out, grads = _run(ops.fusion, tensors, dtype, dtype, backend.device, **options)
    base_out, base_grads = _run(_explicit, tensors, dtype, dtype, **options)
    true_out, true_grads = _run(_explicit, tensors, torch.float64, dtype, **options)
    assert_close(out, base_out, true_out)
    for name in NAMES:
        assert_close(grads[name], base_grads[name], true_grads[name], local=LOCAL_LONG_SUM)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients(backend, shape, mask, which):
    _compare(backend, shape, backend.dtypes[which], **_masks(mask, shape[0], shape[3]))


def test_one_video(backend):
    _compare(backend, (1, 1, 2, 4097, 2, 64, 128), backend.dtypes[0])


@pytest.mark.parametrize("backend", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("which", [0, 1])
def test_a_layer_of_the_large_model(backend, which):
    _compare(backend, (1, 1, 25, 4097, 16, 64, 1024), backend.dtypes[which])


def _multiprocessors(backend, count):
    """A small GPU has few scores at a time."""
    if backend.name != "emulated":
        return nullcontext()
    import emulated

    return emulated.device(num_multiprocessors=count)


@pytest.mark.parametrize("shape", [(5, 2, 5, 257, 6, 16, 32), (2, 1, 50, 257, 6, 16, 32)], ids=["items", "rows"])
@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
def test_scores_in_several_chunks(backend, shape):
    with _multiprocessors(backend, 1):
        _compare(backend, shape, backend.dtypes[0], **_masks("both", shape[0], shape[3]))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("scale", [0.0, 0.3, 2.0, -0.2], ids=str)
def test_any_scale(backend, scale, which):
    """Up to scores in the tens."""
    options = {"scale": scale, **_masks("mask", 2, 70)}
    _compare(backend, (2, 1, 9, 70, 4, 16, 32), backend.dtypes[which], spread=1.5, **options)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_as_good_as_projected_keys_and_values(backend, shape, which):
    """The output by both rules; gradients by the local one: those of the weights sum over rows of bfloat16 as wide as
    tokens, where attention's kernel for the CPU has float32."""

    def projected(q, x, key_weight, value_weight, value_bias):
        k, v = ops.linear(x, key_weight), ops.linear(x, value_weight, value_bias)
        return ops.attention(q, *(t.unflatten(-1, q.shape[2:]) for t in (k, v)))

    tensors, dtype = _tensors(shape), backend.dtypes[which]
    out, grads = _run(ops.fusion, tensors, dtype, dtype, backend.device)
    base_out, base = _run(projected, tensors, dtype, dtype, backend.device)
    true_out, true = _run(projected, tensors, torch.float64, dtype)
    assert_close(out, base_out, true_out)
    for name, grad in grads.items():
        allowed = LOCAL_LONG_SUM * (base[name] - true[name]).abs().max()
        assert (grad - true[name]).abs().max() <= allowed, name


def test_halves_of_a_packed_projection_and_spaced_queries(backend):
    tensors = {name: t.to(backend.device, backend.dtypes[0]) for name, t in _tensors((2, 1, 5, 33, 3, 64, 96)).items()}
    packed = torch.cat([tensors["key_weight"], tensors["value_weight"]])
    views = tensors | {
        "q": torch.cat([tensors["q"]] * 3, 2)[:, :, 3:6],
        "x": torch.cat([tensors["x"]] * 2, 2)[:, :, 96:],
        "key_weight": packed[:192],
        "value_weight": packed[192:],
    }
    outs, grads = [], []
    for some in (tensors, views):
        leaves = {name: t.detach().requires_grad_() for name, t in some.items()}
        out = ops.fusion(**leaves)
        out.sum().backward()
        assert out.flatten(2).data_ptr() == out.data_ptr()
        outs.append(out)
        grads.append([t.grad for t in leaves.values()])
    # On a GPU other distances between rows may be another kernel of cuBLAS: not the same bits.
    torch.testing.assert_close(*outs)
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_hidden_tokens_are_never_read(backend):
    tensors = {name: t.to(backend.device, backend.dtypes[0]) for name, t in _tensors((2, 1, 5, 33, 3, 64, 96)).items()}
    lengths = torch.tensor([20, 0], device=backend.device)
    results = []
    for value in (0.0, torch.nan):
        leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        with torch.no_grad():
            leaves["x"][0, 20:] = value
            leaves["x"][1] = value
        out = ops.fusion(**leaves, key_lengths=lengths)
        out.float().square().sum().backward()
        results.append([out, *(t.grad for t in leaves.values())])
    for zero, nan in zip(*results, strict=True):
        assert torch.equal(zero, nan)
    out, dq, dx, *_ = results[0]
    assert out[1].count_nonzero() == dq[1].count_nonzero() == dx[1].count_nonzero() == 0


def test_nan_stays_in_its_item(backend):
    tensors = {name: t.to(backend.device, backend.dtypes[0]) for name, t in _tensors((2, 1, 5, 33, 3, 64, 96)).items()}
    tensors["x"][0, 3] = torch.nan
    out = ops.fusion(**tensors)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


def test_what_is_kept_for_the_backward_pass(backend):
    tensors = {name: t.to(backend.device, backend.dtypes[0]) for name, t in _tensors((2, 2, 3, 37, 2, 16, 48)).items()}
    mask = _masks("mask", 2, 37)["key_mask"].to(backend.device)
    arguments = [tensors[name] for name in NAMES[:4]]
    out, weights, context = torch.ops.mplug2.fusion_fwd(*arguments, mask, 0.25, True)
    assert weights.shape == (2, 12, 40)
    assert weights[:, :, :37].masked_select(~mask[:, None]).count_nonzero() == weights[:, :, 37:].count_nonzero() == 0
    torch.testing.assert_close(weights.float().sum(-1), torch.ones(2, 12, device=backend.device), rtol=0.01, atol=0)
    torch.testing.assert_close(context, weights[:, :, :37] @ tensors["x"])
    again, *nothing = torch.ops.mplug2.fusion_fwd(*arguments, mask, 0.25, False)
    assert torch.equal(again, out)
    assert [t.numel() for t in nothing] == [0, 0]


@pytest.mark.parametrize("forward", ["cpu", "emulated"])
def test_forward_by_one_layer_and_backward_by_another(forward):
    import emulated

    emulated.load()
    layers = {"cpu": torch.ops.mplug2, "emulated": emulated.ops}
    backward = layers["cpu" if forward == "emulated" else "emulated"].fusion_bwd
    tensors, dtype = _tensors((2, 1, 5, 33, 3, 64, 96)), torch.bfloat16
    del tensors["value_bias"]
    q, *rest = (t.to(dtype) for t in tensors.values())
    out, *saved = layers[forward].fusion_fwd(q, *rest, None, 0.125, True)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    grads = backward(dout, q, *rest, *saved, 0.125)
    base_out, base = _run(_explicit, tensors, dtype, dtype)
    true_out, true = _run(_explicit, tensors, torch.float64, dtype)
    assert_close(out, base_out, true_out)
    for name, grad in zip(tensors, grads, strict=True):
        assert_close(grad, base[name], true[name], local=LOCAL_LONG_SUM)


def test_the_same_bits_every_time(backend):
    tensors, dtype = _tensors((2, 2, 3, 300, 2, 16, 48)), backend.dtypes[0]
    options = _masks("both", 2, 300)
    first = _run(ops.fusion, tensors, dtype, dtype, backend.device, **options)
    schedules = [nullcontext()] * 2
    if backend.name == "emulated":
        import emulated

        schedules = [emulated.schedule("plain"), emulated.schedule("skewed", 1), emulated.schedule("random", 7)]
    for schedule in schedules:
        with schedule:
            again = _run(ops.fusion, tensors, dtype, dtype, backend.device, **options)
        assert torch.equal(first[0], again[0])
        for name in NAMES:
            assert torch.equal(first[1][name], again[1][name]), name


WITHOUT_CUDA_KERNEL = {
    "float32": (torch.float32, {}, (2, 1, 5, 33, 3, 64, 96)),
    "rows longer than shared memory": (torch.bfloat16, {"max_shared_bytes": 4096}, (1, 1, 2, 1025, 1, 8, 16)),
    "no queries": (torch.bfloat16, {}, (2, 1, 0, 33, 3, 64, 96)),
    "no keys": (torch.bfloat16, {}, (2, 1, 5, 0, 3, 64, 96)),
}


@pytest.mark.parametrize("case", WITHOUT_CUDA_KERNEL.values(), ids=WITHOUT_CUDA_KERNEL.keys())
def test_what_has_no_cuda_kernel_goes_to_the_reference(case):
    import emulated

    dtype, device, shape = case
    emulated.load()
    arguments = [t.to(dtype) for t in _tensors(shape).values()][:4]
    with emulated.device(**device), emulated.counts() as counts:
        results = emulated.ops.fusion_fwd(*arguments, None, 0.125, True)
        grads = emulated.ops.fusion_bwd(torch.ones_like(arguments[0]), *arguments, *results[1:], 0.125)
    assert not counts.launches
    for actual, expected in zip(results, torch.ops.mplug2.fusion_fwd(*arguments, None, 0.125, True), strict=True):
        assert torch.equal(actual, expected)
    for grad, argument in zip(grads, arguments, strict=True):
        assert grad.shape == argument.shape
        assert grad.isfinite().all()


@pytest.mark.parametrize(
    "shape", [(0, 1, 5, 33, 3, 64, 96), (2, 1, 0, 33, 3, 64, 96), (2, 1, 5, 0, 3, 64, 96)], ids=str
)
@pytest.mark.parametrize("has_mask", [False, True])
def test_empty(backend, shape, has_mask):
    leaves = {name: t.to(backend.device, backend.dtypes[0]).requires_grad_() for name, t in _tensors(shape).items()}
    mask = torch.ones(shape[0], shape[3], dtype=torch.bool, device=backend.device) if has_mask else None
    out = ops.fusion(**leaves, key_mask=mask)
    assert out.shape == leaves["q"].shape
    out.sum().backward()
    assert all(leaves[name].grad.count_nonzero() == 0 for name in NAMES[:4])


def test_reference_is_the_definition():
    for shape in SHAPES:
        for kind in MASKS:
            options = {"scale": 0.3, **_masks(kind, shape[0], shape[3])}
            out, grads = _run(ops.fusion, _tensors(shape), torch.float64, torch.float64, **options)
            true_out, true_grads = _run(_explicit, _tensors(shape), torch.float64, torch.float64, **options)
            torch.testing.assert_close(out, true_out)
            for name in NAMES:
                torch.testing.assert_close(grads[name], true_grads[name])


def test_errors_name_the_tensor():
    tensors = {name: t.float() for name, t in _tensors((2, 1, 5, 33, 3, 64, 96)).items()}
    for wrong, message in [
        ({"q": tensors["q"][0]}, r"q must have shape \[B\*G, S, N, H\], got \[5, 3, 64\]"),
        ({"q": tensors["q"][[0, 1, 1]]}, "q must have a multiple of x's rows, B = 2, got 3"),
        ({"key_weight": tensors["key_weight"][:, 1:]}, r"key_weight must have shape \[N\*H, D\] = \[192, 96\]"),
        ({"value_bias": tensors["value_bias"][1:]}, r"value_bias must have shape \[N\*H\] = \[192\], got \[191\]"),
        ({"key_lengths": torch.ones(3, dtype=torch.long)}, r"key_lengths must be integers of shape \[B\] = \[2\]"),
        ({"key_mask": torch.ones(2, 33)}, r"key_mask must be bool of shape \[B, K\] = \[2, 33\], got torch.float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.fusion(**(tensors | wrong))
    with pytest.raises(RuntimeError, match="value_weight must be float32 like the first argument, got bfloat16"):
        ops.fusion(**(tensors | {"value_weight": tensors["value_weight"].bfloat16()}))
