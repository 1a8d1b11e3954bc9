"""`mplug2 info`: its data, its JSON, its tables, and the record of what loaded."""

import json
import os
import subprocess
import sys

import pytest
import torch

import mplug2
from mplug2 import _library, info, proofs


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", "mplug2.info", *arguments]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}
    ).stdout


def test_report_is_plain_data_about_this_process():
    facts = info.report()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["versions"]["torch"] == torch.__version__
    assert None not in facts["versions"].values()
    assert len(facts["devices"]) == torch.cuda.device_count()
    assert facts["cpu"]["cores"] >= 1


def test_features_agree_with_what_torch_uses():
    features = info.report()["cpu"]["features"]
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert features["avx512f"]
        assert features["avx2"]


def test_libraries_say_where_from_or_why_not():
    libraries = {library["name"]: library for library in info.report()["libraries"]}
    assert set(libraries) == {"_cpu", "_frames", "_cuda"}
    assert libraries["_cpu"]["path"].endswith("_cpu.so")
    assert libraries["_frames"]["path"]
    if torch.version.cuda is None:
        assert libraries["_cuda"]["path"] is None
        assert "without CUDA" in libraries["_cuda"]["reason"]
    assert all(library["reason"] for library in libraries.values())


def test_every_registered_op_has_a_layer_and_a_reason():
    _library.load_ops()
    schemas = [schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("mplug2::")]
    registered = {name.removeprefix("mplug2::") for name in schemas if not name.endswith("_reference")}
    ops = info.report()["ops"]
    assert {op["op"].removeprefix("mplug2::") for op in ops} == registered
    assert all(op["layer"] and op["reason"] for op in ops)


def test_json_on_stdout_is_the_report():
    assert json.loads(run("--json"))["versions"] == info.report()["versions"]


def test_tables_name_every_library_and_op():
    text = run()
    facts = info.report()
    for name in [
        *facts["versions"],
        *(row["name"] for row in facts["libraries"]),
        *(row["op"] for row in facts["ops"]),
    ]:
        assert name in text


def _record(name, capability, digest="d" * 64):
    return proofs.Record("linear", name, digest, capability, "A GPU", "nvcc 13.0", "CUDA 13.0", "2.13.0", "2026-01-02")


def test_explain_gives_every_kernel_a_layer_and_the_reason():
    kernels = [
        proofs.Instance("linear", "proven", "d" * 64, ("9.0",), (), 0),
        proofs.Instance("linear", "slower", "d" * 64, ("9.0",), ("9.0",), 0),
        proofs.Instance("linear", "elsewhere", "d" * 64, ("8.0",), (), 0),
        proofs.Instance("linear", "changed", "e" * 64, (), (), 0),
        proofs.Instance("linear", "linear_fwd_product_bf16", "d" * 64, (), (), 0),
    ]
    records = [
        _record("proven", "9.0"),
        _record("slower", "9.0"),
        _record("elsewhere", "8.0"),
        _record("changed", "9.0"),
    ]
    rows = {row["instance"]: row for row in info.explain(kernels, records, {"9.0"})}  # the last is none for 9.0
    assert {name: row["layer"] for name, row in rows.items()} == {
        "proven": "portable", "slower": "reference", "elsewhere": "reference", "changed": "reference",
    }  # fmt: skip
    assert rows["proven"]["reason"] == "sources dddddddddddd are proven on 9.0, A GPU, 2026-01-02"
    assert "the reference was measured to be faster" in rows["slower"]["reason"]
    assert "(on 8.0 it is): run `mplug2 doctor`" in rows["elsewhere"]["reason"]
    assert rows["changed"]["reason"] == "sources eeeeeeeeeeee are not proven on 9.0: run `mplug2 doctor`"


def test_explain_without_kernels_says_why():
    if _library.load_cuda().path is None:
        assert _library.load_cuda().reason in " ".join(run("--explain").split())


def test_missing_cpu_library_is_one_line_that_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(_library, "_loaded", {})
    monkeypatch.setattr(mplug2, "__path__", [str(tmp_path)])
    with pytest.raises(ImportError, match=r"_cpu\.so is in none of .*run `pip install -e \. ") as caught:
        _library.load_ops()
    assert "\n" not in str(caught.value)
    report = info.report()
    assert report["libraries"][0]["path"] is None
    assert report["ops"] == []


def test_library_that_does_not_load_is_an_import_error(monkeypatch, tmp_path):
    (tmp_path / "_cpu.so").write_bytes(b"not a library")
    monkeypatch.setattr(_library, "_loaded", {})
    monkeypatch.setattr(mplug2, "__path__", [str(tmp_path)])
    with pytest.raises(ImportError, match=r"does not load into torch .*run `pip install"):
        _library.load_ops()


@pytest.mark.parametrize("version", ["2.10.1", "1.13.0+cu117"])
def test_torch_too_old_is_said(monkeypatch, version):
    monkeypatch.setattr(_library, "_loaded", {})
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ImportError, match=rf"needs torch >= 2\.11, got {version.replace('+', '.')}"):
        _library.load_ops()
