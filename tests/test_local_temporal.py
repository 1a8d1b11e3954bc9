"""local_temporal: kernels against the float64 truth, what passes through, and errors."""

from contextlib import contextmanager, nullcontext

import pytest
import torch

import op_cases
from mplug2 import ops
from mplug2.ops import reference
from tolerances import LOCAL_LONG_SUM, assert_close, assert_close_together, draws

SHAPES = [(1, 1, 2, 8), (2, 5, 7, 32), (1, 16, 1, 64), (3, 2, 97, 48), (1, 4, 257, 128), (2, 3, 5, 18)]
# Pieces of 16 frames, and the layouts of a row on a GPU: 1 to 4 chunks of a lane, one warp or four.
SHAPES += [(1, 17, 2, 272), (1, 129, 3, 16), (1, 33, 1, 528), (1, 3, 2, 784), (1, 2, 3, 1040), (1, 5, 1, 2064)]
FORWARD = ("local_temporal_fwd_down", "local_temporal_fwd_up")  # the product form
PASSES = ("local_temporal_fwd_norm", "local_temporal_fwd_mix")
BACKWARD = ("local_temporal_bwd_mix", "local_temporal_bwd_norm")


def _tensors(*shape, seed=0):
    return op_cases.local_temporal_tensors(torch.Generator().manual_seed(seed), *shape)


def _on(backend, tensors, which=0):
    return {name: t.to(backend.device, backend.dtypes[which]) for name, t in tensors.items()}


def _launches(shape, forward, prefix):
    if shape[-1] % 16:  # no chunks of 8 in D and in D/2
        return ()
    return (PASSES if prefix == shape[2] else forward) + BACKWARD


@contextmanager
def _passes():
    """A GPU whose blocks have less shared memory than the product form takes, so that the passes serve."""
    import emulated

    with emulated.device(max_shared_bytes=96 * 1024):
        yield


def _run(function, tensors, kind, dtype, prefix, device="cpu", needing=None):
    """Output and gradients by name, on the CPU, of values that are exact in `dtype`."""
    leaves = {
        name: t.to(dtype).to(device, kind).requires_grad_(needing is None or name in needing)
        for name, t in tensors.items()
    }
    out = function(**leaves, num_prefix_tokens=prefix)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    out.backward(dout.to(device, kind))
    return out.detach().cpu(), {name: t.grad.cpu() for name, t in leaves.items() if t.requires_grad}


def _compare(backend, shape, dtype, prefix=1, needing=None, forward=FORWARD):
    runs = []
    for tensors in draws(lambda seed: _tensors(*shape, seed=seed), backend.most_draws):
        with backend.launching(*_launches(shape, forward, prefix)):
            actual = _run(ops.local_temporal, tensors, dtype, dtype, prefix, backend.device, needing)
        baseline = _run(reference.local_temporal, tensors, dtype, dtype, prefix, needing=needing)
        truth = _run(reference.local_temporal, tensors, torch.float64, dtype, prefix, needing=needing)
        runs.append([{"out": out, **grads} for out, grads in (actual, baseline, truth)])
        assert runs[-1][0].keys() == runs[-1][2].keys()
    assert_close_together(runs)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("prefix", [0, 1])
def test_output_and_gradients(backend, shape, prefix, which):
    _compare(backend, shape, backend.dtypes[which], prefix)


TILES = [((3, 16, 4, 528), 1), ((5, 5, 7, 48), 0), ((3, 1, 90, 64), 1), ((1, 16, 3, 1024), 1)]  # of whole positions
TILES += [((1, 128, 2, 16), 0), ((1, 260, 2, 16), 1)]  # of one position, and of pieces of one


