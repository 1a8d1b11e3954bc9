"""What attention's backward kernels of tiles move and multiply, counted by the emulator and held to the bounds of
docs/attention_gpu.md."""

import pytest
import torch

import emulated
from mplug2.ops import reference

SECTOR, HEAD_DIM = 32, 64
DQ, DKV, PARTS = "attention_bwd_tiled_dq", "attention_bwd_tiled_dkv", "attention_bwd_tiled_parts"
PRODUCTS = {DQ: 3, DKV: 4}  # five, and scores and gradients of weights a second time


def _sectors(t: torch.Tensor) -> int:
    return t.numel() * t.element_size() // SECTOR


def _run(queries: int, keys: int, *, groups: int = 1, causal: bool = False):
    """Counts of a head, with its tensors by name."""
    g = torch.Generator().manual_seed(0)
    q, dout = (torch.randn(groups, queries, 1, HEAD_DIM, generator=g).bfloat16() for _ in range(2))
    k, v = (torch.randn(1, keys, 1, HEAD_DIM, generator=g).bfloat16() for _ in range(2))
    lse, out = reference.attention_lse(q, k, causal=causal), reference.attention(q, k, v, causal=causal)
    with emulated.counts() as counts:
        dq, dk, dv = emulated.ops.attention_bwd(dout, q, k, v, out, lse, None, None, causal, HEAD_DIM**-0.5)
    return counts, {"q": q, "k": k, "v": v, "dout": dout, "out": out, "dq": dq, "dk": dk, "dv": dv}


def _needed(launch: emulated.Launch, pairs: int) -> float:
    """m16n8k16 instructions that whole ones would take, for so many pairs of a query and a key."""
    return PRODUCTS[launch.name] * pairs * HEAD_DIM / (16 * 8 * 16)


@pytest.fixture(autouse=True, scope="module")
def _library():
    emulated.load()


@pytest.fixture(scope="module")
def square():
    """On a GPU so small that no blocks share the work of one."""
    with emulated.device(num_multiprocessors=1):
        return _run(512, 512)


TILES = 512 // 128  # of rows or keys that blocks own


@pytest.mark.parametrize(
    ("kernel", "once", "once_a_block", "written"),
    [(DQ, ("q", "dout", "out"), ("k", "v"), ("dq",)), (DKV, ("k", "v"), ("q", "dout"), ("dk", "dv"))],
    ids=["dq", "dkv"],
)
def test_what_is_owned_moves_once_and_what_streams_by_once_a_block(square, kernel, once, once_a_block, written):
    counts, tensors = square
    launch = counts.of(kernel)
    assert launch.grid == (TILES, 1, 1)
    for name in once:
        assert launch.of(tensors[name]).read.blocks == _sectors(tensors[name])
    for name in once_a_block:
        assert launch.of(tensors[name]).read.blocks == TILES * _sectors(tensors[name])
    for name in written:
        assert launch.of(tensors[name]).written.blocks == _sectors(tensors[name])
    # Requests of warps ask for whole sectors and for none twice; but for lse, eight numbers at a time.
    assert launch.global_sectors <= 1.05 * sum(r.read.blocks + r.written.blocks for r in launch.ranges)


@pytest.mark.parametrize("kernel", [DQ, DKV])
def test_instructions_of_whole_tiles(square, kernel):
    launch = square[0].of(kernel)
    needed = _needed(launch, 512 * 512)
    deltas = 512 / 16 * 8 if kernel == DQ else 0  # delta = dout . out, by the same instructions
    assert launch.mma == needed + deltas
    assert max(launch.mma_by_scheduler) == (needed + deltas) / 4
    assert launch.exponentials == 512 * 512
    assert launch.block_barriers <= TILES * (512 / 64 + 5)


@pytest.mark.parametrize("kernel", [DQ, DKV])
def test_a_fragment_of_what_streams_by_feeds_two_instructions(square, kernel):
    """A pass of shared memory gives 128 bytes, half of a fragment of 16 x 16 numbers; none is lost to conflicts."""
    launch = square[0].of(kernel)
    assert launch.ldmatrix.actual <= launch.mma
    assert launch.wavefronts.actual == launch.wavefronts.ideal


@pytest.mark.parametrize(("kernel", "slack"), [(DQ, 1.12), (DKV, 1.08)])
def test_causal_skips_what_nobody_sees(kernel, slack):
    with emulated.device(num_multiprocessors=1):
        launch = _run(512, 512, causal=True)[0].of(kernel)
    assert launch.mma <= slack * _needed(launch, 512 * 513 // 2)


def test_few_queries_share_blocks_and_warps():
    """25 queries: four warps share each tile of keys, and blocks the keys, whose parts move once each way."""
    counts, tensors = _run(25, 2048)
    launch, parts = counts.of(DQ), counts.of(PARTS)
    splits = 2048 // (4 * 64)
    assert launch.grid == (1, splits, 1)
    for name in ("k", "v"):
        assert launch.of(tensors[name]).read.blocks == _sectors(tensors[name])
    assert launch.mma <= 1.09 * _needed(launch, 32 * 2048)  # with each split's own delta
    assert max(launch.mma_by_scheduler) <= 1.05 * launch.mma / 4
    (workspace,) = [r for r in launch.ranges if r.bytes == splits * 25 * HEAD_DIM * 4]
    once = emulated.Sectors(workspace.bytes // SECTOR, workspace.bytes // SECTOR)
    assert workspace.written == once
    assert [r.read for r in parts.ranges if r.data == workspace.data] == [once]
    assert parts.of(tensors["dq"]).written.blocks == _sectors(tensors["dq"])
    assert counts.of(DKV).grid == (2048 // 128, 1, 1)
    assert counts.of(DKV).mma <= 1.01 * _needed(counts.of(DKV), 32 * 2048)  # of 64 rows that stream by, 32


def test_few_keys_share_blocks_and_warps():
    counts, _ = _run(2048, 50)
    launch = counts.of(DKV)
    assert launch.grid == (1, 2048 // (4 * 64), 1)
    assert launch.mma <= 1.05 * _needed(launch, 2048 * 64)
    assert max(launch.mma_by_scheduler) <= 1.05 * launch.mma / 4
    assert len([x for x in counts.launches if x.name == PARTS]) == 2


def test_two_blocks_of_an_a100_fit():
    """164 KB a multiprocessor, of which 1 KB a block is the system's."""
    counts, _ = _run(33, 33, groups=3)
    for kernel in (DQ, DKV):
        assert counts.of(kernel).shared_bytes + 1024 <= 164 * 1024 // 2
