"""The CUDA kernels as machine code: no spills, no traps, the instructions that are meant; and the library they make."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mplug2 import _library

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "build_tools"))
import cuda_report  # noqa: E402
import digests  # noqa: E402

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")

# What the machine code of a kernel must hold, on every architecture. Every kernel matches one line.
WIDE, EXP = ("LDG.128", "STG.128"), ("EX2",)
EXPECTED = {
    r"sum_parts_kernel": (),  # a few kilobytes, read once
    r"add_layer_norm::(fwd|bwd)_kernel": WIDE,
    r"attention::short_fwd_kernel": ("HMMA", "LDSM", "LDGSTS", "STG.128", "EX2"),
    r"fusion::fwd_kernel": ("LDGSTS", "STG.128", "EX2"),
    r"fusion::bwd_kernel": ("LDGSTS", "STG.128"),
    r"attention::tiled_fwd_kernel": ("HMMA", "LDSM", "LDGSTS", "STG.128", "EX2"),
    r"attention::combine_kernel": WIDE + EXP,
    r"attention::short_bwd_kernel": ("HMMA", "LDSM", "LDGSTS", "LDG.128", "STG.128", "EX2"),
    r"attention::tiled_bwd_(dq|dkv)_kernel": ("HMMA", "LDSM", "LDGSTS", "STG.128", "EX2"),
    r"attention::tiled_bwd_parts_kernel": WIDE,
    r"linear::(fwd|bwd)_kernel<\w+, Identity>": WIDE,
    r"linear::(fwd|bwd)_kernel<\w+, (QuickGelu|Gelu)>": WIDE + EXP,
    r"linear::product_kernel<\w+, Identity>": ("HMMA", "LDSM", "LDGSTS", *WIDE),
    r"linear::product_kernel<\w+, (QuickGelu|Gelu)>": ("HMMA", "LDSM", "LDGSTS", *WIDE, *EXP),
    r"local_temporal::norm_(bwd_)?kernel": WIDE,
    r"local_temporal::mix_(bwd_)?kernel": WIDE + EXP,
    r"local_temporal::down_kernel": ("HMMA", "LDSM", "LDGSTS", *WIDE, *EXP),
    r"local_temporal::up_kernel": ("HMMA", "LDSM", "LDGSTS", "STG.128"),
    r"linear_cross_entropy::fwd_kernel": ("LDG.128", "EX2"),
    r"linear_cross_entropy::bwd_kernel": WIDE + EXP,
    r"linear_cross_entropy::add_kernel": WIDE,
}


def _label(path: Path) -> str:
    return str(path.relative_to(digests.CSRC))


COMPILED = [(source, arch) for source in cuda_report.sources() for arch in cuda_report.ARCHS]


@needs_nvcc
@pytest.mark.parametrize(
    ("source", "arch"),
    [pytest.param(*pair, id=f"{_label(pair[0])}-{pair[1]}") for pair in COMPILED if cuda_report.is_for(*pair)],
)
def test_machine_code(source, arch):
    kernels = cuda_report.report((arch,), jobs=1, paths=[source])
    assert kernels or "launch(" not in source.read_text(), "a file that launches kernels and has none"
    complaints = cuda_report.complaints(kernels)
    assert not complaints, "\n".join(complaints)
    for kernel in kernels:
        rows = [wanted for pattern, wanted in EXPECTED.items() if re.match(pattern, kernel.name)]
        assert len(rows) == 1, f"{kernel.name}: {len(rows)} lines of EXPECTED, where there must be one"
        absent = [label for label in rows[0] if not kernel.counts[label]]
        assert not absent, f"sm_{arch}: {kernel.name} has no {', '.join(absent)}"


def test_files_for_one_architecture_are_compiled_for_no_other():
    inst = [path for path in cuda_report.sources() if path.parent.name == "inst"]
    assert 0 < len(inst) <= 8
    for path in inst:
        assert [arch for arch in cuda_report.ARCHS if cuda_report.is_for(path, arch)] == ["80"]
    assert cuda_report.is_for(digests.CSRC / "linear" / "linear_cuda.cu", "90")


BAD = """
#include <cstdio>
#include <cute/arch/copy_sm90.hpp>
__global__ void traps(uint4* from, cute::uint128_t* shared) {
  cute::SM90_U32x4_STSM_N::copy(from->x, from->y, from->z, from->w, *shared);
}
__global__ void spills(float* x) {
  float all[1000];
  for (int i = 0; i < 1000; ++i) all[i] = x[i];
  all[static_cast<int>(x[1000])] = 1;
  x[0] = all[static_cast<int>(x[1001])];
}
"""


@needs_nvcc
def test_traps_and_stack_frames_are_found(monkeypatch, tmp_path):
    source = tmp_path / "bad" / "bad_cuda.cu"
    source.parent.mkdir()
    source.write_text(BAD)
    monkeypatch.setattr(digests, "CSRC", tmp_path)
    monkeypatch.setattr(cuda_report, "CACHE", tmp_path / "cubin")
    kernels = {kernel.name: kernel for kernel in cuda_report.report(("80",), jobs=1)}
    assert set(kernels) == {"traps", "spills"}
    assert kernels["traps"].forbidden
    assert kernels["spills"].stack == 4000
    assert len(cuda_report.complaints(list(kernels.values()))) >= 2


LOAD = """
import ctypes, os, sys, torch
import mplug2
from mplug2 import proofs
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
ctypes.CDLL(sys.argv[2], mode=os.RTLD_LAZY)  # symbols of libtorch_cuda stay open, which a CPU build does not have
for instance in proofs.instances(torch.ops.mplug2_cuda):
    print(instance.op, instance.name, instance.digest)
for schema in torch._C._jit_get_all_schemas():
    if schema.name.startswith("mplug2::") and torch._C._dispatch_has_kernel_for_dispatch_key(schema.name, "CUDA"):
        print("kernel", schema.name)
print("initialised", torch.cuda.is_initialized())
"""


def _runtime() -> Path | None:
    """The CUDA runtime beside nvcc; /usr/local/bin/nvcc may be a link or a script."""
    folders = [Path(os.path.realpath(shutil.which("nvcc") or "/")).parents[1], *Path("/usr/local").glob("cuda*")]
    found = (path for folder in folders for name in ("lib64", "lib") for path in (folder / name).glob("libcudart.so.*"))
    return next(found, None)


def test_library_registers_every_instance_with_the_digest_of_its_unit():
    path = _library._find("_cuda.so")
    if path is None or _runtime() is None:
        pytest.skip("no _cuda.so was built" if path is None else "no CUDA runtime library")
    command = [sys.executable, "-c", LOAD, str(_runtime()), str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *lines, last = (tuple(line.split()) for line in done.stdout.splitlines())
    kernels = {line[1] for line in lines if line[0] == "kernel"}
    digest_of = {
        (path.parent.name, name): digests.digest(unit)
        for unit, path in digests.units().items()
        for name in re.findall(r'"(\w+)",\s*MPLUG2_DIGEST', path.read_text(encoding="utf-8"))
    }
    assert {line[:2]: line[2] for line in lines if line[0] != "kernel"} == digest_of
    assert {f"mplug2::{op}_fwd" for op in digests.ops()} <= kernels
    assert last == ("initialised", "False")
