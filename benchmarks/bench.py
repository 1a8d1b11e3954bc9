"""Timing shared by all benchmarks: candidates run interleaved in one process, medians with p20 and p80, and every table
ends with the command that repeats it. On a machine shared with others only the ratios within one table count.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mplug2 import ops

RESULTS = Path(__file__).parent / "results"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one candidate."""

    median: float
    p20: float
    p80: float


def arguments(description: str, **defaults: int | str) -> argparse.Namespace:
    """--dtype, --threads, --rounds, --no-compile, and one option for each of `defaults`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--dtype", choices=list(DTYPES), nargs="+", default=list(DTYPES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave out the torch.compile candidates")
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def measure(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Run all candidates twice to warm up, then `rounds` times in turn."""
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for warm in (True, True, *[False] * rounds):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if not warm:
                samples[name].append(1e3 * (time.perf_counter() - start))
    return {name: _timing(values) for name, values in samples.items()}


def _timing(values: Sequence[float]) -> Timing:
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return Timing(statistics.median(values), cuts[1], cuts[7])


def header() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    isa, products = torch.ops.mplug2_cpu.instruction_set(), torch.ops.mplug2_cpu.has_bf16_products()
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return (
        f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads, {isa}, "
        f"bfloat16 products {'in hardware' if products else 'none'}, torch {torch.__version__}, "
        f"{len(ops.layers())} ops, revision {revision or 'unknown'}"
    )


def report(
    op: str,
    dtype: str,
    shape: str,
    timings: dict[str, Timing],
    *,
    ours: str = "ours",
    gflop: float | None = None,
    errors: dict[str, float] | None = None,
) -> None:
    """Print one table and append it to results/<device>-<torch>.csv. Ratios are to the median of `ours`."""
    base = timings[ours].median
    print(f"\n{op} {dtype} {shape}")
    print(f"{'':34}{'median ms':>10}{'p20':>9}{'p80':>9}{'of ours':>9}{'TFLOP/s':>9}{'error':>10}")
    rows = []
    for name, t in timings.items():
        rate = f"{gflop / t.median:.3f}" if gflop else ""
        error = f"{errors[name]:.1e}" if errors and name in errors else ""
        print(f"{name:34}{t.median:10.2f}{t.p20:9.2f}{t.p80:9.2f}{t.median / base:8.2f}x{rate:>9}{error:>10}")
        rows.append([op, dtype, shape, name, f"{t.median:.4f}", f"{t.p20:.4f}", f"{t.p80:.4f}", rate, error, command()])
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{platform.machine()}-{torch.__version__}.csv"
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(
                ["op", "dtype", "shape", "candidate", "median_ms", "p20_ms", "p80_ms", "tflops", "error", "command"]
            )
        writer.writerows(rows)


def command() -> str:
    return f"python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}".strip()


def start() -> None:
    print(header())


def finish() -> None:
    print(f"\nrepeat with: {command()}")


def compiled(function: Callable, args: argparse.Namespace, name: str) -> dict[str, Callable]:
    """{name: torch.compile(function)}, or nothing with --no-compile."""
    return {} if args.no_compile else {name: torch.compile(function)}
