"""Proves kernels on the GPU at hand: `mplug2 doctor`, a process of its own.

Every kernel instance of the library runs through the public function of its op, at shapes that fill the GPU at least
twice: 50 times with the same bits, within the tolerances of the tests against the float64 truth, with NaN in memory
that was not written and round everything that was allocated. What passes is recorded (mplug2/proofs.py) and serves from
then on; nothing else does.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mplug2 import _library, ops, proofs
from mplug2.doctor_cases import CASES, Case, randn
from mplug2.tolerances import LOCAL, judge

REPEATS = 50
SECONDS = 30.0  # that a call may take before it counts as one that does not end
DTYPES = (torch.bfloat16, torch.float16)
# Blocks that one multiprocessor holds at once, at most, of the kernels that use matrix instructions.
BLOCKS_A_MULTIPROCESSOR = 4


# ---- where it is run ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Place:
    """A device with a library of kernel instances. `layer` forces one; `key` is the dispatch key of its kernels."""

    device: torch.device
    library: Any  # torch.ops.mplug2_cuda
    layer: Callable[[str], AbstractContextManager]
    key: torch._C.DispatchKey
    blocks: int  # that fill the device twice

    def served(self) -> dict[str, int]:
        return {instance.name: instance.served for instance in proofs.instances(self.library)}

    def served_since(self, before: dict[str, int]) -> list[str]:
        return [name for name, times in self.served().items() if times > before[name]]

    def wait(self) -> None:
        """Until all is done; what went wrong on the device is raised here, a kernel that does not end, too."""
        if self.device.type != "cuda":
            return
        done, end = torch.cuda.Event(), time.monotonic() + SECONDS
        done.record()
        while not done.query():
            if time.monotonic() > end:
                raise RuntimeError(f"still running after {SECONDS:.0f} s")


class Bands(TorchDispatchMode):
    """Whatever a kernel's host code allocates is full of NaN, and lies between two bands of NaN."""

    BYTES = 4096
    NAN = 0xFF  # as every byte of a float16, bfloat16 or float32
    FACTORIES = (
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.new_empty.default,
        torch.ops.aten.empty_like.default,
    )

    def __init__(self, key: torch._C.DispatchKey):
        super().__init__()
        self.key = key
        self.buffers: list[Tensor] = []
        self._ops: list[torch._ops.OpOverload] = []  # being run

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        is_op = name.startswith("mplug2") and not name.endswith("_reference")
        is_kernel = is_op and torch._C._dispatch_has_kernel_for_dispatch_key(name, self.key)
        if is_kernel and func not in self._ops:
            self._ops.append(func)
            try:
                with self:  # allocations inside come here, too
                    return func._op_dk(self.key, *args, **kwargs)
            finally:
                self._ops.remove(func)
        result = func(*args, **kwargs)
        return self._surrounded(result) if self._ops and func in self.FACTORIES else result

    def _surrounded(self, like: Tensor) -> Tensor:
        """A tensor of the layout of the new one inside a buffer that is kept."""
        size = like.numel() * like.element_size()
        buffer = torch.full((size + 2 * self.BYTES,), self.NAN, dtype=torch.uint8, device=like.device)
        self.buffers.append(buffer)
        return buffer[self.BYTES : self.BYTES + size].view(like.dtype).as_strided(like.shape, like.stride())

    def complaint(self) -> str:
        """What is wrong with the memory round the allocations so far; they are forgotten."""
        buffers, self.buffers = self.buffers, []
        if not buffers:
            return "no allocation was seen, so nothing was surrounded with NaN"
        for buffer in buffers:
            if (buffer[: self.BYTES] != self.NAN).any():
                return "wrote before the beginning of an allocation"
            if (buffer[-self.BYTES :] != self.NAN).any():
                return "wrote past the end of an allocation"
        return ""


# ---- how it is judged -----------------------------------------------------------------------------------------------
@dataclass
class Finding:
    """One direction of one case in one dtype; `complaint` is "" where all was well."""

    op: str
    what: str
    dtype: str
    part: str  # "forward" or "backward"
    instances: list[str] = field(default_factory=list)  # that served
    complaint: str = ""
    error: float = 0.0  # largest |op - truth| in units of the reference's at that dtype
    distance: float = 0.0  # 1 - 2<x, y> / (<x, x> + <y, y>) from the truth
    microseconds: float | None = None
    reference_microseconds: float | None = None


PARTS = ("forward", "backward")


