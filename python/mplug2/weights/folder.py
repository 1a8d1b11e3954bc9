"""Our own format: a folder with config.json, vocab.txt and model.safetensors."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mplug2.composition import Parts
from mplug2.quantization import is_quantized
from mplug2.weights.load import LoadReport, WeightsError, load_tensors

WEIGHTS, CONFIG, VOCAB = "model.safetensors", "config.json", "vocab.txt"
# A table that text encoder and decoder share is stored once, under the first name that the saved tasks have.
_WORD_TABLES = ("text.embeddings.word.weight", "decoder.embeddings.word.weight")


class SafetensorsFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when asked for."""

    def __init__(self, path: Path):
        if not path.is_file():
            raise WeightsError(f"{path}: no such file")
        self.path = path
        try:
            self._file = safe_open(path, "pt")
        except (SafetensorError, OSError) as e:
            raise WeightsError(f"{path}: damaged or not a safetensors file ({e})") from None
        self._names = dict.fromkeys(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self._file.get_tensor(name)
        except SafetensorError as e:
            raise WeightsError(f"{self.path}: cannot read {name} ({e})") from None

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load_folder(
    parts: Parts, folder: str | Path, *, device: torch.device | str = "cpu", allow_missing: bool = False
) -> LoadReport:
    """Fill `parts` (on the meta device) from a folder of our own format."""
    path = Path(folder) / WEIGHTS
    tensors = SafetensorsFile(path)

    def sources(name: str) -> tuple[str, ...]:
        if name not in tensors and parts.config.share_embeddings and name in _WORD_TABLES:
            return tuple(n for n in _WORD_TABLES if n in tensors)
        return (name,)

    return load_tensors(parts, tensors, sources, file=str(path), device=device, allow_missing=allow_missing)


def save_folder(parts: Parts, vocab_file: str | Path, folder: str | Path) -> None:
    """Write config, vocabulary and weights. A new folder appears whole or not at all; in a model folder that exists,
    the three files are replaced once all of them are written, and what else it holds stays."""
    folder = Path(folder)
    if is_quantized(parts):
        raise ValueError(f"{folder}: a quantized model cannot be saved; save it before, and quantize when it is loaded")
    if folder.exists() and not (folder / CONFIG).is_file() and any(folder.iterdir()):
        raise ValueError(f"{folder}: exists and is not a model folder; name a new one")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        (new / CONFIG).write_text(parts.config.to_json())
        shutil.copyfile(vocab_file, new / VOCAB)
        tensors = {name: p.detach().contiguous() for name, p in parts.named_parameters()}
        save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
        for file in (CONFIG, VOCAB, WEIGHTS):
            (new / file).chmod(0o644)
            with open(new / file, "rb") as f:
                os.fsync(f.fileno())
        new.chmod(0o755)
        if folder.exists():
            for file in (CONFIG, VOCAB, WEIGHTS):
                os.replace(new / file, folder / file)
        else:
            new.rename(folder)
    finally:
        if new.exists():
            shutil.rmtree(new)
