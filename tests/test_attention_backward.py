"""The backward pass of attention alone, from the reference's out and lse: the CUDA kernels of tiles of keys."""

import pytest
import torch

import emulated
from conftest import emulated_kernels
from mplug2 import ops
from mplug2.ops import reference
from test_attention import TILED_BACKWARD, VIEWS, _explicit, _masks, _reference, _run, _tensors
from tolerances import LOCAL_FROM_LSE, assert_close

# Rows are the queries of all groups. One tile of rows or keys whose warps share the other side (up to 32, up to 64),
# several, rests of them, and as few tiles as several blocks share.
BACKWARD = [
    (2, 1, 25, 97, 2, 64),
    (2, 5, 1, 257, 1, 64),
    (2, 3, 25, 33, 1, 64),
    (2, 1, 50, 1025, 1, 64),
    (2, 3, 50, 97, 1, 64),
    (2, 1, 133, 133, 1, 64),
    (2, 1, 330, 40, 1, 64),
    (2, 5, 1, 1025, 1, 64),
]


def _backward(device, tensors, dtype, dout=None, key_lengths=None, key_mask=None, causal=False, scale=None):
    scale = tensors[0].shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (t.to(dtype).to(device) for t in tensors)
    mask = [None if t is None else t.to(device) for t in (key_lengths, key_mask)]
    out = reference.attention(q, k, v, *mask, causal, scale)
    lse = reference.attention_lse(q, k, *mask, causal, scale)
    if dout is None:
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [g.cpu() for g in torch.ops.mplug2.attention_bwd(dout.to(out), q, k, v, out, lse, *mask, causal, scale)]


def _compare_backward(backend, shape, dtype, **options):
    tensors = _tensors(shape)
    with backend.launching(*TILED_BACKWARD):
        actual = _backward(backend.device, tensors, dtype, **options)
    baseline = _run(_explicit, tensors, dtype, dtype, **options)[2]
    truth = _run(_explicit, tensors, torch.float64, dtype, **options)[2]
    for triple in zip(actual, baseline, truth, strict=True):
        assert_close(*triple, local=LOCAL_FROM_LSE)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("mask", ["lengths", "mask", "empty"])
@pytest.mark.parametrize("shape", BACKWARD, ids=str)
def test_backward_under_masks(backend, shape, mask, causal):
    _compare_backward(backend, shape, backend.dtypes[causal], causal=causal, **_masks(mask, shape[0], shape[3]))


@pytest.mark.parametrize(
    ("shape", "causal"),
    [
        ((1, 1, 25, 4097, 1, 64), False),
        ((1, 5, 1, 4097, 1, 64), False),
        ((1, 1, 4097, 50, 1, 64), False),
        ((1, 1, 600, 600, 1, 64), True),
        ((1, 3, 200, 130, 1, 64), True),
        ((1, 2, 130, 321, 1, 64), True),
    ],
    ids=str,
)
def test_backward_of_many_tiles(backend, shape, causal):
    """Of keys and of queries, which blocks share; of queries of several groups, and tiles above the diagonal."""
    _compare_backward(backend, shape, backend.dtypes[0], causal=causal)


@pytest.mark.parametrize("scale", [0.3, 4.0], ids=str)
def test_backward_of_any_scale(backend, scale):
    _compare_backward(backend, (1, 2, 33, 70, 1, 64), backend.dtypes[0], scale=scale)


def test_backward_of_hidden_memory(backend):
    """No number of a hidden key counts, in either kernel; its own gradients are 0."""
    q, k, v = _tensors((2, 3, 25, 150, 1, 64))
    options = {"key_lengths": torch.tensor([149, 70]), "key_mask": torch.arange(150).expand(2, 150) % 3 != 2}
    hidden = ~options["key_mask"] | (torch.arange(150) >= options["key_lengths"][:, None])
    clean = [t.masked_fill(hidden[:, :, None, None], 0) for t in (k, v)]
    spoilt = [t.masked_fill(hidden[:, :, None, None], torch.nan) for t in (k, v)]
    dtype = backend.dtypes[0]
    out, lse = (f(q.to(dtype), clean[0].to(dtype), *rest, **options) for f, rest in
                ((reference.attention, [clean[1].to(dtype)]), (reference.attention_lse, [])))  # fmt: skip
    dout = torch.ones_like(out)
    mask = [options["key_lengths"].to(backend.device), options["key_mask"].to(backend.device)]

    def grads(k, v):
        tensors = [t.to(backend.device, dtype) for t in (dout, q, k, v, out)]
        return torch.ops.mplug2.attention_bwd(*tensors, lse.to(backend.device), *mask, False, 0.125)

    with backend.launching(*TILED_BACKWARD):
        actual = grads(*spoilt)
    for one, other in zip(actual, grads(*clean), strict=True):
        assert torch.equal(one, other)
    for grad in actual[1:]:
        assert (grad[hidden.to(backend.device)] == 0).all()


