"""The CUDA kernels on the CPU, for tests: builds and loads the emulated library (tests/emulator) and sets how it runs.

Its ops are `torch.ops.mplug2_emulated.<op>`, on CPU tensors. A mistake that the emulator finds is a RuntimeError.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import json
import math
import mmap
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "tests" / "emulator"
BUILD = ROOT / "build" / "emulator"

ops = torch.ops.mplug2_emulated

_MAP_NORESERVE = 0x4000  # Linux; mmap names it from Python 3.13 on
ORDERS = ("plain", "skewed", "random")


def _program(name: str) -> str:
    beside = Path(sysconfig.get_path("scripts"), name)
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise RuntimeError(f"emulated: {name} is neither in {beside.parent} nor on PATH: pip install {name}")
    return found


def build(target: str = "mplug2_emulated") -> Path:
    """Bring `target` up to date and return its path. Workers that start together wait for the first one."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        commands = [[_program("cmake"), "--build", str(BUILD), "--target", target]]
        include = Path(torch.__file__).parent / "include"
        cache = BUILD / "CMakeCache.txt"
        if not (BUILD / "build.ninja").is_file() or f"={include}\n" not in cache.read_text():
            settings = [f"-DCMAKE_MAKE_PROGRAM={_program('ninja')}", f"-DMPLUG2_TORCH_INCLUDE={include}"]
            commands.insert(0, [_program("cmake"), "-S", str(SOURCE), "-B", str(BUILD), "-G", "Ninja", *settings])
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CLICOLOR": "0"})
            if done.returncode:
                raise RuntimeError(f"emulated: {' '.join(command)} failed:\n{done.stdout[-8000:]}{done.stderr[-2000:]}")
    suffix = ".so" if target == "mplug2_emulated" else ""
    return BUILD / f"{target}{suffix}"


@functools.cache
def load() -> ctypes.CDLL:
    """Build and load the library, once a process."""
    path = build()
    torch.ops.load_library(str(path))
    library = ctypes.CDLL(str(path))
    library.emulator_take_counts.restype = ctypes.c_char_p
    return library


@contextmanager
def schedule(order: str, seed: int = 0) -> Iterator[None]:
    """Order in which warps run: "plain" (turns), "skewed" (one as far ahead as barriers allow; `seed` 0 favours the
    first, 1 the last, others a shuffled order; the default with seed 0) or "random" by `seed`."""
    load().emulator_set_schedule(ORDERS.index(order), ctypes.c_uint64(seed))
    try:
        yield
    finally:
        load().emulator_set_schedule(ORDERS.index("skewed"), ctypes.c_uint64(0))