class _Run:
    """The two parts of a case, one call each. `dtype` is the one in which the gradients that come in are exact."""

    def __init__(self, case: Case, tensors: dict[str, Tensor], dtype: torch.dtype, device: torch.device):
        self.case, self.dtype = case, dtype
        self.arguments = {name: t.detach().to(device) for name, t in tensors.items()}
        self.leaves = [t.requires_grad_() for t in self.arguments.values() if t.is_floating_point()]
        self.outs: tuple[Tensor, ...] = ()
        self.douts: list[Tensor] = []

    def forward(self) -> list[Tensor]:
        outs = getattr(ops, self.case.op)(**self.arguments, **self.case.options)
        self.outs = outs if isinstance(outs, tuple) else (outs,)
        if not self.douts:
            g = torch.Generator().manual_seed(1)
            self.douts = [randn(g, *out.shape).to(self.dtype).to(out) for out in self.outs]
        return [out.detach() for out in self.outs]

    def backward(self) -> list[Tensor]:
        return list(torch.autograd.grad(self.outs, self.leaves, self.douts, retain_graph=True))

    def call(self, part: str) -> list[Tensor]:
        return self.forward() if part == "forward" else self.backward()


def examine(case: Case, dtype: torch.dtype, place: Place, repeats: int = REPEATS) -> list[Finding]:
    """Run a case in one dtype and judge its forward and its backward part."""
    g = torch.Generator().manual_seed(0)
    tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in case.make(g, place.blocks).items()}
    wide = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    with place.layer("reference"):
        truths = _both(_Run(case, wide, dtype, place.device))
        low = _Run(case, tensors, dtype, place.device)
        baselines = _both(low)
        reference_times = {part: _microseconds(low, part, place.device) for part in PARTS}
        del low
    findings = {part: Finding(case.op, case.what, str(dtype).removeprefix("torch."), part) for part in PARTS}
    with place.layer("portable"):
        run = _Run(case, tensors, dtype, place.device)
        firsts: dict[str, list[Tensor]] = {}
        for part in (part for _ in range(repeats) for part in PARTS):
            finding, bands, before = findings[part], Bands(place.key), place.served()
            try:
                with bands, torch.autograd.set_multithreading_enabled(False):  # modes are of this thread
                    results = run.call(part)
                place.wait()
                problem = bands.complaint() if place.served() != before else ""
            except RuntimeError as error:
                finding.instances, finding.complaint = place.served_since(before), str(error).splitlines()[0]
                return list(findings.values())  # the other part needs this one's results
            if part not in firsts:
                finding.instances, firsts[part] = place.served_since(before), results
            elif not all(map(_same_bits, results, firsts[part])):
                problem = problem or "other bits in another run"
            finding.complaint = finding.complaint or problem
        for part, finding in findings.items():
            local = case.local if part == "backward" else LOCAL
            _judge(finding, firsts[part], baselines[part], truths[part], local, dtype)
            finding.microseconds = _microseconds(run, part, place.device)
            finding.reference_microseconds = reference_times[part]
    return list(findings.values())


def _both(run: _Run) -> dict[str, list[Tensor]]:
    return {part: run.call(part) for part in PARTS}


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _judge(finding: Finding, actual, baseline, truth, local: float, dtype: torch.dtype) -> None:
    for a, b, t in zip(actual, baseline, truth, strict=True):
        verdict = judge(a, b, t, local=local, dtype=dtype)
        finding.complaint = finding.complaint or verdict.complaint
        finding.error, finding.distance = max(finding.error, verdict.error), max(finding.distance, verdict.distance)


def _microseconds(run: _Run, part: str, device: torch.device) -> float | None:
    """Median of 20 calls on a GPU; it tells nothing elsewhere."""
    if device.type != "cuda":
        return None
    times = []
    for _ in range(25):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run.call(part)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times[5:])


def proven(findings: list[Finding]) -> set[str]:
    """Instances that served in some finding, and in none that complains."""
    served = {name for finding in findings for name in finding.instances}
    return served - {name for finding in findings if finding.complaint for name in finding.instances}


