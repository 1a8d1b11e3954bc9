"""A kernel serves only where it was proven: records, digests, the choice of the layer, and doctor.

Doctor and the table of proofs run here on the emulated kernels, with the same code as on a GPU.
"""

import json
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import emulated
from conftest import emulated_kernels
from mplug2 import _library, doctor, ops, proofs

ROOT = Path(__file__).parents[1]
RECORD = proofs.Record(
    "linear", "linear_fwd_bf16", "0" * 64, "9.0", "A GPU", "nvcc 13", "CUDA 13.0", "2.13.0", "2026-01-02"
)


# ---- records --------------------------------------------------------------------------------------------------------
def test_records_are_added_and_replaced_by_what_they_prove(tmp_path):
    file = tmp_path / "cache" / "proven.json"
    assert proofs.read(file) == []
    other = replace(RECORD, capability="8.0")
    proofs.write(file, [RECORD, other])
    later = replace(RECORD, date="2026-02-03")
    proofs.write(file, [later])
    assert proofs.read(file) == [other, later]
    assert [path.name for path in file.parent.iterdir()] == ["proven.json"]
    proofs.write(file, [], withdrawn=[replace(RECORD, date="2026-03-04")])
    assert proofs.read(file) == [other]
    assert proofs.as_text([RECORD, other]) == f"linear_fwd_bf16 {'0' * 64} 90\nlinear_fwd_bf16 {'0' * 64} 80\n"


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"records": [{"op": "linear"}]}', json.dumps({"records": [{**vars(RECORD), "capability": "90"}]})],
    ids=["empty", "a list", "fields missing", "no capability"],
)
def test_file_of_something_else_is_an_error_and_stays(tmp_path, text):
    file = tmp_path / "proven.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"proven\.json: not a file of records .*run `mplug2 doctor`"):
        proofs.read(file)
    with pytest.raises(ValueError, match="not a file of records"):
        proofs.write(file, [RECORD])
    assert file.read_text() == text


def test_user_cache_follows_the_xdg_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert proofs.user_cache() == tmp_path / "mplug2" / "proven.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert proofs.user_cache() == tmp_path / ".cache" / "mplug2" / "proven.json"


def test_shipped_records_are_read():
    proofs.read(proofs.SHIPPED)


# ---- digests --------------------------------------------------------------------------------------------------------
@pytest.fixture
def digests(monkeypatch, tmp_path):
    """build_tools/digests.py, looking at a small tree of its own."""
    monkeypatch.syspath_prepend(ROOT / "build_tools")
    import digests

    for path, text in {
        "core/device.h": "#if defined(__CUDACC__)\nint real;\n#else\nint emulated;\n#endif\n",
        "core/unused.h": "int unused;\n",
        "add/add_cuda.cu": '#include "add/add_fwd.cuh"\nconst char* kName = "a // b";\n',
        "add/add_fwd.cuh": '#include "core/device.h"\n// adds\nint add(int a, int b) { return a + b; }\n',
        "add/add_cpu.cpp": "int cpu;\n",
        "add/add_many_cuda.cu": '#include "core/device.h"\nint many;\n',
    }.items():
        (tmp_path / "csrc" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "csrc" / path).write_text(text)
    monkeypatch.setattr(digests, "CSRC", tmp_path / "csrc")
    monkeypatch.setattr(digests, "PROVEN", tmp_path / "proven.json")
    return digests


@pytest.mark.parametrize(
    ("path", "old", "new", "changes"),
    [
        ("add/add_fwd.cuh", "// adds", "/* sums\n two */ // numbers", False),
        ("add/add_fwd.cuh", "{ return a + b; }", "{\n  return a+b;\n}", False),
        ("add/add_fwd.cuh", "a + b;", "a - b;", True),
        ("add/add_cuda.cu", "a // b", "a // c", True),
        ("core/device.h", "int emulated;", "int other;", False),
        ("core/device.h", "int real;", "int other;", True),
        ("core/unused.h", "int unused;", "int other;", False),
        ("add/add_cpu.cpp", "int cpu;", "int other;", False),
        ("add/add_many_cuda.cu", "int many;", "int other;", False),
    ],
)
def test_digest_changes_with_what_the_kernel_computes_and_with_nothing_else(digests, path, old, new, changes):
    assert digests.ops() == ["add"]
    assert list(digests.units()) == ["add", "add_many"]
    before = digests.digest("add")
    file = digests.CSRC / path
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    assert (digests.digest("add") != before) == changes


def test_digest_holds_the_flags_and_the_version_of_cutlass(digests, monkeypatch):
    before = digests.digest("add")
    assert digests.digest("add", "--use_fast_math") != before
    monkeypatch.setattr(digests.cutlass_headers, "VERSION", "0")
    assert digests.digest("add") != before


