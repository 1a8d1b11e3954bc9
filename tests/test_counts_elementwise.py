"""What the one-pass kernels round the products move, counted by the emulator: every operand once, in whole sectors."""

import pytest
import torch

import emulated
import op_cases
from mplug2 import ops

SECTOR = 32  # bytes
HALF, FLOAT = 2, 4  # bytes of a number


@pytest.fixture(autouse=True)
def small_device(backend):
    """Of a GPU with fewer multiprocessors than there is work for, so that blocks take several turns; and of none for
    which linear is one kernel or local_temporal two."""
    with emulated.device(num_multiprocessors=2, max_shared_bytes=96 * 1024, capability=90):
        yield


pytestmark = pytest.mark.parametrize("backend", ["emulated"], indirect=True)


def _bytes(launch):
    """(read, written), distinct in the launch, and the same summed over blocks."""
    ranges = launch.ranges
    return (
        (sum(r.read.launch for r in ranges) * SECTOR, sum(r.written.launch for r in ranges) * SECTOR),
        (sum(r.read.blocks for r in ranges) * SECTOR, sum(r.written.blocks for r in ranges) * SECTOR),
    )


def _assert_moves(launch, *, read, written, read_by_blocks=None):
    """Bytes, of everything the launch touches; blocks read nothing twice but what `read_by_blocks` says."""
    launched, by_blocks = _bytes(launch)
    assert launched == (read, written)
    assert by_blocks == (read if read_by_blocks is None else read_by_blocks, written)


def _assert_whole_sectors(launch, parts=0):
    """Requests of a warp ask for all of the sectors that they touch; those of float32 sums, for a half at a time."""
    (_, _), (read, written) = _bytes(launch)
    assert launch.global_sectors * SECTOR == read + written + parts


