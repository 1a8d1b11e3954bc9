"""Compiles every CUDA kernel for several architectures and shows what became of it: `make cuda`.

A row per kernel and architecture: what ptxas says (registers, stack frame, spills) and how often the machine code holds
the instructions that matter. The machine code of unchanged sources is kept in build/cubin/.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import cutlass_headers
import digests
import torch_headers

# What is shipped (sm_80, sm_90), and what later GPUs compile from PTX by themselves.
ARCHS = ("80", "90", "100", "120")
CACHE = digests.ROOT / "build" / "cubin"

# In SASS. HMMA is mma.sync, LDSM ldmatrix, LDGSTS cp.async, MUFU.EX2 an exponential.
INSTRUCTIONS = {
    "HMMA": r"HMMA\.", "LDSM": r"LDSM\.", "LDGSTS": r"LDGSTS\.", "LDG.128": r"LDG\.\S*\.128",
    "STG.128": r"STG\.\S*\.128", "EX2": r"MUFU\.EX2", "BAR": r"BAR\.", "local": r"(?:LDL|STL)\b",
}  # fmt: skip
# Never: a breakpoint is what CUTLASS's structs compile to where an architecture lacks the instruction.
FORBIDDEN = {"BPT": r"BPT\b", "vprintf": r"\bvprintf\b", "__assertfail": r"__assertfail"}


@dataclass
class Kernel:
    """One kernel of one file on one architecture."""

    source: str  # relative to csrc/
    arch: str
    name: str  # demangled, without its parameters
    registers: int
    stack: int  # bytes, as are the spills
    spill_stores: int
    spill_loads: int
    counts: dict[str, int] = field(default_factory=dict)  # of INSTRUCTIONS
    forbidden: list[str] = field(default_factory=list)  # of FORBIDDEN, found in it


def sources() -> list[Path]:
    """Files with kernels: core/ holds host code alone."""
    found = [path for op in digests.ops() for path in (digests.CSRC / op).rglob("*.cu")]
    return sorted(found)


def is_for(source: Path, arch: str) -> bool:
    """Whether the build compiles a file for an architecture: those in inst/ are for the one that their name ends in."""
    return source.parent.name != "inst" or source.stem.endswith(f"_sm{arch}")


def report(archs: tuple[str, ...] = ARCHS, jobs: int | None = None, paths: list[Path] | None = None) -> list[Kernel]:
    """Every kernel of `paths` (all sources) on every architecture that they are compiled for.

    Raises:
        RuntimeError: nvcc or nvdisasm is missing, or a file does not compile; the message holds what the compiler says.
    """
    tools = {name: _program(name) for name in ("nvcc", "nvdisasm", "c++filt")}
    if missing := [name for name, path in tools.items() if path is None]:
        raise RuntimeError(f"cuda_report: no {', '.join(missing)} found: nvdisasm comes with `pip install -e '.[dev]'`")
    with ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0))) as pool:
        work = [(path, arch) for path in paths or sources() for arch in archs if is_for(path, arch)]
        parts = list(pool.map(lambda item: _kernels(*item, tools), work))
    return [kernel for part in parts for kernel in part]


def _program(name: str) -> str | None:
    """Of PATH, or of a package of this environment."""
    packages = Path(sysconfig.get_path("platlib"), "nvidia")
    return shutil.which(name) or next((str(path) for path in sorted(packages.glob(f"*/bin/{name}"))), None)


# What ptxas says of a kernel.
ENTRY = re.compile(
    r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.DOTALL,
)
BODY = re.compile(r"^\.text\.(\S+):\n(.*?)(?=^\.text\.|\Z)", re.MULTILINE | re.DOTALL)


def _kernels(source: Path, arch: str, tools: dict[str, str]) -> list[Kernel]:
    cubin, log = _compiled(source, arch, tools["nvcc"])
    code = dict(BODY.findall(_run([tools["nvdisasm"], "--print-code", str(cubin)])))
    entries = ENTRY.findall(log)
    if not entries:
        return []
    names = _run([tools["c++filt"], "--no-params", *(entry[0] for entry in entries)]).splitlines()
    kernels = []
    for (symbol, stack, stores, loads, registers), name in zip(entries, names, strict=True):
        plain = name.replace("mplug2::", "").replace("(anonymous namespace)::", "").removeprefix("void ")
        counts = {label: len(re.findall(pattern, code[symbol])) for label, pattern in INSTRUCTIONS.items()}
        forbidden = [label for label, pattern in FORBIDDEN.items() if re.search(pattern, code[symbol])]
        numbers = map(int, (registers, stack, stores, loads))
        kernels.append(Kernel(str(source.relative_to(digests.CSRC)), arch, plain, *numbers, counts, forbidden))
    return kernels


def _compiled(source: Path, arch: str, nvcc: str) -> tuple[Path, str]:
    """The machine code and what ptxas said, from build/cubin/ where nothing that matters has changed."""
    key = [_run([nvcc, "--version"]), arch, source.name, digests.digest_of_files(source)]
    cubin = CACHE / f"{source.stem}-{arch}-{hashlib.sha256(' '.join(key).encode()).hexdigest()[:20]}.cubin"
    log = cubin.with_suffix(".log")
    if not log.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        part = CACHE / f"part-{os.getpid()}-{cubin.name}"
        includes = [cutlass_headers.cutlass_include(digests.ROOT / "build"), torch_headers.torch_include()]
        options = [*digests.FLAGS, f"-arch=sm_{arch}", "-Xptxas", "-v", f"-I{digests.CSRC}"]
        options += ["-DUSE_CUDA", "-DMPLUG2_HAVE_SM80", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
        options += [f"-isystem={folder}" for folder in includes]
        said = _run([nvcc, *options, "-cubin", str(source), "-o", str(part)])
        for old in CACHE.glob(f"{source.stem}-{arch}-*"):
            old.unlink(missing_ok=True)
        part.rename(cubin)
        log.write_text(said, encoding="utf-8")
    return cubin, log.read_text(encoding="utf-8")


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"cuda_report: {' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def complaints(kernels: list[Kernel]) -> list[str]:
    """What no kernel may have."""
    lines = []
    for kernel in kernels:
        found = [*kernel.forbidden]
        if kernel.stack or kernel.spill_stores or kernel.spill_loads or kernel.counts["local"]:
            found.append(f"{kernel.stack} bytes of stack, {kernel.spill_stores + kernel.spill_loads} bytes spilled")
        lines += [f"{kernel.source}, sm_{kernel.arch}, {kernel.name}: {what}" for what in found]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", default=",".join(ARCHS), help="[default: %(default)s]")
    parser.add_argument("sources", nargs="*", type=Path, help="files [default: all]")
    options = parser.parse_args()
    try:
        kernels = report(tuple(options.archs.split(",")), paths=[path.resolve() for path in options.sources])
    except RuntimeError as error:
        sys.exit(str(error))
    print(f"{'sm':>4} {'regs':>5} {'stack':>6} {'spill':>6}", *(f"{label:>8}" for label in INSTRUCTIONS), " kernel")
    for kernel in kernels:
        numbers = (
            f"{kernel.arch:>4} {kernel.registers:>5} {kernel.stack:>6} {kernel.spill_stores + kernel.spill_loads:>6}"
        )
        print(numbers, *(f"{kernel.counts[label]:>8}" for label in INSTRUCTIONS), f" {kernel.name}")
    if found := complaints(kernels):
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
