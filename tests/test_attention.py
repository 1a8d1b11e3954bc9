"""attention: kernels against a float64 truth written out here, masks of every kind, shared keys, and errors."""

import math

import pytest
import torch

import emulated
from mplug2 import ops
from mplug2.ops import reference
from tolerances import LOCAL_FROM_LSE, assert_close

# (B, G, S, K, N, H)
SHAPES = [
    (2, 1, 5, 5, 3, 64),
    (2, 5, 1, 97, 2, 64),
    (2, 3, 7, 33, 2, 32),
    (1, 1, 257, 257, 2, 64),
    (1, 1, 25, 1025, 1, 64),
    (1, 2, 9, 4, 1, 20),
    (3, 1, 4, 6, 2, 1),
]
# What the CUDA kernels of short rows take. Forward: whole and partial steps of 32 keys, 32 queries a warp with and
# without a rest of up to 16 queries that the warps share. Backward: pairs of warps with 1, 3 and 4 tiles of 16 keys,
# and a rest of none, up to 16 keys and more. And the longest rows.
SHORT = [
    (1, 1, 1, 1, 1, 64),
    (2, 1, 5, 33, 3, 64),
    (3, 1, 97, 97, 1, 64),
    (1, 1, 128, 64, 2, 64),
    (1, 1, 130, 3, 2, 64),
    (1, 1, 144, 47, 1, 64),
    (1, 1, 151, 16, 1, 64),
    (1, 1, 9, 64, 1, 64),
    (1, 1, 70, 80, 1, 64),
    (1, 1, 32, 81, 1, 64),
    (1, 1, 197, 197, 3, 64),
    (1, 1, 31, 208, 1, 64),
    (1, 1, 64, 209, 1, 64),
    (5, 1, 257, 257, 1, 64),
    (1, 1, 40, 300, 1, 64),
    (1, 1, 320, 320, 1, 64),
]
# What the CUDA kernels of tiles of keys take beside masks: tiles of 16, 32, 64 and 128 rows (the G S queries that share
# keys), rests of rows and of keys, and keys that blocks share, 4,097 = 64 x 64 + 1 among them.
TILED = [
    (3, 1, 1, 321, 2, 64),
    (1, 5, 1, 4097, 2, 64),
    (1, 5, 4, 700, 1, 64),
    (1, 25, 1, 1028, 1, 64),
    (1, 1, 50, 4097, 1, 64),
    (2, 128, 1, 70, 1, 64),
    (2, 2, 70, 33, 1, 64),
    (1, 1, 321, 321, 1, 64),
]
MASKS = ["none", "lengths", "mask", "both", "empty"]
SHORT_FORWARD, SHORT_BACKWARD = "attention_fwd_short", "attention_bwd_short"
TILED_FORWARD, TILED_BACKWARD = "attention_fwd_tiled", ("attention_bwd_tiled_dq", "attention_bwd_tiled_dkv")


def _launches(shape, dtype, key_lengths=None, key_mask=None, causal=False, scale=1.0):
    """The CUDA kernels that serve a call, forward and backward."""
    _, groups, queries, keys, _, head_dim = shape
    if head_dim != 64 or 0 in shape or scale <= 0 or dtype == torch.float32:
        return []
    masked = key_lengths is not None or key_mask is not None or causal
    short = groups == 1 and queries <= 320 and keys <= 320 and not masked
    return [SHORT_FORWARD, SHORT_BACKWARD] if short else [TILED_FORWARD, *TILED_BACKWARD]


def _explicit(q, k, v, key_lengths=None, key_mask=None, causal=False, scale=None):
    """The definition in the dtype given, with all scores and copies of k and v: (out, lse)."""
    (rows, queries, _, head_dim), (batch, keys) = q.shape, k.shape[:2]
    groups = rows // batch
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    seen = torch.ones(rows, 1, queries, keys, dtype=torch.bool)
    if key_lengths is not None:
        seen &= (torch.arange(keys) < key_lengths[:, None]).repeat_interleave(groups, 0)[:, None, None]
    if key_mask is not None:
        seen &= key_mask.repeat_interleave(groups, 0)[:, None, None]
    if causal:
        seen &= torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries
    scores = torch.einsum("bsnh,bknh->bnsk", q, k) * (head_dim**-0.5 if scale is None else scale)
    weights = scores.masked_fill(~seen, torch.finfo(q.dtype).min).softmax(-1) * seen
    return torch.einsum("bnsk,bknh->bsnh", weights, v), scores.masked_fill(~seen, -math.inf).logsumexp(-1)


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