@pytest.mark.parametrize("backend", ["emulated", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize(("shape", "prefix"), TILES, ids=str)
def test_tiles_of_the_product_form(backend, shape, prefix):
    _compare(backend, shape, backend.dtypes[0], prefix)


@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
@pytest.mark.parametrize("shape", [(3, 16, 4, 528), (1, 260, 2, 1040)], ids=str)
def test_blocks_that_take_all_columns(backend, shape):
    """Of a GPU that is full with a block a tile of rows."""
    import emulated

    with emulated.device(num_multiprocessors=1):
        _compare(backend, shape, backend.dtypes[0])


@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_passes_where_a_block_has_too_little_shared_memory(backend, shape, which):
    with _passes():
        _compare(backend, shape, backend.dtypes[which], forward=PASSES)


@pytest.mark.parametrize("needing", [("x",), ("conv_weight",), ("ln_bias", "up_weight")], ids=str)
def test_gradients_of_some_inputs(backend, needing):
    _compare(backend, (2, 5, 7, 32), backend.dtypes[0], needing=needing)


def test_stride_0_gradients(backend):
    tensors, dtype = _tensors(2, 5, 7, 32), backend.dtypes[0]
    grads = []
    for function, kind, device in (
        (ops.local_temporal, dtype, backend.device),
        (reference.local_temporal, dtype, "cpu"),
        (reference.local_temporal, torch.float64, "cpu"),
    ):
        leaves = {name: t.to(dtype).to(device, kind).requires_grad_() for name, t in tensors.items()}
        function(**leaves, num_prefix_tokens=1).sum().backward()
        grads.append({name: t.grad.cpu() for name, t in leaves.items()})
    for name in tensors:
        assert_close(*(grad[name] for grad in grads), local=LOCAL_LONG_SUM)


VIEWS = {
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "every other video": lambda t: t.repeat_interleave(2, 0)[::2],
    "2 bytes past an aligned address": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t),
    "expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_views_give_the_bits_of_their_copies(backend, view):
    x, *weights = _on(backend, _tensors(2, 5, 7, 32)).values()
    x = view(x)
    weights = [torch.cat([t.new_zeros(3), t.flatten()])[3:].view_as(t) for t in weights]
    # NOTE: not .contiguous(), which leaves a misaligned tensor where it is.
    copies = [t.clone(memory_format=torch.contiguous_format) for t in (x, *weights)]
    with backend.launching(*FORWARD, *BACKWARD):
        out, hidden = torch.ops.mplug2.local_temporal_fwd(x, *weights, 1, 1e-5, True)
        grads = torch.ops.mplug2.local_temporal_bwd(view(out), x, hidden, *weights, 1, 1e-5)
    expected, copied_hidden = torch.ops.mplug2.local_temporal_fwd(*copies, 1, 1e-5, True)
    assert torch.equal(out, expected)
    assert torch.equal(hidden, copied_hidden)
    dout = view(out).clone(memory_format=torch.contiguous_format)
    expected = torch.ops.mplug2.local_temporal_bwd(dout, copies[0], hidden, *copies[1:], 1, 1e-5)
    for grad, wanted in zip(grads, expected, strict=True):
        assert torch.equal(grad, wanted)


@pytest.mark.parametrize(("forward", "passes"), [("cpu", False), ("emulated", False), ("emulated", True)])
def test_forward_by_one_layer_and_backward_by_another(forward, passes):
    """Every layer and form saves the same hidden."""
    import emulated

    emulated.load()
    layers = {"cpu": torch.ops.mplug2, "emulated": emulated.ops}
    backward = "cpu" if forward == "emulated" else "emulated"
    tensors, dtype = _tensors(2, 5, 7, 32), torch.bfloat16
    x, *weights = (t.to(dtype) for t in tensors.values())
    with _passes() if passes else nullcontext():
        out, hidden = layers[forward].local_temporal_fwd(x, *weights, 1, 1e-5, True)
    prefix = hidden.view(2, 5, 7, 16)[:, :, 0]
    assert torch.equal(prefix, tensors["down_bias"].to(dtype).expand_as(prefix))  # of LN's zeros
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    grads = layers[backward].local_temporal_bwd(dout, x, hidden, *weights, 1, 1e-5)
    _, base = _run(reference.local_temporal, tensors, dtype, dtype, 1)
    _, true = _run(reference.local_temporal, tensors, torch.float64, dtype, 1)
    for name, grad in zip(tensors, grads, strict=True):
        assert_close(grad, base[name], true[name], local=LOCAL_LONG_SUM)


def test_the_same_bits_every_time(backend):
    tensors, dtype = _tensors(2, 19, 9, 272), backend.dtypes[0]
    first = _run(ops.local_temporal, tensors, dtype, dtype, 1, backend.device)
    schedules = [nullcontext()] * 2
    if backend.name == "emulated":
        import emulated

        schedules = [emulated.schedule("plain"), emulated.schedule("skewed", 1), emulated.schedule("random", 7)]
    for schedule in schedules:
        with schedule:
            again = _run(ops.local_temporal, tensors, dtype, dtype, 1, backend.device)
        assert torch.equal(first[0], again[0])
        for name, grad in first[1].items():
            assert torch.equal(grad, again[1][name]), name


@pytest.mark.parametrize("shape", [(0, 4, 5, 16), (2, 0, 5, 16), (2, 4, 0, 16)])
def test_empty(backend, shape):
    tensors = {name: t.requires_grad_() for name, t in _on(backend, _tensors(*shape)).items()}
    out = ops.local_temporal(**tensors, num_prefix_tokens=0)
    assert out.shape == shape
    out.sum().backward()
    assert all(t.grad.count_nonzero() == 0 for t in tensors.values())


@pytest.mark.parametrize("which", [0, 1])
def test_prefix_passes_through_and_is_never_read(backend, which):
    tensors = _on(backend, _tensors(2, 3, 6, 16), which)
    with backend.launching(*FORWARD):
        before = ops.local_temporal(**tensors, num_prefix_tokens=2)
    assert torch.equal(before[:, :, :2], tensors["x"][:, :, :2])
    tensors["x"][:, :, :2] = float("nan")
    after = ops.local_temporal(**tensors, num_prefix_tokens=2)
    assert torch.equal(after[:, :, 2:], before[:, :, 2:])
    assert after[:, :, :2].isnan().all()


@pytest.mark.parametrize("width", [16, 1040])
def test_nan_in_the_prefix_stays_out_of_the_gradients(backend, width):
    tensors = _on(backend, _tensors(2, 3, 6, width))
    tensors["x"][:, :, 0] = float("nan")
    tensors = {name: t.requires_grad_() for name, t in tensors.items()}
    with backend.launching(*BACKWARD):
        ops.local_temporal(**tensors).sum().backward()
    assert all(t.grad.isfinite().all() for t in tensors.values())


def test_every_token_in_the_prefix(backend):
    tensors = {name: t.requires_grad_() for name, t in _on(backend, _tensors(2, 3, 4, 16)).items()}
    out = ops.local_temporal(**tensors, num_prefix_tokens=4)
    assert torch.equal(out, tensors["x"])
    out.backward(torch.ones_like(out))
    assert (tensors.pop("x").grad == 1).all()
    assert all(t.grad.count_nonzero() == 0 for t in tensors.values())


@pytest.mark.parametrize("frames", [7, 35])
def test_frames_see_their_neighbours_and_no_further(backend, frames):
    tensors = _on(backend, _tensors(2, frames, 3, 16))
    before = ops.local_temporal(**tensors)
    middle = frames // 2 - 1  # of 35: 16, where a piece begins
    tensors["x"][0, middle, 1, :8] += 1  # not all channels alike: LN would not see it
    changed = (ops.local_temporal(**tensors) != before).any(-1)
    near = slice(middle - 1, middle + 2)
    assert changed[0, near, 1].all()
    changed[0, near, 1] = False
    assert not changed.any()


def test_large_inputs_give_no_nan(backend):
    tensors = _on(backend, _tensors(1, 3, 4, 16))
    tensors["conv_bias"] += torch.tensor([1e4, -1e4] * 4, device=backend.device)
    assert ops.local_temporal(**tensors).isfinite().all()


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_several_chunks_of_videos_are_one_result(backend):
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
def test_wrong_shapes_are_said(backend, name, shape, message):
    tensors = {key: t.float() for key, t in _tensors(2, 3, 5, 16).items()}
    tensors[name] = torch.zeros(shape)
    with pytest.raises(RuntimeError, match=f"local_temporal: {message}"):
        ops.local_temporal(**tensors)


def test_wrong_dtypes_and_prefix_are_said(backend):
    tensors = {key: t.float() for key, t in _tensors(2, 3, 5, 16).items()}
    with pytest.raises(RuntimeError, match="up_bias must be float32 like the first argument, got bfloat16"):
        ops.local_temporal(**{**tensors, "up_bias": tensors["up_bias"].bfloat16()})
    with pytest.raises(RuntimeError, match=r"num_prefix_tokens must be in 0\.\.L = 5, got 6"):
        ops.local_temporal(**tensors, num_prefix_tokens=6)
    with pytest.raises(RuntimeError, match="x must be float32, bfloat16, float16 or float64, got int64"):
        ops.local_temporal(**{**tensors, "x": tensors["x"].long()})
