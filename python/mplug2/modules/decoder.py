"""Shared decoder: causal self-attention, cross-attention to the context, feed-forward, tied LM head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mplug2.config import DecoderConfig, TextConfig
from mplug2.modules.heads import LmHead
from mplug2.modules.layers import Embeddings, TransformerLayer


@dataclass(frozen=True)
class Context:
    """What the decoder attends to: for every layer packed keys and values (B, K, 2, N, H), or the tokens (B, K, D) as
    they are; and their mask (B, K)."""

    layers: list[Tensor]
    mask: Tensor | None = None

    def __len__(self) -> int:
        """Number of items B."""
        return len(self.layers[0])

    @property
    def device(self) -> torch.device:
        return self.layers[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].dtype

    def select(self, items: Tensor | slice) -> Context:
        """The context of some items: a tensor of indices copies, a slice does not."""
        return Context([t[items] for t in self.layers], None if self.mask is None else self.mask[items])


class Decoder(nn.Module):
    """Ids (B*G, S) and the context of B items -> states (B*G, S, D); G consecutive rows read one item's context."""

    def __init__(
        self, config: DecoderConfig, text: TextConfig, *, word: nn.Embedding | None = None, dropout: float = 0.0
    ):
        super().__init__()
        self.start_id, self.end_id = config.start_id, config.end_id
        self.embeddings = Embeddings(text, word=word, dropout=dropout)
        self.layers = nn.ModuleList(
            TransformerLayer(text.width, text.num_heads, text.mlp_width, has_cross_attention=True, dropout=dropout)
            for _ in range(config.num_layers)
        )
        self.head = LmHead(text)

    def project(self, tokens: Tensor, mask: Tensor | None = None, *, absorb: bool = False) -> Context:
        """Keys and values of all layers for context tokens (B, K, D).

        absorb: keep the tokens instead, over which every head attends through its rows of the weights: keys and values
        are never made (`ops.fusion`), for more work a step.
        """
        return Context(list(self.project_layers(tokens, absorb=absorb)), mask)

    def project_layers(self, tokens: Tensor, *, absorb: bool = False) -> Iterator[Tensor]:
        """The same, one layer after the other."""
        for layer in self.layers:
            yield tokens if absorb else layer.cross_attention.project(tokens)

    def forward(
        self,
        ids: Tensor,
        context: Context,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        causal: bool = True,
        visible: Tensor | None = None,
        cache=None,
    ) -> Tensor:
        """positions: of the ids, any shape that broadcasts to theirs; default 0, 1, 2, ... in each row. A cache
        (`generation.Cache`) takes one id a row, whose position is behind what the row holds. visible: which ids each
        one sees, see `SelfAttention`."""
        if cache is not None:
            positions = cache.lengths[:, None]
        x = self.embeddings(ids, positions=positions)
        causal = causal and ids.shape[1] > 1  # a single new token sees every key
        for i, layer in enumerate(self.layers):
            x = layer(
                x,
                key_mask=mask,
                causal=causal,
                visible=visible,
                cache=None if cache is None else cache.layers[i],
                context=context.layers[i],
                context_mask=context.mask,
            )
        return x

    def logits(self, states: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return self.head.logits(states, self.embeddings.word.weight)

    def loss(self, ids: Tensor, context: Context, labels: Tensor, *, reduction: str = "mean") -> Tensor:
        """Cross-entropy of labels (R, S), -100 ignored, each predicted from the ids before it.

        "mean" over all labels, or "row": the sum over each row (R,).
        """
        states = self(ids, context, mask=ids != 0)[:, :-1]
        return self.head.loss(states, self.embeddings.word.weight, labels[:, 1:], reduction=reduction)