def _half(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("has_residual", [False, True])
def test_linear_forward(activation, has_residual):
    rows, width = 300, 264
    residual = _half(rows, width) if has_residual else None
    with emulated.counts() as counts:
        ops.linear(_half(rows, 16), _half(width, 16), _half(width), activation=activation, residual=residual)
    (launch,) = counts.launches
    tensor = rows * width * HALF
    _assert_moves(launch, read=tensor * (1 + has_residual), written=tensor)
    _assert_whole_sectors(launch)
    assert launch.exponentials == (rows * width if activation == "quick_gelu" else 0)


def test_a_bare_linear_layer_is_the_product_alone():
    with emulated.counts() as counts:
        ops.linear(_half(5, 16), _half(24, 16), _half(24))
        ops.linear(_half(5, 16), _half(24, 16), residual=_half(5, 24))
    assert not counts.launches


@pytest.mark.parametrize("activation", ["none", "gelu", "quick_gelu"])
def test_linear_backward(activation):
    rows, width = 300, 272  # rows begin with a sector
    x, weight, pre, dout = _half(rows, 16), _half(width, 16), _half(rows, width), _half(rows, width)
    with emulated.counts() as counts:
        torch.ops.mplug2.linear_bwd(dout, x, weight, pre, activation)
    first, second = counts.launches
    tensor, parts = rows * width * HALF, first.grid[1] * width * FLOAT
    has_activation = activation != "none"
    _assert_moves(first, read=tensor * (1 + has_activation), written=tensor * has_activation + parts)
    _assert_whole_sectors(first, parts)
    assert first.exponentials == rows * width * has_activation
    assert first.wavefronts.actual == first.wavefronts.ideal
    _assert_moves(second, read=parts, written=-(-width * HALF // SECTOR) * SECTOR)


# Up to 16 frames are one piece; beyond, pieces of 16 read two frames more.
@pytest.mark.parametrize(("frames", "hidden_reads"), [(5, 1.0), (16, 1.0), (48, (17 + 18 + 17) / 48)])
def test_local_temporal_forward(frames, hidden_reads):
    videos, tokens, width = 2, 9, 256
    tensors = {
        name: t.to(torch.bfloat16)
        for name, t in op_cases.local_temporal_tensors(
            torch.Generator().manual_seed(0), videos, frames, tokens, width
        ).items()
    }
    with emulated.counts() as counts:
        ops.local_temporal(**tensors, num_prefix_tokens=0)
    norm, mix = counts.launches
    hidden, rows = width // 2, videos * frames * tokens
    wide, narrow, vectors = rows * width * HALF, rows * hidden * HALF, 2 * width * HALF
    # LN: x in, normed and a copy of x out.
    _assert_moves(norm, read=wide + vectors, written=2 * wide, read_by_blocks=wide + norm.grid[0] * vectors)
    _assert_whole_sectors(norm)
    # Convolution and QuickGELU: hidden in, act out, whose one more chunk is the bias's channel.
    chunk = rows * 8 * HALF
    read, written = _bytes(mix)[0]
    assert read == narrow + hidden * 4 * HALF  # the convolution's parameters
    assert narrow + chunk <= written <= narrow + 2 * chunk  # chunks of two rows share sectors
    assert mix.of(tensors["conv_bias"]).read.launch * SECTOR == hidden * HALF
    assert mix.exponentials == rows * hidden
    loads = mix.global_requests * 32 * 8 * HALF  # bytes, were all lanes to load
    assert loads >= narrow * hidden_reads
    # Four passes over an activation, beside the products' own four: normed in, hidden out, act in, out in and out.
    passes = sum(sum(_bytes(launch)[0]) for launch in counts.launches) / wide
    assert passes <= 4.2
    assert _bytes(mix)[1][0] <= 1.25 * hidden_reads * narrow + mix.grid[0] * hidden * 4 * HALF


@pytest.mark.parametrize(("frames", "reads"), [(5, 1.0), (16, 1.0), (48, 1.15)])
def test_local_temporal_backward(frames, reads):
    videos, tokens, width = 2, 9, 256
    x, *weights = (
        t.to(torch.bfloat16)
        for t in op_cases.local_temporal_tensors(
            torch.Generator().manual_seed(0), videos, frames, tokens, width
        ).values()
    )
    hidden, rows = width // 2, videos * frames * tokens
    saved, dout = _half(rows, hidden), _half(*x.shape)
    with emulated.counts() as counts:
        torch.ops.mplug2.local_temporal_bwd(dout, x, saved, *weights, 0, 1e-5)
    mix, mix_parts, norm, norm_parts = counts.launches
    wide, narrow = rows * width * HALF, rows * hidden * HALF
    # hidden and dact in; act, dhidden and the parts of five sums out.
    parameters, parts = 4 * hidden * HALF, mix.grid[1] * 5 * hidden * FLOAT
    launched, by_blocks = _bytes(mix)
    assert launched == (2 * narrow + parameters, 2 * narrow + parts)
    assert by_blocks[0] <= reads * 2 * narrow + mix.grid[0] * mix.grid[1] * parameters
    assert by_blocks[1] == 2 * narrow + parts
    assert mix.exponentials <= rows * hidden * (1 if frames <= 16 else 1.15)
    assert _bytes(mix_parts)[0][0] == parts
    # x, dout and dnormed in; dx, normed and the parts of three sums out.
    vectors, parts = 2 * width * HALF, norm.grid[0] * 3 * width * FLOAT
    _assert_moves(
        norm,
        read=3 * wide + vectors,
        written=2 * wide + parts,
        read_by_blocks=3 * wide + norm.grid[0] * vectors,
    )
    _assert_whole_sectors(norm, parts)
    assert _bytes(norm_parts)[0][0] == parts


def test_linear_cross_entropy():
    rows, width, words = 40, 16, 1001
    stride = 1008  # rows of logits begin at multiples of 16 bytes
    x, weight, bias = _half(rows, width), _half(words, width), _half(words)
    targets = torch.arange(rows)
    with emulated.counts() as counts:
        _, lse = torch.ops.mplug2.linear_cross_entropy_fwd(x, weight, targets, bias, -100, 0.1)
    (launch,) = counts.launches
    logits, vector = rows * stride * HALF, stride * HALF
    read, _ = _bytes(launch)[0]
    assert read <= logits + vector + rows * 8 + SECTOR
    assert _bytes(launch)[1][0] <= logits + rows * (vector + SECTOR)  # each block its row, the bias, a target
    assert launch.exponentials <= 1.3 * rows * stride  # one a number, one for eight where a larger logit comes

    with emulated.counts() as counts:
        torch.ops.mplug2.linear_cross_entropy_bwd(lse, x, weight, targets, bias, lse, -100, 0.1)
    first, second = counts.launches
    parts = first.grid[1] * stride * FLOAT
    launched, by_blocks = _bytes(first)
    assert launched[1] == by_blocks[1] == logits + parts
    assert launched[0] <= logits + vector + rows * 16 + 3 * SECTOR
    assert by_blocks[0] <= logits + first.grid[1] * vector + first.grid[0] * first.grid[1] * rows * 3 * SECTOR
    assert first.exponentials == rows * stride
    assert _bytes(second)[0][0] == parts


@pytest.mark.parametrize("is_masked", [False, True])
def test_fusion(is_masked):
    items, rows, keys, width = 3, 10, 265, 32  # rows of scores an item
    stride = 272  # rows of scores and weights begin with a sector
    q, x, key_weight, value_weight = (
        _half(items, 5, 2, 8),
        _half(items, keys, width),
        _half(16, width),
        _half(16, width),
    )
    mask = torch.arange(keys).expand(items, keys) < 200 if is_masked else None
    with emulated.counts() as counts:
        out, *saved = torch.ops.mplug2.fusion_fwd(q, x, key_weight, value_weight, mask, 0.3, True)
    (launch,) = counts.launches
    scores = items * rows * stride
    flags = items * stride if is_masked else 0
    # Every score is read once and makes one exponential, every weight is written once.
    flag_sectors = -(-flags // SECTOR) * SECTOR
    by_blocks = scores * FLOAT + (rows * items * stride if is_masked else 0)
    launched, blocks = _bytes(launch)
    assert launched == (scores * FLOAT + flag_sectors, scores * HALF)
    assert blocks[1] == scores * HALF
    assert by_blocks <= blocks[0] <= by_blocks + is_masked * rows * items * SECTOR
    assert launch.exponentials == scores
    assert launch.wavefronts.actual == launch.wavefronts.ideal

    with emulated.counts() as counts:
        torch.ops.mplug2.fusion_bwd(out, q, x, key_weight, value_weight, *saved, 0.3)
    (launch,) = counts.launches
    # Weights and their gradients in; weights and gradients of scores out.
    _assert_moves(launch, read=scores * (HALF + FLOAT), written=scores * 2 * HALF)
    _assert_whole_sectors(launch)
    assert launch.wavefronts.actual == launch.wavefronts.ideal
