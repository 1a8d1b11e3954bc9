"""All that a machine with a GPU is asked for, in stages that can be stopped and started again.

On the machine, which needs nvcc and a torch but no network; and before that, where there is a package index:

    python benchmarks/gpu.py --out DIR [--wheels WHEELS] [STAGE ...]
    python benchmarks/gpu.py --prepare WHEELS [--without NAME ...]

Stages, each of at most ten minutes: ceilings (the device's own), build (an environment with mplug2 and its kernels,
over this interpreter's torch), doctor (proves kernels), test (pytest -m gpu), bench (ops), generation (its benches),
sanitize (compute-sanitizer).
Every step leaves a log and what it measured in DIR at once; what passed is not run again for the same revision.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import site
import subprocess
import sys
import sysconfig
import time
import tomllib
import venv
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
LIMIT = 570  # seconds of a stage, so that it ends by itself within ten minutes
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")

PASSED, FAILED, ABSENT = "passed", "failed", "absent"


@dataclass(frozen=True)
class Step:
    """One command; what it prints goes to the stage's log and, where `output` is given, its stdout to that file."""

    name: str
    command: list[str]
    seconds: int
    output: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)


class Absent(Exception):
    """The machine lacks what a stage needs; says what."""


@dataclass
class Run:
    """Where things are, and what was asked for."""

    out: Path
    env: Path
    wheels: Path | None = None
    archs: str = ""
    revision: str = "unknown"
    is_rehearsal: bool = False

    @property
    def python(self) -> str:
        """Of the environment that the build stage makes."""
        path = self.env / "bin" / "python"
        if not path.exists():
            raise Absent(f"{path}: run the build stage first")
        return str(path)

    def environment(self) -> dict[str, str]:
        """Programs of the new environment before those of this interpreter; pip offline where wheels are given."""
        folders = [str(self.env / "bin"), sysconfig.get_path("scripts"), os.environ.get("PATH", "")]
        variables = {"PATH": os.pathsep.join(folders), "PYTHONUNBUFFERED": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        if self.wheels:
            variables |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels)}
        return os.environ | variables

    def printed(self, command: list[str], seconds: int = 120) -> str:
        """What a command prints on stdout."""
        return subprocess.run(
            command, cwd=ROOT, env=self.environment(), timeout=seconds, check=True, capture_output=True, text=True
        ).stdout


# ---- stages ---------------------------------------------------------------------------------------------------------
def ceilings(run: Run) -> Iterator[Step]:
    arguments = ["--compile-only"] if run.is_rehearsal else ["--json", str(run.out / "ceilings.json")]
    yield Step("ceilings", [sys.executable, str(BENCHMARKS / "ceilings.py"), *arguments], 240)


def build(run: Run) -> Iterator[Step]:
    make_environment(run.env)
    pip = [run.python, "-m", "pip", "install", "--progress-bar", "off"]
    # A rehearsal without a GPU builds the CPU half: nvcc takes minutes on two cores.
    settings = [f"--config-settings=cmake.define.MPLUG2_CUDA={'OFF' if run.is_rehearsal else 'ON'}"]
    if run.archs:
        settings.append(f"--config-settings=cmake.define.MPLUG2_CUDA_ARCHS={run.archs}")
    yield Step("tools", [*pip, *build_requirements()], 90)
    yield Step("mplug2", [*pip, "--no-build-isolation", *settings, f"{ROOT}[test]"], 430)
    yield Step("info", [run.python, "-m", "mplug2.info", "--explain"], 45)


