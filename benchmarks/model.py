"""Bounds of our own CUDA kernels on a GPU that is not there, from what can be counted without one.

    python benchmarks/model.py [--op OP] [--device A100] [--ceilings FILE] [--json]

Kernels run emulated (tests/emulator) at three small sizes; what they move and compute is extrapolated to the published
large model at 32 videos and divided by the rates of a device. That gives seconds for each of DRAM, L2, shared memory,
mma.sync at its own rate, exponentials and issue slots. The truth would lie at or above the largest of them (all else
hidden behind it), and near their sum where nothing overlaps: that interval is the bound, and the largest names what
binds. Latency, launches and clocks are not in it, and rates that nobody measured are marked.

It ranks designs and catches regressions. It is never a time, a share of the roof, or a number for the README.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from devices import DEVICES, SCHEDULERS, Device, with_ceilings

ROOT = Path(__file__).resolve().parents[1]

SECTOR = 32  # bytes
RESOURCES = ("dram", "l2", "shared", "mma", "exp", "issue")


# ---- arithmetic -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Work:
    """What one launch does, summed over its blocks."""

    dram_bytes: float  # every sector that is touched, once
    l2_bytes: float  # every sector that a block touches, once a block
    wavefronts: float
    mma: float  # m16n8k16
    mma_busiest: float  # of them on the busiest of the four schedulers
    exponentials: float
    anchors: float  # memory requests and matrix instructions of warps: what ties machine code to how often it ran
    barriers: float
    blocks: float

    def _zip(self, other: Work, f: Callable[[float, float], float]) -> Work:
        return Work(*(f(getattr(self, x.name), getattr(other, x.name)) for x in fields(self)))

    def __add__(self, other: Work) -> Work:
        return self._zip(other, lambda a, b: a + b)

    def __sub__(self, other: Work) -> Work:
        return self._zip(other, lambda a, b: a - b)

    def __mul__(self, factor: float) -> Work:
        return Work(*(factor * getattr(self, x.name) for x in fields(self)))


@dataclass(frozen=True)
class Size:
    """Of an emulated run: rows (or frames, or heads) and multiprocessors."""

    rows: int
    multiprocessors: int


def extrapolated(first: Work, more_rows: Work, more_multiprocessors: Work, sizes: tuple[Size, Size], to: Size) -> Work:
    """Work at `to`, by the plane through three runs: `first` at sizes[0]; with sizes[1].rows; with
    sizes[1].multiprocessors. Kernels are linear in both: a share of each row, one of each resident block, and the rest.
    """
    a, b = sizes
    of_row = (more_rows - first) * (1 / (b.rows - a.rows))
    of_multiprocessor = (more_multiprocessors - first) * (1 / (b.multiprocessors - a.multiprocessors))
    return first + of_row * (to.rows - a.rows) + of_multiprocessor * (to.multiprocessors - a.multiprocessors)


def resident_blocks(device: Device, registers: int, threads: int, shared_bytes: int) -> int:
    """Blocks that a multiprocessor holds at once. Registers are given to warps by 256, shared memory by 128 bytes, of
    which the system keeps 1,024 a block."""
    warps = math.ceil(threads / 32)
    of_warp = 256 * math.ceil(registers * 32 / 256)
    shared = 128 * math.ceil((shared_bytes + 1024) / 128)
    by = (device.registers // (of_warp * warps), device.threads // (32 * warps), device.shared_bytes // shared)
    return min(device.blocks, *by)


def imbalance(blocks: float, multiprocessors: int) -> float:
    """Work of the busiest multiprocessor over the mean, where blocks are alike."""
    mean = blocks / multiprocessors
    return math.ceil(mean) / mean


def issue_slots(instructions: int, static_anchors: int, anchors: float) -> float:
    """Warp instructions issued: all of the machine code as often as its anchors ran. An estimate: code outside the
    main loop counts too often, and branches not taken count."""
    return instructions * anchors / static_anchors


@dataclass(frozen=True)
class Bound:
    """Seconds of every resource, and of all launches' intervals."""

    seconds: dict[str, float]
    largest: float
    total: float
    binding: str
    assumed: tuple[str, ...]  # resources whose rate nobody measured, the binding one among them


