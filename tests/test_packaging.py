"""What is shipped: every file of the package, the sources of a build, and a library free of torch's C++ ABI."""

import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import mplug2
from mplug2 import _library

ROOT = Path(__file__).parents[1]
HOOKS = "import sys; sys.path.insert(0, 'build_tools'); import backend; "


def call_backend(code: str) -> str:
    command = [sys.executable, "-c", HOOKS + code]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout


def package_files() -> set[str]:
    package = ROOT / "python" / "mplug2"
    files = (path for path in package.rglob("*") if path.is_file() and path.suffix not in (".pyc", ".so"))
    return {f"mplug2/{path.relative_to(package).as_posix()}" for path in files}


def test_wheel_holds_every_file_of_the_package(tmp_path):
    # The libraries are left out: they are compiled by the set-up, and this test is about the files beside them.
    call_backend(f"backend.build_wheel({str(tmp_path)!r}, {{'wheel.cmake': 'false'}})")
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name for name in names if name.startswith("mplug2/")} == package_files()
    assert {name.rsplit("/", 1)[-1] for name in names} >= {"LICENSE", "NOTICE", "METADATA", "entry_points.txt"}


def test_sdist_holds_what_a_build_needs(tmp_path):
    call_backend(f"backend.build_sdist({str(tmp_path)!r})")
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    wanted = {"pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"} | sources
    wanted |= {f"build_tools/{path.name}" for path in (ROOT / "build_tools").glob("*.py")}
    assert wanted | {f"python/{name}" for name in package_files()} <= names
    assert not [name for name in names if name.startswith(("build/", ".venv/"))]


def test_torch_is_a_build_requirement_only_where_there_is_none():
    ask = "print(any(r.startswith('torch') for r in backend.get_requires_for_build_wheel()))"
    assert call_backend(ask) == "False\n"
    assert call_backend("backend.torch_include = lambda: None; " + ask) == "True\n"


def test_cuda_build_asks_for_pip_only_where_it_must_fetch_headers_without_one(monkeypatch):
    ask = "print('pip' in backend.get_requires_for_build_wheel())"
    assert call_backend(ask) == "False\n"
    missing = (
        "import cutlass_headers as c; c.installed_include = lambda: None; c.importlib.util.find_spec = lambda _: None; "
    )
    missing += "c.sysconfig.get_path = lambda _: '/nowhere'; "
    monkeypatch.setenv("CUDACXX", "nvcc")
    assert call_backend(missing + ask) == "True\n"


@pytest.mark.parametrize("name", ["_cpu", "_cuda"])
def test_library_uses_the_stable_abi_only(name):
    path = _library._find(f"{name}.so")
    if name == "_cuda" and path is None:
        pytest.skip("no _cuda.so was built")
    symbols = subprocess.run(["nm", "-D", "-C", "--undefined-only", path], check=True, capture_output=True, text=True)
    unstable = [line for line in symbols.stdout.splitlines() if "at::" in line or "c10::" in line]
    assert not unstable, f"{name} binds to one torch version through {unstable[:3]}"
    headers = subprocess.run(["readelf", "-d", path], check=True, capture_output=True, text=True).stdout
    assert "[libtorch.so]" in headers, f"{name} must pull in whichever torch is loaded"
    if name == "_cpu":  # the CUDA one of a source tree holds line numbers for profilers; a wheel's does not
        assert str(ROOT).encode() not in path.read_bytes(), f"{name} holds a path of the machine that built it"


def test_version_is_the_same_everywhere():
    assert mplug2.__version__ == metadata.version("mplug2")
