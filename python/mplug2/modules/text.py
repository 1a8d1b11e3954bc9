"""Text encoder: post-norm BERT below the universal layers."""

from __future__ import annotations

from torch import Tensor, nn

from mplug2.config import TextConfig
from mplug2.modules.layers import Embeddings, TransformerLayer


class TextEncoder(nn.Module):
    """Ids (B, S) -> states (B, S, D). mask (B, S) bool, True where a word piece stands."""

    def __init__(self, config: TextConfig, *, dropout: float = 0.0):
        super().__init__()
        self.embeddings = Embeddings(config, dropout=dropout)
        self.layers = nn.ModuleList(
            TransformerLayer(
                config.width, config.num_heads, config.mlp_width, has_cross_attention=False, dropout=dropout
            )
            for _ in range(config.num_layers)
        )

    def forward(self, ids: Tensor, mask: Tensor | None = None, *, token_types: Tensor | None = None) -> Tensor:
        x = self.embeddings(ids, token_types=token_types)
        for layer in self.layers:
            x = layer(x, key_mask=mask)
        return x
