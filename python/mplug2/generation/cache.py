"""Self-attention cache of a decoder: keys and values of the tokens so far, preallocated, reordered as beams move."""

from __future__ import annotations

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one layer, (R, capacity, N, H) each, of which `length` tokens are filled."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.length = 0
        self.keys = self.values = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (R, S, N, H) behind what is there; the whole filled part comes back as views."""
        if self.keys is None:
            shape = (k.shape[0], self.capacity, *k.shape[2:])
            self.keys, self.values = k.new_empty(shape), v.new_empty(shape)
        end = self.length + k.shape[1]
        self.keys[:, self.length : end] = k
        self.values[:, self.length : end] = v
        self.length = end
        return self.keys[:, :end], self.values[:, :end]

    def reorder(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys[rows], self.values[rows]


class Cache:
    """The caches of all layers of one decoder, for at most `capacity` tokens."""

    def __init__(self, num_layers: int, capacity: int):
        self.layers = [LayerCache(capacity) for _ in range(num_layers)]

    @property
    def length(self) -> int:
        return self.layers[0].length

    def reorder(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was; the number of rows may change."""
        for layer in self.layers:
            layer.reorder(rows)


def new_cache(decoder, capacity: int) -> Cache:
    """An empty cache for `decoder`; capacity is cut to the decoder's position table."""
    return Cache(len(decoder.layers), min(capacity, decoder.embeddings.position.num_embeddings))


def step(decoder, ids: Tensor, context, cache: Cache) -> Tensor:
    """Log-probabilities (R, V) of the token after ids (R, S), which follow what the cache holds; at least float32."""
    logits = decoder.logits(decoder(ids, context, cache=cache)[:, -1])
    return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