def doctor(run: Run) -> Iterator[Step]:
    sys.path.append(str(ROOT / "build_tools"))
    import digests

    names = digests.ops()
    for op in names:  # a process each: a kernel that ends one leaves the others
        arguments = ["--help"] if run.is_rehearsal else ["--json", "--op", op, "--write", str(run.out / "proven.json")]
        command = [run.python, "-m", "mplug2.doctor", *arguments]
        yield Step(op, command, LIMIT // len(names), run.out / f"doctor-{op}.json")


# A machine's own pytest plugins warn, and warnings are errors.
OWN_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def pytest(run: Run) -> list[str]:
    return [run.python, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"]


def test(run: Run) -> Iterator[Step]:
    how = ["--collect-only", "-q"] if run.is_rehearsal else ["-n", "8", f"--junitxml={run.out / 'test.xml'}"]
    yield Step("pytest", [*pytest(run), "-p", "xdist.plugin", *how], LIMIT, environment=OWN_PLUGINS)


# Bench, arguments at the published large model's size, arguments of a rehearsal, seconds.
BENCHES = (
    ("add_layer_norm", ["--rows", "131584"], ["--rows", "64"], 70),
    ("linear", ["--rows", "131584"], ["--rows", "64", "--width", "64", "--out", "64"], 90),
    ("local_temporal", ["--batch", "32"], ["--width", "64", "--grid", "2"], 130),
    ("attention", ["--batch", "32"], ["--heads", "1"], 130),
    ("fusion", ["--batch", "32"], ["--width", "64", "--keys", "33"], 50),
    ("linear_cross_entropy", ["--rows", "800"], ["--rows", "8", "--width", "64"], 60),
    ("vision_block", ["--batch", "8"], ["--preset", "nano"], 70),
)
MODEL_BENCHES = (
    ("generation", ["--preset", "large", "--batch", "8", "--parts", "forced,memory"], ["--parts", "forced"], 340),
    ("ranking", ["--preset", "large"], ["--answers", "8"], 230),
)


def bench(run: Run) -> Iterator[Step]:
    yield from _benches(run, BENCHES)


def generation(run: Run) -> Iterator[Step]:
    yield from _benches(run, MODEL_BENCHES)


def _benches(run: Run, rows: tuple) -> Iterator[Step]:
    for name, large, small, seconds in rows:
        command = [run.python, str(BENCHMARKS / f"bench_{name}.py"), "--dtype", "bfloat16", "--results", str(run.out)]
        command += ["--revision", run.revision]
        if run.is_rehearsal:
            command += ["--device", "cpu", "--rounds", "2", "--no-compile", *small]
        else:
            command += ["--device", "cuda", "--rounds", "30", *large]
            if (run.out / "ceilings.json").is_file():
                command += ["--ceilings", str(run.out / "ceilings.json")]
        yield Step(name, command, seconds)


def sanitize(run: Run) -> Iterator[Step]:
    collected = run.printed([*pytest(run), "--collect-only", "-q"])
    chosen = few_of_each_file(collected)
    if not chosen:
        raise Absent("no test is marked gpu")
    if run.is_rehearsal:
        return
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        raise Absent("no compute-sanitizer on PATH")
    # Without PyTorch's pool of memory a tensor's end is the end of an allocation.
    alone = OWN_PLUGINS | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in ("memcheck", "racecheck"):
        options = ["--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
        command = [sanitizer, *options, *pytest(run), *chosen]
        yield Step(tool, command, LIMIT // 2, environment=alone)


STAGES: dict[str, Callable[[Run], Iterator[Step]]] = {
    stage.__name__: stage for stage in (ceilings, build, doctor, test, bench, generation, sanitize)
}


def few_of_each_file(collected: str, count: int = 3) -> list[str]:
    """Of pytest's list, the first `count` tests of every file."""
    chosen: dict[str, list[str]] = {}
    for line in collected.splitlines():
        if "::" in line:
            chosen.setdefault(line.split("::")[0], []).append(line.strip())
    return [test for tests in chosen.values() for test in tests[:count]]


def make_environment(folder: Path) -> None:
    """A virtual environment that also sees every package of this interpreter, which may be a virtual one itself: then
    --system-site-packages would show those of the interpreter below it, without torch."""
    if (folder / "ready").exists():
        return
    venv.EnvBuilder(clear=True, with_pip=False, symlinks=True).create(folder)
    folders = dict.fromkeys([*site.getsitepackages(), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (packages,) = folder.glob("lib/python3*/site-packages")
    (packages / "beneath.pth").write_text("".join(f"{path}\n" for path in folders), encoding="utf-8")
    (folder / "ready").touch()


# ---- running --------------------------------------------------------------------------------------------------------
@dataclass
class Outcome:
    """Of one step. `result` is "passed", "failed: ..." or "absent: ..."."""

    result: str
    seconds: float


class Record:
    """What became of every step, in stages.json: written after each one, so that a stop loses one step at most."""

    def __init__(self, path: Path, revision: str):
        self.path, self.revision = path, revision
        self.outcomes: dict[str, Outcome] = {}
        if path.is_file():
            known = json.loads(path.read_text(encoding="utf-8"))
            if known["revision"] == revision:
                self.outcomes = {key: Outcome(**outcome) for key, outcome in known["steps"].items()}

    def has_passed(self, key: str) -> bool:
        return key in self.outcomes and self.outcomes[key].result == PASSED

    def add(self, key: str, outcome: Outcome) -> None:
        self.outcomes[key] = outcome
        self._write()

    def forget(self, stage: str) -> None:
        self.outcomes = {key: value for key, value in self.outcomes.items() if key.split("/")[0] != stage}
        self._write()

    def _write(self) -> None:
        facts = {"revision": self.revision, "steps": {key: asdict(value) for key, value in self.outcomes.items()}}
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        part.rename(self.path)


def run_stage(name: str, run: Run, record: Record, seconds: int = LIMIT) -> None:
    """Every step that has not passed, until the stage's time is used up. A step that fails does not stop the next one,
    except in the build."""
    end = time.monotonic() + seconds
    try:
        for step in STAGES[name](run):
            key = f"{name}/{step.name}"
            if record.has_passed(key):
                continue
            left = end - time.monotonic()
            if left < 1:
                record.add(key, Outcome(f"{FAILED}: the stage's {seconds} s are used up; run it again", 0.0))
                return
            outcome = run_step(step, run, run.out / f"{name}.log", min(step.seconds, left))
            record.add(key, outcome)
            print(f"{key:32}{outcome.seconds:8.1f} s  {outcome.result}", flush=True)
            if outcome.result != PASSED and name == "build":
                return
    except Absent as error:
        record.add(f"{name}/", Outcome(f"{ABSENT}: {error}", 0.0))
    except (subprocess.SubprocessError, OSError) as error:
        record.add(f"{name}/", Outcome(f"{FAILED}: {error}", 0.0))
    else:
        record.outcomes.pop(f"{name}/", None)


def run_step(step: Step, run: Run, log: Path, seconds: float) -> Outcome:
    """The command, and all that it starts, ended after `seconds`."""
    begin = time.monotonic()
    part = step.output.with_suffix(".part") if step.output else None
    with log.open("ab") as said:
        said.write(f"\n$ {' '.join(step.command)}\n".encode())
        said.flush()
        with part.open("wb") if part else log.open("ab") as stdout:
            process = subprocess.Popen(
                step.command, cwd=ROOT, env=run.environment() | step.environment, stdin=subprocess.DEVNULL,
                stdout=stdout, stderr=said, start_new_session=True,
            )  # fmt: skip
            try:
                status = process.wait(timeout=seconds)
                result = PASSED if status == 0 else f"{FAILED}: exit status {status}, see {log.name}"
            except subprocess.TimeoutExpired:
                result = f"{FAILED}: stopped after {seconds:.0f} s, see {log.name}"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
    if part and step.output:
        part.rename(step.output)
    return Outcome(result, round(time.monotonic() - begin, 1))


def summary(record: Record) -> str:
    lines = [f"revision {record.revision}", f"{'stage':32}{'seconds':>8}  result"]
    lines += [f"{key:32}{outcome.seconds:8.1f}  {outcome.result}" for key, outcome in record.outcomes.items()]
    return "\n".join(lines) + "\n"


# ---- wheels ---------------------------------------------------------------------------------------------------------
def build_requirements() -> list[str]:
    """What the build stage installs first: the build's own requirements and tools."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return [*project["build-system"]["requires"], "cmake>=3.24", "ninja>=1.10"]


def requirements() -> list[str]:
    """Everything mplug2 needs to be built, to run and to be tested, but torch, which the machine has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [*build_requirements(), *project["dependencies"], *project["optional-dependencies"]["test"]]
    return [need for need in needed if re.match(r"[\w-]+", need)[0] != "torch"]


def prepare(folder: Path, without: list[str], python: str) -> None:
    """Download wheels for Linux on x86-64 into the folder, and drop those of packages that the machine has."""
    sys.path.append(str(ROOT / "build_tools"))
    import cutlass_headers

    folder.mkdir(parents=True, exist_ok=True)
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(folder)]
    platforms = [f"--platform={name}_x86_64" for name in PLATFORMS]
    target = ["--only-binary=:all:", f"--python-version={python}", "--implementation=cp", *platforms]
    subprocess.run([*download, *target, *requirements()], check=True)
    subprocess.run([*download, "--no-deps", f"nvidia-cutlass=={cutlass_headers.VERSION}"], check=True)
    unwanted = {name.replace("-", "_").lower() for name in without}
    for wheel in folder.glob("*.whl"):
        if wheel.name.split("-")[0].lower() in unwanted:
            wheel.unlink()
    sizes = {wheel.name: wheel.stat().st_size for wheel in folder.glob("*.whl")}
    print(f"{folder}: {len(sizes)} wheels, {sum(sizes.values()) / 2**20:.1f} MiB; the largest:")
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True)[:8]:
        print(f"{sizes[name] / 2**20:8.1f}  {name}")


def revision() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="*", metavar="STAGE", help=f"{', '.join(STAGES)} [default: all]")
    parser.add_argument("--out", type=Path, help="folder for logs and results")
    parser.add_argument("--wheels", type=Path, help="folder of wheels: nothing is downloaded")
    parser.add_argument("--env", type=Path, default=ROOT / "build" / "gpu", help="environment [default: build/gpu]")
    parser.add_argument("--archs", default="", help="architectures to build for, as '90' [default: the build's]")
    parser.add_argument("--revision", default=revision(), help="name of these sources [default: git describe]")
    parser.add_argument("--again", action="store_true", help="run steps that have passed, too")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: what a CPU can run of every stage")
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="download wheels into DIR, and nothing else")
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help="packages that the machine has")
    parser.add_argument("--python", default="3.12", help="the machine's Python, for --prepare [default: %(default)s]")
    options = parser.parse_args(arguments)
    if options.prepare:
        prepare(options.prepare, options.without, options.python)
        return 0
    if options.out is None:
        parser.error("--out is needed")
    if unknown := [name for name in options.stage if name not in STAGES]:
        parser.error(f"no stage {', '.join(unknown)}, only {', '.join(STAGES)}")
    if options.wheels and not options.wheels.is_dir():
        parser.error(f"--wheels: {options.wheels} is not a folder")
    options.out.mkdir(parents=True, exist_ok=True)
    wheels = options.wheels.resolve() if options.wheels else None
    run = Run(options.out.resolve(), options.env.resolve(), wheels, options.archs, options.revision, options.rehearse)
    record = Record(run.out / "stages.json", options.revision + (" rehearsal" if options.rehearse else ""))
    for name in options.stage or STAGES:
        if options.again:
            record.forget(name)
        run_stage(name, run, record)
        (run.out / "summary.txt").write_text(summary(record), encoding="utf-8")
    print(summary(record), end="")
    return int(any(outcome.result != PASSED for outcome in record.outcomes.values()))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the step under way is ended, too
    sys.exit(main())