def bound(work: Work, device: Device, slots: float | None = None) -> Bound:
    """The interval of one launch. What multiprocessors do by themselves takes as long as on the busiest of them."""
    uneven = imbalance(work.blocks, device.multiprocessors)
    amounts = {
        "dram": work.dram_bytes,
        "l2": work.l2_bytes,
        "shared": work.wavefronts * uneven,
        "mma": SCHEDULERS * work.mma_busiest * uneven,
        "exp": work.exponentials * uneven,
    }
    if slots is not None:
        amounts["issue"] = slots * uneven
    seconds = {name: amount / device.rates[name].value for name, amount in amounts.items()}
    binding = max(seconds, key=seconds.__getitem__)
    assumed = tuple(name for name in seconds if seconds[name] > 0 and device.rates[name].is_assumed)
    return Bound(seconds, seconds[binding], sum(seconds.values()), binding, assumed)


# ---- what is counted ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Case:
    """One op at the published large model's size. `run(ops, rows)` calls it on so many rows (or pairs of a frame and a
    head)."""

    op: str
    what: str
    run: Callable[[object, int], object]
    unit: int  # rows of the smallest run; another has twice as many
    multiprocessors: int  # of the smallest run: so few that its rows fill twice as many
    rows: int  # of 32 videos
    kernels: dict[str, str]  # launch -> pattern of the kernel's name in the machine code
    most_shared_bytes: int = 1 << 20  # of a block, where with more another form would serve


FRAMES, TOKENS, VIDEOS, WIDTH = 16, 257, 32, 1024
ROWS = VIDEOS * FRAMES * TOKENS


def _randn(*shape: int):
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def _add_layer_norm_forward(ops, rows: int):
    return ops.add_layer_norm_fwd(_randn(rows, WIDTH), _randn(rows, WIDTH), _randn(WIDTH), _randn(WIDTH), 1e-5)


def _add_layer_norm_backward(ops, rows: int):
    grads = (_randn(rows, WIDTH) for _ in range(3))
    return ops.add_layer_norm_bwd(*grads, _randn(WIDTH), _randn(WIDTH), 1e-5)


def _linear_forward(ops, rows: int):
    weight = _randn(4 * WIDTH, WIDTH)
    return ops.linear_fwd(_randn(rows, WIDTH), weight, _randn(4 * WIDTH), "quick_gelu", None, True)


def _linear_backward(ops, rows: int):
    dout, pre = _randn(rows, 4 * WIDTH), _randn(rows, 4 * WIDTH)
    return ops.linear_bwd(dout, _randn(rows, WIDTH), _randn(4 * WIDTH, WIDTH), pre, "quick_gelu")


def _local_temporal_weights() -> tuple:
    half = WIDTH // 2
    norm_and_down = (_randn(WIDTH), _randn(WIDTH), _randn(half, WIDTH), _randn(half))
    return *norm_and_down, _randn(half, 3), _randn(half), _randn(WIDTH, half), _randn(WIDTH)


