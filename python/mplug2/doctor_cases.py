"""What `mplug2 doctor` runs of every op: an op adds a line to CASES."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mplug2.tolerances import LOCAL_FROM_LSE, LOCAL_LONG_SUM

# Rows that a block of a kernel stands for where blocks are small and a row is a few warps' work.
ROWS_A_BLOCK = 16


@dataclass(frozen=True)
class Case:
    """Arguments of one op. `make(generator, blocks)` gives float64 tensors for at least so many blocks of a kernel."""

    op: str
    what: str
    make: Callable[[torch.Generator, int], dict[str, Tensor]]
    options: dict[str, Any] = field(default_factory=dict)
    local: float = LOCAL_LONG_SUM  # of the gradients


def randn(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def _sums(g: torch.Generator, blocks: int, width: int) -> dict[str, Tensor]:
    rows = blocks * ROWS_A_BLOCK
    parts = {"x": randn(g, rows, width), "residual": randn(g, rows, width)}
    return parts | {"weight": 1 + 0.1 * randn(g, width), "bias": randn(g, width)}


def _attention(
    g: torch.Generator, blocks: int, queries: int, keys: int, *, groups: int = 1, tiles: int = 1, lengths: bool = False
) -> dict[str, Tensor]:
    """`tiles`: blocks that share the queries of a head."""
    heads = 16
    batch = -(-blocks // (heads * tiles))
    q = randn(g, batch * groups, queries, heads, 64)
    k, v = randn(g, batch, keys, 2, heads, 64).unbind(2)
    some = {"key_lengths": torch.randint(1, keys + 1, (batch,), generator=g)} if lengths else {}
    return {"q": q, "k": k, "v": v} | some


def _linear(g: torch.Generator, blocks: int, width: int, wide: int, *, residual: bool) -> dict[str, Tensor]:
    rows = blocks * ROWS_A_BLOCK
    parts = {"x": randn(g, rows, width), "weight": randn(g, wide, width) / width**0.5, "bias": randn(g, wide)}
    return parts | ({"residual": randn(g, rows, wide)} if residual else {})


def _local_temporal(
    g: torch.Generator, blocks: int, frames: int, tokens: int, width: int, hidden: int | None = None
) -> dict[str, Tensor]:
    hidden = hidden or width // 2
    batch = -(-blocks * ROWS_A_BLOCK // (frames * tokens))
    return {
        "x": randn(g, batch, frames, tokens, width),
        "ln_weight": 1 + 0.1 * randn(g, width), "ln_bias": 0.1 * randn(g, width),
        "down_weight": randn(g, hidden, width) / width**0.5, "down_bias": 0.1 * randn(g, hidden),
        "conv_weight": 0.5 * randn(g, hidden, 3), "conv_bias": 0.1 * randn(g, hidden),
        "up_weight": randn(g, width, hidden) / hidden**0.5, "up_bias": 0.1 * randn(g, width),
    }  # fmt: skip


def _words(g: torch.Generator, blocks: int, width: int, vocabulary: int) -> dict[str, Tensor]:
    targets = torch.randint(0, vocabulary, (blocks,), generator=g)
    targets[::7] = -100
    parts = {"x": randn(g, blocks, width), "weight": randn(g, vocabulary, width) / width**0.5}
    return parts | {"targets": targets, "bias": randn(g, vocabulary)}


def _fusion(
    g: torch.Generator, blocks: int, queries: int, keys: int, heads: int, *, groups: int = 1, masked: bool = False
) -> dict[str, Tensor]:
    width = heads * 64
    batch = -(-blocks * 4 // (groups * queries * heads))  # a row of scores is a small block
    tensors = {
        "q": randn(g, batch * groups, queries, heads, 64), "x": randn(g, batch, keys, width),
        "key_weight": randn(g, width, width) / width**0.5, "value_weight": randn(g, width, width) / width**0.5,
        "value_bias": randn(g, width),
    }  # fmt: skip
    return tensors | ({"key_mask": torch.rand(batch, keys, generator=g) > 0.3} if masked else {})


CASES = [
    Case("add_layer_norm", "D 1024", lambda g, n: _sums(g, n, 1024), {"eps": 1e-12}),
    Case("add_layer_norm", "D 768", lambda g, n: _sums(g, n, 768), {"eps": 1e-5}),
    *(
        Case("attention", what, make, options, LOCAL_FROM_LSE)
        for what, make, options in (
            ("257 x 257", lambda g, n: _attention(g, n, 257, 257), {}),
            ("197 x 197", lambda g, n: _attention(g, n, 197, 197), {}),
            ("197 x 50", lambda g, n: _attention(g, n, 197, 50), {}),
            ("197 x 197, lengths", lambda g, n: _attention(g, n, 197, 197, lengths=True), {}),
            ("25 x 1028", lambda g, n: _attention(g, n, 25, 1028), {}),
            ("50 x 1028", lambda g, n: _attention(g, n, 50, 1028), {}),
            ("1 x 514, 5 share", lambda g, n: _attention(g, n, 1, 514, groups=5, lengths=True), {}),
            ("1 x 4097, 5 share, one row", lambda g, n: _attention(g, 1, 1, 4097, groups=5), {}),  # blocks share keys
            ("1025, causal", lambda g, n: _attention(g, n, 1025, 1025, tiles=8), {"causal": True}),
        )
    ),
    *(
        Case("linear", what, make, {"activation": activation})
        for what, make, activation in (
            ("1024 to 4096, QuickGELU", lambda g, n: _linear(g, n, 1024, 4096, residual=False), "quick_gelu"),
            ("768 to 3072, GELU", lambda g, n: _linear(g, n, 768, 3072, residual=False), "gelu"),
            ("4096 to 1024, residual", lambda g, n: _linear(g, n, 4096, 1024, residual=True), None),
            # No multiple of 8, so that on 8.x, too, cuBLAS computes the product.
            ("1020 to 4096, QuickGELU", lambda g, n: _linear(g, n, 1020, 4096, residual=False), "quick_gelu"),
        )
    ),
    Case("local_temporal", "T 16, L 257, D 1024", lambda g, n: _local_temporal(g, n, 16, 257, 1024)),
    Case("local_temporal", "T 5, L 197, D 768", lambda g, n: _local_temporal(g, n, 5, 197, 768)),
    Case("local_temporal", "T 129, L 9, D 512", lambda g, n: _local_temporal(g, n, 129, 9, 512)),
    # More hidden channels than the product form takes, so that the forward pass is cuBLAS's products and passes, too.
    Case("local_temporal", "T 16, L 257, 1024 to 4104", lambda g, n: _local_temporal(g, n, 16, 257, 1024, 4104)),
    Case("fusion", "25 x 4097, D 1024", lambda g, n: _fusion(g, n, 25, 4097, 16)),
    Case("fusion", "2 x 514, 5 share, mask", lambda g, n: _fusion(g, n, 2, 514, 12, groups=5, masked=True)),
    Case("linear_cross_entropy", "D 256, V 30522", lambda g, n: _words(g, n, 256, 30522), {"label_smoothing": 0.1}),
]
