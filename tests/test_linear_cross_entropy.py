"""linear_cross_entropy: loss and gradients against the float64 truth, chunks, reductions, and memory."""

import pytest
import torch
import torch.nn.functional as F

from mplug2 import ops
from tolerances import LOCAL_LONG_SUM, assert_close


def _plain(x, weight, targets, bias=None, **options):
    """The definition, with all logits."""
    logits = F.linear(x, weight, bias)
    if logits.dtype != torch.float64:
        logits = logits.float()
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), **options)


def _tensors(rows, width, vocabulary, seed=0):
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, vocabulary, (rows,), generator=g)
    targets[::5] = -100
    return {
        "x": torch.randn(rows, width, generator=g, dtype=torch.float64),
        "weight": torch.randn(vocabulary, width, generator=g, dtype=torch.float64) * 2 / width**0.5,
        "bias": torch.randn(vocabulary, generator=g, dtype=torch.float64),
    }, targets


def _run(function, tensors, targets, kind, dtype, **options):
    leaves = {name: t.to(dtype).to(kind).requires_grad_() for name, t in tensors.items()}
    loss = function(targets=targets, **leaves, **options)
    weights = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    (loss * weights).sum().backward()
    return loss, {name: t.grad for name, t in leaves.items()}


def _compare(tensors, targets, dtype, **options):
    loss, grads = _run(ops.linear_cross_entropy, tensors, targets, dtype, dtype, **options)
    base_loss, base_grads = _run(_plain, tensors, targets, dtype, dtype, **options)
    true_loss, true_grads = _run(_plain, tensors, targets, torch.float64, dtype, **options)
    assert loss.dtype == torch.float32
    assert_close(loss, base_loss, true_loss, dtype=dtype)
    for name, grad in grads.items():
        assert_close(grad, base_grads[name], true_grads[name], local=LOCAL_LONG_SUM)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradients(dtype, reduction, smoothing):
    _compare(*_tensors(23, 32, 101), dtype, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (1, 17), (1100, 30522)])
def test_one_row_and_several_chunks(rows, vocabulary, dtype):
    _compare(*_tensors(rows + 1, 8, vocabulary), dtype)


def test_no_bias():
    tensors, targets = _tensors(9, 16, 33)
    _compare({name: tensors[name] for name in ("x", "weight")}, targets, torch.float32)


def test_leading_dimensions_and_ignored_rows():
    x, weight = torch.randn(2, 3, 8), torch.randn(11, 8)
    targets = torch.tensor([[1, 7, 7], [10, 7, 2]])
    loss = ops.linear_cross_entropy(x, weight, targets, ignore_index=7, reduction="none")
    torch.testing.assert_close(loss, _plain(x, weight, targets, ignore_index=7, reduction="none").view(2, 3))
    assert torch.equal(loss == 0, targets == 7)


def test_huge_logits_stay_finite():
    x, weight = torch.full((2, 4), 1e4), torch.eye(4)
    x[1, 2] = 3e4
    loss = ops.linear_cross_entropy(x, weight, torch.tensor([0, 1]), reduction="none")
    torch.testing.assert_close(loss, _plain(x, weight, torch.tensor([0, 1]), reduction="none"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_empty_and_all_ignored(dtype):
    weight = torch.randn(5, 4, dtype=dtype, requires_grad=True)
    none = ops.linear_cross_entropy(
        torch.zeros(0, 4, dtype=dtype), weight, torch.zeros(0, dtype=torch.long), reduction="sum"
    )
    none.backward()
    assert none == 0
    assert weight.grad.count_nonzero() == 0
    ignored = torch.full((3,), -100)
    x = torch.randn(3, 4, dtype=dtype)
    assert ops.linear_cross_entropy(x, weight, ignored, reduction="sum") == 0
    assert ops.linear_cross_entropy(x, weight, ignored).isnan()


def test_reference_in_chunks_is_the_definition():
    """float64 goes through the reference, whose chunks are many here."""
    tensors, targets = _tensors(600, 4, 30522)
    loss, grads = _run(ops.linear_cross_entropy, tensors, targets, torch.float64, torch.float64, label_smoothing=0.1)
    true_loss, true_grads = _run(_plain, tensors, targets, torch.float64, torch.float64, label_smoothing=0.1)
    torch.testing.assert_close(loss, true_loss)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, true_grads[name])


def test_errors_name_the_tensor():
    x, weight, targets = torch.zeros(3, 8), torch.ones(5, 8), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"targets must have shape \[3\], got \[2\]"):
        ops.linear_cross_entropy(x, weight, targets[:2])
    with pytest.raises(ValueError, match="reduction must be 'mean', 'sum' or 'none', got 'max'"):
        ops.linear_cross_entropy(x, weight, targets, reduction="max")
    with pytest.raises(RuntimeError, match=r"weight must have shape \[V, D\] = \[\*, 8\], got \[5, 7\]"):
        ops.linear_cross_entropy(x, weight[:, :7], targets)
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(
            RuntimeError, match=r"targets must be in 0\.\.V-1 = 4 or ignore_index = -100, got 5 in row 1"
        ):
            ops.linear_cross_entropy(x.to(dtype), weight.to(dtype), torch.tensor([0, 5, 1]))
    with pytest.raises(RuntimeError, match=r"label_smoothing must be in 0\.\.1, got 1\.5"):
        ops.linear_cross_entropy(x, weight, targets, label_smoothing=1.5)
