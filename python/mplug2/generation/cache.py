"""Self-attention cache of a decoder: keys and values of the tokens so far, preallocated, each row of its own length."""

from __future__ import annotations

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one layer, (rows, capacity, N, H) each."""

    def __init__(self, num_rows: int, capacity: int):
        self.num_rows, self.capacity = num_rows, capacity
        self.keys = self.values = None
        self.lengths: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store k, v (R, 1, N, H) behind what the first R rows hold; their keys, values and numbers of keys (R,)."""
        if self.keys is None:
            shape = (self.num_rows, self.capacity, *k.shape[2:])
            self.keys, self.values = k.new_zeros(shape), v.new_zeros(shape)  # hidden, but NaN there would count
        keys, values = self.keys[: len(k)], self.values[: len(k)]
        at = self.lengths[:, None, None, None].expand_as(k)
        keys.scatter_(1, at, k)
        values.scatter_(1, at, v)
        return keys, values, self.lengths + 1


class Cache:
    """The caches of all layers of one decoder, for at most `capacity` tokens a row."""

    def __init__(self, decoder, num_rows: int, capacity: int):
        self.layers = [LayerCache(num_rows, capacity) for _ in decoder.layers]

    @property
    def lengths(self) -> Tensor:
        """(R,): tokens that the first R rows hold."""
        return self.layers[0].lengths

    @lengths.setter
    def lengths(self, lengths: Tensor) -> None:
        for layer in self.layers:
            layer.lengths = lengths

    def reorder(self, rows: Tensor, num_tokens: int) -> None:
        """Of the first R rows, row i becomes what row rows[i] was; num_tokens: what the longest of them holds."""
        for layer in self.layers:
            for filled in (layer.keys[: len(rows), :num_tokens], layer.values[: len(rows), :num_tokens]):
                filled.copy_(filled[rows])

    def clear(self, rows: slice) -> None:
        """Zero some rows: what is behind a row's length is hidden, but NaN there would count in the reference."""
        for layer in self.layers:
            for stored in (layer.keys, layer.values):
                if stored is not None:
                    stored[rows] = 0

    def move(self, source: slice, target: slice) -> None:
        """Some rows, copied over others."""
        for layer in self.layers:
            for stored in (layer.keys, layer.values):
                stored[target] = stored[source]


def log_probs(logits: Tensor) -> Tensor:
    """log softmax over the last dimension, at least in float32."""
    return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
