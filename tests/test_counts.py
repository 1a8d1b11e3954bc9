"""What the CUDA kernels move, counted where they are emulated and held to the bounds of their pages.

Global memory counts in sectors of 32 bytes. Of a tensor, `launch` says how many are touched at all, which DRAM must
move; `blocks` adds up those of each block, which L2 must.
"""

import pytest
import torch

import emulated


@pytest.fixture(autouse=True)
def few_multiprocessors():
    """So few that every block works on several tiles."""
    with emulated.device(num_multiprocessors=2):
        yield


def _sectors(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size() // 32


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def assert_once(moved: emulated.Sectors, tensor: torch.Tensor, slack: float = 1.0) -> None:
    """Every sector of the tensor moves, and in one block alone."""
    assert moved.launch == _sectors(tensor)
    assert moved.blocks <= slack * moved.launch


def assert_once_a_block(moved: emulated.Sectors, tensor: torch.Tensor, launch: emulated.Launch) -> None:
    assert moved == emulated.Sectors(_sectors(tensor), launch.grid[0] * _sectors(tensor))


def assert_no_waste(launch: emulated.Launch, again: int = 0) -> None:
    """Requests of warps bring whole sectors, none but `again` twice; shared memory has no bank conflicts."""
    assert launch.global_sectors == sum(r.read.blocks + r.written.blocks for r in launch.ranges) + again
    assert launch.wavefronts.actual == launch.wavefronts.ideal


# One width of each layout, and one that leaves half of a warp idle.
ADD_LAYER_NORM_WIDTHS = [144, 512, 768, 1024, 1536, 4096]


@pytest.mark.parametrize("width", ADD_LAYER_NORM_WIDTHS)
def test_add_layer_norm_forward(width):
    x, residual, weight, bias = _randn(97, width), _randn(97, width), _randn(width), _randn(width)
    with emulated.counts() as counts:
        normed, total = emulated.ops.add_layer_norm_fwd(x, residual, weight, bias, 1e-5)
    launch = counts.of("add_layer_norm_fwd")
    for tensor in (x, residual):
        assert_once(launch.of(tensor).read, tensor)
    for tensor in (normed, total):
        assert_once(launch.of(tensor).written, tensor)
    for tensor in (weight, bias):
        assert_once_a_block(launch.of(tensor).read, tensor, launch)
    assert len(launch.ranges) == 6
    assert_no_waste(launch)
    if width <= 1024:
        assert launch.block_barriers == launch.grid[0]  # a row is one warp's


@pytest.mark.parametrize("width", ADD_LAYER_NORM_WIDTHS)
def test_add_layer_norm_backward(width):
    dnormed, dsum, total, weight = _randn(97, width), _randn(97, width), _randn(97, width), _randn(width)
    with emulated.counts() as counts:
        dx, dweight, dbias = emulated.ops.add_layer_norm_bwd(dnormed, dsum, total, weight, weight, 1e-5)
    launch, parts = (counts.of(name) for name in ("add_layer_norm_bwd_rows", "add_layer_norm_bwd_parts"))
    for tensor in (dnormed, dsum, total):
        assert_once(launch.of(tensor).read, tensor)
    assert_once(launch.of(dx).written, dx)
    assert_once_a_block(launch.of(weight).read, weight, launch)
    # The workspace, 8 bytes a column and block, is written once, in halves of sectors, and read once.
    (workspace,) = [r for r in launch.ranges if r.bytes == launch.grid[0] * 2 * width * 4]
    once = emulated.Sectors(workspace.bytes // 32, workspace.bytes // 32)
    assert workspace.written == once
    assert_no_waste(launch, again=once.launch)
    assert [r.read for r in parts.ranges if r.data == workspace.data] == [once]
    for tensor in (dweight, dbias):
        assert_once(parts.of(tensor).written, tensor)
    assert_no_waste(parts)
