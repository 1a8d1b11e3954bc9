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
# What the CUDA kernel of short rows takes: whole and partial steps of 32 keys, 32 queries a warp with and without a
# rest of up to 16 queries that the warps share, and the longest rows.
SHORT = [
    (1, 1, 1, 1, 1, 64),
    (2, 1, 5, 33, 3, 64),
    (3, 1, 97, 97, 1, 64),
    (1, 1, 128, 64, 2, 64),
    (1, 1, 130, 3, 2, 64),
    (1, 1, 144, 47, 1, 64),
    (1, 1, 151, 16, 1, 64),
    (1, 1, 197, 197, 3, 64),
    (5, 1, 257, 257, 1, 64),
    (1, 1, 320, 320, 1, 64),
]
MASKS = ["none", "lengths", "mask", "both", "empty"]
SHORT_FORWARD = "attention_fwd_short"


def _launches(shape, dtype, key_lengths=None, key_mask=None, causal=False, scale=1.0):
    """The CUDA kernels that serve a call."""
    _, groups, queries, keys, _, head_dim = shape
    short = groups == 1 and head_dim == 64 and 0 < queries <= 320 and 0 < keys <= 320
    masked = key_lengths is not None or key_mask is not None or causal
    return [SHORT_FORWARD] if short and not masked and scale > 0 and dtype != torch.float32 else []


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


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_lse_and_gradients(backend, shape, mask, causal, which):
    _compare(backend, shape, backend.dtypes[which], causal=causal, **_masks(mask, shape[0], shape[3]))