def _run(function, tensors, kind, dtype, device="cpu", **options):
    """Output, lse and gradients, on the CPU, of values that are exact in `dtype`."""
    leaves = [t.to(dtype).to(device, kind).requires_grad_() for t in tensors]
    options = {name: o.to(device) if isinstance(o, torch.Tensor) else o for name, o in options.items()}
    out, lse = function(*leaves, **options)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    out.backward(dout.to(device, kind))
    return out.detach().cpu(), lse.cpu(), [t.grad.cpu() for t in leaves]


def _reference(q, k, v, **options):
    return reference.attention(q, k, v, **options), reference.attention_lse(q.detach(), k.detach(), **options)


def _op(q, k, v, **options):
    return ops.attention(q, k, v, return_lse=True, **options)


def _gradients(dout, q, k, v, out, lse):
    """dq, dk, dv by the op itself, whatever the strides of its arguments."""
    return torch.ops.mplug2.attention_bwd(dout, q, k, v, out, lse, None, None, False, q.shape[-1] ** -0.5)


def _tensors(shape, spread=1.0):
    batch, groups, queries, keys, heads, head_dim = shape
    g = torch.Generator().manual_seed(0)
    sizes = [(batch * groups, queries), (batch, keys), (batch, keys)]
    return [torch.randn(*s, heads, head_dim, generator=g, dtype=torch.float64) * spread for s in sizes]


def _compare(backend, shape, dtype, spread=1.0, **options):
    tensors = _tensors(shape, spread)
    with backend.launching(*_launches(shape, dtype, **options)):
        out, lse, grads = _run(_op, tensors, dtype, dtype, backend.device, **options)
    base_out, base_lse, base_grads = _run(_explicit, tensors, dtype, dtype, **options)
    true_out, true_lse, true_grads = _run(_explicit, tensors, torch.float64, dtype, **options)
    assert_close(out, base_out, true_out)
    assert_close(lse, base_lse, true_lse, dtype=dtype)
    for triple in zip(grads, base_grads, true_grads, strict=True):
        assert_close(*triple, local=LOCAL_FROM_LSE)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("backend", "shape"),
    [
        pytest.param(*each.values, shape, marks=each.marks, id=f"{each.values[0]}-{shape}")
        for each in (pytest.param("cpu"), pytest.param("emulated"), pytest.param("cuda", marks=pytest.mark.gpu))
        for shape in SHAPES
        if each.values[0] == "cpu" or shape[-1] == 64
    ],
    indirect=["backend"],
)
def test_output_lse_and_gradients(backend, shape, mask, causal, which):
    _compare(backend, shape, backend.dtypes[which], causal=causal, **_masks(mask, shape[0], shape[3]))


WITHOUT_CUDA_KERNEL = {
    "H = 32": ((2, 1, 7, 33, 2, 32), torch.bfloat16, {}),
    "float32": ((2, 1, 7, 33, 2, 64), torch.float32, {}),
}


@pytest.mark.parametrize("case", WITHOUT_CUDA_KERNEL.values(), ids=WITHOUT_CUDA_KERNEL.keys())
def test_what_has_no_cuda_kernel_goes_to_the_reference(case):
    shape, dtype, options = case
    emulated.load()
    tensors, options = [t.to(dtype) for t in _tensors(shape)], {"causal": False, "scale": 0.125, **options}
    options = {"key_lengths": None, "key_mask": None, **options}
    with emulated.counts() as counts:
        out, lse = emulated.ops.attention_fwd(*tensors, **options, return_lse=True)
        grads = emulated.ops.attention_bwd(out, *tensors, out, lse, **options)
    assert not counts.launches
    assert not _launches(shape, dtype, **options)
    assert torch.equal(out, reference.attention(*tensors, **options))
    assert torch.equal(lse, reference.attention_lse(*tensors[:2], **options))
    expected = reference.gradients(lambda *t: reference.attention(*t, **options), tensors, out)
    for grad, e in zip(grads, expected, strict=True):
        assert torch.equal(grad, e)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("shape", SHORT, ids=str)
