"""linear_cross_entropy: loss and gradients against the float64 truth, chunks, reductions, and memory."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from mplug2 import ops
from tolerances import LOCAL_FROM_LSE, LOCAL_LONG_SUM, assert_close

FORWARD, BACKWARD = "linear_cross_entropy_fwd", "linear_cross_entropy_bwd"


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


def _run(function, tensors, targets, kind, dtype, device="cpu", **options):
    """Loss and gradients by name, on the CPU, of values that are exact in `dtype`."""
    leaves = {name: t.to(dtype).to(device, kind).requires_grad_() for name, t in tensors.items()}
    loss = function(targets=targets.to(device), **leaves, **options)
    weights = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    (loss * weights.to(device)).sum().backward()
    return loss.detach().cpu(), {name: t.grad.cpu() for name, t in leaves.items()}


def _compare(backend, tensors, targets, dtype, **options):
    with backend.launching(*[FORWARD, BACKWARD] if tensors["x"].shape[1] % 8 == 0 else []):
        loss, grads = _run(ops.linear_cross_entropy, tensors, targets, dtype, dtype, backend.device, **options)
    base_loss, base_grads = _run(_plain, tensors, targets, dtype, dtype, **options)
    true_loss, true_grads = _run(_plain, tensors, targets, torch.float64, dtype, **options)
    assert loss.dtype == torch.float32
    assert_close(loss, base_loss, true_loss, dtype=dtype)
    for name, grad in grads.items():
        assert_close(grad, base_grads[name], true_grads[name], local=LOCAL_LONG_SUM)


def _multiprocessors(backend, count):
    """A small GPU has small chunks."""
    if backend.name != "emulated":
        return nullcontext()
    import emulated

    return emulated.device(num_multiprocessors=count)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradients(backend, which, reduction, smoothing):
    _compare(backend, *_tensors(23, 32, 101), backend.dtypes[which], reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(("rows", "width", "vocabulary"), [(1, 8, 1), (30, 8, 17), (70, 16, 2056), (5, 9, 33)])
def test_sizes(backend, rows, width, vocabulary, which):
    _compare(backend, *_tensors(rows + 1, width, vocabulary), backend.dtypes[which])


@pytest.mark.parametrize("which", [0, 1])
def test_one_row(backend, which):
    """One loss is one rounding of a logit, which no baseline measures: a bound of its own."""
    (tensors, targets), dtype = _tensors(2, 8, 17), backend.dtypes[which]
    loss, grads = _run(ops.linear_cross_entropy, tensors, targets, dtype, dtype, backend.device)
    true_loss, true_grads = _run(_plain, tensors, targets, torch.float64, dtype)
    unit = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(loss.double(), true_loss, atol=unit, rtol=unit)
    for name, grad in grads.items():
        torch.testing.assert_close(grad.double(), true_grads[name], atol=unit, rtol=unit)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_one_row_keeps_the_usual_rules(backend, which):
    _compare(backend, *_tensors(2, 8, 17), backend.dtypes[which])


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("backend", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_several_chunks(backend, which):
    _compare(backend, *_tensors(1101, 8, 30522), backend.dtypes[which])


# On one multiprocessor, of 128 K logits: rows forward; backward rows too, or words alone.
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("rows", "vocabulary"), [(300, 1001), (50, 4001)])
@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
def test_several_small_chunks(backend, rows, vocabulary, smoothing):
    with _multiprocessors(backend, 1):
        _compare(backend, *_tensors(rows, 8, vocabulary), backend.dtypes[0], label_smoothing=smoothing)


@pytest.mark.parametrize("which", [0, 1])
def test_no_bias(backend, which):
    tensors, targets = _tensors(9, 16, 33)
    _compare(backend, {name: tensors[name] for name in ("x", "weight")}, targets, backend.dtypes[which])


@pytest.mark.parametrize("needing", ["x", "weight", "bias"])
def test_gradient_of_one_input(backend, needing):
    tensors, targets = _tensors(9, 16, 33)
    dtype = backend.dtypes[0]
    leaves = {name: t.to(backend.device, dtype).requires_grad_(name == needing) for name, t in tensors.items()}
    ops.linear_cross_entropy(targets=targets.to(backend.device), **leaves, reduction="none").sum().backward()
    results = []
    for kind in (dtype, torch.float64):
        plain = {name: t.to(dtype).to(kind).requires_grad_(name == needing) for name, t in tensors.items()}
        _plain(targets=targets, **plain, reduction="sum").backward()
        results.append(plain[needing].grad)
    assert_close(leaves.pop(needing).grad.cpu(), *results, local=LOCAL_LONG_SUM)
    assert all(t.grad is None for t in leaves.values())


VIEWS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every other row": lambda t: t.repeat_interleave(2, 0)[::2],
    "columns of a wider tensor": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "2 bytes past an aligned address": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t),
    "expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_views(backend, view):
    tensors, targets = _tensors(60, 16, 40)
    dtype = backend.dtypes[0]
    tensors = {name: t.to(dtype) for name, t in tensors.items()}
    tensors["x"] = view(tensors["x"])
    tensors["weight"] = torch.cat([tensors["weight"]] * 2, 1)[:, 1:17]
    tensors["bias"] = torch.cat([tensors["bias"].new_zeros(3), tensors["bias"]])[3:]
    dloss = torch.ones(1).expand(60)
    x, weight, bias, wanted, dloss = (t.to(backend.device) for t in (*tensors.values(), targets, dloss))
    wanted = wanted.repeat_interleave(2)[::2]
    loss, lse = torch.ops.mplug2.linear_cross_entropy_fwd(x, weight, wanted, bias, -100, 0.0)
    grads = torch.ops.mplug2.linear_cross_entropy_bwd(dloss, x, weight, wanted, bias, lse, -100, 0.0)
    results = []
    for kind in (dtype, torch.float64):
        leaves = {name: t.to(kind).clone().requires_grad_() for name, t in tensors.items()}
        expected = _plain(targets=targets, **leaves, reduction="none")
        expected.sum().backward()
        results.append((expected, *(t.grad for t in leaves.values())))
    assert_close(loss.cpu(), results[0][0], results[1][0], dtype=dtype)
    for grad, base, true in zip(grads, results[0][1:], results[1][1:], strict=True):
        assert_close(grad.cpu(), base, true, local=LOCAL_LONG_SUM)


@pytest.mark.parametrize("forward", ["cpu", "emulated"])
def test_forward_by_one_layer_and_backward_by_another(forward):
    """Every layer saves the same lse, of logits that it rounds or does not: across layers a row's softmax adds up to 1
    less exactly, so of the two rules the local one holds, as wide as for attention."""
    import emulated

    emulated.load()
    layers = {"cpu": torch.ops.mplug2, "emulated": emulated.ops}
    backward = "cpu" if forward == "emulated" else "emulated"
    (tensors, targets), dtype = _tensors(60, 16, 101), torch.bfloat16
    x, weight, bias = (t.to(dtype) for t in tensors.values())
    loss, lse = layers[forward].linear_cross_entropy_fwd(x, weight, targets, bias, -100, 0.1)
    dloss = torch.linspace(0.5, 1.5, 60)  # as _run has it
    grads = layers[backward].linear_cross_entropy_bwd(dloss, x, weight, targets, bias, lse, -100, 0.1)
    options = {"reduction": "none", "label_smoothing": 0.1}
    base_loss, base = _run(_plain, tensors, targets, dtype, dtype, **options)
    true_loss, true = _run(_plain, tensors, targets, torch.float64, dtype, **options)
    assert_close(loss, base_loss, true_loss, dtype=dtype)
    for name, grad in zip(tensors, grads, strict=True):
        allowed = LOCAL_FROM_LSE * (base[name] - true[name]).abs().max()
        assert (grad - true[name]).abs().max() <= allowed, name


def test_the_same_bits_every_time(backend):
    (tensors, targets), dtype = _tensors(67, 16, 600), backend.dtypes[0]
    first = _run(ops.linear_cross_entropy, tensors, targets, dtype, dtype, backend.device)
    schedules = [nullcontext()] * 2
    if backend.name == "emulated":
        import emulated

        schedules = [emulated.schedule("plain"), emulated.schedule("skewed", 1), emulated.schedule("random", 7)]
    for schedule in schedules:
        with schedule:
            again = _run(ops.linear_cross_entropy, tensors, targets, dtype, dtype, backend.device)
        assert torch.equal(first[0], again[0])
        for name, grad in first[1].items():
            assert torch.equal(grad, again[1][name]), name


def test_masked_words_and_nan(backend):
    """Logits of -infinity count for nothing, also where a thread sees no other; NaN stays in its row."""
    x = torch.zeros(3, 8, dtype=backend.dtypes[0], device=backend.device)
    weight, bias = x.new_zeros(50, 8), x.new_full((50,), float("-inf"))
    bias[[7, 41]] = 1.0
    x[2] = float("nan")
    targets = torch.tensor([7, 41, 7], device=backend.device)
    loss = ops.linear_cross_entropy(x, weight, targets, bias, reduction="none")
    torch.testing.assert_close(loss[:2].cpu(), torch.full((2,), 2.0).log())
    assert loss[2].isnan()


@pytest.mark.parametrize("backend", ["emulated", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_target_out_of_range_gives_nan(backend):
    """A GPU's kernel cannot raise without waiting for it."""
    tensors, targets = _tensors(6, 16, 33)
    leaves = {name: t.to(backend.device, backend.dtypes[0]).requires_grad_() for name, t in tensors.items()}
    targets[1], targets[2], targets[3] = 33, -1, 32
    loss = ops.linear_cross_entropy(targets=targets.to(backend.device), **leaves, reduction="none")
    loss.sum().backward()
    expected = torch.tensor([False, True, True, False, False, False])
    assert torch.equal(loss.isnan().cpu(), expected)
    assert torch.equal(leaves["x"].grad.isnan().all(1).cpu(), expected)
    assert leaves["weight"].grad.isnan().all()
    assert leaves["bias"].grad.isnan().all()


