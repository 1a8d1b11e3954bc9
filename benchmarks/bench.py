"""Timing shared by all benchmarks: candidates run interleaved in one process, medians with p20 and p80, and every table
ends with the command that repeats it. On a machine shared with others only the ratios within one table count.

On a GPU times are between CUDA events, after warm-up, with the host far enough ahead that its own time is hidden where
it can be; inputs rotate past the L2 (`Inputs`).
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from devices import DEVICES, with_ceilings
from torch import Tensor

from mplug2 import _library, ops

RESULTS = Path(__file__).parent / "results"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
OF_DEVICE = {"cpu": ("bfloat16", "float32"), "cuda": ("bfloat16", "float16")}  # measured where nothing is said
COLUMNS = ("op", "dtype", "shape", "candidate", "median_ms", "p20_ms", "p80_ms", "tflops", "error", "command")
CUDA_COLUMNS = (*COLUMNS, "tbps", "of_roof", "of_ours", "error_ratio", "layer", "device", "driver", "revision")
MODEL_COLUMNS = ("tokens_per_s", "peak_mb")  # behind either

# Of this process, set by arguments(): what times are taken on, and what it can do.
_device = torch.device("cpu")
_results = RESULTS
_revision = ""
_roof: dict[str, float] = {}  # dram bytes, product FLOP, exponentials, a second
_tables: dict[str, tuple[str, dict[str, float]]] = {}  # printed so far: title -> ours, medians; for the plot


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one candidate."""

    median: float
    p20: float
    p80: float


def arguments(description: str, **defaults: int | str) -> argparse.Namespace:
    """--device, --dtype, --threads, --rounds, --no-compile, where results go, and one option for each of `defaults`."""
    global _device, _results, _revision, _roof
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), nargs="+", help="[default: those with kernels]")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave out the torch.compile candidates")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the csv file")
    parser.add_argument("--ceilings", type=Path, help="JSON of ceilings.py, for the share of the roof on CUDA")
    parser.add_argument("--revision", default="", help="name of these sources [default: git describe]")
    for name, value in defaults.items():
        kind = {"action": "store_true"} if isinstance(value, bool) else {"type": type(value), "default": value}
        parser.add_argument(f"--{name.replace('_', '-')}", **kind)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    args.dtype = args.dtype or list(OF_DEVICE[args.device])
    torch.set_num_threads(args.threads)
    _device, _results, _revision = torch.device(args.device), args.results, args.revision
    if args.device == "cuda":
        _roof = roof_rates(torch.cuda.get_device_name(), args.ceilings)
    return args


def roof_rates(device_name: str, ceilings: Path | None) -> dict[str, float]:
    """What a roof is made of: rates measured on this device, or measured before on one of its name; else none."""
    known = next((device for name, device in DEVICES.items() if name in device_name), None)
    if ceilings:
        known = with_ceilings(known or DEVICES["H100"], json.loads(ceilings.read_text(encoding="utf-8")))
    elif known and (known.rates["dram"].is_assumed or known.rates["product"].is_assumed):
        known = None
    return {name: known.rates[name].value for name in ("dram", "product", "exp")} if known else {}


class Inputs:
    """Tensors of a candidate's call, copied as often as it takes to reach past a GPU's L2: every call gets the next
    copy, `function(*inputs.next())`. On a CPU there is one copy."""

    def __init__(self, *tensors: Tensor):
        size = sum(t.numel() * t.element_size() for t in tensors)
        past = 3 * torch.cuda.get_device_properties(_device).L2_cache_size if _device.type == "cuda" else 0
        self._copies = [tensors, *(tuple(map(torch.clone, tensors)) for _ in range(copies(size, past) - 1))]
        self._at = 0

    def next(self) -> tuple[Tensor, ...]:
        self._at = (self._at + 1) % len(self._copies)
        return self._copies[self._at]


def copies(size: int, past: int, most: int = 64) -> int:
    """How many copies of `size` bytes are more than `past` bytes."""
    return max(1, min(most, math.ceil(past / max(size, 1))))


