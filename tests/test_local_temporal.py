"""local_temporal: kernels against the float64 truth, what passes through, and errors."""

import pytest
import torch

import op_cases
from mplug2 import ops
from mplug2.ops import reference
from tolerances import LOCAL_LONG_SUM, assert_close

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1, 2, 8), (2, 5, 7, 32), (1, 16, 1, 64), (3, 2, 97, 48), (1, 4, 257, 128), (2, 3, 5, 18)]


def _tensors(*shape, seed=0):
    return op_cases.local_temporal_tensors(torch.Generator().manual_seed(seed), *shape)


def _runs(tensors, dtype, prefix=1):
    """(op, baseline, truth): output and gradients by name of each."""
    results = []
    for function, kind in (
        (ops.local_temporal, dtype),
        (reference.local_temporal, dtype),
        (reference.local_temporal, None),
    ):
        leaves = {name: t.to(dtype).to(kind or torch.float64).requires_grad_() for name, t in tensors.items()}
        out = function(**leaves, num_prefix_tokens=prefix)
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
        out.backward(dout.to(out.dtype))
        results.append((out, {name: t.grad for name, t in leaves.items()}))
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("prefix", [0, 1])
def test_output_and_gradients(shape, dtype, prefix):
    (out, grads), (base_out, base_grads), (true_out, true_grads) = _runs(_tensors(*shape), dtype, prefix)
    assert_close(out, base_out, true_out)
    for name, grad in grads.items():
        assert_close(grad, base_grads[name], true_grads[name], local=LOCAL_LONG_SUM)


@pytest.mark.parametrize("shape", [(0, 4, 5, 8), (2, 0, 5, 8), (2, 4, 0, 8)])
def test_empty(shape):
    tensors = {name: t.float().requires_grad_() for name, t in _tensors(*shape).items()}
    out = ops.local_temporal(**tensors, num_prefix_tokens=0)
    assert out.shape == shape
    out.sum().backward()
    assert all(t.grad.count_nonzero() == 0 for t in tensors.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefix_passes_through_and_is_never_read(dtype):
    tensors = {name: t.to(dtype) for name, t in _tensors(2, 3, 6, 16).items()}
    before = ops.local_temporal(**tensors, num_prefix_tokens=2)
    assert torch.equal(before[:, :, :2], tensors["x"][:, :, :2])
    tensors["x"][:, :, :2] = float("nan")
    after = ops.local_temporal(**tensors, num_prefix_tokens=2)
    assert torch.equal(after[:, :, 2:], before[:, :, 2:])
    assert after[:, :, :2].isnan().all()


def test_nan_in_the_prefix_stays_out_of_the_gradients():
    tensors = {name: t.float() for name, t in _tensors(2, 3, 6, 16).items()}
    tensors["x"][:, :, 0] = float("nan")
    tensors = {name: t.requires_grad_() for name, t in tensors.items()}
    ops.local_temporal(**tensors).sum().backward()
    assert all(t.grad.isfinite().all() for t in tensors.values())


def test_frames_see_their_neighbours_and_no_further():
    tensors = {name: t.float() for name, t in _tensors(2, 7, 3, 16).items()}
    before = ops.local_temporal(**tensors)
    tensors["x"][0, 3, 1, :8] += 1  # not all channels alike: LN would not see it
    changed = (ops.local_temporal(**tensors) != before).any(-1)
    assert changed[0, 2:5, 1].all()
    changed[0, 2:5, 1] = False
    assert not changed.any()


def test_large_inputs_give_no_nan():
    tensors = {name: t.float() for name, t in _tensors(1, 3, 4, 16).items()}
    tensors["conv_bias"] += torch.tensor([1e4, -1e4] * 4)
    assert ops.local_temporal(**tensors).isfinite().all()


def test_several_chunks_of_videos_are_one_result():
    tensors = {name: t.float() for name, t in _tensors(40, 8, 65, 256).items()}  # more than one workspace holds
    whole = ops.local_temporal(**tensors)
    single = torch.cat([ops.local_temporal(**{**tensors, "x": x[None]}) for x in tensors["x"]])
    torch.testing.assert_close(whole, single)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("x", (2, 3, 16), r"x must have shape \[B, T, L, D\]"),
        ("ln_bias", (15,), r"ln_bias must have shape \[D\] = \[16\], got \[15\]"),
        ("down_weight", (8, 15), r"down_weight must have shape \[D/2, D\] = \[\*, 16\], got \[8, 15\]"),
        ("conv_weight", (8, 1, 3), r"conv_weight must have shape \[D/2, 3\] = \[8, 3\], got \[8, 1, 3\]"),
        ("up_weight", (8, 16), r"up_weight must have shape \[D, D/2\] = \[16, 8\], got \[8, 16\]"),
    ],
)
def test_wrong_shapes_are_said(name, shape, message):
    tensors = {key: t.float() for key, t in _tensors(2, 3, 5, 16).items()}
    tensors[name] = torch.zeros(shape)
    with pytest.raises(RuntimeError, match=f"local_temporal: {message}"):
        ops.local_temporal(**tensors)


def test_wrong_dtypes_and_prefix_are_said():
    tensors = {key: t.float() for key, t in _tensors(2, 3, 5, 16).items()}
    with pytest.raises(RuntimeError, match="up_bias must be float32 like the first argument, got bfloat16"):
        ops.local_temporal(**{**tensors, "up_bias": tensors["up_bias"].bfloat16()})
    with pytest.raises(RuntimeError, match=r"num_prefix_tokens must be in 0\.\.L = 5, got 6"):
        ops.local_temporal(**tensors, num_prefix_tokens=6)
    with pytest.raises(RuntimeError, match="x must be float32, bfloat16, float16 or float64, got int64"):
        ops.local_temporal(**{**tensors, "x": tensors["x"].long()})