def test_voided_records_are_named(digests):
    good = replace(RECORD, op="add", instance="add_fwd", digest=digests.digest("add"))
    many = replace(good, instance="add_many_fwd", digest=digests.digest("add_many"))
    assert many.digest != good.digest
    proofs.write(digests.PROVEN, [good, many])
    assert digests.voided() == []
    file = digests.CSRC / "add" / "add_many_cuda.cu"
    file.write_text(file.read_text().replace("many", "other"))
    assert [line.split()[1] for line in digests.voided()] == ["add_many_fwd"]
    digests.PROVEN.unlink()
    proofs.write(digests.PROVEN, [RECORD])
    assert digests.voided() == [
        "voided: linear_fwd_bf16 on 9.0 (A GPU, 2026-01-02): the sources of linear have changed since"
    ]


def test_every_instance_has_the_digest_of_the_unit_that_names_it(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "build_tools")
    import digests

    for unit, path in digests.units().items():
        named = re.findall(r"MPLUG2_DIGEST\((\w+)\)", path.read_text(encoding="utf-8"))
        assert set(named) <= {unit}, f"{path.name}: MPLUG2_DIGEST of {set(named)}, must be of {unit}"


# ---- the table of proofs and the layer ------------------------------------------------------------------------------
# The table is closed by the first kernel, so each case is a process.
TABLE = """
import sys
sys.path.insert(0, "tests")
import torch, emulated
from mplug2 import _library, proofs
emulated.load()
library = torch.ops.mplug2_emulated_cuda
torch.library.impl("mplug2_emulated_cuda::warn_unproven", "CompositeExplicitAutograd", _library._warn_unproven)
def served():
    return {i.name for i in proofs.instances(library) if i.served}
def run(dtype=torch.bfloat16):
    x, weight = torch.ones(2, 64, dtype=dtype), torch.ones(64, dtype=dtype)
    return torch.ops.mplug2_emulated.add_layer_norm_fwd(x, x, weight, weight, 1e-5)
def record(name, digest, capability):
    library.add_records(f"{name} {digest} {capability}")
library.force_layer("proven")
"""


def in_process(code: str) -> subprocess.CompletedProcess:
    emulated.build()
    return subprocess.run([sys.executable, "-c", TABLE + code], capture_output=True, text=True, cwd=ROOT)


def test_unproven_kernel_leaves_its_work_to_the_reference_and_says_so_once():
    done = in_process("""
record("add_layer_norm_fwd_bf16", "other sources".replace(" ", "_"), 80)
record("add_layer_norm_fwd_bf16", "emulated", 90)
run(), run(torch.float16), run()
assert served() == set(), served()
""")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning") == 1
    assert "add_layer_norm_fwd_bf16 is not proven on GPUs of compute capability 8.0" in done.stderr
    assert "run `mplug2 doctor`" in done.stderr


def test_proven_kernel_serves_where_it_is_proven():
    done = in_process("""
record("add_layer_norm_fwd_bf16", "emulated", 80)
run()
assert served() == {"add_layer_norm_fwd_bf16"}, served()
with emulated.device(capability=90):
    run()
(mine,) = [i for i in proofs.instances(library) if i.served]
assert (mine.served, mine.proven) == (1, ("8.0",)), mine
""")
    assert done.returncode == 0, done.stderr


def test_what_may_serve():
    done = in_process("""
def may(name, capability):
    return library.may_serve(name, capability)
assert not may("add_layer_norm_bwd", 80)
record("add_layer_norm_bwd_fp16", "emulated", 80)
assert may("add_layer_norm_bwd", 80) and not may("add_layer_norm_bwd", 90) and not may("add_layer_norm_fwd", 80)
library.force_layer("portable")
assert may("add_layer_norm_fwd", 90) and not may("no_such_op", 90)
library.force_layer("reference")
assert not may("add_layer_norm_bwd", 80)
""")
    assert done.returncode == 0, done.stderr


def test_layers_are_forced_and_the_table_is_closed_by_the_first_kernel():
    done = in_process("""
library.force_layer("reference")
run()
assert served() == set()
try:
    record("add_layer_norm_fwd_bf16", "emulated", 80)
except RuntimeError as error:
    assert "the table of proofs is closed" in str(error)
else:
    raise AssertionError("the table is open")
library.force_layer("portable")
run()
assert served() == {"add_layer_norm_fwd_bf16"}
for layer, device, message in (
    ("hopper", 80, 'no layer "hopper"'), ("portable", 75, "needs compute capability 8.0, got 7.5")
):
    try:
        with emulated.device(capability=device):
            library.force_layer(layer)
            run()
    except RuntimeError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)
""")
    assert done.returncode == 0, done.stderr


def test_record_of_another_form_is_an_error():
    emulated.load()
    with pytest.raises(RuntimeError, match=r'a record is "instance digest capability"|the table of proofs is closed'):
        torch.ops.mplug2_emulated_cuda.add_records("name digest capability")


def test_contexts_nest_and_end():
    widest = torch.ops.mplug2_cpu.instruction_set()
    with ops.layer("baseline"):
        with ops.layer("reference"):
            assert torch.ops.mplug2_cpu.instruction_set() == "reference"
        assert torch.ops.mplug2_cpu.instruction_set() == "baseline"
    assert torch.ops.mplug2_cpu.instruction_set() == widest


@pytest.mark.skipif(_library.load_cuda().path is not None, reason="the CUDA kernels are there")
def test_portable_without_kernels_says_why():
    message = 'layer: "portable" is CUDA kernels, and there are none: '
    with pytest.raises(RuntimeError, match=message), ops.layer("portable"):
        pass