@contextmanager
def our_layer() -> Iterator[str]:
    """On CUDA our kernels run whether or not they are proven there: a benchmark is how one learns what they are worth.
    Gives the layer's name; "reference" where there are no kernels."""
    if _device.type != "cuda":
        yield "cpu"
    elif _library.load_cuda().path is None:
        yield "reference"
    else:
        with ops.layer("portable"):
            yield "portable"


def present(candidates: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """On a GPU those that run there, each called once; the absence of the others is printed, with its reason. Ours must
    run. On a CPU all."""
    if _device.type == "cpu":
        return candidates
    found = {}
    for name, run in candidates.items():
        try:
            run()
            _synchronize()
        except (RuntimeError, ImportError) as error:
            if name == "ours":
                raise
            reason = str(error).strip().splitlines() or [type(error).__name__]
            print(f"{name}: absent here: {reason[0][:160]}")
        else:
            found[name] = run
    return found


def measure(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Run all candidates twice to warm up, then `rounds` times in turn."""
    return {name: timing(values) for name, values in samples(candidates, rounds).items()}


def samples(
    candidates: dict[str, Callable[[], object]], rounds: int, *, warm_ups: int = 2, once: Collection[str] = ()
) -> dict[str, list[float]]:
    """The milliseconds behind `measure`, round by round. Candidates of `once` take minutes: they run in the first round
    alone, without warm-up."""
    take = _cuda_milliseconds if _device.type == "cuda" else _cpu_milliseconds
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(-warm_ups, rounds):
        for name, run in candidates.items():
            if name in once and number != 0:
                continue
            milliseconds = take(run)
            if number >= 0:
                taken[name].append(milliseconds)
    return taken


def _cpu_milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


HEAD_START = 4_000_000  # cycles, about 2 ms: what the host may take to queue a candidate without being seen


def _cuda_milliseconds(run: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _synchronize()
    torch.cuda._sleep(HEAD_START)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _synchronize() -> None:
    if _device.type == "cuda":
        torch.cuda.synchronize()


def timing(values: Sequence[float]) -> Timing:
    if len(values) == 1:
        return Timing(values[0], values[0], values[0])
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return Timing(statistics.median(values), cuts[1], cuts[7])


def revision() -> str:
    if _revision:
        return _revision
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return described or "unknown"


def header() -> str:
    if _device.type == "cuda":
        return (
            f"{torch.cuda.get_device_name()}, driver {driver()}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
            f"{len(ops.layers())} ops, revision {revision()}"
        )
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    isa, products = torch.ops.mplug2_cpu.instruction_set(), torch.ops.mplug2_cpu.has_bf16_products()
    return (
        f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads, {isa}, "
        f"bfloat16 products {'in hardware' if products else 'none'}, torch {torch.__version__}, "
        f"{len(ops.layers())} ops, revision {revision()}"
    )


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def roof_milliseconds(
    rates: dict[str, float], gflop: float | None, gigabytes: float | None, exponentials: float | None
) -> float | None:
    """The larger of FLOP, bytes and exponentials (in units of 10^9) at the device's rates; None where none is known."""
    amounts = {"product": gflop, "dram": gigabytes, "exp": exponentials}
    times = [1e12 * amount / rates[name] for name, amount in amounts.items() if amount and name in rates]
    return max(times, default=None)


def report(
    op: str,
    dtype: str,
    shape: str,
    timings: dict[str, Timing],
    *,
    ours: str = "ours",
    gflop: float | None = None,
    gigabytes: float | None = None,
    exponentials: float | None = None,
    errors: dict[str, float] | None = None,
    baseline: str | None = None,
    layer: str = "",
    tokens: float | None = None,
    peaks: dict[str, float] | None = None,
) -> None:
    """Print one table and append it to <results>/<device>-<torch>.csv. Ratios are to the median of `ours`.

    `gflop`, `gigabytes` and `exponentials` (10^9) are what the op needs, whoever computes it; `errors` are against
    float64, and error ratios to that of `baseline`. `tokens` are what every candidate writes; `peaks` are megabytes.
    """
    base, is_cuda = timings[ours].median, _device.type == "cuda"
    roof = roof_milliseconds(_roof, gflop, gigabytes, exponentials)
    more = f"{'TB/s':>8}{'of roof':>9}{'ratio':>8}" if is_cuda else ""
    more += f"{'tokens/s':>10}" * bool(tokens) + f"{'peak MB':>10}" * bool(peaks)
    print(f"\n{op} {dtype} {shape}")
    print(f"{'':34}{'median ms':>10}{'p20':>9}{'p80':>9}{'of ours':>9}{'TFLOP/s':>9}{'error':>10}{more}")
    rows = []
    for name, t in timings.items():
        rate = f"{gflop / t.median:.3f}" if gflop else ""
        error = f"{errors[name]:.1e}" if errors and name in errors else ""
        row = [op, dtype, shape, name, f"{t.median:.4f}", f"{t.p20:.4f}", f"{t.p80:.4f}", rate, error, command()]
        more = ""
        if is_cuda:
            moved = f"{gigabytes / t.median:.2f}" if gigabytes else ""
            share = f"{roof / t.median:.1%}" if roof else ""
            compares = bool(error and baseline and errors and errors.get(baseline))
            ratio = f"{errors[name] / errors[baseline]:.2f}" if compares else ""
            more = f"{moved:>8}{share:>9}{ratio:>8}"
            place = [layer if name == ours else "", torch.cuda.get_device_name(), driver(), revision()]
            row += [moved, share, f"{t.median / base:.3f}", ratio, *place]
        speed = f"{1e3 * tokens / t.median:.1f}" if tokens else ""
        peak = f"{peaks[name]:.0f}" if peaks and name in peaks else ""
        row += [speed, peak]
        more += f"{speed:>10}" * bool(tokens) + f"{peak:>10}" * bool(peaks)
        digits = 4 if is_cuda else 2
        print(
            f"{name:34}{t.median:10.{digits}f} {t.p20:8.{digits}f} {t.p80:8.{digits}f} {t.median / base:7.2f}x"
            f"{rate:>9}{error:>10}{more}"
        )
        rows.append(row)
    _tables[f"{op} {dtype} {shape}"] = (ours, {name: t.median for name, t in timings.items()})
    _results.mkdir(parents=True, exist_ok=True)
    path = _results / f"{_place()}.csv"
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow((*(CUDA_COLUMNS if is_cuda else COLUMNS), *MODEL_COLUMNS))
        writer.writerows(rows)


def _place() -> str:
    """Device and torch, as the names of result files have them."""
    device = torch.cuda.get_device_name().replace(" ", "-") if _device.type == "cuda" else platform.machine()
    return f"{device}-{torch.__version__}"


def plot(path: Path) -> None:
    """The tables of this process as bars of milliseconds, ratios to ours beside them, where there is a matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = [len(medians) for _, medians in _tables.values()]
    figure, axes = pyplot.subplots(
        len(sizes), figsize=(8, 0.5 + sum(0.6 + 0.25 * size for size in sizes)), height_ratios=[1 + n for n in sizes],
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for axis, (title, (ours, medians)) in zip(axes[:, 0], _tables.items(), strict=True):
        bars = axis.barh(list(medians), list(medians.values()), color=["C1" if n == ours else "C0" for n in medians])
        axis.bar_label(bars, [f" {t / medians[ours]:.2f}x" for t in medians.values()], fontsize=7)
        axis.set_title(title, fontsize=8, loc="left")
        axis.tick_params(labelsize=7)
        axis.margins(x=0.1)
        axis.invert_yaxis()
    axes[-1, 0].set_xlabel("ms, median", fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def command() -> str:
    """What repeats a table, without where its results and ceilings lay."""
    words = iter(sys.argv[1:])
    kept = [word for word in words if word not in ("--results", "--ceilings", "--revision") or not next(words)]
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *kept])


def start() -> None:
    print(header())


def finish() -> None:
    print(f"\nrepeat with: {command()}")
    if _tables:
        plot(_results / f"{_place()}-{Path(sys.argv[0]).stem}.png")


def compiled(function: Callable, args: argparse.Namespace, name: str) -> dict[str, Callable]:
    """{name: torch.compile(function)}, or nothing with --no-compile."""
    return {} if args.no_compile else {name: torch.compile(function)}