def test_passes_past_2_to_the_31():
    """The passes over logits alone: the last row forward, the last block of 32 rows and 256 words backward."""
    import emulated

    emulated.load()
    g = torch.Generator().manual_seed(0)
    rows, words = 2**15 + 32, 2**16
    assert (rows - 1) * words > 2**31
    small = torch.randn(32, words, generator=g).bfloat16()
    logits = emulated.sparse(rows, words, dtype=torch.bfloat16)
    logits[-32:] = small
    targets = torch.randint(words - 256, words, (rows,), generator=g)
    dloss, (loss, lse) = torch.randn(rows, generator=g), torch.zeros(2, rows)
    parts = emulated.sparse(rows // 32, words, dtype=torch.float32)
    with emulated.blocks(rows - 1, rows):
        torch.ops.mplug2_samples.linear_cross_entropy_fwd_pass(logits, targets, loss, lse)
    truth = F.cross_entropy(small[-1:].double(), targets[-1:], label_smoothing=0.1)
    torch.testing.assert_close(loss[-1].double(), truth, rtol=1e-5, atol=1e-5)

    lse[-32:] = small.float().logsumexp(-1)
    few_parts = torch.zeros(1, words)
    blocks = rows // 32 * words // 256
    with emulated.blocks(blocks - 1, blocks):
        torch.ops.mplug2_samples.linear_cross_entropy_bwd_pass(logits, targets, dloss, lse, parts)
    with emulated.blocks(words // 256 - 1, words // 256):
        last = (targets[-32:], dloss[-32:], lse[-32:])
        torch.ops.mplug2_samples.linear_cross_entropy_bwd_pass(small, *last, few_parts)
    assert torch.equal(logits[-32:], small)
    assert torch.equal(parts[-1:, -256:], few_parts[:, -256:])
    assert few_parts[:, -256:].abs().min() > 0


def test_leading_dimensions_and_ignored_rows(backend):
    dtype = backend.dtypes[-1]
    x, weight = (torch.randn(shape).to(backend.device, dtype) for shape in ((2, 3, 8), (11, 8)))
    targets = torch.tensor([[1, 7, 7], [10, 7, 2]], device=backend.device)
    loss = ops.linear_cross_entropy(x, weight, targets, ignore_index=7, reduction="none")
    torch.testing.assert_close(
        loss, _plain(x, weight, targets, ignore_index=7, reduction="none").view(2, 3), atol=1e-2, rtol=1e-2
    )
    assert torch.equal(loss == 0, targets == 7)


@pytest.mark.parametrize("which", [0, 1])
def test_huge_logits_stay_finite(backend, which):
    x = torch.full((2, 8), 1e4, dtype=backend.dtypes[which], device=backend.device)
    weight, targets = torch.eye(8, dtype=x.dtype, device=x.device), torch.tensor([0, 1], device=x.device)
    x[1, 2] = 3e4
    loss = ops.linear_cross_entropy(x, weight, targets, reduction="none")
    torch.testing.assert_close(loss, _plain(x, weight, targets, reduction="none"))


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
