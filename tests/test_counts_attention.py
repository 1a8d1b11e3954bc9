"""What the attention kernels move and multiply, counted by the emulator, within the bounds of docs/attention_gpu.md."""

import pytest
import torch

import emulated

SECTOR = 32  # bytes
LENGTH, HEADS, HEAD_DIM = 257, 2, 64  # a frame of 16 x 16 patches


def _needed(products: int) -> float:
    """m16n8k16 instructions that whole ones would take, of one launch."""
    return products * HEADS * LENGTH * LENGTH * HEAD_DIM / (16 * 8 * 16)


def _packed() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return list(torch.randn(1, LENGTH, 3, HEADS, HEAD_DIM, generator=g).bfloat16().unbind(2))


def _held(launch: emulated.Launch, products: int, shared_bytes: int) -> None:
    assert launch.mma <= 1.12 * _needed(products)
    assert max(launch.mma_by_scheduler) <= 1.20 * _needed(products) / 4
    assert launch.shared_bytes_read <= shared_bytes * launch.mma
    assert launch.wavefronts.actual <= 1.05 * launch.wavefronts.ideal


@pytest.fixture(scope="module")
def forward() -> tuple[emulated.Launch, torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = _packed()
    emulated.load()
    with emulated.counts() as counts:
        out, lse = emulated.ops.attention_fwd(q, k, v, None, None, False, HEAD_DIM**-0.5, True)
    return counts.of("attention_fwd_short"), q, out, lse


def test_forward_moves_each_operand_once(forward):
    launch, q, out, lse = forward
    operand = LENGTH * HEADS * HEAD_DIM * 2 / SECTOR
    packed = launch.of(q)  # q, k and v
    for sectors in (packed.read.launch, packed.read.blocks):
        assert sectors == 3 * operand
    for sectors in (launch.of(out).written.launch, launch.of(out).written.blocks):
        assert sectors == operand
    assert launch.of(lse).written.blocks <= 1.05 * lse.numel() * 4 / SECTOR
    # The requests of warps ask for whole sectors, and for none twice; but for those of lse, eight numbers at a time.
    total = sum(r.read.blocks + r.written.blocks for r in launch.ranges)
    assert launch.global_sectors <= 1.02 * total


def test_forward_multiplies_little_more_than_it_must(forward):
    # A fragment of keys or values feeds one instruction: 16 queries a warp leave room for twice as many warps.
    _held(forward[0], products=2, shared_bytes=257)


def test_forward_exponentials_and_barriers(forward):
    launch = forward[0]
    assert launch.exponentials <= 1.12 * HEADS * LENGTH * LENGTH
    assert launch.block_barriers <= 3 * HEADS
    assert launch.named_barriers == 0


def test_two_blocks_of_an_a100_fit():
    """163 KB a multiprocessor; 1 KB a block is the system's."""
    q, k, v = _packed()
    with emulated.counts() as counts:
        emulated.ops.attention_fwd(q, k, v, None, None, False, HEAD_DIM**-0.5, True)
    assert 2 * (counts.of("attention_fwd_short").shared_bytes + 1024) <= 164 * 1024


# ---- tiles of keys --------------------------------------------------------------------------------------------------
def _tiled(batch, groups, queries, keys, *, causal=False, multiprocessors=1):
    """The counts of a forward pass over packed keys and values, and its q, k and out."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(batch * groups, queries, HEADS, HEAD_DIM, generator=g).bfloat16()
    k, v = torch.randn(batch, keys, 2, HEADS, HEAD_DIM, generator=g).bfloat16().unbind(2)
    emulated.load()
    with emulated.device(num_multiprocessors=multiprocessors), emulated.counts() as counts:
        out, _ = emulated.ops.attention_fwd(q, k, v, None, None, causal, HEAD_DIM**-0.5, True)
    return counts, q, k, out


def _sectors(*shape: int) -> int:
    return torch.Size(shape).numel() * HEADS * HEAD_DIM * 2 // SECTOR


@pytest.mark.parametrize(("groups", "queries", "rows"), [(5, 1, 16), (1, 25, 32), (5, 10, 64), (128, 1, 128)], ids=str)
def test_rows_that_share_keys_read_them_once(groups, queries, rows):
    """All tiles of rows: everything moves once, and the arithmetic is that of the tile's rows."""
    batch, keys = 2, 1025
    counts, q, k, out = _tiled(batch, groups, queries, keys)
    launch = counts.of("attention_fwd_tiled")
    assert len(counts.launches) == 1
    for found, size in ((launch.of(k).read, 2 * batch * keys), (launch.of(q).read, batch * groups * queries)):
        assert found.launch == found.blocks == _sectors(size)
    assert launch.of(out).written.launch == launch.of(out).written.blocks == _sectors(batch * groups * queries)
    least = 2 * batch * HEADS * rows * keys * HEAD_DIM / (16 * 8 * 16)
    assert launch.mma <= 1.008 * least  # 1,032 keys
    assert max(launch.mma_by_scheduler) <= 1.04 * least / 4
    assert launch.exponentials <= 1.06 * batch * HEADS * rows * keys
    assert launch.wavefronts.actual <= 1.01 * launch.wavefronts.ideal
    # A fragment feeds two instructions where a warp has 32 rows; beyond 128 are the parts of warps, once a block.
    assert launch.shared_bytes_read <= {16: 265, 32: 146, 64: 138, 128: 128}[rows] * launch.mma
    assert launch.block_barriers <= batch * HEADS * (-(-keys // 64) + 2)


def test_keys_that_blocks_share_are_read_once():
    batch, groups, keys, splits = 1, 5, 4097, 16
    counts, _, k, out = _tiled(batch, groups, 1, keys, multiprocessors=108)
    tiled, combine = counts.of("attention_fwd_tiled"), counts.of("attention_fwd_combine")
    assert tiled.grid == (batch * HEADS, splits, 1)
    assert tiled.of(k).read.launch == tiled.of(k).read.blocks == _sectors(2 * batch * keys)
    parts = splits * HEADS * groups * 9  # 72 float32
    assert sum(r.written.launch for r in tiled.ranges) <= parts
    assert sum(r.read.launch for r in combine.ranges) <= parts
    assert combine.of(out).written.launch == _sectors(batch * groups)
    rows = _sectors(batch * groups)
    assert sum(r.read.blocks for r in tiled.ranges) == tiled.of(k).read.blocks + splits * rows


def test_tiles_above_the_diagonal_are_skipped():
    length = 1025
    launch = _tiled(1, 1, length, length, causal=True)[0].of("attention_fwd_tiled")
    half = HEADS * (length * (length + 1) / 2) * 2 * HEAD_DIM / (16 * 8 * 16)
    assert launch.mma <= 1.10 * half
    assert launch.shared_bytes_read <= 129 * launch.mma
    assert launch.wavefronts.actual <= 1.01 * launch.wavefronts.ideal


def test_the_last_row_is_shared_by_the_warps():
    """513 = 4 x 128 + 1: the keys of the last row are divided among the warps."""
    length = 513
    launch = _tiled(1, 1, length, length)[0].of("attention_fwd_tiled")
    least = 2 * HEADS * 512 * length * HEAD_DIM / (16 * 8 * 16)
    assert launch.mma <= 1.08 * least
    assert max(launch.mma_by_scheduler) <= 1.01 * launch.mma / 4


def test_lengths_end_the_walk_over_keys():
    emulated.load()
    q = torch.randn(3, 5, 1, HEAD_DIM).bfloat16()
    k, v = torch.randn(3, 1000, 2, 1, HEAD_DIM).bfloat16().unbind(2)
    with emulated.device(num_multiprocessors=1), emulated.counts() as counts:
        emulated.ops.attention_fwd(q, k, v, torch.tensor([129, 0, 8]), None, False, HEAD_DIM**-0.5, False)
    launch = counts.of("attention_fwd_tiled")
    assert launch.of(k).read.blocks == 2 * (129 + 8) * HEAD_DIM * 2 / SECTOR
    assert launch.mma == 2 * (136 + 8) * 16 * HEAD_DIM / (16 * 8 * 16)


# Kilobytes of shared memory, and bytes of it read for a matrix instruction: 64 in four products, whose fragments of
# queries feed four instructions; more in dq = ds k, whose ds cross shared memory. Least where dq is made at the end.
SIZES = {"99 KB": (99, 178), "227 KB": (227, 142)}


@pytest.fixture(scope="module", params=SIZES.values(), ids=SIZES.keys())
def backward(request):
    kilobytes, shared_bytes = request.param
    q, k, v = _packed()
    dout = q.flip(1).contiguous()
    emulated.load()
    out, lse = emulated.ops.attention_fwd(q, k, v, None, None, False, HEAD_DIM**-0.5, True)
    with emulated.device(max_shared_bytes=kilobytes * 1024), emulated.counts() as counts:
        grads = emulated.ops.attention_bwd(dout, q, k, v, out, lse, None, None, False, HEAD_DIM**-0.5)
    return counts.of("attention_bwd_short"), (q, dout, out, lse), grads, shared_bytes


def test_backward_moves_each_operand_once(backward):
    launch, (q, dout, out, lse), grads, _ = backward
    operand = LENGTH * HEADS * HEAD_DIM * 2 / SECTOR
    for tensor, operands in ((q, 3), (dout, 1), (out, 1)):  # q, k and v are packed
        read = launch.of(tensor).read
        assert read.launch == read.blocks == operands * operand
    for grad in grads:
        written = launch.of(grad).written
        assert written.launch == written.blocks == operand
    assert launch.of(lse).read.blocks <= 1.05 * lse.numel() * 4 / SECTOR
    assert len(launch.ranges) == 7  # and nothing else
    total = sum(r.read.blocks + r.written.blocks for r in launch.ranges)
    assert launch.global_sectors <= 1.02 * total


def test_backward_multiplies_little_more_than_it_must(backward):
    launch, *_, shared_bytes = backward
    _held(launch, products=5, shared_bytes=shared_bytes)


def test_backward_exponentials_and_barriers(backward):
    launch = backward[0]
    assert launch.exponentials <= 1.125 * HEADS * LENGTH * LENGTH
    assert launch.block_barriers <= 16 * HEADS
    assert launch.named_barriers <= 2 * ((LENGTH + 15) // 16) * HEADS