def test_short_rows(backend, shape, which):
    _compare(backend, shape, backend.dtypes[which])


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("shape", TILED, ids=str)
def test_long_and_shared_rows(backend, shape, which):
    _compare(backend, shape, backend.dtypes[which])


@pytest.mark.parametrize(
    "shape", [(1, 1, 1025, 1025, 1, 64), (1, 2, 130, 200, 1, 64), (1, 3, 200, 130, 1, 64)], ids=str
)
def test_causal_tiles(backend, shape):
    """Tiles above the diagonal are skipped; queries of several groups in a tile, more queries than keys."""
    _compare(backend, shape, backend.dtypes[0], causal=True)


LENGTHS = {
    "none, all, some, one, beyond, below none": (torch.tensor([0, 700, 450, 1, 1000, -3]), 3),
    "int32": (torch.tensor([64, 65, 0], dtype=torch.int32), 25),
    "every other of a tensor": (torch.tensor([128, 5, 129, 5]).view(2, 2)[:, 0], 70),
}


@pytest.mark.parametrize(("lengths", "queries"), LENGTHS.values(), ids=LENGTHS.keys())
def test_lengths(backend, lengths, queries):
    _compare(backend, (len(lengths), 1, queries, 700, 1, 64), backend.dtypes[0], key_lengths=lengths)


