"""Fusion: text queries that attend to the visual tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mplug2.config import FusionConfig, TextConfig
from mplug2.modules.layers import TransformerLayer


class Fusion(nn.Module):
    """(visual (B, K, D), text (B, S, D)) -> (visual, text).

    Text cross-attends to the visual tokens in every layer but those, after the first, whose index is a multiple of
    `stride_layer`: these attend jointly over [visual; text] and add their result to the visual tokens.
    """

    def __init__(self, config: FusionConfig, text: TextConfig, *, dropout: float = 0.0):
        super().__init__()
        self.is_joint = [i > 0 and i % config.stride_layer == 0 for i in range(config.num_layers)]
        self.layers = nn.ModuleList(
            TransformerLayer(text.width, text.num_heads, text.mlp_width, has_cross_attention=not joint, dropout=dropout)
            for joint in self.is_joint
        )

    def forward(
        self, visual: Tensor, text: Tensor, *, visual_mask: Tensor | None = None, text_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        for layer, joint in zip(self.layers, self.is_joint, strict=True):
            if joint:
                both = layer(torch.cat([visual, text], 1), key_mask=join_masks(visual, visual_mask, text, text_mask))
                added, text = both.split([visual.shape[1], text.shape[1]], 1)
                visual = visual + added
            else:
                context = layer.cross_attention.project(visual)
                text = layer(text, key_mask=text_mask, context=context, context_mask=visual_mask)
        return visual, text


def join_masks(a: Tensor, a_mask: Tensor | None, b: Tensor, b_mask: Tensor | None) -> Tensor | None:
    """The mask of [a; b] along the tokens: (B, Ka + Kb) bool, or None where neither has one."""
    if a_mask is None and b_mask is None:
        return None
    full = [m if m is not None else x.new_ones(x.shape[:2], dtype=torch.bool) for x, m in ((a, a_mask), (b, b_mask))]
    return torch.cat(full, 1)
