"""The state of a run on disk: everything a resumed run needs to go on as if it had never stopped."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import torch

CHECKPOINT = "checkpoint.pt"


def save_checkpoint(folder: Path, state: dict) -> None:
    """Write folder/checkpoint.pt; the one before stays until the new one is on disk."""
    new = folder / f".{CHECKPOINT}"
    with open(new, "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    new.replace(folder / CHECKPOINT)


def load_checkpoint(folder: Path) -> dict:
    """Read folder/checkpoint.pt. ValueError names the file when it is missing, damaged or holds more than tensors."""
    path = folder / CHECKPOINT
    if not path.is_file():
        raise ValueError(f"{path}: no such file; there is nothing to resume, start without it")
    try:
        return torch.load(path, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as e:
        raise ValueError(f"{path}: damaged checkpoint ({e}); delete it and start again") from None
