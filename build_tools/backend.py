"""PEP 517 backend: scikit-build-core, which asks for torch as a build requirement only where no torch is at hand.

A torch in `build-system.requires` would make pip fetch the newest CUDA build (several GB) into the isolated build
environment, although the build reads half a megabyte of headers that the user's own torch already has.
"""

import os

from scikit_build_core import build as _build
from scikit_build_core.build import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

from cutlass_headers import needs_pip
from torch_headers import torch_include

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

# Bounded above because the library built is the same for every torch from 2.11 on: no need for the newest.
TORCH_FOR_HEADERS = "torch>=2.11,<2.14"


def _with_headers(requires: list[str]) -> list[str]:
    return [*requires, *([] if torch_include() else [TORCH_FOR_HEADERS]), *(["pip"] if needs_pip() else [])]


def _tell_cmake() -> None:
    if include := torch_include():
        os.environ["MPLUG2_TORCH_INCLUDE"] = include


def get_requires_for_build_wheel(config_settings=None):
    return _with_headers(_build.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):
    return _with_headers(_build.get_requires_for_build_editable(config_settings))


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _tell_cmake()
    return _build.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _tell_cmake()
    return _build.build_editable(wheel_directory, config_settings, metadata_directory)