def _local_temporal_forward(ops, rows: int):
    x = _randn(1, FRAMES, rows // FRAMES, WIDTH)
    return ops.local_temporal_fwd(x, *_local_temporal_weights(), 0, 1e-5, True)


def _local_temporal_backward(ops, rows: int):
    x, hidden = _randn(1, FRAMES, rows // FRAMES, WIDTH), _randn(rows, WIDTH // 2)
    return ops.local_temporal_bwd(x, x, hidden, *_local_temporal_weights(), 0, 1e-5)


def _attention_forward(ops, pairs: int):
    """257 tokens; `pairs` of a frame and a head."""
    q, k, v = _randn(1, TOKENS, 3, pairs, 64).unbind(2)
    return ops.attention_fwd(q, k, v, None, None, False, 0.125, True)


def _attention_to_visual_tokens(queries: int):
    """`heads` of `queries` queries over the 4,097 tokens of a video."""

    def run(ops, heads: int):
        k, v = _randn(1, FRAMES * (TOKENS - 1) + 1, 2, heads, 64).unbind(2)
        return ops.attention_fwd(_randn(1, queries, heads, 64), k, v, None, None, False, 0.125, True)

    return run


def _attention_backward(ops, pairs: int):
    q, k, v = _randn(1, TOKENS, 3, pairs, 64).unbind(2)
    dout, out, lse = _randn(1, TOKENS, pairs, 64), _randn(1, TOKENS, pairs, 64), _randn(1, pairs, TOKENS).float()
    return ops.attention_bwd(dout, q, k, v, out, lse, None, None, False, 0.125)


# Width 1,024 is one warp's row in four chunks a lane.
_ROW = r"<__nv_bfloat16, RowLayout<4, 1> ?>"
# Products of passes are cuBLAS's: not in these bounds.
CASES = [
    Case("add_layer_norm", "forward", _add_layer_norm_forward, 128, 1, ROWS, {
        "add_layer_norm_fwd": rf"add_layer_norm::fwd_kernel{_ROW}",
    }),
    Case("add_layer_norm", "backward", _add_layer_norm_backward, 128, 1, ROWS, {
        "add_layer_norm_bwd_rows": rf"add_layer_norm::bwd_kernel{_ROW}",
        "add_layer_norm_bwd_parts": r"sum_parts_kernel<__nv_bfloat16, 2>",
    }),
    Case("linear", "1024 to 4096, QuickGELU, forward", _linear_forward, 32, 1, ROWS, {
        "linear_fwd": r"linear::fwd_kernel<__nv_bfloat16, QuickGelu>",
    }),
    Case("linear", "1024 to 4096, QuickGELU, backward", _linear_backward, 256, 16, ROWS, {
        "linear_bwd": r"linear::bwd_kernel<__nv_bfloat16, QuickGelu>",
        "linear_bwd_parts": r"sum_parts_kernel<__nv_bfloat16, 1>",
    }),
    Case("local_temporal", "forward, two products of ours", _local_temporal_forward, 256, 1, ROWS, {
        "local_temporal_fwd_down": r"local_temporal::down_kernel<__nv_bfloat16>",
        "local_temporal_fwd_up": r"local_temporal::up_kernel<__nv_bfloat16>",
    }),
    Case("local_temporal", "forward, passes", _local_temporal_forward, 256, 1, ROWS, {
        "local_temporal_fwd_norm": rf"local_temporal::norm_kernel{_ROW}",
        "local_temporal_fwd_mix": r"local_temporal::mix_kernel<__nv_bfloat16>",
    }, most_shared_bytes=96 * 1024),
    Case("local_temporal", "backward", _local_temporal_backward, 512, 2, ROWS, {
        "local_temporal_bwd_mix": r"local_temporal::mix_bwd_kernel<__nv_bfloat16>",
        "local_temporal_bwd_mix_parts": r"sum_parts_kernel<__nv_bfloat16, 5>",
        "local_temporal_bwd_norm_parts": r"sum_parts_kernel<__nv_bfloat16, 3>",
        "local_temporal_bwd_norm": rf"local_temporal::norm_bwd_kernel{_ROW}",
    }),
    Case("attention", "257 x 257, forward", _attention_forward, 1, 1, VIDEOS * FRAMES * 16, {
        "attention_fwd_short": r".*short_fwd_kernel<__nv_bfloat16",
    }),
    Case("attention", "257 x 257, backward", _attention_backward, 1, 1, VIDEOS * FRAMES * 16, {
        "attention_bwd_short": r".*short_bwd_kernel<__nv_bfloat16, 4",
    }),
    Case("attention", "25 x 4097, forward", _attention_to_visual_tokens(25), 4, 1, VIDEOS * 16, {
        "attention_fwd_tiled": r".*tiled_fwd_kernel<__nv_bfloat16, attention::Layout<1, 2>",
    }),
    Case("attention", "4097 x 4097, forward", _attention_to_visual_tokens(4097), 1, 1, VIDEOS * 16, {
        "attention_fwd_tiled": r".*tiled_fwd_kernel<__nv_bfloat16, attention::Layout<4, 2>",
    }),
]  # fmt: skip


def work_of(launch) -> Work:
    """Of an emulated launch (tests/emulated.py)."""
    sectors = [(r.read.launch + r.written.launch, r.read.blocks + r.written.blocks) for r in launch.ranges]
    return Work(
        dram_bytes=SECTOR * sum(once for once, _ in sectors),
        l2_bytes=SECTOR * sum(of_blocks for _, of_blocks in sectors),
        wavefronts=launch.wavefronts.actual,
        mma=launch.mma,
        mma_busiest=max(launch.mma_by_scheduler),
        exponentials=launch.exponentials,
        anchors=launch.global_requests + launch.mma,
        barriers=launch.block_barriers + launch.named_barriers,
        blocks=math.prod(launch.grid),
    )


@dataclass(frozen=True)
class Launched:
    """A launch of a case at its three sizes."""

    case: Case
    name: str
    threads: int
    shared_bytes: int
    works: tuple[Work, Work, Work]
    sizes: tuple[Size, Size]

    def at(self, multiprocessors: int) -> Work:
        return extrapolated(*self.works, self.sizes, Size(self.case.rows, multiprocessors))


def counted(case: Case, shared_bytes: int) -> list[Launched]:
    """Runs the case emulated, on a device with so much shared memory for a block."""
    import emulated

    emulated.load()
    small, large = Size(case.unit, case.multiprocessors), Size(2 * case.unit, 2 * case.multiprocessors)
    runs = []
    for rows, multiprocessors in (
        (small.rows, small.multiprocessors), (large.rows, small.multiprocessors), (small.rows, large.multiprocessors)
    ):  # fmt: skip
        # 9.0, where linear is passes round a product: of the kernel that is both only a stand-in is emulated.
        with (
            emulated.device(multiprocessors, min(shared_bytes, case.most_shared_bytes), 90),
            emulated.counts() as counts,
        ):
            case.run(emulated.ops, rows)
        runs.append(counts.launches)
    if len({tuple(launch.name for launch in run) for run in runs}) != 1:
        raise RuntimeError(f"model: {case.op}, {case.what}: launches differ between sizes")
    return [
        Launched(case, a.name, a.threads, a.shared_bytes, tuple(map(work_of, (a, b, c))), (small, large))
        for a, b, c in zip(*runs, strict=True)
    ]


# ---- machine code ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Code:
    """Of one kernel on one architecture."""

    registers: int
    instructions: int
    anchors: int


# As Work.anchors: memory requests and matrix instructions (an m16n8k16).
ANCHOR = re.compile(r"\b(LDG|STG|LDGSTS|ATOMG|RED|HMMA)\.")
INSTRUCTION = re.compile(r"^\s*(?:/\*[0-9a-f]+\*/\s*)?@?!?[A-Z0-9_]+[. ].*;", re.MULTILINE)


def code_of(body: str) -> tuple[int, int]:
    """Instructions and anchors in one kernel's disassembly."""
    lines = [line for line in body.splitlines() if INSTRUCTION.match(line) and not re.search(r"\bNOP\b", line)]
    return len(lines), sum(bool(ANCHOR.search(line)) for line in lines)


def machine_code(arch: str, ops: set[str]) -> dict[str, Code]:
    """Of every kernel of the ops, by its demangled name.

    Raises:
        RuntimeError: nvcc or nvdisasm is missing, or a file does not compile.
    """
    import cuda_report

    paths = [path for path in cuda_report.sources() if path.parent.name in ops]
    registers = {kernel.name: kernel.registers for kernel in cuda_report.report((arch,), paths=paths)}
    found = {}
    for path in paths:
        (cubin,) = cuda_report.CACHE.glob(f"{path.stem}-{arch}-*.cubin")
        sass = _output([cuda_report._program("nvdisasm"), "--print-code", str(cubin)])
        for name, body in re.findall(r"^\.text\.(\S+):\n(.*?)(?=^\.text\.|\Z)", sass, re.MULTILINE | re.DOTALL):
            plain = _output(["c++filt", "--no-params", name]).strip()
            plain = plain.replace("mplug2::", "").replace("(anonymous namespace)::", "").removeprefix("void ")
            found[plain] = Code(registers[plain], *code_of(body))
    return found


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# ---- the table ------------------------------------------------------------------------------------------------------
def bounds(devices: list[Device], ops: set[str]) -> list[dict]:
    """One dict per launch and device."""
    launches = {
        size: [launch for case in CASES if case.op in ops for launch in counted(case, size - 1024)]
        for size in {device.shared_bytes for device in devices}
    }
    codes: dict[str, dict[str, Code]] = {}
    for arch in sorted({device.arch for device in devices}):
        try:
            codes[arch] = machine_code(arch, ops)
        except RuntimeError as error:
            codes[arch] = {}
            print(f"model: no machine code for sm_{arch}: {str(error).splitlines()[0]}", file=sys.stderr)
    return [_row(launch, device, codes[device.arch]) for device in devices for launch in launches[device.shared_bytes]]


def _row(launch: Launched, device: Device, codes: dict[str, Code]) -> dict:
    work = launch.at(device.multiprocessors)
    pattern = launch.case.kernels.get(launch.name, "$^")
    code = next((code for kernel, code in codes.items() if re.match(pattern, kernel)), None)
    slots = issue_slots(code.instructions, code.anchors, work.anchors) if code and code.anchors else None
    limits = bound(work, device, slots)
    row = {
        "op": launch.case.op, "case": launch.case.what, "launch": launch.name, "device": device.name,
        "binding": limits.binding, "largest_us": 1e6 * limits.largest, "sum_us": 1e6 * limits.total,
        "us": {resource: 1e6 * seconds for resource, seconds in limits.seconds.items()}, "assumed": limits.assumed,
        "blocks": work.blocks, "threads": launch.threads, "shared_bytes": launch.shared_bytes,
        "registers": None, "blocks_a_multiprocessor": None, "waves": None,
    }  # fmt: skip
    if code:
        held = resident_blocks(device, code.registers, launch.threads, launch.shared_bytes)
        waves = work.blocks / (held * device.multiprocessors)
        row |= {"registers": code.registers, "blocks_a_multiprocessor": held, "waves": waves}
    return row


def show(table: list[dict]) -> None:
    print(f"{'device':7}{'launch':32}{'bound, us':>17}  {'binds':8}", *(f"{name:>8}" for name in RESOURCES), end="")
    print(f"{'regs':>6}{'blocks/SM':>10}{'waves':>7}")
    for row in table:
        interval = f"{row['largest_us']:.1f} - {row['sum_us']:.1f}"
        marks = {name: "*" if name in row["assumed"] else "" for name in RESOURCES}
        cells = (f"{row['us'][name]:.1f}{marks[name]}" if name in row["us"] else "?" for name in RESOURCES)
        print(f"{row['device']:7}{row['launch']:32}{interval:>17}  {row['binding'] + marks[row['binding']]:8}", end=" ")
        print(*(f"{cell:>8}" for cell in cells), end="")
        waves = "?" if row["waves"] is None else f"{row['waves']:.2f}"
        print(f"{row['registers'] or '?':>6}{row['blocks_a_multiprocessor'] or '?':>10}{waves:>7}")
    print("* by a rate that nobody measured. Bounds rank designs; none is a time.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", choices=sorted({case.op for case in CASES}), help="[default: all]")
    parser.add_argument("--device", action="append", choices=list(DEVICES), help="[default: all]")
    parser.add_argument("--ceilings", type=Path, help="JSON of ceilings.py: rates for the one --device")
    parser.add_argument("--json", action="store_true", help="the rows, and the rates with their sources")
    options = parser.parse_args()
    devices = [DEVICES[name] for name in options.device or DEVICES]
    if options.ceilings:
        if len(devices) != 1:
            parser.error("--ceilings are of one --device")
        devices = [with_ceilings(devices[0], json.loads(options.ceilings.read_text(encoding="utf-8")))]
    sys.path += [str(ROOT / "tests"), str(ROOT / "build_tools")]
    table = bounds(devices, set(options.op or {case.op for case in CASES}))
    if options.json:
        rates = {d.name: {name: vars(rate) for name, rate in d.rates.items()} for d in devices}
        print(json.dumps({"rates": rates, "rows": table}, indent=2))
    else:
        show(table)


if __name__ == "__main__":
    main()
