"""Loads the compiled half of mplug2 and keeps a record of what was loaded, or why not.

`_cpu.so` holds the schemas of all ops and their CPU kernels, so nothing works without it; `_frames` prepares decoded
pictures on the host.
"""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

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
    folders = list(sys.modules["mplug2"].__path__)  # of an editable install: the sources and the one with the libraries
    path = next((found for folder in folders if (found := Path(folder, "_cpu.so")).is_file()), None)
    if path is None:
        raise ImportError(
            f"mplug2: the compiled library _cpu.so is in none of {folders}: "
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


def libraries() -> list[Library]:
    """Every compiled library that mplug2 can have, tried now if it was not before; raises nothing."""
    return [_try_ops(), _try_frames(), Library("_cuda", None, "not part of this version: CUDA runs the references")]


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
