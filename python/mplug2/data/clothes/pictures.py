"""Pictures of clothes: Fashion-MNIST, 60,000 for training and 10,000 for testing, grey, 28 x 28, MIT licence.

A few hundred test pictures ship with the package, so that the demo and the tests need nothing else. The whole set is
the Debian package `dataset-fashion-mnist`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mplug2.data.idx import read_idx

ITEMS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
BUNDLED = Path(__file__).parent / "bundled"
_PREFIXES = {"train": "train", "test": "t10k"}


@dataclass(frozen=True)
class Pictures:
    """Grey pictures (N, 28, 28) uint8, 0 outside the item, and their items (N,) int64, numbered as in ITEMS."""

    pixels: np.ndarray
    items: np.ndarray


def read_pictures(folder: str | Path, split: str) -> Pictures:
    """Read one split ("train" or "test") of Fashion-MNIST from a folder with its idx files, gzipped or not."""
    if split not in _PREFIXES:
        raise ValueError(f"split must be one of {', '.join(_PREFIXES)}, got {split!r}")
    images_path = _find(Path(folder), f"{_PREFIXES[split]}-images-idx3-ubyte")
    labels_path = _find(Path(folder), f"{_PREFIXES[split]}-labels-idx1-ubyte")
    pixels, items = read_idx(images_path), read_idx(labels_path).astype(np.int64)
    if pixels.ndim != 3 or pixels.shape[1:] != (28, 28):
        raise ValueError(f"{images_path}: expected pictures (N, 28, 28), got {pixels.shape}")
    if items.shape != pixels.shape[:1] or np.setdiff1d(items, np.arange(len(ITEMS))).size:
        raise ValueError(f"{labels_path}: expected {len(pixels)} labels from 0 to 9, one a picture, got {items.shape}")
    return Pictures(pixels, items)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise ValueError(
        f"{folder}: no file {name}.gz. The pictures are the Debian package dataset-fashion-mnist: "
        "`apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb fashion`, "
        "then name the folder fashion/usr/share/datasets/fashion-mnist"
    )
