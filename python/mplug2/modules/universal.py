"""Universal layers: one set of self-attention and MLP weights for both modalities (mPLUG-2, figure 2c).

On text they are further encoder layers. On vision a few learned queries read the visual tokens first, and the tokens
then read the queries, so that every token sees the whole video.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mplug2.config import TextConfig, UniversalConfig
from mplug2.modules.layers import CrossAttention, TransformerLayer


class UniversalLayers(nn.Module):
    """`text(x)`: (B, S, D) -> (B, S, D). `vision(v)`: (B, K, D) -> LN(v + read-out of the queries), same shape."""

    def __init__(self, config: UniversalConfig, text: TextConfig, *, has_vision: bool = True, dropout: float = 0.0):
        super().__init__()
        self.mode = config.mode
        self.layers = nn.ModuleList(
            TransformerLayer(
                text.width, text.num_heads, text.mlp_width, has_cross_attention=has_vision, dropout=dropout
            )
            for _ in range(config.num_layers)
        )
        if has_vision:
            self.queries = nn.Parameter(torch.empty(config.num_queries, text.width))
            self.norm = nn.LayerNorm(text.width, eps=1e-12)
        if has_vision and self.mode == "figure":
            self.read_out = CrossAttention(text.width, text.num_heads)

    def text(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, key_mask=mask)
        return x

    def vision(self, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.norm(v + self.exchange(v, mask))

    def exchange(self, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """What is added to the tokens. In mode "released" the last layer ignores the mask, as its weights know it."""
        queries = self.queries.expand(v.shape[0], -1, -1)
        for layer in self.layers if self.mode == "figure" else self.layers[:-1]:
            queries = layer(queries, context=layer.cross_attention.project(v), context_mask=mask)
        if self.mode == "figure":
            return self.read_out(v, self.read_out.project(queries))
        last = self.layers[-1]
        return last(v, context=last.cross_attention.project(queries))
