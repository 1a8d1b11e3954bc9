"""Encoder and decoder as the published code builds them, over the weights of our modules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from reference_structure import PublishedBlock
from torch import Tensor, nn

from mplug2.composition import Parts
from mplug2.modules.decoder import Decoder
from mplug2.modules.layers import TransformerLayer


def attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(H) + mask) v, all scores at once. q (R, S, D), k and v (R, K, D), mask (R or 1, 1, S, K)."""
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores + mask
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class PublishedLayer(nn.Module):
    """BERT's layer; query, key and value are three projections, and the context's are made in every call."""

    def __init__(self, layer: TransformerLayer):
        super().__init__()
        self.layer = layer
        self.num_heads = layer.self_attention.num_heads

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x (R, S, D), context (R, K, D), mask added to the scores of self-attention."""
        layer, attention = self.layer, self.layer.self_attention
        weights, biases = attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))
        x = _norm(layer.self_norm, _linear(attention.out, attend(q, k, v, self.num_heads, mask)) + x)
        if context is not None:
            cross = layer.cross_attention
            weights, biases = cross.key_value.weight.chunk(2), cross.key_value.bias.chunk(2)
            k, v = (F.linear(context, w, b) for w, b in zip(weights, biases, strict=True))
            y = attend(_linear(cross.query, x), k, v, self.num_heads)
            x = _norm(layer.cross_norm, _linear(cross.out, y) + x)
        return _norm(layer.mlp_norm, _linear(layer.mlp.down, F.gelu(_linear(layer.mlp.up, x))) + x)


class PublishedEncoder(nn.Module):
    """`Parts.encode_vision` with the published layouts: video (B, 3, T, H, W) -> (B, K, D)."""

    def __init__(self, parts: Parts):
        super().__init__()
        if parts.config.universal.mode != "released":
            raise ValueError(f"baseline: universal.mode must be 'released', got {parts.config.universal.mode!r}")
        vision = parts.vision
        heads = vision.config.num_heads
        self.patch_embedding, self.norm_pre, self.norm_post = vision.patch_embedding, vision.norm_pre, vision.norm_post
        self.class_embedding, self.position_embedding = vision.class_embedding, vision.position_embedding
        self.projection = vision.projection
        self.projection_norm = None if vision.projection is None else vision.projection_norm
        self.layers = nn.ModuleList(PublishedBlock(block, heads) for block in vision.blocks)
        self.queries, self.norm = parts.universal.queries, parts.universal.norm
        self.universal = nn.ModuleList(map(PublishedLayer, parts.universal.layers))

    @torch.no_grad()
    def forward(self, video: Tensor) -> Tensor:
        batch = len(video)
        patches = self.patch_embedding(video)  # (B, D, T, H, W)
        frames = patches.shape[2]
        x = patches.permute(0, 2, 3, 4, 1).flatten(2, 3).flatten(0, 1)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.position_embedding
        x = self.norm_pre(x).transpose(0, 1).contiguous()
        for layer in self.layers:
            x = layer(x, frames)
        x = x.transpose(0, 1).unflatten(0, (batch, frames))
        v = self.norm_post(torch.cat([x[:, :, :1].mean(1), x[:, :, 1:].flatten(1, 2)], 1))
        if self.projection is not None:
            v = self.projection_norm(_linear(self.projection, v))
        queries = self.queries.expand(batch, -1, -1)
        for layer in self.universal[:-1]:
            queries = layer(queries, v)
        return self.norm(v + self.universal[-1](v, queries))


class PublishedDecoder(nn.Module):
    """Ids (R, S) and the context's tokens (R, K, D), a copy for each row -> log p (R, S, V)."""

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.start_id, self.end_id = decoder.start_id, decoder.end_id
        self.embeddings, self.head = decoder.embeddings, decoder.head
        self.layers = nn.ModuleList(map(PublishedLayer, decoder.layers))

    def forward(self, ids: Tensor, context: Tensor, *, is_padded: bool = False, num_last: int | None = None) -> Tensor:
        """is_padded: ids 0 are no keys. num_last: of how many positions at the end log p is wanted; default all."""
        length, table = ids.shape[1], self.embeddings
        x = table.word(ids) + table.position.weight[:length] + table.token_type.weight[0]
        x = table.norm(x)
        masked = torch.ones(1, 1, length, length, dtype=torch.bool, device=ids.device).triu(1)
        if is_padded:
            masked = masked | (ids == 0)[:, None, None]
        mask = torch.zeros(masked.shape, dtype=x.dtype, device=x.device).masked_fill_(masked, -10000.0)
        for layer in self.layers:
            x = layer(x, context, mask)
        x = x if num_last is None else x[:, -num_last:]
        features = self.head.norm(F.gelu(_linear(self.head.dense, x)))
        logits = F.linear(features, table.word.weight, self.head.bias)
        return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)


def compile_layers(encoder: PublishedEncoder, decoder: PublishedDecoder) -> None:
    """Compile every layer in place: all of one kind share their graphs. Forgets what was compiled before, which would
    count towards the limit of graphs of one function."""
    torch.compiler.reset()
    for block in encoder.layers:
        block.compile()
    for layer in (*encoder.universal, *decoder.layers):
        layer.compile(dynamic=True)


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, module.weight, module.bias)


def _norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)
