"""The emulator itself: what instructions compute, which mistakes it sees, what it counts. Its samples are the kernels
of emulator/samples.cuh."""

import os
import subprocess

import pytest
import torch

import emulated

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(autouse=True, scope="module")
def _library():
    emulated.load()


def run(name, x, y, *, n=0, blocks=1, threads=64, shared=4096):
    """One launch of a sample; y (written) is returned."""
    torch.ops.mplug2_samples.run(name, x, y, n, blocks, threads, shared)
    return y


def floats(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- what instructions compute --------------------------------------------------------------------------------------
def test_shuffles_and_votes():
    lanes = torch.arange(32)
    got = run("shuffles", torch.zeros(1), torch.zeros(12, 32, dtype=torch.int32), threads=32)
    in_eighth, eighth = lanes % 8, lanes // 8 * 8
    expected = [
        torch.full((32,), 5),
        (lanes + 1) % 32,
        lanes ^ 3,
        torch.where(lanes >= 2, lanes - 2, lanes),
        torch.where(lanes < 30, lanes + 2, lanes),
        eighth + 1,
        torch.where(in_eighth >= 3, lanes - 3, lanes),
        torch.where(in_eighth < 5, lanes + 3, lanes),
        torch.full((32,), sum(1 << lane for lane in range(0, 32, 3))),
        torch.full((32,), 2),
        torch.full((32,), 2),
        torch.where(lanes < 8, lanes ^ 1, -1),
    ]
    assert torch.equal(got, torch.stack(expected).int())


@pytest.mark.parametrize("is_transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("count", [2, 4])
def test_ldmatrix(count, is_transposed):
    matrices = torch.arange(count * 64, dtype=torch.int16).view(count, 8, 8)
    name = f"ldmatrix_x{count}" + ("_transposed" if is_transposed else "")
    got = run(name, matrices, torch.zeros(32, count, 2, dtype=torch.int16), threads=32)
    seen = matrices.transpose(1, 2) if is_transposed else matrices
    assert torch.equal(got, seen.reshape(count, 32, 2).transpose(0, 1))


@pytest.mark.parametrize("depth", [16, 8])
@pytest.mark.parametrize("dtype", HALVES)
def test_matrix_products(dtype, depth):
    a, b = floats(16, depth).to(HALVES[dtype]), floats(8, depth, seed=1).to(HALVES[dtype])
    d = floats(16, 8, seed=2)
    expected = d.double() + a.double() @ b.double().T
    got = run(f"product_{dtype}_k{depth}", torch.cat([a, b]), d.clone(), threads=32)
    torch.testing.assert_close(got, expected.float(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_becomes_its_float(dtype):
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(HALVES[dtype])
    got = run(f"to_floats_{dtype}", halves, torch.zeros(2**16), n=2**16, blocks=64, threads=1024)
    torch.testing.assert_close(got, halves.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", HALVES)
def test_floats_round_to_the_nearest_half(dtype):
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(HALVES[dtype]).float()
    # Around every half and every middle between two.
    middles = (halves[:-1] + halves[1:]) / 2
    x = torch.cat([halves, middles, torch.nextafter(middles, torch.tensor(torch.inf)), middles.nextafter(halves[:-1])])
    x = torch.cat([x, torch.tensor([65519.9, 65520.0, 1e30, -1e30, 3.4e38, 1e-45, 2.0**-25, 2.0**-24, 1.5 * 2.0**-24])])
    got = run(f"from_floats_{dtype}", x, x.to(HALVES[dtype]).zero_(), n=len(x), blocks=len(x) // 1024 + 1, threads=1024)
    torch.testing.assert_close(got, x.to(HALVES[dtype]), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", HALVES)
def test_pairs(dtype):
    x = floats(64)
    torch.testing.assert_close(run(f"pairs_{dtype}", x, x * 0, n=64), x.to(HALVES[dtype]).float(), rtol=0, atol=0)


def test_exp2():
    x = torch.tensor([-torch.inf, -200, -126.5, -126, -1.25, 0, 0.7, 10, 127, 128, torch.inf, torch.nan])
    expected = torch.where(x < -126, 0, torch.exp2(x.double())).float()
    torch.testing.assert_close(run("exponentials", x, x * 0, n=len(x)), expected, equal_nan=True)


def test_warp_reductions():
    x = floats(64)
    expected = x.view(2, 32).sum(1) + 1000 * x.view(2, 32).max(1).values
    torch.testing.assert_close(run("warp_reductions", x, x * 0), expected.repeat_interleave(32))


# ---- running --------------------------------------------------------------------------------------------------------
SCHEDULES = [("plain", 0)] + [("skewed", seed) for seed in range(4)] + [("random", seed) for seed in range(4)]


@pytest.mark.parametrize(("order", "seed"), SCHEDULES)
def test_right_kernels_pass_in_every_order(order, seed):
    x = floats(3 * 128 * 4)
    with emulated.schedule(order, seed):
        assert torch.equal(run("hand_over", x, x * 0, threads=128), x)
        got = run("early_return", x, torch.zeros(40), threads=128)
    assert torch.equal(got, torch.ones(40))


def order_of_warps(order, seed):
    with emulated.schedule(order, seed):
        return run("tickets", torch.zeros(1), torch.zeros(4, 4, dtype=torch.int32), threads=128).tolist()


def test_schedules_differ_and_repeat():
    assert order_of_warps("plain", 0) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    # The one that completes the barrier goes on first, to its end; then those that the schedule prefers.
    assert order_of_warps("skewed", 0) == [[4, 8, 12, 0], [5, 9, 13, 1], [6, 10, 14, 2], [7, 11, 15, 3]]
    assert order_of_warps("skewed", 1) == [[0, 12, 8, 4], [1, 13, 9, 5], [2, 14, 10, 6], [3, 15, 11, 7]]
    assert order_of_warps("random", 1) != order_of_warps("random", 2)
    assert order_of_warps("random", 1) == order_of_warps("random", 1)


@pytest.mark.parametrize("threads", [1, 2])
def test_untracked_runs_compute_the_same(threads):
    x = floats(1000)
    with emulated.untracked(threads):
        assert torch.equal(run("copy", x, x * 0, n=1000, blocks=5), x)
        total = run("add", torch.ones(64 * 20), torch.zeros(1), blocks=20)
    assert total.item() == 64 * 20


def test_untracked_runs_cannot_be_counted():
    with emulated.untracked(), emulated.counts(), pytest.raises(RuntimeError, match="what is counted must be tracked"):
        run("copy", torch.ones(64), torch.ones(64), n=64)


def test_selected_blocks():
    x = floats(64 * 4)
    with emulated.blocks(1, 3):
        got = run("copy16", x, x * 0, n=256, blocks=4, threads=16)
    assert torch.equal(got, torch.cat([x[:64] * 0, x[64:192], x[192:] * 0]))


def test_offsets_past_2_to_the_31():
    step = 2**21 + 1
    x, y = (emulated.sparse(step * 1024 + 1, dtype=torch.int16) for _ in range(2))
    x[-1] = 7
    with emulated.counts() as counts:
        run("touch_last", x, y, n=step)
    assert y[-1] == 7
    assert counts.launches[0].of(y).written.launch == 1


def test_tables_of_constants_can_be_read():
    got = run("table", torch.arange(8.0), torch.zeros(8), threads=8)
    assert got.tolist() == [3, 1, 4, 1, 5, 9, 2, 6]


# ---- mistakes -------------------------------------------------------------------------------------------------------
MISTAKES = {
    "race_between_warps": "race: .* byte .* of shared memory, which thread .* (wrote|read): no barrier between warps",
    "race_in_a_warp": "race: .* of shared memory, which .* no __syncwarp",
    "shuffle_is_no_syncwarp": "race: .* no __syncwarp .*shuffles, votes and ldmatrix order no memory",
    "ldmatrix_of_unsynced_stores": "race: reads .* which thread .* wrote: no __syncwarp",
    "overwritten_while_read": "race: .* no barrier between",
    "two_warps_write": r"race: writes byte .* of shared memory, which thread .* wrote: no barrier between",
    "one_named_barrier_is_not_the_other": "race: .* no barrier between warps",
    "never_written": "reads byte .* of shared memory, which nobody wrote",
    "past_shared_memory": "touches bytes 256 to 259 of the 256 bytes of shared memory",
    "before_shared_memory": "touches bytes -4 to -1 of the 256 bytes of shared memory",
    "atomic_and_plain": "race: ",
    "one_of_two_adders_is_waited_for": "race: reads byte 0 .* an atomic of warp 0 wrote: no barrier between",
    "read_in_flight": "cp.async of warp . is in flight: no cp_async_wait for it yet",
    "read_without_wait": "cp.async of warp . is in flight: no cp_async_wait for it yet",
    "read_the_neighbours_copy": "race: .* no __syncwarp",
    "copied_over_what_is_read": "cp.async of warp . is in flight|race: writes .* which .* read",
    "misaligned_copy": "cp.async: address not aligned to 16 bytes",
    "read_past_the_end": "reads 4 bytes outside of every tensor of the op, at byte 256 of one of 256 bytes",
    "write_past_the_end": "writes 4 bytes outside of every tensor of the op, at byte 256 of one of 256 bytes",
    "write_the_input": "writes byte .* of a tensor of 4096 bytes that the op only reads",
    "misaligned": "misaligned access of 4 bytes",
    "two_threads_write": "writes byte .* of a tensor .* that thread .* of block 0 .* wrote in the same launch",
    "read_what_another_wrote": "reads byte 252 of a tensor .* that thread 63 of block 0 .* wrote in the same launch",
    "write_what_another_read": "writes byte .* of a tensor .* read in the same launch",
    "add_without_atomics": "byte 0 of a tensor .* wrote in the same launch, without atomics",
    "add_and_read": "reads byte 0 of a tensor .* that atomics wrote in the same launch",
    "null_pointer": "reads 4 bytes outside of every tensor of the op, at 0x0",
    "barrier_not_reached": "leaves a deadlock: warp 0 lanes 0-31 at named_barrier_sync",
    "arrive_twice": "named_barrier_arrive: the warp arrives twice before the others do",
    "half_a_warp": "named_barrier_sync: threads must be whole warps of the block, got 16",
    "no_such_barrier": "named_barrier_sync: id must be 0 to 7, got 8",
    "arrivals_left": "the block ends with 32 of 64 threads at named barrier 2",
    "divergent_barrier": "__shfl_xor_sync: lane .* at __syncthreads|__syncthreads: lane .* at __shfl_xor_sync",
    "shuffle_with_absent_lanes": "__shfl_xor_sync: lane 0 reads lane 8, which takes no part",
    "product_of_half_a_warp": "mma m16n8k16: needs all 32 lanes of the warp",
}


@pytest.mark.parametrize("order", emulated.ORDERS)
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_errors(name, order):
    is_sized = MISTAKES[name].endswith(("256 bytes", "256 bytes of shared memory"))
    shared = 256 if "shared memory" in MISTAKES[name] and is_sized else 4096
    threads = {"one_named_barrier_is_not_the_other": 128, "one_of_two_adders_is_waited_for": 96}.get(name, 64)
    x = torch.zeros(64 if is_sized else 1024)
    y = torch.zeros(64 if is_sized else 1024)
    with emulated.schedule(order, 1), pytest.raises(RuntimeError, match=MISTAKES[name]):
        run(name, x, y, threads=threads, shared=shared)


def test_errors_name_kernel_block_thread_and_line():
    with pytest.raises(
        RuntimeError, match=r"^never_written: block \(0, 0, 0\), thread 0 \(warp 0, lane 0\): .*cuh:\d+]"
    ):
        run("never_written", torch.zeros(64), torch.zeros(64))


def test_counts_of_barriers_must_agree():
    with pytest.raises(RuntimeError, match="counts 64 threads, others at this barrier 96"):
        run("wrong_count", torch.zeros(1), torch.zeros(1), threads=96)


def test_two_blocks_must_not_write_the_same():
    run("two_blocks_write", torch.zeros(1), torch.zeros(64))
    with pytest.raises(RuntimeError, match=r"block \(1, 0, 0\).* that thread 0 of block 0 .* wrote in the same launch"):
        run("two_blocks_write", torch.zeros(1), torch.zeros(64), blocks=2)


def test_atomics_may_meet():
    assert run("add", torch.ones(256), torch.zeros(1), blocks=4).item() == 256


def test_memory_of_an_op_that_has_ended_is_none_of_the_next():
    earlier = torch.ones(64)
    run("copy", earlier, torch.zeros(64), n=64)
    with pytest.raises(RuntimeError, match="reads 4 bytes outside of every tensor of the op"):
        run("follow_pointer", torch.tensor([earlier.data_ptr()]), torch.zeros(1), threads=1)


def test_work_goes_on_after_an_error():
    x = floats(64)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="nobody wrote"):
            run("never_written", x, x.clone())
        assert torch.equal(run("copy", x, x * 0, n=64), x)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"threads": 1025}, "a block has 1 to 1024 threads, got 1025"),
        ({"blocks": 0}, r"grid must be within .*, got \(0, 1, 1\)"),
        ({"shared": 163 * 1024 + 16}, "shared memory must be at most 166912 bytes, got 166928"),
    ],
)
def test_launches_that_a_gpu_refuses(sizes, message):
    with pytest.raises(RuntimeError, match=message):
        run("copy", torch.zeros(1), torch.zeros(1), **sizes)


def test_limits_of_the_device_can_be_set():
    with (
        emulated.device(max_shared_bytes=99 * 1024),
        pytest.raises(RuntimeError, match="shared memory must be at most 101376 bytes"),
    ):
        run("copy", torch.zeros(1), torch.zeros(1), shared=100 * 1024)


# ---- counts ---------------------------------------------------------------------------------------------------------
def count(name, x, y, **sizes):
    with emulated.counts() as counts:
        run(name, x, y, **sizes)
    return counts.of(name)


def test_sectors():
    # 4 blocks of 64 threads; every block reads the whole row of 2,048 bytes, one writes it.
    x, y = torch.zeros(512), torch.zeros(512)
    launch = count("copy", x, y, n=512, blocks=4)
    assert (launch.grid, launch.threads, launch.shared_bytes) == ((4, 1, 1), 64, 4096)
    for sectors in (launch.of(x).read, launch.of(y).written):
        assert sectors.launch == 64 + (x.data_ptr() % 32 != 0)
        assert sectors.launch <= sectors.blocks <= sectors.launch + 2 * 8
    assert launch.of(x).written == launch.of(y).read == emulated.Sectors(0, 0)
    # 512 numbers, 32 at once, read and written: 128 bytes a request.
    assert launch.global_requests == 32
    assert launch.global_sectors == 32 * 4
    assert count("copy16", x, y, n=512, blocks=2).global_requests == 8


def test_sectors_of_blocks_that_read_the_same():
    x, y = torch.zeros(64), torch.zeros(1)
    with emulated.counts() as counts:
        torch.ops.mplug2_samples.run("add", x.expand(4, 64)[0], y, 0, 1, 64, 0)
    assert counts.launches[0].of(x).read == emulated.Sectors(8, 8)


@pytest.mark.parametrize(("stride", "wavefronts"), [(0, 1), (1, 1), (2, 2), (3, 1), (8, 4), (32, 4)])
def test_wavefronts_of_loads(stride, wavefronts):
    # 32 lanes over 128 words, 4 to a bank: a stride of 8 touches 16 of them on 4 banks, of 32 words 4 on one.
    launch = count("strided", torch.zeros(1), torch.zeros(32), n=stride, threads=32)
    assert launch.loads.actual == wavefronts
    assert launch.loads.ideal == 1
    assert launch.stores == emulated.Wavefronts(4, 4)
    assert (launch.shared_bytes_read, launch.shared_bytes_written) == (128, 512)


@pytest.mark.parametrize(("row_bytes", "wavefronts"), [(16, 1), (144, 1), (128, 8), (64, 4), (32, 2)])
def test_wavefronts_of_ldmatrix(row_bytes, wavefronts):
    launch = count("matrix_rows", torch.zeros(1), torch.zeros(32), n=row_bytes, threads=32)
    assert launch.ldmatrix == emulated.Wavefronts(2 * wavefronts, 2)
    assert launch.shared_bytes_read == 256


def test_matrix_products_by_scheduler():
    launch = count("products", torch.zeros(1), torch.zeros(6 * 32), threads=6 * 32)
    # Warp w multiplies w times with depth 16 and once with depth 8.
    assert launch.mma_by_scheduler == (0.5 + 4.5, 1.5 + 5.5, 2.5, 3.5)
    assert launch.mma == 18


def test_exponentials_and_barriers():
    x = torch.zeros(100)
    assert count("exponentials", x, x.clone(), n=100, blocks=2).exponentials == 100
    launch = count("hand_over", floats(3 * 128 * 4), torch.zeros(3 * 128 * 4), threads=128)
    assert (launch.block_barriers, launch.named_barriers) == (3, 3 * 4)
    assert launch.copies == emulated.Wavefronts(3 * 4 * 4, 3 * 4 * 4)


# ---- AddressSanitizer -----------------------------------------------------------------------------------------------
def sanitized(what):
    program = emulated.build("emulator_sanitized")
    return subprocess.run(
        [program, what], capture_output=True, text=True, env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    )


def test_fibers_under_address_sanitizer():
    done = sanitized("right")
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr


@pytest.mark.parametrize("how", ["load", "cp.async"])
def test_address_sanitizer_finds_reads_past_the_end(how):
    done = sanitized(how)
    assert done.returncode
    assert "heap-buffer-overflow" in done.stderr
    assert "0 bytes to the right of" in done.stderr