# ---- the command ----------------------------------------------------------------------------------------------------
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
    op: Annotated[list[str] | None, typer.Option(help="Only this op; may be repeated.", show_default=False)] = None,
    write: Annotated[
        Path | None, typer.Option(help="File to add the records to, instead of this user's.", show_default=False)
    ] = None,
) -> None:
    """Prove the CUDA kernels on this machine's GPU, and record what passed: it serves from then on."""
    if unknown := set(op or ()) - {case.op for case in CASES}:
        _end(f"doctor: no op {', '.join(sorted(unknown))}, only {', '.join(sorted({case.op for case in CASES}))}")
    library = _library.load_cuda()
    if library.path is None:
        _end(f"doctor: there are no CUDA kernels to prove: {library.reason}")
    if not torch.cuda.is_available():
        _end("doctor: there is no CUDA device to prove kernels on")
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    place = Place(
        torch.device("cuda", torch.cuda.current_device()), torch.ops.mplug2_cuda, ops.layer, torch._C.DispatchKey.CUDA,
        2 * properties.multi_processor_count * BLOCKS_A_MULTIPROCESSOR,
    )  # fmt: skip
    capability = f"{properties.major}.{properties.minor}"
    instances = [i for i in proofs.instances(place.library) if (not op or i.op in op) and i.is_made_for(capability)]
    console = Console(stderr=True, highlight=False)
    path, lost = write or proofs.user_cache(), ""
    findings: list[Finding] = []
    for name, cases in itertools.groupby(CASES, key=lambda case: case.op):
        of_op = [instance for instance in instances if instance.op == name]
        if lost or not of_op:
            continue
        found, lost = _examine_op(cases, place, console)
        findings += found
        _save(path, of_op, found, properties)  # at once: the next op may end this process
    passed = proven(findings)
    missed = sorted({i.name for i in instances} - {name for finding in findings for name in finding.instances})
    if as_json:
        facts = {"findings": [asdict(f) for f in findings], "proven": sorted(passed)}
        print(json.dumps(facts | {"without_case": missed, "file": str(path)}, indent=2), flush=True)
    else:
        show(findings, missed)
        print(
            f"{len(passed)} of {len(instances)} kernel instances are proven on {properties.name}; wrote {path}",
            flush=True,
        )
    if lost:
        console.print(f"doctor: the GPU is lost to this process: {lost}; --op checks one op alone", markup=False)
        os._exit(1)  # a kernel that does not end would hold up the usual end
    if len(passed) < len(instances):
        raise typer.Exit(1)


def _examine_op(cases: Iterable[Case], place: Place, console: Console) -> tuple[list[Finding], str]:
    """What was found, and why the GPU is lost to this process, "" where it is not."""
    findings: list[Finding] = []
    for case, dtype in itertools.product(cases, DTYPES):
        console.print(f"{case.op}, {case.what}, {dtype}", markup=False)
        findings += examine(case, dtype, place)
        if lost := _lost(place):
            return findings, lost
    return findings, ""


def _save(path: Path, instances: list[proofs.Instance], findings: list[Finding], properties) -> None:
    """Add the records of what passed, take away those of what did not."""
    passed = proven(findings)
    failed = {name for finding in findings if finding.complaint for name in finding.instances}
    try:
        proofs.write(
            path,
            [_record(instance, properties) for instance in instances if instance.name in passed],
            [_record(instance, properties) for instance in instances if instance.name in failed],
        )
    except (OSError, ValueError) as error:
        _end(f"doctor: {error}")


def show(findings: list[Finding], missed: list[str]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("op", "case", "error", "us", "reference us", "verdict"):
        table.add_column(column, overflow="fold")
    for f in findings:
        times = ("" if t is None else f"{t:.1f}" for t in (f.microseconds, f.reference_microseconds))
        verdict = f.complaint or ("passed" if f.instances else "no kernel of ours")
        cells = (f"{f.op} {f.part}", f"{f.what}, {f.dtype}", f"{f.error:.2f}", *times, verdict)
        table.add_row(*map(Text, cells))
    Console(highlight=False).print(table)
    for name in missed:
        print(f"{name}: no case reaches it, so it stays unproven")


def _driver() -> int:
    """The CUDA version of the driver, 13000 for 13.0; 0 where it does not say."""
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value


def _record(instance: proofs.Instance, properties) -> proofs.Record:
    driver = _driver()
    return proofs.Record(
        op=instance.op, instance=instance.name, digest=instance.digest,
        capability=f"{properties.major}.{properties.minor}", device=properties.name,
        compiler=torch.ops.mplug2_cuda.compiler(), driver=f"CUDA {driver // 1000}.{driver % 1000 // 10}",
        torch=torch.__version__, date=date.today().isoformat(),
    )  # fmt: skip


def _lost(place: Place) -> str:
    """Why nothing runs on the device any more, "" where all is well: a kernel that read outside memory ends all, and
    so does one that does not end."""
    try:
        place.wait()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def _end(line: str) -> None:
    typer.echo(line, err=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(doctor)
