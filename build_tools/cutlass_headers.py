"""Finds CUTLASS's headers, or fetches them; kernels take single machine instructions from there (csrc/core/device.h).

`python build_tools/cutlass_headers.py BUILD` prints the include folder, inside BUILD where they had to be fetched.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

# Pinned, because the version is part of every kernel's digest: another one voids what was proven. Never a requirement
# of the build: the package holds 6 MB of headers, and its own requirements are 347 MB of Python that no header needs.
VERSION = "4.2.0.0"
HEADERS = "cutlass_library/source/include/"


def installed_include() -> Path | None:
    """The headers of an installed nvidia-cutlass of that version: of this interpreter, or of the environment being
    installed into, which stays on disk (though not importable) under pip's build isolation."""
    folders = [Path(sysconfig.get_path("purelib"))]
    spec = importlib.util.find_spec("cutlass_library")
    if spec is not None and spec.origin:
        folders.insert(0, Path(spec.origin).parents[1])
    for folder in folders:
        if (folder / HEADERS / "cutlass").is_dir() and (folder / f"nvidia_cutlass-{VERSION}.dist-info").is_dir():
            return folder / HEADERS
    return None


def cutlass_include(build: Path) -> Path:
    """Return the include folder, unpacked into the folder `build` where none is installed.

    Raises:
        RuntimeError: the package could not be downloaded; the message says what to do.
    """
    if found := installed_include():
        return found
    folder = build / f"cutlass-{VERSION}"
    include = folder / HEADERS
    if include.is_dir():  # appears in one step, below
        return include
    folder.mkdir(parents=True, exist_ok=True)
    package = f"nvidia-cutlass=={VERSION}"
    done = subprocess.run([*_pip(), "download", "--quiet", "--no-deps", "--dest", str(folder), package])
    wheels = list(folder.glob(f"nvidia_cutlass-{VERSION}-*.whl"))
    if done.returncode or not wheels:
        raise RuntimeError(
            f"mplug2: the CUDA kernels need the headers of {package}, which could not be downloaded: "
            f"run `pip install --no-deps {package}` first, or build without them by MPLUG2_CUDA=OFF"
        )
    part = folder / "part"
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(part, [name for name in wheel.namelist() if name.startswith(HEADERS)])
    include.parent.mkdir(parents=True, exist_ok=True)
    (part / HEADERS).rename(include)
    wheels[0].unlink()
    return include


def needs_pip() -> bool:
    """Whether a build of the CUDA kernels would have to fetch the headers and has no pip to do it with."""
    has_nvcc = bool(os.environ.get("CUDACXX") or shutil.which("nvcc"))
    return has_nvcc and not installed_include() and not (importlib.util.find_spec("pip") or Path(_pip()[1]).is_dir())


def _pip() -> list[str]:
    """pip of this interpreter; under build isolation that of the environment being installed into."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    return [sys.executable, str(Path(sysconfig.get_path("purelib"), "pip"))]


if __name__ == "__main__":
    try:
        print(cutlass_include(Path(sys.argv[1]).resolve()))
    except RuntimeError as error:
        sys.exit(str(error))
