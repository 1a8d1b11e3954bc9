"""What every search keeps of the items of a running batch: tokens, how far each item is, whether it goes on.

All of it lies on the device in tensors of a fixed shape that are changed in place, so that a step needs no word from
the host and can be captured in a CUDA graph. A slot is one item, `width` rows of the decoder: its beams or samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from mplug2.modules.decoder import Decoder


@dataclass(frozen=True)
class Hypothesis:
    """Generated ids, start token (or prefix) and, where reached, end token included; and their score."""

    ids: list[int]
    score: float


class Search(ABC):
    """Base of the ways to choose tokens.

    Args:
        width: rows per item.
        min_length: the end token is not chosen among the first min_length new tokens.
        max_length: new tokens at most, end token included.
        prefix: ids (P,) that every item continues, or (slots, P); default the start token alone.
    """

    def __init__(self, decoder: Decoder, *, width: int, min_length: int, max_length: int, prefix: Tensor | None = None):
        name = type(self).__name__
        if not 0 <= min_length <= max_length or max_length < 1:
            raise ValueError(f"{name}: need 0 <= min_length <= max_length >= 1, got {min_length} and {max_length}")
        self.prefix = torch.tensor([decoder.start_id]) if prefix is None else prefix
        self.prefix_length = self.prefix.shape[-1]
        table = decoder.embeddings.position.num_embeddings
        if self.prefix_length + max_length - 1 > table:
            raise ValueError(
                f"{name}: {max_length} tokens behind a prefix of {self.prefix_length} are more than the position table "
                f"{table} holds: max_length must be at most {table + 1 - self.prefix_length}"
            )
        self.width, self.min_length, self.max_length = width, min_length, max_length
        self.end_id = decoder.end_id
        self.capacity = self.prefix_length + max_length

    def allocate(self, num_slots: int, device: torch.device, dtype: torch.dtype) -> None:
        """Room for items; dtype is that of log-probabilities and scores."""
        self._tensors: list[Tensor] = []
        self._device, self._dtype = device, dtype
        self.ids = self._new(num_slots, self.width, self.capacity, dtype=torch.int64)
        self.position = self._new(num_slots, dtype=torch.int64)  # of the token that the decoder reads next
        self.is_open = self._new(num_slots, dtype=torch.bool)

    def _new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        self._tensors.append(torch.zeros(shape, device=self._device, dtype=dtype or self._dtype))
        return self._tensors[-1]

    def admit(self, slot: int) -> None:
        """Begin a new item."""
        prefix = self.prefix if self.prefix.dim() == 1 else self.prefix[slot]
        self.ids[slot, :, : self.prefix_length] = prefix.to(self._device)
        self.position[slot] = 0
        self.is_open[slot] = True

    def move(self, source: int, target: int) -> None:
        for t in self._tensors:
            t[target] = t[source]

    def next_ids(self, num_slots: int) -> Tensor:
        """What the decoder reads now: (slots, width)."""
        at = self.position[:num_slots, None, None].expand(-1, self.width, 1)
        return self.ids[:num_slots].gather(2, at)[..., 0]

    @abstractmethod
    def advance(self, log_p: Tensor) -> Tensor | None:
        """Choose by log-probabilities (slots, width, V), which may be overwritten, of the first slots.

        Returns (slots, width): the row of the same item that each row continues; None where every row continues itself.
        """

    @abstractmethod
    def result(self, slot: int) -> list[Hypothesis]:
        """What was found for an item that is no longer open, best first."""
