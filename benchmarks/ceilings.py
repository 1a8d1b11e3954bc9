"""What the GPU at hand can do at most, measured by small kernels of ours (ceilings.cu); torch is not needed.

    python benchmarks/ceilings.py [--json FILE]

The product of two 8,192 x 8,192 bfloat16 matrices is measured too, by cuBLAS, where there is a torch with CUDA.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "build_tools"))
import cutlass_headers  # noqa: E402
import digests  # noqa: E402

SOURCE = Path(__file__).with_name("ceilings.cu")
LAUNCHES = 20
# What an exported measure_<name> counts, a second.
UNITS = {
    "copy": "bytes",
    "l2_read": "bytes",
    "shared_ldmatrix": "bytes",
    "shared_load16": "bytes",
    "mma": "m16n8k16",
    "exp2": "exponentials",
}


def compiled(folder: Path, archs: tuple[str, ...] = ("native",)) -> Path:
    """The shared library of ceilings.cu in `folder`, for the GPU at hand ("native") or for architectures as "80".

    Raises:
        RuntimeError: there is no nvcc, or it fails; the message holds what it says.
    """
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc is None:
        raise RuntimeError("ceilings: no nvcc on PATH (CUDACXX names one)")
    library = folder / "ceilings.so"
    include = cutlass_headers.cutlass_include(ROOT / "build")
    targets = ["-arch=native"] if archs == ("native",) else [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    options = [*digests.FLAGS, *targets, "-shared", "-Xcompiler", "-fPIC", "-cudart", "shared"]
    command = [nvcc, *options, f"-I{ROOT / 'csrc'}", f"-isystem={include}", str(SOURCE), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ceilings: {' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return library


def measured(path: Path) -> dict:
    """The device's facts and its rates: for every ceiling unit, median, p20 and p80 of units a second.

    Raises:
        RuntimeError: CUDA reports an error.
    """
    library = ctypes.CDLL(str(path))
    library.error_text.restype = ctypes.c_char_p

    def check(error: int, what: str) -> None:
        if error:
            raise RuntimeError(f"ceilings: {what}: {library.error_text(error).decode()}")

    name = ctypes.create_string_buffer(256)
    multiprocessors, l2_bytes, capability = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    facts = (ctypes.byref(value) for value in (multiprocessors, l2_bytes, capability))
    check(library.device_facts(name, len(name), *facts), "device")
    rates = {}
    for ceiling, unit in UNITS.items():
        milliseconds, work = (ctypes.c_float * LAUNCHES)(), ctypes.c_double()
        check(getattr(library, f"measure_{ceiling}")(LAUNCHES, milliseconds, ctypes.byref(work)), ceiling)
        rates[ceiling] = {"unit": unit, **_spread([1e3 * work.value / ms for ms in milliseconds])}
    return {
        "device": name.value.decode(),
        "multiprocessors": multiprocessors.value,
        "l2_bytes": l2_bytes.value,
        "capability": capability.value,
        "rates": rates,
    }


def product(size: int = 8192) -> dict | None:
    """FLOP a second of cuBLAS on random bfloat16 matrices, or None without a torch with CUDA."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rates = []
    for _ in range(3 + LAUNCHES):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        a @ b
        end.record()
        end.synchronize()
        rates.append(2e3 * size**3 / begin.elapsed_time(end))
    return {"unit": "FLOP", **_spread(rates[3:])}


def _spread(rates: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(rates, n=10, method="inclusive")
    return {"median": statistics.median(rates), "p20": cuts[1], "p80": cuts[7]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    parser.add_argument("--compile-only", action="store_true", help="for sm_80 and sm_90; needs no GPU")
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            if options.compile_only:
                compiled(Path(folder), ("80", "90"))
                return
            found = measured(compiled(Path(folder)))
    except RuntimeError as error:
        sys.exit(str(error))
    if rate := product():
        found["rates"]["product"] = rate
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"{found['device']}, {found['multiprocessors']} multiprocessors, {found['l2_bytes'] / 2**20:.0f} MB of L2")
    for ceiling, rate in found["rates"].items():
        spread = f"{rate['median'] / 1e12:10.3f} T/s  p20 {rate['p20'] / 1e12:.3f}  p80 {rate['p80'] / 1e12:.3f}"
        print(f"{ceiling:18}{spread}  {rate['unit']}")


if __name__ == "__main__":
    main()
