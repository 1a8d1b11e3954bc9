"""The arithmetic of benchmarks/model.py, against numbers worked out by hand."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import devices
import model


def work(**amounts: float):
    none = dict.fromkeys((field.name for field in model.fields(model.Work)), 0.0)
    return model.Work(**(none | amounts))


def device(**rates: float):
    ones = dict.fromkeys(model.RESOURCES, 1.0)
    given = {name: devices.Rate(value, "measured") for name, value in (ones | rates).items()}
    return devices.Device("toy", "80", 10, 164 * 1024, given)


@pytest.mark.parametrize(
    ("registers", "threads", "shared_bytes", "expected"),
    [
        (32, 256, 0, 8),  # 2,048 threads
        (128, 128, 0, 4),  # 4 warps of 4,096 registers each
        (33, 128, 0, 12),  # 33 registers take the place of 40: 4 warps of 1,280
        (32, 128, 67584, 2),  # K and V of 257 keys: 68,608 of 167,936 bytes
        (32, 32, 0, 32),  # no more blocks than that
        (255, 1024, 0, 0),  # 32 warps of 8,192 registers do not fit
    ],
)
def test_resident_blocks(registers, threads, shared_bytes, expected):
    assert model.resident_blocks(device(), registers, threads, shared_bytes) == expected


def test_imbalance():
    assert model.imbalance(100, 10) == 1
    assert model.imbalance(101, 10) == pytest.approx(11 / 10.1)
    assert model.imbalance(5, 10) == 2  # half of the multiprocessors idle


def test_extrapolation_separates_rows_multiprocessors_and_the_rest():
    def at(rows, multiprocessors):
        return work(l2_bytes=7 + 3 * rows + 50 * multiprocessors, blocks=8 * multiprocessors, mma=2 * rows)

    sizes = (model.Size(128, 1), model.Size(256, 2))
    to = model.Size(131584, 132)
    found = model.extrapolated(at(128, 1), at(256, 1), at(128, 2), sizes, to)
    assert found == at(131584, 132)


def test_issue_slots():
    # 300 instructions with 12 accesses, of which warps made 1,200: the code ran a hundred times.
    assert model.issue_slots(300, 12, 1200) == 30000


def test_bound_is_the_largest_and_the_sum():
    rates = {"dram": 100.0, "l2": 200.0, "shared": 10.0, "mma": 5.0, "exp": 50.0, "issue": 1000.0}
    amounts = work(dram_bytes=400, l2_bytes=600, wavefronts=20, mma_busiest=2.5, exponentials=100, blocks=20)
    found = model.bound(amounts, device(**rates), slots=500)
    assert found.seconds == {"dram": 4, "l2": 3, "shared": 2, "mma": 2, "exp": 2, "issue": 0.5}
    assert (found.largest, found.total, found.binding, found.assumed) == (4, 13.5, "dram", ())


def test_bound_counts_the_busiest_multiprocessor_for_all_but_memory():
    amounts = work(dram_bytes=1, l2_bytes=1, wavefronts=1, mma_busiest=0.25, exponentials=1, blocks=15)
    found = model.bound(amounts, device())  # 15 blocks on 10: the busiest has 2, the mean is 1.5
    assert found.seconds == pytest.approx({"dram": 1, "l2": 1, "shared": 4 / 3, "mma": 4 / 3, "exp": 4 / 3})


def test_assumed_rates_are_named_where_they_are_used():
    toy = device()
    toy.rates["l2"] = devices.Rate(1, "assumed: a guess")
    assert model.bound(work(dram_bytes=1, l2_bytes=1, blocks=10), toy).assumed == ("l2",)
    assert model.bound(work(dram_bytes=1, blocks=10), toy).assumed == ()


def test_rates_of_the_devices():
    for name in ("A100", "H100", "H200"):
        rates = devices.DEVICES[name].rates
        assert set(rates) == {*model.RESOURCES, "product"}
        assert all(rate.source == "measured" or rate.source.startswith("assumed") for rate in rates.values())
    # residual + LayerNorm of 131,584 rows of 1,024: four bfloat16 tensors at 4.3 TB/s are 251 us
    assert 4 * 2 * model.ROWS * 1024 / devices.DEVICES["H200"].rates["dram"].value == pytest.approx(250.7e-6, rel=1e-3)


def test_measured_ceilings_replace_rates():
    names = ("copy", "l2_read", "shared_ldmatrix", "shared_load16", "mma", "exp2", "product")
    found = {"multiprocessors": 114, "rates": {name: {"median": 128.0 * (i + 1)} for i, name in enumerate(names)}}
    measured = devices.with_ceilings(devices.DEVICES["H100"], found)
    assert measured.multiprocessors == 114
    assert {name: rate.value for name, rate in measured.rates.items() if not rate.is_assumed} == {
        "dram": 128, "l2": 256, "shared": 4, "mma": 640, "exp": 768, "product": 896,
    }  # fmt: skip


def test_machine_code_is_counted_by_lines():
    body = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0030*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0040*/                   NOP ;
        /*0050*/                   EXIT ;
"""
    assert model.code_of(body) == (5, 3)


def test_work_of_a_launch():
    emulated = pytest.importorskip("emulated")
    empty, moved = emulated.Wavefronts(0, 0), emulated.Wavefronts(5, 4)
    once, twice = emulated.Sectors(10, 10), emulated.Sectors(10, 20)
    launch = emulated.Launch(
        "toy", (4, 2, 1), 128, 0, (emulated.Range(0, 320, once, once), emulated.Range(320, 320, twice, twice)),
        global_requests=7, global_sectors=60, ldmatrix=moved, loads=empty, stores=empty, copies=moved,
        shared_bytes_read=0, shared_bytes_written=0, mma_by_scheduler=(4, 2, 2, 2), exponentials=9,
        block_barriers=3, named_barriers=1,
    )  # fmt: skip
    assert model.work_of(launch) == model.Work(
        dram_bytes=32 * 40, l2_bytes=32 * 60, wavefronts=10, mma=10, mma_busiest=4, exponentials=9, anchors=17,
        barriers=4, blocks=8,
    )  # fmt: skip
