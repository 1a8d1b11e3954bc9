"""What benchmarks/bench.py works out, on a CPU: roofs, copies of inputs, tables."""

import csv
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import bench


def test_roof_is_the_largest_need():
    rates = {"product": 800e12, "dram": 4e12, "exp": 4e12}
    assert bench.roof_milliseconds(rates, 800.0, 1.0, None) == pytest.approx(1.0)  # 800 GFLOP
    assert bench.roof_milliseconds(rates, 8.0, 8.0, None) == pytest.approx(2.0)  # 8 GB
    assert bench.roof_milliseconds(rates, 8.0, 1.0, 12.0) == pytest.approx(3.0)  # 12e9 exponentials
    assert bench.roof_milliseconds({}, 8.0, 1.0, 12.0) is None
    assert bench.roof_milliseconds(rates, None, None, None) is None


def test_roof_rates_are_measured_ones():
    assert bench.roof_rates("NVIDIA H200", None)["dram"] == 4.3e12
    assert bench.roof_rates("NVIDIA H100 80GB HBM3", None)["product"] == 744e12
    assert bench.roof_rates("NVIDIA A100-SXM4-80GB", None) == {}
    assert bench.roof_rates("Another", None) == {}


@pytest.mark.parametrize(("size", "past", "expected"), [(10, 0, 1), (10, 95, 10), (100, 95, 1), (1, 1000, 64)])
def test_copies_reach_past_the_cache(size, past, expected):
    assert bench.copies(size, past) == expected


def test_inputs_on_a_cpu_are_one_copy():
    x = torch.zeros(3)
    inputs = bench.Inputs(x)
    assert inputs.next()[0] is x
    assert inputs.next()[0] is x


def test_absent_peers_are_said_and_ours_must_run(monkeypatch, capsys):
    monkeypatch.setattr(bench, "_device", torch.device("cuda"))
    monkeypatch.setattr(bench, "_synchronize", lambda: None)

    def fails():
        raise RuntimeError("No available kernel. Aborting execution.\nmore")

    assert list(bench.present({"ours": lambda: 1, "SDPA flash": fails})) == ["ours"]
    assert capsys.readouterr().out == "SDPA flash: absent here: No available kernel. Aborting execution.\n"
    with pytest.raises(RuntimeError, match="No available kernel"):
        bench.present({"ours": fails})


def test_a_table_is_added_to_the_csv_file(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "_results", tmp_path)
    timings = {"ours": bench.Timing(2.0, 1.5, 2.5), "theirs": bench.Timing(5.0, 4.0, 6.0)}
    for _ in range(2):
        bench.report("op", "bfloat16", "D=1", timings, gflop=10.0, errors={"ours": 0.25})
    (file,) = tmp_path.glob("*.csv")
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert [row["candidate"] for row in rows] == ["ours", "theirs"] * 2
    assert (rows[0]["tflops"], rows[0]["error"]) == ("5.000", "2.5e-01")
    assert "2.50x" in capsys.readouterr().out


def test_a_table_of_models_has_tokens_a_second_and_peaks(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "_results", tmp_path)
    timings = {"ours": bench.timing([200.0]), "theirs": bench.timing([400.0, 500.0, 600.0])}
    bench.report("caption", "bfloat16", "B=1", timings, tokens=20, peaks={"ours": 1234.4})
    (file,) = tmp_path.glob("*.csv")
    with file.open(newline="") as opened:
        ours, theirs = csv.DictReader(opened)
    assert (ours["median_ms"], ours["p20_ms"], ours["tokens_per_s"], ours["peak_mb"]) == (
        "200.0000", "200.0000", "100.0", "1234",
    )  # fmt: skip
    assert (theirs["median_ms"], theirs["tokens_per_s"], theirs["peak_mb"]) == ("500.0000", "40.0", "")
    assert "1234" in capsys.readouterr().out


def test_slow_candidates_run_once_beside_the_others():
    calls = []
    candidates = {name: lambda name=name: calls.append(name) for name in ("ours", "slow")}
    taken = bench.samples(candidates, 3, once=["slow"])
    assert calls == ["ours", "ours", "ours", "slow", "ours", "ours"]  # two of ours warm up
    assert {name: len(values) for name, values in taken.items()} == {"ours": 3, "slow": 1}


def test_a_table_on_cuda_has_roof_bandwidth_and_ratios(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "_device", torch.device("cuda"))
    monkeypatch.setattr(bench, "_results", tmp_path)
    monkeypatch.setattr(bench, "_roof", {"dram": 4e12, "product": 800e12})
    monkeypatch.setattr(bench, "driver", lambda: "580.1")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Toy")
    timings = {"ours": bench.Timing(0.5, 0.4, 0.6), "eager": bench.Timing(1.0, 0.9, 1.1)}
    bench.report(
        "op", "bfloat16", "D=1", timings, gflop=1.0, gigabytes=1.0, errors={"ours": 0.01, "eager": 0.02},
        baseline="eager", layer="portable",
    )  # fmt: skip
    with (tmp_path / f"NVIDIA-Toy-{torch.__version__}.csv").open(newline="") as opened:
        ours, eager = csv.DictReader(opened)
    assert (ours["tbps"], ours["of_roof"], ours["of_ours"], ours["error_ratio"]) == ("2.00", "50.0%", "1.000", "0.50")
    assert (eager["of_roof"], eager["of_ours"], eager["layer"], ours["layer"]) == ("25.0%", "2.000", "", "portable")
    assert (ours["device"], ours["driver"]) == ("NVIDIA Toy", "580.1")
