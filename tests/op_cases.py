"""One example of every op, for the tests that hold for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mplug2 import ops


@dataclass
class OpCase:
    """`run(**tensors)` gives a tensor or a tuple; `differentiable` names the tensors that have a gradient."""

    stem: str
    tensors: dict[str, Tensor]
    run: Callable[..., Tensor | tuple[Tensor, ...]]
    differentiable: list[str] = field(default_factory=list)

    def __post_init__(self):
        if not self.differentiable:
            self.differentiable = [name for name, t in self.tensors.items() if t.is_floating_point()]

    def to(self, dtype: torch.dtype) -> OpCase:
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in self.tensors.items()}
        return OpCase(self.stem, tensors, self.run, self.differentiable)

    def leaves(self) -> dict[str, Tensor]:
        return {
            name: t.detach().clone().requires_grad_(name in self.differentiable) for name, t in self.tensors.items()
        }


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def local_temporal_tensors(
    generator: torch.Generator, batch: int, frames: int, tokens: int, width: int
) -> dict[str, Tensor]:
    hidden = width // 2
    return {
        "x": _randn(generator, batch, frames, tokens, width),
        "ln_weight": 1 + 0.1 * _randn(generator, width),
        "ln_bias": 0.1 * _randn(generator, width),
        "down_weight": _randn(generator, hidden, width) / width**0.5,
        "down_bias": 0.1 * _randn(generator, hidden),
        "conv_weight": 0.5 * _randn(generator, hidden, 3),
        "conv_bias": 0.1 * _randn(generator, hidden),
        "up_weight": _randn(generator, width, hidden) / hidden**0.5,
        "up_bias": 0.1 * _randn(generator, width),
    }


def cases(seed: int = 0, scale: int = 1) -> dict[str, OpCase]:
    """Small float64 examples (at most 500 elements a tensor), by the stem of the op; `scale` multiplies the leading
    size."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 1]], dtype=torch.bool)
    attention = OpCase(
        "attention",
        {
            "q": _randn(g, 4 * scale, 3, 1, 3),
            "k": _randn(g, 2 * scale, 4, 1, 3),
            "v": _randn(g, 2 * scale, 4, 1, 3),
            "key_lengths": torch.tensor([4, 3] * scale),
            "key_mask": mask.repeat(scale, 1),
        },
        lambda **t: ops.attention(**t, causal=True),
    )
    local_temporal = OpCase(
        "local_temporal", local_temporal_tensors(g, 1 * scale, 3, 3, 4), lambda **t: ops.local_temporal(**t)
    )
    add_layer_norm = OpCase(
        "add_layer_norm",
        {
            "x": _randn(g, 3 * scale, 5),
            "residual": _randn(g, 3 * scale, 5),
            "weight": 1 + 0.1 * _randn(g, 5),
            "bias": _randn(g, 5),
        },
        lambda **t: ops.add_layer_norm(**t, eps=1e-12),
    )
    linear = OpCase(
        "linear",
        {
            "x": _randn(g, 2 * scale, 2, 5),
            "weight": _randn(g, 6, 5),
            "bias": _randn(g, 6),
            "residual": _randn(g, 2 * scale, 2, 6),
        },
        lambda **t: ops.linear(**t, activation="quick_gelu"),
    )
    linear_cross_entropy = OpCase(
        "linear_cross_entropy",
        {
            "x": _randn(g, 5 * scale, 4),
            "weight": _randn(g, 11, 4),
            "targets": torch.tensor([0, 10, -100, 3, 3] * scale),
            "bias": _randn(g, 11),
        },
        lambda **t: ops.linear_cross_entropy(**t, label_smoothing=0.1),
    )
    fusion = OpCase(
        "fusion",
        {
            "q": _randn(g, 4 * scale, 3, 2, 3),
            "x": _randn(g, 2 * scale, 4, 5),
            "key_weight": _randn(g, 6, 5) / 5**0.5,
            "value_weight": _randn(g, 6, 5) / 5**0.5,
            "value_bias": _randn(g, 6),
            "key_lengths": torch.tensor([4, 3] * scale),
            "key_mask": mask.repeat(scale, 1),
        },
        lambda **t: ops.fusion(**t),
    )
    every = (attention, local_temporal, add_layer_norm, linear, linear_cross_entropy, fusion)
    return {case.stem: case for case in every}
