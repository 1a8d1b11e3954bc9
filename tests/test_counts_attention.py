"""What the attention kernels move and multiply, counted by the emulator and held to the bounds of docs/attention.md."""

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


def _held(launch: emulated.Launch, products: int) -> None:
    assert launch.mma <= 1.12 * _needed(products)
    assert max(launch.mma_by_scheduler) <= 1.20 * _needed(products) / 4
    assert launch.shared_bytes_read <= 128 * launch.mma
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
    _held(forward[0], products=2)


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