WITHOUT_CUDA_KERNEL = {
    "lengths": ((2, 1, 5, 33, 2, 64), torch.bfloat16, _masks("lengths", 2, 33)),
    "mask": ((2, 1, 5, 33, 2, 64), torch.bfloat16, _masks("mask", 2, 33)),
    "causal": ((2, 1, 33, 33, 2, 64), torch.float16, {"causal": True}),
    "groups": ((2, 5, 1, 97, 2, 64), torch.bfloat16, {}),
    "321 keys": ((1, 1, 3, 321, 1, 64), torch.bfloat16, {}),
    "321 queries": ((1, 1, 321, 3, 1, 64), torch.bfloat16, {}),
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
    assert not counts.launches
    assert not _launches(shape, dtype, **options)
    assert torch.equal(out, reference.attention(*tensors, **options))
    assert torch.equal(lse, reference.attention_lse(*tensors[:2], **options))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("shape", SHORT, ids=str)
def test_short_rows(backend, shape, which):
    _compare(backend, shape, backend.dtypes[which])


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


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_views_give_the_bits_of_their_copies(backend, view):
    tensors = [view(t.to(backend.device, backend.dtypes[0])) for t in _tensors((2, 1, 38, 38, 3, 64))]
    with backend.launching(SHORT_FORWARD):
        actual = ops.attention(*tensors, return_lse=True)
    # NOTE: not .contiguous(), which leaves a misaligned tensor where it is.
    copies = [t.clone(memory_format=torch.contiguous_format) for t in tensors]
    for one, other in zip(actual, ops.attention(*copies, return_lse=True), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("needing", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_gradients_of_some_inputs_from_stride_0_gradients(backend, needing):
    dtype, tensors = backend.dtypes[0], _tensors((3, 1, 37, 37, 2, 64))

    def grads(function, kind, device="cpu"):
        leaves = [t.to(dtype).to(device, kind).requires_grad_(i in needing) for i, t in enumerate(tensors)]
        function(*leaves)[0].sum().backward()
        return [leaf.grad for leaf in leaves]

    with backend.launching(SHORT_FORWARD):
        actual = grads(_op, dtype, backend.device)
    baseline, truth = grads(_explicit, dtype), grads(_explicit, torch.float64)
    for i, triple in enumerate(zip(actual, baseline, truth, strict=True)):
        if i in needing:
            assert_close(triple[0].cpu(), *triple[1:], local=LOCAL_FROM_LSE, dtype=dtype)
        else:
            assert triple[0] is None


@pytest.mark.parametrize("length", [37, 133])
def test_tokens_beyond_the_end_are_never_read(backend, length):
    whole = [t.to(backend.device, backend.dtypes[0]) for t in _tensors((2, 1, 150, 150, 2, 64))]
    for t in whole:
        t[:, length:] = torch.nan
    views = [t[:, :length] for t in whole]
    with backend.launching(SHORT_FORWARD):
        out = ops.attention(*views)
    assert out.isfinite().all()
    assert torch.equal(out, ops.attention(*(t.contiguous() for t in views)))


def test_nan_stays_in_its_query(backend):
    q, k, v = (t.to(backend.device, backend.dtypes[0]) for t in _tensors((1, 1, 133, 70, 1, 64)))
    clean, clean_lse = ops.attention(q, k, v, return_lse=True)
    spoilt = q.clone()
    spoilt[:, [3, 130], :, 5] = torch.nan  # of a warp's own, and of those that the warps share
    with backend.launching(SHORT_FORWARD):
        out, lse = ops.attention(spoilt, k, v, return_lse=True)
    hit = torch.zeros(133, dtype=torch.bool, device=backend.device)
    hit[[3, 130]] = True
    assert out[:, hit].isnan().all()
    assert lse[..., hit].isnan().all()
    assert torch.equal(out[:, ~hit], clean[:, ~hit])
    assert torch.equal(lse[..., ~hit], clean_lse[..., ~hit])


def test_scores_far_apart(backend):
    """Scores that grow from key to key, by thousands: the exponents that weights are relative to follow."""
    dtype = backend.dtypes[0]
    q, k, v = _tensors((1, 1, 133, 257, 1, 64))
    k = k * torch.linspace(0, 40, 257, dtype=torch.float64)[:, None, None]
    truth, true_lse = _explicit(*(t.to(dtype).double() for t in (q, k, v)))
    base, base_lse = _explicit(*(t.to(dtype) for t in (q, k, v)))
    with backend.launching(SHORT_FORWARD):
        out, lse = ops.attention(*(t.to(backend.device, dtype) for t in (q, k, v)), return_lse=True)
    assert_close(out.cpu(), base, truth)
    assert_close(lse.cpu(), base_lse, true_lse, dtype=dtype)


def test_the_same_bits_every_time(backend):
    tensors = [t.to(backend.device, backend.dtypes[0]) for t in _tensors((2, 1, 257, 257, 1, 64))]
    first = ops.attention(*tensors, return_lse=True)
    for _ in range(3):
        for one, other in zip(first, ops.attention(*tensors, return_lse=True), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("length", [97, 257])
def test_the_same_bits_in_any_order_of_warps(length):
    emulated.load()
    tensors = [t.bfloat16() for t in _tensors((1, 1, length, length, 1, 64))]

    def run():
        return emulated.ops.attention_fwd(*tensors, None, None, False, 0.125, True)

    first = run()
    for order in [("plain", 0), ("skewed", 1), ("skewed", 2), ("random", 0), ("random", 1)]:
        with emulated.schedule(*order):
            for one, other in zip(first, run(), strict=True):
                assert torch.equal(one, other)


def test_shared_memory_decides():
    """The longest rows fit the 99 KB of small GPUs; what does not fit goes to the reference."""
    emulated.load()
    tensors = [t.bfloat16() for t in _tensors((1, 1, 320, 320, 1, 64))]
    for kilobytes, launches in ((99, 1), (64, 0)):
        with emulated.device(max_shared_bytes=kilobytes * 1024), emulated.counts() as counts:
            emulated.ops.attention_fwd(*tensors, None, None, False, 0.125, True)
        assert len(counts.launches) == launches


def _in_one_block(tensors, block):
    with emulated.blocks(block, block + 1):
        return emulated.ops.attention_fwd(*tensors, None, None, False, 0.125, True)


def test_more_heads_than_a_grid_has_rows():
    emulated.load()
    batch, heads = 3, 30000
    tensors = [torch.zeros(batch, 2, heads, 64, dtype=torch.bfloat16) for _ in range(3)]
    small = [t.bfloat16() for t in _tensors((1, 1, 2, 2, 1, 64))]
    for t, s in zip(tensors, small, strict=True):
        t[2, :, 12345] = s[0, :, 0]
    out, lse = _in_one_block(tensors, 2 * heads + 12345)
    small_out, small_lse = emulated.ops.attention_fwd(*small, None, None, False, 0.125, True)
    assert torch.equal(out[2, :, 12345], small_out[0, :, 0])
    assert torch.equal(lse[2, 12345], small_lse[0, 0])


@pytest.mark.parametrize("length", [5, 133])
def test_elements_past_2_to_the_31(length):
    emulated.load()
    small = [t.bfloat16() for t in _tensors((1, 1, length, length, 2, 64))]
    rows = 2**31 // (length * 2 * 64) + 2
    tensors = [emulated.sparse(rows, length, 2, 64, dtype=torch.bfloat16) for _ in range(3)]
    for t, s in zip(tensors, small, strict=True):
        t[-1] = s[0]
    out, lse = _in_one_block(tensors, 2 * rows - 1)
    small_out, small_lse = emulated.ops.attention_fwd(*small, None, None, False, 0.125, True)
    assert torch.equal(out[-1, :, 1], small_out[0, :, 1])
    assert torch.equal(lse[-1, 1], small_lse[0, 1])


def test_tokens_past_2_to_the_31():
    emulated.load()
    small = [t.bfloat16() for t in _tensors((1, 1, 9, 9, 1, 64))]
    tensors = [emulated.sparse(9, 2**28 + 64, dtype=torch.bfloat16)[None, :, None, :64] for _ in range(3)]
    for t, s in zip(tensors, small, strict=True):
        t.copy_(s)
    for one, other in zip(_in_one_block(tensors, 0), _in_one_block(small, 0), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hidden_keys_are_never_read(dtype):
    q, k, v = (torch.randn(2, n, 2, 8, dtype=dtype, requires_grad=True) for n in (3, 70, 70))
    options = {"key_lengths": torch.tensor([69, 2]), "key_mask": torch.arange(70).expand(2, 70) % 3 != 2}
    hidden = ~options["key_mask"] | (torch.arange(70) >= options["key_lengths"][:, None])
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
    with backend.launching(SHORT_FORWARD):
        out = ops.attention(q, k, v)
    assert torch.equal(out, v.expand(out.shape))
    out.backward(torch.ones_like(out))
    torch.testing.assert_close(v.grad, torch.full_like(v, 4))
    assert q.grad.count_nonzero() == k.grad.count_nonzero() == 0  # the weight is 1 whatever the score


def test_queries_without_keys_give_zero_and_take_no_gradient():
    q, k, v = (torch.randn(2, n, 2, 8, requires_grad=True) for n in (5, 3, 3))
    mask = torch.tensor([[False] * 3, [True, False, True]])
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