@pytest.mark.parametrize("scale", [0.0, 0.3, 4.0, -0.2], ids=str)
def test_any_scale(backend, scale):
    _compare(backend, (1, 1, 133, 70, 1, 64), backend.dtypes[0], spread=1.5, scale=scale)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_is_the_definition(shape, mask, causal):
    tensors = _tensors(shape)
    options = {"causal": causal, "scale": 0.3, **_masks(mask, shape[0], shape[3])}
    for function in (_reference, _op):
        actual = _run(function, tensors, torch.float64, torch.float64, **options)
        truth = _run(_explicit, tensors, torch.float64, torch.float64, **options)
        for a, t in zip((*actual[:2], *actual[2]), (*truth[:2], *truth[2]), strict=True):
            torch.testing.assert_close(a, t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_self_attention(dtype):
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(1, 4097, 3, 1, 64, generator=g, dtype=torch.float64).to(dtype).unbind(2)
    truth, true_lse = _explicit(q.double(), k.double(), v.double())
    out, lse = ops.attention(q, k, v, return_lse=True)
    assert_close(out, _explicit(q, k, v)[0], truth)
    torch.testing.assert_close(lse, true_lse.float(), rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_views_into_a_packed_projection(backend, which, head_dim):
    dtype = (*backend.dtypes, torch.float64)[which]
    packed = torch.randn(2, 37, 3, 4, head_dim, dtype=dtype, device=backend.device)
    views = packed.unbind(2)
    assert not views[0].is_contiguous()
    with backend.launching(*([SHORT_FORWARD] if head_dim == 64 and which < 2 else [])):
        out = ops.attention(*views)
    assert torch.equal(out, ops.attention(*(t.contiguous() for t in views)))
    assert out.flatten(2).data_ptr() == out.data_ptr()


VIEWS = {
    "heads first in memory": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "last dimension not contiguous": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "every other token": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "rows of 66 numbers": lambda t: torch.cat([t, t[..., :2]], 3)[..., :64],
    "2 bytes past an aligned address": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t),
    "expanded": lambda t: t[:, :, :1].expand_as(t),
    "one token for all": lambda t: t[:, :1].expand_as(t),
}


@pytest.mark.parametrize("shape", [(2, 1, 38, 38, 3, 64), (2, 3, 5, 38, 3, 64), (2, 3, 1, 38, 3, 64)], ids=str)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_views_give_the_bits_of_their_copies(backend, view, shape):
    tensors = [view(t.to(backend.device, backend.dtypes[0])) for t in _tensors(shape)]
    forward, *backward = _launches(shape, backend.dtypes[0])
    with backend.launching(forward):
        actual = ops.attention(*tensors, return_lse=True)
    # NOTE: not .contiguous(), which leaves a misaligned tensor where it is.
    copies = [t.clone(memory_format=torch.contiguous_format) for t in tensors]
    for one, other in zip(actual, ops.attention(*copies, return_lse=True), strict=True):
        assert torch.equal(one, other)
    out, lse = actual
    with backend.launching(*backward):
        grads = _gradients(view(out.flip(1)), *tensors, view(out), lse)
    copies += [t.clone(memory_format=torch.contiguous_format) for t in (view(out.flip(1)), view(out))]
    for one, other in zip(grads, _gradients(copies[3], *copies[:3], copies[4], lse), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("needing", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_gradients_of_some_inputs_from_stride_0_gradients(backend, needing):
    dtype, tensors = backend.dtypes[0], _tensors((3, 1, 37, 37, 2, 64))

    def grads(function, kind, device="cpu"):
        leaves = [t.to(dtype).to(device, kind).requires_grad_(i in needing) for i, t in enumerate(tensors)]
        function(*leaves)[0].sum().backward()
        return [leaf.grad for leaf in leaves]

    with backend.launching(SHORT_FORWARD, SHORT_BACKWARD):
        actual = grads(_op, dtype, backend.device)
    baseline, truth = grads(_explicit, dtype), grads(_explicit, torch.float64)
    for i, triple in enumerate(zip(actual, baseline, truth, strict=True)):
        if i in needing:
            assert_close(triple[0].cpu(), *triple[1:], local=LOCAL_FROM_LSE, dtype=dtype)
        else:
            assert triple[0] is None


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("length", [37, 133])
def test_tokens_beyond_the_end_are_never_read(backend, length, groups):
    shape = (2, groups, 150, 150, 2, 64)
    whole = [t.to(backend.device, backend.dtypes[0]) for t in _tensors(shape)]
    for t in whole:
        t[:, length:] = torch.nan
    views = [t[:, :length] for t in whole]
    forward, *backward = _launches((2, groups, length, length, 2, 64), backend.dtypes[0])
    with backend.launching(forward):
        out, lse = ops.attention(*views, return_lse=True)
    assert out.isfinite().all()
    assert torch.equal(out, ops.attention(*(t.contiguous() for t in views)))
    padded_out = torch.cat([out, torch.full_like(out, torch.nan)], 1)[:, :length]
    with backend.launching(*backward):
        grads = _gradients(views[0], *views, padded_out, lse)
    assert all(grad.isfinite().all() for grad in grads)
    dout, k, v = (t.contiguous() for t in views)
    for one, other in zip(grads, _gradients(dout, dout, k, v, out, lse), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001])
def test_nan_of_any_bits_is_not_lost(bits):
    """An exponential made of bits could turn 0x7fffffff, a GPU's NaN, into a number."""
    q, k, v = torch.randn(3, 1, 20, 1, 64, generator=torch.Generator().manual_seed(0)).unbind(0)
    k.view(torch.int32)[0, 3, 0, 0] = bits
    assert ops.attention(q, k, v).isnan().all()
    k[0, 3, 0, 0] = 0
    q.view(torch.int32)[0, 3, 0, 0] = bits
    assert ops.attention(q, k, v).isnan().all(-1)[0, :, 0].nonzero().tolist() == [[3]]


@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=str)
def test_nan_stays_in_its_query(backend, options):
    shape = (1, 1, 133, 133, 1, 64)
    q, k, v = (t.to(backend.device, backend.dtypes[0]) for t in _tensors(shape))
    clean, clean_lse = ops.attention(q, k, v, return_lse=True, **options)
    spoilt = q.clone()
    spoilt[:, [3, 130], :, 5] = torch.nan  # of a warp's own, and of those that the warps share
    with backend.launching(_launches(shape, backend.dtypes[0], **options)[0]):
        out, lse = ops.attention(spoilt, k, v, return_lse=True, **options)
    hit = torch.zeros(133, dtype=torch.bool, device=backend.device)
    hit[[3, 130]] = True
    assert out[:, hit].isnan().all()
    assert lse[..., hit].isnan().all()
    assert torch.equal(out[:, ~hit], clean[:, ~hit])
    assert torch.equal(lse[..., ~hit], clean_lse[..., ~hit])


@pytest.mark.parametrize("groups", [1, 2])
def test_scores_far_apart(backend, groups):
    """Scores that grow from key to key, by thousands: the exponents that weights are relative to follow."""
    dtype, shape = backend.dtypes[0], (1, groups, 133, 257, 1, 64)
    q, k, v = _tensors(shape)
    k = k * torch.linspace(0, 40, 257, dtype=torch.float64)[:, None, None]
    truth, true_lse = _explicit(*(t.to(dtype).double() for t in (q, k, v)))
    base, base_lse = _explicit(*(t.to(dtype) for t in (q, k, v)))
    with backend.launching(_launches(shape, dtype)[0]):
        out, lse = ops.attention(*(t.to(backend.device, dtype) for t in (q, k, v)), return_lse=True)
    assert_close(out.cpu(), base, truth)
    assert_close(lse.cpu(), base_lse, true_lse, dtype=dtype)


def test_gradients_of_scores_far_apart(backend):
    """Weights that are 0 or 1, and lse of thousands."""
    tensors = _tensors((1, 1, 133, 257, 1, 64))
    tensors[1] = tensors[1] * torch.linspace(0, 40, 257, dtype=torch.float64)[:, None, None]
    with backend.launching(SHORT_FORWARD, SHORT_BACKWARD):
        *_, grads = _run(_op, tensors, backend.dtypes[0], backend.dtypes[0], backend.device)
    *_, truth = _run(_explicit, tensors, torch.float64, backend.dtypes[0])
    for grad, t in zip(grads, truth, strict=True):
        torch.testing.assert_close(grad.double(), t, rtol=0.02, atol=0.02 * t.abs().max().item())


@pytest.mark.parametrize("keys", [70, 97])
def test_gradients_of_scores_far_below_zero(backend, keys):
    """Where a tile ends, 2^-lse overflows: weights of keys that are not there must not come in."""
    tensors, dtype = _tensors((1, 1, 37, keys, 1, 64)), backend.dtypes[0]
    tensors[0], tensors[1] = 0.1 * tensors[0] + 4, 0.1 * tensors[1] - 8
    with backend.launching(SHORT_FORWARD, SHORT_BACKWARD):
        _, lse, grads = _run(_op, tensors, dtype, dtype, backend.device)
    assert (lse < -200).all()
    *_, base = _run(_explicit, tensors, dtype, dtype)
    *_, truth = _run(_explicit, tensors, torch.float64, dtype)
    for grad, b, t in zip(grads, base, truth, strict=True):
        assert_close(grad, b, t, local=LOCAL_FROM_LSE)


def test_gradients_after_another_layer(backend):
    """out and lse of the reference: a forward pass that no kernel served."""
    shape, dtype = (1, 1, 70, 97, 2, 64), backend.dtypes[0]
    tensors = _tensors(shape)
    q, k, v = (t.to(backend.device, dtype) for t in tensors)
    out, lse = reference.attention(q, k, v), reference.attention_lse(q, k)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    with backend.launching(SHORT_BACKWARD):
        grads = _gradients(dout.to(backend.device), q, k, v, out, lse)
    *_, base = _run(_explicit, tensors, dtype, dtype)
    *_, truth = _run(_explicit, tensors, torch.float64, dtype)
    for grad, b, t in zip(grads, base, truth, strict=True):
        assert_close(grad.cpu(), b, t, local=LOCAL_FROM_LSE)


@pytest.mark.parametrize("shape", [(2, 1, 257, 257, 1, 64), (1, 5, 1, 1025, 1, 64)], ids=str)
def test_the_same_bits_every_time(backend, shape):
    tensors = [t.to(backend.device, backend.dtypes[0]) for t in _tensors(shape)]

    def run():
        out, lse = ops.attention(*tensors, return_lse=True)
        return out, lse, *_gradients(tensors[0], *tensors, out, lse)

    first = run()
    for _ in range(3):
        for one, other in zip(first, run(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("shape", "causal"),
    [
        ((1, 1, 97, 97, 1, 64), False),
        ((1, 1, 257, 257, 1, 64), False),
        ((1, 5, 1, 1025, 1, 64), False),
        ((1, 5, 10, 330, 1, 64), False),
        ((1, 1, 290, 290, 1, 64), True),
    ],
    ids=str,
)
def test_the_same_bits_in_any_order_of_warps(shape, causal):
    emulated.load()
    tensors = [t.bfloat16() for t in _tensors(shape)]
    mask = _masks("mask", *shape[:4:3])["key_mask"] if causal else None
    saved = emulated.ops.attention_fwd(*tensors, None, mask, causal, 0.125, True)

    def run():
        forward = emulated.ops.attention_fwd(*tensors, None, mask, causal, 0.125, True)
        return *forward, *emulated.ops.attention_bwd(tensors[0], *tensors, *saved, None, mask, causal, 0.125)

    first = run()
    for order in [("plain", 0), ("skewed", 1), ("skewed", 2), ("random", 0), ("random", 1)]:
        with emulated.schedule(*order):
            for one, other in zip(first, run(), strict=True):
                assert torch.equal(one, other)


def test_shared_memory_decides():
    """The longest rows fit the 99 KB of small GPUs; what does not fit goes to the kernel of tiles."""
    emulated.load()
    tensors = [t.bfloat16() for t in _tensors((1, 1, 320, 320, 1, 64))]
    for kilobytes, kernel in ((99, SHORT_FORWARD), (64, TILED_FORWARD)):
        with emulated.device(max_shared_bytes=kilobytes * 1024), emulated.counts() as counts:
            emulated.ops.attention_fwd(*tensors, None, None, False, 0.125, True)
        assert [launch.name for launch in counts.launches] == [kernel]


@pytest.mark.parametrize(("length", "kilobytes"), [(97, (80, 99)), (257, (99, 227))])
def test_shared_memory_decides_when_dq_is_made(length, kilobytes):
    """Backward: after 64 queries, or where ds of all of them fit at the end. The bits are the same."""
    emulated.load()
    tensors = [t.bfloat16() for t in _tensors((1, 1, length, length, 1, 64))]
    saved = emulated.ops.attention_fwd(*tensors, None, None, False, 0.125, True)
    runs, launches = [], []
    for size in kilobytes:
        with emulated.device(max_shared_bytes=size * 1024), emulated.counts() as counts:
            runs.append(emulated.ops.attention_bwd(tensors[0], *tensors, *saved, None, None, False, 0.125))
        launches.append(counts.of(SHORT_BACKWARD))
    assert launches[0].shared_bytes < launches[1].shared_bytes
    assert launches[0].block_barriers > launches[1].block_barriers
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


def test_backward_of_what_does_not_fit_goes_to_the_kernels_of_tiles():
    emulated.load()
    tensors = [t.bfloat16() for t in _tensors((1, 1, 320, 320, 1, 64))]
    saved = emulated.ops.attention_fwd(*tensors, None, None, False, 0.125, True)
    with emulated.device(max_shared_bytes=99 * 1024), emulated.counts() as counts:
        emulated.ops.attention_bwd(tensors[0], *tensors, *saved, None, None, False, 0.125)
    assert [launch.name for launch in counts.launches if "parts" not in launch.name] == [*TILED_BACKWARD]


def _in_blocks(tensors, first, end, causal=False):
    """out, lse and, of the short kernels, gradients of what the blocks compute."""
    with emulated.blocks(first, end):
        saved = emulated.ops.attention_fwd(*tensors, None, None, causal, 0.125, True)
        if causal:
            return saved
        return *saved, *emulated.ops.attention_bwd(tensors[0], *tensors, *saved, None, None, False, 0.125)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_more_heads_than_a_grid_has_rows(causal):
    emulated.load()
    batch, heads = 3, 30000
    tensors = [torch.zeros(batch, 2, heads, 64, dtype=torch.bfloat16) for _ in range(3)]
    small = [t.bfloat16() for t in _tensors((1, 1, 2, 2, 1, 64))]
    for t, s in zip(tensors, small, strict=True):
        t[2, :, 12345] = s[0, :, 0]
    block = 2 * heads + 12345
    out, lse, *grads = _in_blocks(tensors, block, block + 1, causal)
    small_out, small_lse, *small_grads = _in_blocks(small, 0, 1, causal)
    assert torch.equal(lse[2, 12345], small_lse[0, 0])
    for one, other in zip((out, *grads), (small_out, *small_grads), strict=True):
        assert torch.equal(one[2, :, 12345], other[0, :, 0])


@pytest.mark.parametrize(("length", "causal"), [(5, False), (133, False), (5, True), (133, True)], ids=str)
def test_elements_past_2_to_the_31(length, causal):
    emulated.load()
    small = [t.bfloat16() for t in _tensors((1, 1, length, length, 2, 64))]
    rows = 2**31 // (length * 2 * 64) + 2
    tensors = [emulated.sparse(rows, length, 2, 64, dtype=torch.bfloat16) for _ in range(3)]
    for t, s in zip(tensors, small, strict=True):
        t[-1] = s[0]
    tiles = 2 if causal and length > 128 else 1  # of rows, a block each
    out, lse, *grads = _in_blocks(tensors, (2 * rows - 1) * tiles, 2 * rows * tiles, causal)
    small_out, small_lse, *small_grads = _in_blocks(small, tiles, 2 * tiles, causal)
    assert torch.equal(lse[-1, 1], small_lse[0, 1])
    for one, other in zip((out, *grads), (small_out, *small_grads), strict=True):
        assert torch.equal(one[-1, :, 1], other[0, :, 1])


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_tokens_past_2_to_the_31(causal):
    emulated.load()
    small = [t.bfloat16() for t in _tensors((1, 1, 9, 9, 1, 64))]
    tensors = [emulated.sparse(9, 2**28 + 64, dtype=torch.bfloat16)[None, :, None, :64] for _ in range(3)]
    for t, s in zip(tensors, small, strict=True):
        t.copy_(s)
    for one, other in zip(_in_blocks(tensors, 0, 1, causal), _in_blocks(small, 0, 1, causal), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("queries", [3, 90])
@pytest.mark.parametrize("which", [0, 1])
def test_hidden_keys_are_never_read(backend, which, queries):
    dtype, device = backend.dtypes[which], backend.device
    q, k, v = (torch.randn(2, n, 2, 64, dtype=dtype, device=device, requires_grad=True) for n in (queries, 150, 150))
    keys = torch.arange(150, device=device)
    options = {"key_lengths": torch.tensor([149, 2], device=device), "key_mask": keys.expand(2, 150) % 3 != 2}
    hidden = ~options["key_mask"] | (keys >= options["key_lengths"][:, None])
    with backend.launching(*([TILED_FORWARD] if dtype != torch.float32 else [])):
        before = ops.attention(q, k, v, **options)
    expected = torch.autograd.grad(before.sum(), (q, k, v))
    spoilt = [t.detach().masked_fill(hidden[:, :, None, None], float("nan")).requires_grad_() for t in (k, v)]
    after = ops.attention(q, *spoilt, **options)
    assert torch.equal(after, before)
    for grad, e in zip(torch.autograd.grad(after.sum(), (q, *spoilt)), expected, strict=True):
        assert torch.equal(grad, e)


@pytest.mark.parametrize("which", [0, 1])
def test_a_single_key_is_copied(backend, which):
    options = {"dtype": backend.dtypes[which], "device": backend.device, "requires_grad": True}
    q, k, v = (torch.randn(2, n, 3, 64, **options) for n in (4, 1, 1))
    with backend.launching(SHORT_FORWARD, SHORT_BACKWARD):
        out = ops.attention(q, k, v)
        out.backward(torch.ones_like(out))
    assert torch.equal(out, v.expand(out.shape))
    torch.testing.assert_close(v.grad, torch.full_like(v, 4))
    assert q.grad.count_nonzero() == k.grad.count_nonzero() == 0  # the weight is 1 whatever the score
    dout = torch.randn_like(out)
    dq, dk, _ = torch.autograd.grad(ops.attention(q, k, v), (q, k, v), dout)
    assert dq.count_nonzero() == dk.count_nonzero() == 0


@pytest.mark.parametrize("which", [0, 1])
def test_queries_without_keys_give_zero_and_take_no_gradient(backend, which):
    options = {"dtype": backend.dtypes[which], "device": backend.device, "requires_grad": True}
    q, k, v = (torch.randn(2, n, 2, 64, **options) for n in (5, 3, 3))
    mask = torch.tensor([[False] * 3, [True, False, True]], device=backend.device)
    out, lse = ops.attention(q, k, v, key_mask=mask, causal=True, return_lse=True)  # the first queries precede all keys
    none = lse.isinf()
    assert none[0].all()
    assert none[1, :, :2].all()
    assert not none[1, :, 2:].any()
    assert (out[none.transpose(1, 2)] == 0).all()
    out.square().sum().backward()
    assert (q.grad[none.transpose(1, 2)] == 0).all()
    assert (k.grad[0] == 0).all()
    assert (v.grad[0] == 0).all()
    assert (v.grad[1, 1] == 0).all()


@pytest.mark.parametrize(
    ("rows", "batch", "queries", "keys"), [(0, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0), (0, 2, 3, 4)], ids=str
)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"masked": True}], ids=str)
def test_empty(backend, rows, batch, queries, keys, options):
    kind = {"dtype": backend.dtypes[0], "device": backend.device}
    q = torch.zeros(rows, queries, 2, 64, **kind, requires_grad=True)
    k, v = (torch.zeros(batch, keys, 2, 64, **kind, requires_grad=True) for _ in range(2))
    options = dict(options)
    if options.pop("masked", False):
        mask = torch.ones(batch, keys, dtype=torch.bool, device=backend.device)
        options |= {"key_mask": mask, "key_lengths": torch.full((batch,), keys, device=backend.device)}
    out, lse = ops.attention(q, k, v, return_lse=True, **options)
    assert out.shape == q.shape
    assert lse.shape == (rows, 2, queries)
    assert (lse == -math.inf).all()
    out.sum().backward()
    assert all(t.grad.count_nonzero() == 0 for t in (q, k, v))