@contextmanager
def untracked(threads: int | None = None) -> Iterator[None]:
    """Follows no access, for big runs: fast, over `threads` OS threads (all cores), but blind to races and bounds."""
    load().emulator_set_tracking(False, threads or len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        load().emulator_set_tracking(True, 1)


@contextmanager
def blocks(first: int, end: int) -> Iterator[None]:
    """Of every launch only the blocks from `first` to before `end` run, for tensors too large to compute whole."""
    load().emulator_set_blocks(ctypes.c_uint64(first), ctypes.c_uint64(end))
    try:
        yield
    finally:
        load().emulator_set_blocks(ctypes.c_uint64(0), ctypes.c_uint64(2**64 - 1))


@contextmanager
def device(num_multiprocessors: int = 108, max_shared_bytes: int = 163 * 1024, capability: int = 80) -> Iterator[None]:
    """The GPU that host code sees; an A100 where nothing is said."""
    load().emulator_set_device(num_multiprocessors, max_shared_bytes, capability)
    try:
        yield
    finally:
        load().emulator_set_device(108, 163 * 1024, 80)


@contextmanager
def layer(name: str) -> Iterator[None]:
    """Which layer the ops run in: "portable", their kernels, is usual here; "reference"; or "proven", what `mplug2`
    itself does."""
    load()
    torch.ops.mplug2_emulated_cuda.force_layer(name)
    try:
        yield
    finally:
        torch.ops.mplug2_emulated_cuda.force_layer("")


def sparse(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take memory only where they are written: tensors of more than 2^31 elements."""
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


@dataclass(frozen=True)
class Wavefronts:
    """Passes of shared memory (32 banks of 4 bytes): `ideal` without bank conflicts."""

    actual: int
    ideal: int


@dataclass(frozen=True)
class Sectors:
    """32-byte sectors: distinct in the launch, and the sum over blocks of those distinct in the block."""

    launch: int
    blocks: int


@dataclass(frozen=True)
class Range:
    """Memory that kernels may touch: a tensor's, or of several that overlap."""

    data: int  # address
    bytes: int
    read: Sectors
    written: Sectors


@dataclass(frozen=True)
class Launch:
    """What one launch did. Numbers are sums over its blocks."""

    name: str
    grid: tuple[int, int, int]
    threads: int  # a block
    shared_bytes: int
    ranges: tuple[Range, ...]
    global_requests: int  # memory instructions of warps
    global_sectors: int  # distinct in a request, summed over requests
    ldmatrix: Wavefronts
    loads: Wavefronts
    stores: Wavefronts
    copies: Wavefronts  # cp.async
    shared_bytes_read: int
    shared_bytes_written: int
    mma_by_scheduler: tuple[float, ...]  # m16n8k16, or half of one for m16n8k8; warp w belongs to scheduler w % 4
    exponentials: int  # of threads
    block_barriers: int
    named_barriers: int

    @property
    def mma(self) -> float:
        return sum(self.mma_by_scheduler)

    @property
    def wavefronts(self) -> Wavefronts:
        kinds = (self.ldmatrix, self.loads, self.stores, self.copies)
        return Wavefronts(sum(kind.actual for kind in kinds), sum(kind.ideal for kind in kinds))

    def of(self, tensor: torch.Tensor) -> Range:
        """The range that holds the tensor's first element."""
        address = tensor.data_ptr()
        for found in self.ranges:
            if found.data <= address < found.data + found.bytes:
                return found
        raise LookupError(f"{self.name}: the tensor at {address:#x} is none of the memory of this launch")


@dataclass
class Counts:
    """Filled when the `counts()` block ends."""

    launches: list[Launch] = field(default_factory=list)

    def of(self, name: str) -> Launch:
        """The one launch whose name begins with `name`."""
        found = [launch for launch in self.launches if launch.name.startswith(name)]
        if len(found) != 1:
            raise LookupError(f"{name}: {len(found)} launches of this name among {[x.name for x in self.launches]}")
        return found[0]


def _launch(record: dict) -> Launch:
    def wavefronts(kind: str) -> Wavefronts:
        return Wavefronts(**record[kind])

    return Launch(
        **{key: record[key] for key in ("name", "threads", "shared_bytes", "global_requests", "global_sectors")},
        **{key: record[key] for key in ("shared_bytes_read", "shared_bytes_written", "exponentials")},
        **{key: record[key] for key in ("block_barriers", "named_barriers")},
        **{key: wavefronts(key) for key in ("ldmatrix", "loads", "stores", "copies")},
        grid=tuple(record["grid"]),
        ranges=tuple(
            Range(r["data"], r["bytes"], Sectors(**r["read"]), Sectors(**r["written"])) for r in record["ranges"]
        ),
        mma_by_scheduler=tuple(k8 / 2 for k8 in record["mma_k8"]),
    )


@contextmanager
def counts() -> Iterator[Counts]:
    """Counts what the launches inside do."""
    library = load()
    result = Counts()
    library.emulator_take_counts()
    library.emulator_count(True)
    try:
        yield result
    finally:
        library.emulator_count(False)
        result.launches = [_launch(record) for record in json.loads(library.emulator_take_counts())]
