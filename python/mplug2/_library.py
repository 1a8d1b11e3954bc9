"""Loads the compiled half of mplug2 and keeps a record of what was loaded, or why not.

`_cpu.so` holds the schemas of all ops and their CPU kernels, so nothing works without it; `_cuda.so` holds the CUDA
kernels, and without it CUDA tensors go to the references; `_frames` prepares decoded pictures on the host.
"""

import importlib
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from mplug2 import proofs

BUILD_COMMAND = "pip install -e . --no-build-isolation"
MIN_TORCH = (2, 11)


@dataclass(frozen=True)
class Library:
    """One compiled library: where it was loaded from, or (path None) why it was not."""

    name: str
    path: str | None
    reason: str


_loaded: dict[str, Library] = {}


def load_ops() -> Library:
    """Load `_cpu.so`, once; it registers the ops of `torch.ops.mplug2`.

    Raises:
        ImportError: torch is older than 2.11, or the library is missing or does not load. The message is one line and
            names the command to run.
    """
    if "_cpu" in _loaded:
        return _loaded["_cpu"]
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < MIN_TORCH:
        raise ImportError(f"mplug2: needs torch >= 2.11, got {torch.__version__}: run `pip install 'torch>=2.11'`")
    path = _find("_cpu.so")
    if path is None:
        raise ImportError(
            f"mplug2: the compiled library _cpu.so is in none of {_folders()}: "
            f"run `{BUILD_COMMAND}` in the source folder, or install a wheel"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"mplug2: {path} does not load into torch {torch.__version__} ({error}): "
            f"run `{BUILD_COMMAND}` in the source folder to build it anew"
        ) from error
    _loaded["_cpu"] = Library("_cpu", str(path), f"loaded into torch {torch.__version__}")
    return _loaded["_cpu"]


def load_cuda() -> Library:
    """Load `_cuda.so`, once, and give it the records of what is proven; raises nothing, and does not touch a GPU."""
    if "_cuda" not in _loaded:
        _loaded["_cuda"] = _load_cuda()
    return _loaded["_cuda"]


def _load_cuda() -> Library:
    if torch.version.cuda is None:
        return Library("_cuda", None, f"torch {torch.__version__} is a build without CUDA")
    path = _find("_cuda.so")
    if path is None:
        return Library(
            "_cuda", None, f"not built: put an nvcc of CUDA {torch.version.cuda} on PATH and run `{BUILD_COMMAND}`"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return Library("_cuda", None, f"does not load into torch {torch.__version__} ({error}): run `{BUILD_COMMAND}`")
    library = torch.ops.mplug2_cuda
    torch.library.impl("mplug2_cuda::warn_unproven", "CompositeExplicitAutograd", _warn_unproven)
    reason = f"loaded into torch {torch.__version__}"
    for file in (proofs.SHIPPED, proofs.user_cache()):
        try:
            library.add_records(proofs.as_text(proofs.read(file)))
        except ValueError as error:
            reason += f"; {error}"
    return Library("_cuda", str(path), reason)


def _warn_unproven(instance: str, capability: int) -> None:
    """Called by the library, once a process, when a kernel leaves its work to the reference for want of proof."""
    warnings.warn(
        f"mplug2: {instance} is not proven on GPUs of compute capability {capability // 10}.{capability % 10}, so the "
        "reference runs, as for every other kernel without a proof: run `mplug2 doctor` once on this machine",
        RuntimeWarning,
        stacklevel=2,
    )


def _folders() -> list[str]:
    return list(sys.modules["mplug2"].__path__)  # of an editable install: the sources and the one with the libraries


def _find(name: str) -> Path | None:
    return next((found for folder in _folders() if (found := Path(folder, name)).is_file()), None)


def libraries() -> list[Library]:
    """Every compiled library that mplug2 can have, tried now if it was not before; raises nothing."""
    return [_try_ops(), _try_frames(), load_cuda()]


def _try_ops() -> Library:
    try:
        return load_ops()
    except ImportError as error:
        return Library("_cpu", None, str(error))


def _try_frames() -> Library:
    try:
        module = importlib.import_module("mplug2._frames")
    except ImportError as error:
        return Library("_frames", None, f"{error}: run `{BUILD_COMMAND}` in the source folder")
    return Library("_frames", module.__file__, "loaded")
