"""Reading of released checkpoints `mPLUG2_*.pth` into the modules of a task."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mplug2.composition import Parts
from mplug2.weights.load import LoadReport, WeightsError, first_line, load_tensors
from mplug2.weights.names import canonical, old_names


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .pth file by canonical name. Mapped into memory where the file's format allows, never unpickled
    beyond tensors and plain containers; whatever is wrong with the file is one WeightsError."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old pickle protocols; what cannot be read is an error below
            raw = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as e:
        raise WeightsError(
            f"{path}: not a PyTorch checkpoint of plain tensors ({first_line(e)}); "
            "save {'model': model.state_dict()} alone and load that"
        ) from None
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, IndexError, AttributeError, TypeError) as e:
        raise WeightsError(f"{path}: damaged or not a PyTorch checkpoint ({first_line(e)})") from None
    for key in ("model", "module", "state_dict"):
        if isinstance(raw, Mapping) and isinstance(raw.get(key), Mapping):
            raw = raw[key]
            break
    if not isinstance(raw, Mapping) or not any(isinstance(v, Tensor) for v in raw.values()):
        raise WeightsError(f"{path}: holds no tensors; expected a state dict, or one under 'model' or 'module'")
    return {canonical(str(name)): value for name, value in raw.items()}


def load_released(
    parts: Parts, path: str | Path, *, device: torch.device | str = "cpu", allow_missing: bool = False
) -> LoadReport:
    """Fill `parts` (on the meta device) from a released checkpoint file."""
    return load_state(parts, read_checkpoint(path), file=str(path), device=device, allow_missing=allow_missing)


def load_state(
    parts: Parts, state: Mapping[str, Tensor], *, file: str, device: torch.device | str, allow_missing: bool = False
) -> LoadReport:
    """The same from a state dict with canonical old names."""
    layers = [int(m[1]) for name in state if (m := re.match(r"fusion_encoder\.encoder\.layer\.(\d+)\.", name))]
    start = max(layers, default=0) + 1 - parts.config.fusion.num_layers

    def sources(name: str) -> tuple[str, ...]:
        return old_names(name, num_text_layers=parts.config.text.num_layers, fusion_start=start)

    return load_tensors(parts, state, sources, file=file, device=device, allow_missing=allow_missing)
