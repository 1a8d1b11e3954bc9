"""The idx files of the MNIST family: a big-endian header (type, number of dimensions, sizes), then the raw bytes."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

_UNSIGNED_BYTE = 0x08


def read_idx(path: str | Path) -> np.ndarray:
    """Read an idx file of unsigned bytes, plain or gzipped: uint8 of the shape in its header.

    ValueError names the file when it is not an idx file, holds another type than unsigned bytes, or has another length
    than its header says.
    """
    path = Path(path)
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as e:
            raise ValueError(f"{path}: damaged gzip file ({e}); fetch it again") from None
    if len(raw) < 4 or raw[:2] != b"\0\0" or len(raw) < 4 + 4 * raw[3]:
        raise ValueError(f"{path}: not an idx file (expected it to start with two zero bytes, a type and the sizes)")
    if raw[2] != _UNSIGNED_BYTE:
        raise ValueError(f"{path}: expected an idx file of unsigned bytes (type 0x08), got type 0x{raw[2]:02x}")
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", count=raw[3], offset=4))
    data = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])
    if data.size != math.prod(shape):
        raise ValueError(f"{path}: its header says {shape}, {math.prod(shape)} bytes, got {data.size}; fetch it again")
    return data.reshape(shape)


def write_idx(path: str | Path, array: np.ndarray) -> None:
    """Write a uint8 array as a gzipped idx file, byte for byte the same each time."""
    if array.dtype != np.uint8:
        raise ValueError(f"{path}: expected a uint8 array, got {array.dtype}")
    header = bytes((0, 0, _UNSIGNED_BYTE, array.ndim)) + np.asarray(array.shape, ">u4").tobytes()
    Path(path).write_bytes(gzip.compress(header + array.tobytes(), 9, mtime=0))
