"""Features that grow row by row in a .npy file, which numpy reads or maps at any time."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np


class FeaturesFile:
    """A matrix (rows, D) in a .npy file, beside the lines of a `ResultsFile` that say which row is whose.

    A row is written before its line, so every line has its row; rows without a line, left by a kill, are cut off when
    the file is opened again. The header's count of rows follows every row.

    num_rows: rows that lines are there for. ValueError: what is there is not such a file of as many rows, of this width
    and dtype.
    """

    def __init__(self, path: str | Path, *, num_rows: int, width: int, dtype: str = "float32") -> None:
        self.path, self.num_rows = Path(path), num_rows
        self._width, self._dtype = width, np.dtype(dtype).newbyteorder("<")
        self._start = len(self._header(0))
        if num_rows or (self.path.exists() and self.path.stat().st_size):
            self._check()
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(self._file, self._start + num_rows * width * self._dtype.itemsize)
        self._write_header()

    def __enter__(self) -> FeaturesFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.fsync(self._file)
        os.close(self._file)

    def append(self, row: np.ndarray) -> int:
        """Write a row (D,); returns its index."""
        content = np.ascontiguousarray(row, self._dtype).tobytes()
        if os.pwrite(self._file, content, self._start + self.num_rows * len(content)) != len(content):
            raise OSError(f"{self.path}: the disk is full; make room and run the same command again")
        self.num_rows += 1
        self._write_header()
        return self.num_rows - 1

    def _write_header(self) -> None:
        os.pwrite(self._file, self._header(self.num_rows), 0)

    def _header(self, num_rows: int) -> bytes:
        """Of the same length for any number of rows: numpy leaves room for the first axis to grow."""
        shape = {"descr": self._dtype.str, "fortran_order": False, "shape": (num_rows, self._width)}
        buffer = io.BytesIO()
        np.lib.format.write_array_header_1_0(buffer, shape)
        return buffer.getvalue()

    def _check(self) -> None:
        row = self._width * self._dtype.itemsize
        with open(self.path, "rb") as file:
            try:
                np.lib.format.read_magic(file)
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            except ValueError as e:
                raise ValueError(f"{self.path}: is no .npy file of features ({e}); name another file") from None
            held = (os.path.getsize(self.path) - file.tell()) // row
        if dtype != self._dtype or shape[1:] != (self._width,) or held < self.num_rows:
            raise ValueError(
                f"{self.path}: expected {self.num_rows} rows of {self._width} {self._dtype}, got {held} of "
                f"{shape[1:]} {dtype}; name another file, or the model that began this one"
            )
