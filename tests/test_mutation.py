"""A kernel broken in every way of emulator/mutant.cuh is noticed: by an error of the emulator, by numbers that leave
the tolerances, or by counts beyond their bounds. Unbroken it passes all three in every order of its warps."""

import re

import pytest
import torch

import emulated
from tolerances import LOCAL_LONG_SUM, assert_close

HEADS, QUERIES, KEYS, HEAD = 2, 70, 101, 64
SCALE = 0.125
TILE_QUERIES, TILE_KEYS = 64, 32

NAMES = re.findall(r"^  k(\w+),", (emulated.SOURCE / "mutant.cuh").read_text(), re.MULTILINE)

# Mutation -> what the error says.
CAUGHT = {
    # by the emulator
    "NoBlockBarrier": "race: reads .* of shared memory|reads .* of shared memory, which nobody wrote",
    "LaxWait": "cp.async of warp 4 is in flight: no cp_async_wait for it yet",
    "NoWait": "cp.async of warp . is in flight: no cp_async_wait for it yet",
    "NoSyncwarp": "race: .* no __syncwarp of the whole warp since",
    "NoEmptyBarrier": "arrives twice|race: |in flight",
    "WrongCount": "named_barrier_.*: counts .* threads, others at this barrier",
    "MissedBarrier": "in flight|deadlock|race: |nobody wrote",
    "NoSumBarrier": "race: .* of shared memory|nobody wrote",
    "DivergentShuffle": "lane .* of this warp is at",
    "Tail": "wrote in the same launch|outside of every tensor",
    "Misaligned": "cp.async: address not aligned to 16 bytes",
    "PastTheEnd": "reads 16 bytes outside of every tensor of the op",
    "Overrun": "touches bytes 256.. to 256.. of the 25600 bytes of shared memory",
    "RacingGradient": "byte .* of a tensor of 256 bytes that .* wrote in the same launch, without atomics",
    "ThroughGlobal": "reads byte .* wrote in the same launch",
    # by the numbers
    "Index": "numbers: ",
    "Mask": "numbers: ",
    "Scale": "numbers: ",
    "NoRescale": "numbers: ",
    "Stride": "numbers: ",
    "UnreadRange": "numbers: ",
    # by the counts
    "ConflictingLayout": "counts: wavefronts",
    "LoadedTwice": "counts: global sectors",
    "WastedProducts": "counts: matrix instructions",
}


def attention(q, k, v):
    return torch.softmax(q @ k.transpose(1, 2) * SCALE, dim=-1) @ v


def check_numbers(out, total, q, k, v):
    true = attention(q.double(), k.double(), v.double())
    baseline = attention(q, k, v)
    try:
        assert_close(out, baseline, true)
        sums = [o.to(torch.float64).sum((0, 1)) for o in (baseline, true)]
        assert_close(total, *sums, local=LOCAL_LONG_SUM, dtype=q.dtype)
    except AssertionError as error:
        raise AssertionError(f"numbers: {error}") from error


def check_counts(launch):
    blocks = -(-QUERIES // TILE_QUERIES) * HEADS
    tiles = -(-KEYS // TILE_KEYS)
    products = blocks * tiles * 2 * (TILE_QUERIES // 16) * (TILE_KEYS // 8) * (HEAD // 16)
    assert launch.mma <= products, "counts: matrix instructions"
    assert launch.wavefronts.actual <= 1.05 * launch.wavefronts.ideal, "counts: wavefronts"
    row = HEAD * 2 / 32  # sectors
    sectors = HEADS * 2 * QUERIES * row + blocks * (2 * KEYS * row + HEAD * 4 / 32)
    assert launch.global_sectors <= sectors, "counts: global sectors"
    assert launch.shared_bytes_read / launch.mma <= 1.15 * 256, "counts: shared bytes"


def run(name, *, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(HEADS, length, HEAD, generator=g).to(dtype) for length in (QUERIES, KEYS, KEYS))
    out, total = torch.full_like(q, torch.nan), torch.zeros(HEAD)
    with emulated.counts() as counts:
        torch.ops.mplug2_samples.attention(q, k, v, out, total, SCALE, NAMES.index(name))
    check_numbers(out, total, q, k, v)
    check_counts(counts.of("mutant"))


@pytest.fixture(autouse=True, scope="module")
def _library():
    emulated.load()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("order", "seed"),
    [("plain", 0), *(("skewed", seed) for seed in range(4)), *(("random", seed) for seed in range(4))],
)
def test_unbroken(order, seed, dtype):
    with emulated.schedule(order, seed):
        run("None", dtype=dtype)


def test_every_mutation_has_a_test():
    assert set(NAMES) == {"None", *CAUGHT}


@pytest.mark.parametrize(("order", "seed"), [("plain", 0), ("skewed", 0), ("skewed", 1), ("random", 1)])
@pytest.mark.parametrize("name", CAUGHT)
def test_broken(name, order, seed):
    with emulated.schedule(order, seed), pytest.raises((RuntimeError, AssertionError), match=CAUGHT[name]):
        run(name)
