"""Starting a model from what others trained: CLIP for the vision tower, BERT for the language modules.

Both kinds of file use the names of the released checkpoints without the first component, so `names.py` serves them too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mplug2.composition import Parts
from mplug2.weights.folder import WEIGHTS, SafetensorsFile
from mplug2.weights.load import LoadReport, WeightsError, start_tensors
from mplug2.weights.names import old_names
from mplug2.weights.released import read_checkpoint
from mplug2.weights.torchscript import TorchScriptFile, is_torchscript

# What neither CLIP nor BERT has: it keeps its own start.
_OWN = re.compile(
    r"\.(local_temporal\d|projection|projection_norm|cross_attention|cross_norm|queries|read_out)\b|^universal\.norm\."
)


def load_clip(parts: Parts, path: str | Path) -> LoadReport:
    """Start the vision tower from OpenAI's CLIP (ViT-B/16, ViT-L/14 or any ViT of the model's sizes).

    Patches of pictures become patches of videos (`inflate_patches`), the position table is brought to the model's grid,
    and the local temporal modules stay what they are; at their random start, the identity.

    Args:
        parts: modules that have their values, such as `compose` makes; everything but the tower keeps them.
        path: a state dict (.pt, .pth, .safetensors) with names `visual.*`, or the TorchScript archive that OpenAI
            published, of which only the tensors are read.

    Raises:
        WeightsError: the file cannot be read or does not fit; then nothing was changed.
    """

    def sources(name: str) -> tuple[str, ...]:
        if not name.startswith("vision.") or _OWN.search(name):
            return ()
        return tuple(old.removeprefix("visual_encoder.") for old in old_names(name, num_text_layers=0, fusion_start=0))

    return start_tensors(parts, read_tensors(path), sources, file=str(path))


def load_bert(parts: Parts, path: str | Path) -> LoadReport:
    """Start the language modules from a BERT checkpoint of the model's width and vocabulary, as the reference does.

    Text encoder and universal layers take the file's first layers, the decoder its first ones again, fusion its last
    ones; heads over words take the prediction head where there is one. Cross-attention and queries keep their start.

    Args:
        parts: modules that have their values, such as `compose` makes.
        path: model.safetensors or pytorch_model.bin, or the folder that holds one of them. Names may start with
            `bert.`; weight and bias of LayerNorms may have their old names gamma and beta.

    Raises:
        WeightsError: the file cannot be read or does not fit; then nothing was changed.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in (WEIGHTS, "pytorch_model.bin") if (path / name).is_file()]
        if not found:
            raise WeightsError(f"{path}: holds neither {WEIGHTS} nor pytorch_model.bin")
        path = found[0]
    tensors = read_tensors(path)
    in_file = {_bert_name(name): name for name in tensors}
    num_layers = len({m[1] for name in in_file if (m := re.match(r"encoder\.layer\.(\d+)\.", name))})
    config = parts.config
    needed = config.text.num_layers + config.universal.num_layers
    if parts.decoder is not None:
        needed = max(needed, config.decoder.num_layers)
    if parts.fusion is not None:
        needed = max(needed, config.fusion.num_layers)
    if num_layers < needed:
        raise WeightsError(f"{path}: has {num_layers} BERT layers, this model needs {needed}")
    has_head = any(name.startswith("cls.predictions.transform.") for name in in_file)

    def sources(name: str) -> tuple[str, ...]:
        is_head = name.startswith(("decoder.head.", "heads.mlm."))
        if name.startswith("vision.") or _OWN.search(name) or (is_head and not has_head):
            return ()
        start = num_layers - config.fusion.num_layers
        names = old_names(name, num_text_layers=config.text.num_layers, fusion_start=start)
        return tuple(in_file.get(short, short) for short in (old.partition(".")[2] for old in names))

    return start_tensors(parts, tensors, sources, file=str(path))


def _bert_name(name: str) -> str:
    """`bert.encoder.x.LayerNorm.gamma` -> `encoder.x.LayerNorm.weight`; plain names stay."""
    name = re.sub(r"^(module\.)?bert\.", "", name)
    return re.sub(r"LayerNorm\.(gamma|beta)$", lambda m: f"LayerNorm.{'weight' if m[1] == 'gamma' else 'bias'}", name)


def read_tensors(path: str | Path) -> Mapping[str, Tensor]:
    """The tensors of a .safetensors file, a TorchScript archive or a checkpoint by name."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    return TorchScriptFile(path) if path.is_file() and is_torchscript(path) else read_checkpoint(path)
