"""Heads: language modeling, contrastive, matching, classes. Those without published code follow the ALBEF tradition."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mplug2 import ops
from mplug2.config import ModelConfig, TextConfig
from mplug2.modules.layers import Linear


class LmHead(nn.Module):
    """BERT's prediction head: logits = LN(gelu(dense(x))) E^T + bias, E the word table (V, D) of whoever owns it."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.dense = Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=1e-12)
        self.bias = nn.Parameter(torch.empty(config.vocab_size))

    def features(self, x: Tensor) -> Tensor:
        return self.norm(self.dense(x, activation="gelu"))

    def logits(self, x: Tensor, word: Tensor) -> Tensor:
        return ops.linear(self.features(x), word, self.bias)

    def loss(self, x: Tensor, word: Tensor, labels: Tensor, *, reduction: str = "mean") -> Tensor:
        """Cross-entropy of x (R, S, D) against labels (R, S), -100 ignored: "mean" over labels or "row" sums (R,)."""
        per_label = "mean" if reduction == "mean" else "none"
        loss = ops.linear_cross_entropy(
            self.features(x).flatten(0, 1), word, labels.flatten(), self.bias, reduction=per_label
        )
        return loss if reduction == "mean" else loss.view(labels.shape).sum(1)


class ContrastiveHead(nn.Module):
    """One linear map D -> 256 per modality on token 0, L2-normalised, and the learned temperature."""

    def __init__(self, config: ModelConfig, *, width: int = 256):
        super().__init__()
        self.vision = nn.Linear(config.text.width, width)
        self.text = nn.Linear(config.text.width, width)
        self.temperature = nn.Parameter(torch.empty(()))

    def forward(self, visual: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, K, D), (B, S, D) -> unit vectors (B, 256), (B, 256)."""
        return F.normalize(self.vision(visual[:, 0]), dim=-1), F.normalize(self.text(text[:, 0]), dim=-1)


class MatchingHead(nn.Linear):
    """Does the text fit the picture? Two logits from fused text, token 0."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.text.width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, 0])


class VisionClassHead(nn.Linear):
    """Class logits from the visual tokens (B, K, D), token 0."""

    def __init__(self, config: ModelConfig):
        super().__init__(config.text.width, config.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, 0])


class TextClassHead(nn.Sequential):
    """Class logits (one output: regression) from text or fused text (B, S, D), token 0: linear, ReLU, linear."""

    def __init__(self, config: ModelConfig):
        super().__init__(
            nn.Linear(config.text.width, config.text.width),
            nn.ReLU(),
            nn.Linear(config.text.width, config.num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, 0])


class ImageIndex(nn.Embedding):
    """Learned vectors added to the visual tokens of the first and the second image of a pair."""

    def __init__(self, config: ModelConfig):
        super().__init__(2, config.text.width)


HEADS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "mlm": lambda config: LmHead(config.text),
    "contrastive": ContrastiveHead,
    "matching": MatchingHead,
    "vision_classes": VisionClassHead,
    "text_classes": TextClassHead,
    "image_index": ImageIndex,
}