def test_every_instance_is_of_a_folder_and_bears_its_name():
    emulated.load()
    instances = proofs.instances(torch.ops.mplug2_emulated_cuda)
    assert len({instance.name for instance in instances}) == len(instances) > 0
    for instance in instances:
        assert (ROOT / "csrc" / instance.op / f"{instance.op}_cuda.cu").is_file()
        assert instance.name.startswith(f"{instance.op}_")


# ---- doctor ---------------------------------------------------------------------------------------------------------
def test_every_op_with_kernels_has_cases():
    emulated.load()
    with_kernels = {instance.op for instance in proofs.instances(torch.ops.mplug2_emulated_cuda)}
    assert with_kernels <= {case.op for case in doctor.CASES}
    assert all(callable(getattr(ops, case.op)) for case in doctor.CASES)


def test_doctor_passes_good_kernels():
    emulated.load()
    library = torch.ops.mplug2_emulated_cuda
    place = doctor.Place(torch.device("cpu"), library, emulated.layer, torch._C.DispatchKey.CPU, 2)
    (case,) = (case for case in doctor.CASES if (case.op, case.what) == ("add_layer_norm", "D 768"))
    with emulated_kernels(), emulated.device(num_multiprocessors=1):
        findings = doctor.examine(case, torch.bfloat16, place, repeats=2)
    assert [(f.part, f.instances, f.complaint) for f in findings] == [
        ("forward", ["add_layer_norm_fwd_bf16"], ""),
        ("backward", ["add_layer_norm_bwd_bf16"], ""),
    ]
    assert all(0 < f.error <= 2 and f.distance < 5e-6 for f in findings)
    assert doctor.proven(findings) == {"add_layer_norm_fwd_bf16", "add_layer_norm_bwd_bf16"}


class _Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.ops.mplug2_doubling.double(x)

    @staticmethod
    def backward(ctx, dout):
        return torch.ops.mplug2_doubling.double(dout)


class _Library:
    """Counts the runs of the op below, as the compiled library does for its instances."""

    def __init__(self):
        self.served, self.forced = 0, "portable"

    def instances(self):
        return f"doubling\tdouble_bf16\tdigest\t\t\t{self.served}\n"


def _spoil(out, fault, run):
    """What a wrong kernel does to its output."""
    flat = out.as_strided((out.numel() + 16,), (1,), out.storage_offset() - 8)  # 8 elements of each band
    if fault == "writes past the end":
        flat[-1] = 0
    elif fault == "writes before the beginning":
        flat[0] = 0
    elif fault == "leaves one out":
        out.view(-1)[5] = float("nan")
    elif fault == "two percent too much":
        out *= 1.02
    elif fault == "other bits" and run == 3:
        out.view(-1)[7] += 0.0078125
    elif fault == "an error":
        raise RuntimeError("double: no luck\nmore")


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ("none", ""),
        ("writes past the end", "wrote past the end of an allocation"),
        ("writes before the beginning", "wrote before the beginning of an allocation"),
        ("leaves one out", "NaN in other places than in the truth"),
        ("two percent too much", "largest error"),
        ("other bits", "other bits in another run"),
        ("an error", "double: no luck"),
    ],
)
def test_doctor_finds_what_is_wrong(monkeypatch, fault, complaint):
    library = _Library()

    def double(x):
        if library.forced == "reference" or x.dtype == torch.float64:
            return x * 2
        library.served += 1
        out = x.new_empty(x.shape)
        torch.mul(x, 2, out=out)
        _spoil(out, fault, library.served)
        return out

    defined = torch.library.Library("mplug2_doubling", "DEF")
    defined.define("double(Tensor x) -> Tensor")
    defined.impl("double", double, "CPU")

    @contextmanager
    def layer(name):
        before, library.forced = library.forced, name
        yield
        library.forced = before

    monkeypatch.setattr(ops, "doubling", _Doubling.apply, raising=False)
    case = doctor.Case("doubling", "", lambda g, n: {"x": torch.randn(n, 9, generator=g, dtype=torch.float64)})
    place = doctor.Place(torch.device("cpu"), library, layer, torch._C.DispatchKey.CPU, 4)
    try:
        findings = doctor.examine(case, torch.bfloat16, place, repeats=3)
    finally:
        defined._destroy()
    assert findings[0].instances == ["double_bf16"]
    found = next((f.complaint for f in findings if f.complaint), "")
    assert found.startswith(complaint)
    assert bool(found) == bool(complaint)
    assert doctor.proven(findings) == (set() if complaint else {"double_bf16"})


def test_doctor_without_a_gpu_is_one_line_and_status_1():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    from mplug2 import cli

    done = CliRunner().invoke(cli.app, ["doctor"])
    assert done.exit_code == 1
    assert done.output.startswith("doctor: there ")
    assert len(done.output.splitlines()) == 1
    done = CliRunner().invoke(cli.app, ["doctor", "--op", "soup"])
    assert done.exit_code == 1
    assert "doctor: no op soup, only add_layer_norm" in done.output
