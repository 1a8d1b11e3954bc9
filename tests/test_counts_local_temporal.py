"""What local_temporal's product form moves and computes at the published width, counted by the emulator."""

import pytest
import torch

import emulated
import op_cases

# Two tiles of rows: eight positions of 16 frames each. At this size the weights' 2 MB outweigh x's 0.5 MB, and at the
# published one they are a thousandth: (a) leaves them out.
VIDEOS, FRAMES, TOKENS, WIDTH = 2, 16, 8, 1024
HIDDEN, ROWS = WIDTH // 2, VIDEOS * FRAMES * TOKENS
SECTOR, HALF = 32, 2  # bytes
PASS = ROWS * WIDTH * HALF  # bytes of x


@pytest.fixture(scope="module", params=[False, True], ids=["out alone", "hidden kept"])
def forward(request):
    """(down, up), the weights, whether hidden is kept."""
    x, *weights = (
        t.bfloat16()
        for t in op_cases.local_temporal_tensors(
            torch.Generator().manual_seed(0), VIDEOS, FRAMES, TOKENS, WIDTH
        ).values()
    )
    emulated.load()
    # A GPU that two tiles fill, as any is at the published size.
    with emulated.device(num_multiprocessors=2), emulated.counts() as counts:
        emulated.ops.local_temporal_fwd(x, *weights, 0, 1e-5, request.param)
    assert [launch.name for launch in counts.launches] == ["local_temporal_fwd_down", "local_temporal_fwd_up"]
    return counts.launches, weights, request.param


def _bytes(ranges, by):
    return SECTOR * sum(getattr(r.read, by) + getattr(r.written, by) for r in ranges)


def test_memory_is_four_passes_over_x(forward):
    """x in and act out, act and x in and out out: 1.5 and 2.5 passes; hidden, where it is kept, is half of one more."""
    launches, weights, is_kept = forward
    addresses = {weight.data_ptr() for weight in weights}
    passes = [_bytes([r for r in launch.ranges if r.data not in addresses], "launch") / PASS for launch in launches]
    assert passes == [1.5 + 0.5 * is_kept, 2.5]
    assert sum(passes) <= 1.05 * (4 + 0.5 * is_kept)


def test_blocks_compute_64_flop_a_byte(forward):
    """Where hidden is not kept, also with x counted as often as a block asks L2 for it: once for its statistics and, as
    cp.async does not see the L1 cache, once for each tile of 256 columns."""
    launches, _, is_kept = forward
    again = 0 if is_kept else HIDDEN // 256 * PASS
    flop = 2 * 2 * ROWS * WIDTH * HIDDEN
    assert flop >= 64 * (sum(_bytes(launch.ranges, "blocks") for launch in launches) + again)


def test_requests_ask_for_whole_sectors(forward):
    """But for the biases: a warp's pairs of them are eight numbers. x is read once for each tile of 256 columns, and
    twice for its statistics, of which the block's own sectors hold one reading."""
    launches, _, _ = forward
    for launch, again in zip(launches, ((HIDDEN // 256 + 1) * PASS, 0), strict=True):
        assert launch.global_sectors * SECTOR - again <= 1.1 * _bytes(launch.ranges, "blocks")


def test_matrix_instructions_are_those_needed(forward):
    launches, _, _ = forward
    for launch in launches:
        needed = ROWS * WIDTH * HIDDEN / (16 * 8 * 16)
        assert needed <= launch.mma <= 1.05 * needed
        assert max(launch.mma_by_scheduler) == launch.mma / 4


def test_shared_memory_has_no_bank_conflicts(forward):
    launches, _, _ = forward
    for launch in launches:
        assert launch.wavefronts.actual <= 1.05 * launch.wavefronts.ideal
    assert launches[0].exponentials == ROWS * HIDDEN
