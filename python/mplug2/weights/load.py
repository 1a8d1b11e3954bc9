"""Filling a model from named tensors, with a report of what fitted and what did not.

`load_tensors` fills all of a model that lies on the meta device, `start_tensors` some parameters of one with values.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mplug2.composition import Parts, init_parameter

log = logging.getLogger("mplug2.weights")


class WeightsError(ValueError):
    """A weights file that cannot be read, or does not fit the model. The message names the file."""


@dataclass(frozen=True)
class LoadReport:
    """What became of a file's tensors (`used`, `ignored`: names in the file) and of the model's parameters (`missing`:
    not in the file; `resized`: position tables brought to another grid)."""

    used: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{len(self.used)} tensors used, {len(self.ignored)} ignored"
        for name in ("missing", "resized"):
            if names := getattr(self, name):
                text += f", {len(names)} {name} ({_few(names)})"
        return text


def load_tensors(
    parts: Parts,
    tensors: Mapping[str, Tensor],
    sources: Callable[[str], tuple[str, ...]],
    *,
    file: str,
    device: torch.device | str,
    allow_missing: bool = False,
) -> LoadReport:
    """Give every parameter of `parts` its value, one at a time, so that no second copy of the model is held.

    Args:
        parts: modules on the meta device; their dtype is what the tensors are converted to.
        sources: our parameter name -> names in `tensors`, stacked along dimension 0.
        file: what error messages call the source.
        allow_missing: initialise parameters that the file lacks instead of raising WeightsError.
    """
    used, missing, resized = [], [], []
    parameters = dict(parts.named_parameters())
    for name in parameters:
        names = sources(name)
        if not names or any(n not in tensors for n in names):
            missing.append(name)
    if missing and not allow_missing:
        raise WeightsError(
            f"{file}: lacks {len(missing)} of the model's {len(parameters)} parameters ({_few(missing)}); "
            "is it a checkpoint of this model and task? allow_missing=True starts them at random"
        )
    absent = set(missing)
    for name, p in parameters.items():
        value = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=device), requires_grad=p.requires_grad)
        if name in absent:
            init_parameter(name, value)
        else:
            names = sources(name)
            if _fill(value.data, [_checked(tensors[n], n, file) for n in names], name, file):
                resized.append(name)
            used += names
        module, _, kind = name.rpartition(".")
        setattr(parts.get_submodule(module), kind, value)
    known = set(used)
    report = LoadReport(tuple(used), tuple(n for n in tensors if n not in known), tuple(missing), tuple(resized))
    log.log(logging.WARNING if missing else logging.INFO, "%s: %s", file, report)
    return report


@torch.no_grad()
def start_tensors(
    parts: Parts, tensors: Mapping[str, Tensor], sources: Callable[[str], tuple[str, ...]], *, file: str
) -> LoadReport:
    """Overwrite in place the parameters that `sources` names; all others keep the values they have and are `missing`.

    Nothing is written unless every tensor fits: the copies are first made to the meta device, where only shapes count.
    """
    parameters = dict(parts.named_parameters())
    if any(p.is_meta for p in parameters.values()):
        raise ValueError(f"{file}: the model has no values yet; compose it with init=True")
    wanted = {name: names for name in parameters if (names := sources(name))}
    if not wanted:
        raise ValueError(f"{file}: this model has no part that such weights could start")
    absent = [n for names in wanted.values() for n in names if n not in tensors]
    if absent:
        raise WeightsError(f"{file}: lacks {len(absent)} of the tensors that this model needs ({_few(absent)})")
    resized = []
    for device in ("meta", None):
        for name, names in wanted.items():
            value = parameters[name].data
            pieces = [_checked(tensors[n], n, file) for n in names]
            is_resized = _fill(torch.empty_like(value, device=device) if device else value, pieces, name, file)
            if is_resized and device is None:
                resized.append(name)
    used = tuple(dict.fromkeys(n for names in wanted.values() for n in names))
    ignored = tuple(n for n in tensors if n not in set(used))
    report = LoadReport(used, ignored, tuple(n for n in parameters if n not in wanted), tuple(resized))
    log.info("%s: %s", file, report)
    return report


def _checked(tensor: Tensor, name: str, file: str) -> Tensor:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise WeightsError(f"{file}: {name} must be a floating-point tensor, got {kind}")
    return tensor


def _fill(value: Tensor, pieces: list[Tensor], name: str, file: str) -> bool:
    """Copy the stacked pieces into value; True where a position table had to be resized."""
    if sum(p.numel() for p in pieces) == value.numel() and _same_shape(value, pieces):
        rows = 0
        for piece in pieces:
            n = piece.shape[0] if piece.dim() else 1
            target = value[rows : rows + n] if value.dim() else value
            target.copy_(piece.reshape(target.shape))
            rows += n
        return False
    if name == "vision.patch_embedding.weight" and pieces[0].dim() == 4 and pieces[0].shape == value[:, :, 0].shape:
        value.copy_(inflate_patches(pieces[0], value.shape[2]))
        return False
    if name == "vision.position_embedding" and pieces[0].dim() == 2 and pieces[0].shape[1] == value.shape[1]:
        try:
            value.copy_(resize_positions(pieces[0], value.shape[0]))
        except ValueError as e:
            raise WeightsError(f"{file}: {name}: {e}") from None
        return True
    got = " + ".join(str(list(p.shape)) for p in pieces)
    raise WeightsError(f"{file}: {name} has shape {list(value.shape)} in the model but {got} in the file")


def _same_shape(value: Tensor, pieces: list[Tensor]) -> bool:
    """Equal but for dimensions of size 1, such as those of 1x1 convolutions; stacked pieces are equal to each other."""
    if len({p.shape for p in pieces}) > 1:
        return False
    stacked = [sum(p.shape[0] if p.dim() else 1 for p in pieces), *pieces[0].shape[1:]] if value.dim() else []
    return [n for n in stacked if n != 1] == [n for n in value.shape if n != 1]


def inflate_patches(weight: Tensor, depth: int) -> Tensor:
    """A patch filter of pictures (D, 3, p, p) as one of videos (D, 3, depth, p, p): its middle slice, zeros around."""
    inflated = weight.new_zeros(*weight.shape[:2], depth, *weight.shape[2:])
    inflated[:, :, depth // 2] = weight
    return inflated


def resize_positions(table: Tensor, num_tokens: int) -> Tensor:
    """A position table (1 + g^2, D) on another square grid (num_tokens, D): class token kept, the rest bilinear."""
    old, new = round((table.shape[0] - 1) ** 0.5), round((num_tokens - 1) ** 0.5)
    if 1 + old * old != table.shape[0] or 1 + new * new != num_tokens:
        raise ValueError(f"position table of {table.shape[0]} rows cannot become one of {num_tokens}: no square grid")
    dtype = torch.float64 if table.dtype == torch.float64 else torch.float32
    grid = table[1:].to(dtype).T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, (new, new), mode="bilinear", align_corners=False)
    return torch.cat([table[:1].to(dtype), grid[0].flatten(1).T])


def first_line(error: BaseException) -> str:
    """What an error of another library says, short enough to stand in one of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _few(names) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