@pytest.mark.parametrize("groups", [1, 3])
def test_the_only_key_that_is_seen_takes_the_sum(backend, groups):
    """Its weight is 1 whatever the score: exactly no gradient for scores."""
    tensors = _tensors((2, groups, 40, 70, 1, 64))
    only = torch.zeros(2, 70, dtype=torch.bool)
    only[:, 41] = True
    dout = torch.ones(2 * groups, 40, 1, 64)
    with backend.launching(*TILED_BACKWARD):
        dq, dk, dv = _backward(backend.device, tensors, backend.dtypes[0], dout, key_mask=only)
    assert dq.count_nonzero() == dk.count_nonzero() == 0
    torch.testing.assert_close(dv[:, 41], torch.full_like(dv[:, 41], 40 * groups))
    assert (dv[~only] == 0).all()


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_backward_of_views_gives_the_bits_of_their_copies(backend, view, groups):
    dtype, lengths = backend.dtypes[0], torch.tensor([9, 38], device=backend.device)
    q, k, v = (view(t.to(backend.device, dtype)) for t in _tensors((2, groups, 38, 38, 3, 64)))
    out, lse = (t.to(backend.device) for t in (torch.randn(q.shape), torch.randn(q.shape[0], 3, 38)))
    out, dout = view(out.to(dtype)), out.new_ones((), dtype=dtype).expand(q.shape)

    def grads(*tensors, lse=lse, key_lengths=lengths):
        return torch.ops.mplug2.attention_bwd(*tensors, lse, key_lengths, None, False, 0.125)

    with backend.launching(*TILED_BACKWARD):
        actual = grads(
            dout, q, k, v, out,
            lse=lse.mT.contiguous().mT, key_lengths=lengths.repeat_interleave(2)[::2],
        )  # fmt: skip
    copies = [t.clone(memory_format=torch.contiguous_format) for t in (dout, q, k, v, out)]
    for one, other in zip(actual, grads(*copies), strict=True):
        assert one.is_contiguous()
        assert torch.equal(one, other)


@pytest.mark.parametrize("needing", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_masked_gradients_of_some_inputs(backend, needing):
    tensors = [t.to(backend.device, backend.dtypes[0]) for t in _tensors((2, 3, 25, 37, 1, 64))]
    lengths = torch.tensor([37, 20], device=backend.device)

    def grads(needing):
        leaves = [t.clone().requires_grad_(i in needing) for i, t in enumerate(tensors)]
        ops.attention(*leaves, key_lengths=lengths).sum().backward()
        return [leaf.grad for leaf in leaves]

    with backend.launching(*TILED_BACKWARD):
        some = grads(needing)
    for i, (one, other) in enumerate(zip(some, grads((0, 1, 2)), strict=True)):
        assert torch.equal(one, other) if i in needing else one is None


@pytest.mark.parametrize(
    ("shape", "causal"),
    [((1, 1, 25, 1025, 1, 64), False), ((1, 1, 530, 50, 1, 64), False), ((1, 2, 150, 290, 1, 64), True)],
    ids=str,
)
def test_backward_the_same_bits_in_any_order_of_warps(shape, causal):
    tensors = _tensors(shape)
    mask = {"causal": causal, **(_masks("mask", *shape[:4:3]) if causal else {})}
    with emulated_kernels():
        first = _backward("cpu", tensors, torch.bfloat16, **mask)
        for order in [("plain", 0), ("skewed", 1), ("skewed", 2), ("random", 0), ("random", 1)]:
            with emulated.schedule(*order):
                for one, other in zip(first, _backward("cpu", tensors, torch.bfloat16, **mask), strict=True):
                    assert torch.equal(one, other)


def _backward_in_one_block(tensors, block):
    """Of zeros but for the unit of that block; causal, so that no other kernel serves."""
    q = tensors[1]
    lse = torch.zeros(q.shape[0], q.shape[2], q.shape[1])
    with emulated.blocks(block, block + 1):
        return emulated.ops.attention_bwd(*tensors, lse, None, None, True, 0.125)


def test_backward_of_more_heads_than_a_grid_has_rows():
    emulated.load()
    batch, heads = 3, 30000
    small = [t.bfloat16() for t in _tensors((1, 1, 2, 2, 1, 64))]
    small = [small[0] + 1, *small, small[0] + 2]  # dout, q, k, v, out
    tensors = [torch.zeros(batch, 2, heads, 64, dtype=torch.bfloat16) for _ in small]
    for t, s in zip(tensors, small, strict=True):
        t[2, :, 12345] = s[0, :, 0]
    grads = _backward_in_one_block(tensors, 2 * heads + 12345)
    for one, other in zip(grads, _backward_in_one_block(small, 0), strict=True):
        assert torch.equal(one[2, :, 12345], other[0, :, 0])


def test_backward_of_elements_past_2_to_the_31():
    emulated.load()
    small = [t.bfloat16() for t in _tensors((1, 1, 9, 9, 1, 64))]
    small = [small[0] + 1, *small, small[0] + 2]
    far_tokens = [emulated.sparse(9, 2**28 + 64, dtype=torch.bfloat16)[None, :, None, :64] for _ in small]
    rows = 2**31 // (9 * 64) + 2
    far_rows = [emulated.sparse(rows, 9, 1, 64, dtype=torch.bfloat16) for _ in small]
    for t, far, s in zip(far_tokens, far_rows, small, strict=True):
        t.copy_(s)
        far[-1] = s[0]
    expected = _backward_in_one_block(small, 0)
    for one, far, other in zip(
        _backward_in_one_block(far_tokens, 0), _backward_in_one_block(far_rows, rows - 1), expected, strict=True
    ):
        assert torch.equal(one, other)
        assert torch.equal(far[-1], other[0])


@pytest.mark.parametrize(("head_dim", "dtype"), [(32, torch.bfloat16), (64, torch.float32)], ids=str)
def test_what_has_no_cuda_backward_kernel_goes_to_the_reference(head_dim, dtype):
    tensors = _tensors((1, 2, 5, 7, 1, head_dim))
    with emulated_kernels(), emulated.counts() as counts:
        grads = _backward("cpu", tensors, dtype)
    assert not counts.launches
    expected = _run(_reference, tensors, dtype, dtype)[2]
    for one, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(one, other)