def test_lse_carries_no_gradient():
    q, k, v = (torch.randn(1, 2, 1, 4, requires_grad=True) for _ in range(3))
    _, lse = ops.attention(q, k, v, return_lse=True)
    assert not lse.requires_grad


def test_errors_name_the_tensor(backend):
    q, k = (torch.zeros(*shape, device=backend.device) for shape in ((4, 3, 2, 8), (2, 5, 2, 8)))
    with pytest.raises(
        RuntimeError, match=r"attention: k must have shape \[B, K, N, H\] = \[\*, \*, 2, 8\], got \[2, 5, 4, 4\]"
    ):
        ops.attention(q, k.view(2, 5, 4, 4), k)
    with pytest.raises(RuntimeError, match=r"attention: v must have shape .* = \[2, 5, 2, 8\], got \[2, 4, 2, 8\]"):
        ops.attention(q, k, k[:, :4])
    with pytest.raises(RuntimeError, match="q must have a multiple of k's rows, B = 2, got 3"):
        ops.attention(q[:3], k, k)
    with pytest.raises(RuntimeError, match=r"key_mask must have shape \[B, K\] = \[2, 5\], got \[4, 5\]"):
        ops.attention(q, k, k, key_mask=torch.ones(4, 5, dtype=torch.bool, device=backend.device))
    with pytest.raises(RuntimeError, match="key_mask must be bool, got float32"):
        ops.attention(q, k, k, key_mask=torch.ones(2, 5, device=backend.device))
    with pytest.raises(RuntimeError, match="v must be float32 like the first argument, got float16"):
        ops.attention(q, k, k.half())
