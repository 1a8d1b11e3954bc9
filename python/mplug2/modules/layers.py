"""Post-norm transformer layer (BERT) of which the language modules are made, and its parts.

    x = LN(x + self_attention(x));  x = LN(x + cross_attention(x, context));  x = LN(x + mlp(x))

The context enters as projected keys and values, so that whoever decodes projects it once and shares it between beams.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mplug2 import ops


class Block(nn.Module):
    """A block whose activations can be computed again in the backward instead of being kept."""

    recompute = False

    def __call__(self, *args, **kwargs):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(super().__call__, *args, use_reentrant=False, **kwargs)
        return super().__call__(*args, **kwargs)


class Linear(nn.Linear):
    """y = activation(x W^T + b) + residual through `ops.linear`."""

    def forward(self, x: Tensor, *, activation: str | None = None, residual: Tensor | None = None) -> Tensor:
        return ops.linear(x, self.weight, self.bias, activation=activation, residual=residual)


class AddLayerNorm(nn.LayerNorm):
    """LN(x + residual) through `ops.add_layer_norm`."""

    def __init__(self, width: int, eps: float = 1e-12):
        super().__init__(width, eps=eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        normed, _ = ops.add_layer_norm(x, residual, self.weight, self.bias, eps=self.eps)
        return normed


class SelfAttention(nn.Module):
    """Multi-head self-attention with one packed projection; x (R, S, D). A cache adds the keys of earlier tokens;
    `visible` (R or 1, S, S) says which tokens each one sees, instead of all other masks."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)

    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        causal: bool = False,
        visible: Tensor | None = None,
        cache=None,
    ) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        if visible is not None:  # the one attention whose mask has no form: nodes of a trie, a few hundred
            heads_first = (t.transpose(1, 2) for t in (q, k, v))
            y = F.scaled_dot_product_attention(*heads_first, attn_mask=visible[:, None]).transpose(1, 2)
            return self.out(y.flatten(2))
        key_lengths = None
        if cache is not None:
            k, v, key_lengths = cache.append(k, v)
        y = ops.attention(q, k, v, key_lengths=key_lengths, key_mask=key_mask, causal=causal)
        return self.out(y.flatten(2))


class CrossAttention(nn.Module):
    """Attention of x (B*G, S, D) over the context of B items: G consecutive rows share one item.

    The context is packed keys and values (B, K, 2, N, H); or the tokens (B, K, D) themselves, over which each head then
    attends through its rows of the weights, so that keys and values are never made.
    """

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query = Linear(width, width)
        self.key_value = Linear(width, 2 * width)
        self.out = Linear(width, width)

    def project(self, tokens: Tensor) -> Tensor:
        """Tokens (B, K, D) -> packed keys and values."""
        return self.key_value(tokens).unflatten(-1, (2, self.num_heads, -1))

    def forward(self, x: Tensor, context: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        q = self.query(x).unflatten(-1, (self.num_heads, -1))
        if context.dim() == 5:
            y = ops.attention(q, *context.unbind(2), key_mask=key_mask)
        else:
            key_weight, value_weight = self.key_value.weight.chunk(2)
            value_bias = self.key_value.bias.chunk(2)[1]
            y = ops.fusion(q, context, key_weight, value_weight, value_bias, key_mask=key_mask)
        return self.out(y.flatten(2))


class Mlp(nn.Module):
    """down(gelu(up(x))) with the exact (erf) GELU."""

    def __init__(self, width: int, mlp_width: int):
        super().__init__()
        self.up = Linear(width, mlp_width)
        self.down = Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x, activation="gelu"))


class TransformerLayer(Block):
    """One post-norm layer; built with cross-attention only where a context is attended to."""

    def __init__(self, width: int, num_heads: int, mlp_width: int, *, has_cross_attention: bool, dropout: float = 0.0):
        super().__init__()
        self.self_attention = SelfAttention(width, num_heads)
        self.self_norm = AddLayerNorm(width)
        if has_cross_attention:
            self.cross_attention = CrossAttention(width, num_heads)
            self.cross_norm = AddLayerNorm(width)
        self.mlp = Mlp(width, mlp_width)
        self.mlp_norm = AddLayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        causal: bool = False,
        visible: Tensor | None = None,
        cache=None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        y = self.self_attention(x, key_mask=key_mask, causal=causal, visible=visible, cache=cache)
        x = self.self_norm(self.dropout(y), x)
        if context is not None:
            y = self.cross_attention(x, context, key_mask=context_mask)
            x = self.cross_norm(self.dropout(y), x)
        return self.mlp_norm(self.dropout(self.mlp(x)), x)


class Embeddings(nn.Module):
    """LN(word + position + token type): ids (B, S) -> (B, S, D). `word` may be a table that another module owns too."""

    def __init__(self, config, *, word: nn.Embedding | None = None, dropout: float = 0.0):
        super().__init__()
        # NOTE: piece 0 is [PAD]; its row gets no gradient from the look-up (it does from a tied output layer).
        self.word = nn.Embedding(config.vocab_size, config.width, padding_idx=0) if word is None else word
        self.position = nn.Embedding(config.max_positions, config.width)
        self.token_type = nn.Embedding(config.num_token_types, config.width)
        self.norm = nn.LayerNorm(config.width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor, *, token_types: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """positions: of the ids, any shape that broadcasts to theirs; default 0, 1, 2, ... in each row."""
        if positions is None:
            self.check_length(ids.shape[1])
        position = self.position.weight[: ids.shape[1]] if positions is None else self.position(positions)
        types = self.token_type.weight[0] if token_types is None else self.token_type(token_types)
        return self.dropout(self.norm(self.word(ids) + position + types))

    def check_length(self, length: int) -> None:
        """A ValueError where a text of so many word pieces is longer than the position table."""
        if length > self.position.num_embeddings:
            raise ValueError(f"text has {length} word pieces, the position table {self.position.num_embeddings}")
