"""Sampling with temperature, top-k and top-p (nucleus) cuts."""

from __future__ import annotations

import torch
from torch import Tensor

from mplug2.generation.engine import decode
from mplug2.generation.search import Hypothesis, Search
from mplug2.modules.decoder import Context, Decoder


class Sampling(Search):
    """Independent draws for every item; the score is the mean log-probability per token.

    Args:
        num_samples: draws per item.
        temperature: logits are divided by it before the cuts.
        top_k: only the k likeliest tokens are drawn from.
        top_p: only the smallest set of likeliest tokens whose probability reaches p is drawn from.
        seed: makes the draws repeatable; None draws from torch's global generator. Every item takes its random numbers
            when it is admitted, so that draws do not depend on which items share a batch, only on their order.
        options: see `Search`.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        num_samples: int = 1,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        **options,
    ):
        if num_samples < 1:
            raise ValueError(f"Sampling: num_samples must be at least 1, got {num_samples}")
        if temperature <= 0:
            raise ValueError(f"Sampling: temperature must be positive, got {temperature}")
        if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
            raise ValueError(f"Sampling: top_k must be at least 1 and top_p in (0, 1], got {top_k}, {top_p}")
        super().__init__(decoder, width=num_samples, **options)
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)

    def allocate(self, num_slots: int, device: torch.device, dtype: torch.dtype) -> None:
        super().allocate(num_slots, device, dtype)
        self.uniform = self._new(num_slots, self.width, self.capacity, dtype=torch.float64)
        self.total = self._new(num_slots, self.width)  # log p of what was drawn
        self.length = self._new(num_slots, self.width, dtype=torch.int64)  # prefix included
        self.has_ended = self._new(num_slots, self.width, dtype=torch.bool)

    def admit(self, slot: int) -> None:
        super().admit(slot)
        drawn = torch.rand(self.width, self.capacity, dtype=torch.float64, generator=self._generator)
        self.uniform[slot] = drawn.to(self._device)
        self.total[slot] = 0
        self.length[slot] = self.prefix_length
        self.has_ended[slot] = False

    def advance(self, log_p: Tensor) -> None:
        n = log_p.shape[0]
        ids, position, is_open = self.ids[:n], self.position[:n], self.is_open[:n]
        num_new = position + 2 - self.prefix_length  # counting the token drawn now; below 1 the prefix gives it
        end = log_p[..., self.end_id]
        end.masked_fill_((num_new <= self.min_length)[:, None], -torch.inf)
        at = (position + 1).clamp(max=self.capacity - 1)[:, None, None].expand(-1, self.width, 1)
        token = draw(cut(log_p / self.temperature, self.top_k, self.top_p), self.uniform[:n].gather(2, at))
        has_ended = self.has_ended[:n]
        is_new = (is_open & (num_new >= 1))[:, None] & ~has_ended
        self.total[:n] += log_p.gather(2, token)[..., 0].masked_fill(~is_new, 0)
        self.length[:n] += is_new
        ids.scatter_(2, at, torch.where(is_new[..., None], token, ids.gather(2, at)))
        has_ended |= is_new & (token[..., 0] == self.end_id)
        is_open &= ~(has_ended.all(1) | (num_new >= self.max_length))
        position += is_open

    def result(self, slot: int) -> list[Hypothesis]:
        score = self.total[slot] / (self.length[slot] - self.prefix_length)
        rows = zip(self.ids[slot].tolist(), self.length[slot].tolist(), score.tolist(), strict=True)
        return sorted((Hypothesis(ids[:length], s) for ids, length, s in rows), key=lambda h: -h.score)


def sample(
    decoder: Decoder, context: Context, *, min_length: int = 1, max_length: int = 20, **options
) -> list[list[Hypothesis]]:
    """`num_samples` draws for every item of `context`, best first; the score is the mean log-probability per token.

    Args:
        min_length: the end token is not drawn among the first min_length new tokens.
        max_length: new tokens at most, end token included.
        options: num_samples, temperature, top_k, top_p, seed: see `Sampling`; prefix: ids (B, P) to continue, default
            the start token alone.
    """
    return decode(decoder, context, Sampling(decoder, min_length=min_length, max_length=max_length, **options))


def cut(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits (..., V) with everything outside the top-k and the nucleus at -inf."""
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1]), -1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None:
        ordered, order = logits.sort(-1, descending=True)
        p = ordered.softmax(-1)
        outside = p.cumsum(-1) - p >= top_p  # what stands before this token already reaches top_p
        logits = logits.masked_fill(outside.gather(-1, order.argsort(-1)), -torch.inf)
    return logits


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """The token (..., 1) whose stretch of the cumulated probabilities holds uniform (..., 1), in [0, 1)."""
    cumulated = logits.double().softmax(-1).cumsum(-1)
    at = torch.searchsorted(cumulated, uniform * cumulated[..., -1:], right=True)
    return at.clamp(max=logits.shape[-1] - 1)
