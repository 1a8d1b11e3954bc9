"""Tensors of a TorchScript archive, read without running it.

An archive is a zip file: `data.pkl` describes a tree of modules, `data/N` hold the raw storages, `code/` their program.
`torch.jit.load` may run parts of that program; here an unpickler that knows tensors and nothing else reads the tree.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from mplug2.weights.load import WeightsError, first_line

_STORAGES = {
    "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16, "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
    "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies: storage record, offset and strides in elements."""

    record: str
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive; plain checkpoints have no `constants.pkl`."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


class TorchScriptFile(Mapping[str, Tensor]):
    """The tensors of a TorchScript archive by their dotted names, each read when asked for. No code of it is run;
    whatever is wrong with the file is one WeightsError."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                described = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
                root = _Unpickler(BytesIO(archive.read(described))).load()
        except _DAMAGE as e:
            raise WeightsError(f"{path}: damaged or not a TorchScript archive ({e or type(e).__name__})") from None
        self._folder = described.removesuffix(".pkl")
        self._stored = dict(_named_tensors(root))

    def __getitem__(self, name: str) -> Tensor:
        stored = self._stored[name]
        try:
            with zipfile.ZipFile(self.path) as archive:
                # A compressed record could claim any size; real ones are stored as they are.
                record = archive.getinfo(f"{self._folder}/{stored.record}")
                if record.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"record {record.filename} is compressed")
                raw = torch.frombuffer(bytearray(archive.read(record)), dtype=stored.dtype)
            return raw.as_strided(stored.size, stored.stride, stored.offset)
        except _DAMAGE as e:
            raise WeightsError(f"{self.path}: cannot read {name} ({first_line(e)})") from None

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


class _Unpickler(pickle.Unpickler):
    """Knows module nodes (attributes without behaviour) and tensors; every other global is an UnpicklingError."""

    def find_class(self, module: str, name: str):
        if module == "__torch__" or module.startswith("__torch__."):
            # A class of its own for each, made anew: nothing that a file does to it outlives the load.
            return type(name, (_Node,), {})
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: _Stored(*storage, int(offset), tuple(size), tuple(stride))
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch.jit._pickle":  # lists of numbers, and type tags of containers
            return lambda value, *_: value
        raise pickle.UnpicklingError(f"holds {module}.{name}, which is neither a module nor a tensor")

    def persistent_load(self, pid):
        _, dtype, record, *_ = pid
        return str(record), dtype


class _Node:
    """A module of the archive: its parameters and submodules are its attributes."""


def _named_tensors(root: object) -> Iterator[tuple[str, _Stored]]:
    nodes, seen = [("", root)], set()
    while nodes:
        prefix, node = nodes.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        for name, value in vars(node).items() if isinstance(node, _Node) else ():
            if isinstance(value, _Stored):
                yield f"{prefix}{name}", value
            elif isinstance(value, _Node):
                nodes.append((f"{prefix}{name}.", value))


_DAMAGE = (
    zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, ValueError, IndexError,
    AttributeError, TypeError, StopIteration, NotImplementedError, ImportError, MemoryError,
)  # fmt: skip
