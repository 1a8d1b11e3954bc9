"""attention: kernels against a float64 truth written out here, masks of every kind, shared keys, and errors."""

import math

import pytest
import torch

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
MASKS = ["none", "lengths", "mask", "both", "empty"]


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


def _run(function, tensors, kind, dtype, **options):
    leaves = [t.to(dtype).to(kind).requires_grad_() for t in tensors]
    out, lse = function(*leaves, **options)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype).to(kind)
    out.backward(dout)
    return out, lse, [t.grad for t in leaves]


def _reference(q, k, v, **options):
    return reference.attention(q, k, v, **options), reference.attention_lse(q.detach(), k.detach(), **options)


def _op(q, k, v, **options):
    return ops.attention(q, k, v, return_lse=True, **options)


def _compare(shape, dtype, **options):
    batch, groups, queries, keys, heads, head_dim = shape
    g = torch.Generator().manual_seed(0)
    sizes = [(batch * groups, queries), (batch, keys), (batch, keys)]
    tensors = [torch.randn(*s, heads, head_dim, generator=g, dtype=torch.float64) for s in sizes]
    out, lse, grads = _run(_op, tensors, dtype, dtype, **options)
    base_out, base_lse, base_grads = _run(_explicit, tensors, dtype, dtype, **options)
    true_out, true_lse, true_grads = _run(_explicit, tensors, torch.float64, dtype, **options)
    assert_close(out, base_out, true_out)
    assert_close(lse, base_lse, true_lse, dtype=dtype)
    for triple in zip(grads, base_grads, true_grads, strict=True):
        assert_close(*triple, local=LOCAL_FROM_LSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_lse_and_gradients(shape, mask, causal, dtype):
    _compare(shape, dtype, causal=causal, **_masks(mask, shape[0], shape[3]))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_is_the_definition(shape, mask, causal):
    batch, groups, queries, keys, heads, head_dim = shape
    g = torch.Generator().manual_seed(0)
    sizes = [(batch * groups, queries), (batch, keys), (batch, keys)]
    tensors = [torch.randn(*s, heads, head_dim, generator=g, dtype=torch.float64) for s in sizes]
    options = {"causal": causal, "scale": 0.3, **_masks(mask, batch, keys)}
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_views_into_a_packed_projection(dtype):
    packed = torch.randn(2, 9, 3, 4, 16, dtype=dtype)
    views = packed.unbind(2)
    assert not views[0].is_contiguous()
    out = ops.attention(*views)
    assert torch.equal(out, ops.attention(*(t.contiguous() for t in views)))
    assert out.flatten(2).data_ptr() == out.data_ptr()


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_single_key_is_copied(dtype):
    q, k, v = (torch.randn(2, n, 3, 64, dtype=dtype, requires_grad=True) for n in (4, 1, 1))
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
def test_empty(rows, batch, queries, keys, options):
    q = torch.zeros(rows, queries, 2, 8, requires_grad=True)
    k, v = (torch.zeros(batch, keys, 2, 8, requires_grad=True) for _ in range(2))
    options = dict(options)
    if options.pop("masked", False):
        options |= {"key_mask": torch.ones(batch, keys, dtype=torch.bool), "key_lengths": torch.full((batch,), keys)}
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


def test_errors_name_the_tensor():
    q, k = torch.zeros(4, 3, 2, 8), torch.zeros(2, 5, 2, 8)
    with pytest.raises(
        RuntimeError, match=r"attention: k must have shape \[B, K, N, H\] = \[\*, \*, 2, 8\], got \[2, 5, 4, 4\]"
    ):
        ops.attention(q, k.view(2, 5, 4, 4), k)
    with pytest.raises(RuntimeError, match=r"attention: v must have shape .* = \[2, 5, 2, 8\], got \[2, 4, 2, 8\]"):
        ops.attention(q, k, k[:, :4])
    with pytest.raises(RuntimeError, match="q must have a multiple of k's rows, B = 2, got 3"):
        ops.attention(q[:3], k, k)
    with pytest.raises(RuntimeError, match=r"key_mask must have shape \[B, K\] = \[2, 5\], got \[4, 5\]"):
        ops.attention(q, k, k, key_mask=torch.ones(4, 5, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="key_mask must be bool, got float32"):
        ops.attention(q, k, k, key_mask=torch.ones(2, 5))
    with pytest.raises(RuntimeError, match="v must be float32 like the first argument, got float16"):
        ops.attention(q, k, k.half())
