"""Beam search over a decoder whose context is projected once and shared by all beams of an item.

A hypothesis of t new tokens scores sum(log p) / ((5 + t) / 6)^0.6 (Wu et al. 2016, eq. 14).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mplug2.generation.cache import new_cache, step
from mplug2.modules.decoder import Context, Decoder


@dataclass(frozen=True)
class Hypothesis:
    """Generated ids, start token (or prefix) and, where reached, end token included; and their score."""

    ids: list[int]
    score: float


def length_penalty(num_new: int) -> float:
    return ((5 + num_new) / 6) ** 0.6


@torch.no_grad()
def beam_search(
    decoder: Decoder,
    context: Context,
    *,
    beam_size: int = 5,
    min_length: int = 1,
    max_length: int = 20,
    num_return: int = 1,
    prefix: Tensor | None = None,
    decoding: str = "released",
) -> list[list[Hypothesis]]:
    """The best `num_return` hypotheses of every item of `context`, best first.

    Args:
        min_length: the end token is not chosen among the first min_length new tokens.
        max_length: new tokens at most, end token included.
        prefix: ids (B, P) to continue; default the start token alone. Lengths and scores count new tokens only.
        decoding: "released" keeps the rules of the reference: hypotheses that ended stay in the beam and go on, an item
            stops when its best beam ends, and then all its beams are stored, ended or not. "standard": ended hypotheses
            leave the beam; an item stops when its worst kept hypothesis beats every running beam.
    """
    _check(decoder, beam_size, min_length, max_length, num_return, decoding)
    items, device = len(context), context.layers[0][0].device
    if items == 0:
        return []
    if prefix is None:
        prefix = torch.full((items, 1), decoder.start_id, device=device)
    keep = _Released(items, beam_size) if decoding == "released" else _Standard(items, beam_size)
    cache = new_cache(decoder, prefix.shape[1] + max_length)
    ids, running = prefix[:, None], torch.zeros(items, 1, device=device)  # (B, beams, t), summed log p (B, beams)
    for s in range(max_length):
        new = ids if s == 0 else ids[:, :, -1:]
        log_p = step(decoder, new.flatten(0, 1), context, cache).unflatten(0, (items, -1))
        if s < min_length:
            log_p[..., decoder.end_id] = -1e20
        score = (running[..., None] + log_p).flatten(1) / length_penalty(s + 1)
        # The standard rules need as many candidates that go on as there are beams, however many end.
        count = min(keep.candidates(beam_size), score.shape[1])
        score, pick = score.topk(count, 1)
        origin, token = pick // log_p.shape[2], pick % log_p.shape[2]
        ids = torch.cat([_take(ids, origin), token[..., None]], 2)
        chosen = keep.update(ids, score, token == decoder.end_id, is_last=s + 1 == max_length)
        if keep.done:
            break
        if chosen is not None:
            ids, score, origin = (_take(x, chosen) for x in (ids, score, origin))
        running = score * length_penalty(s + 1)
        cache.reorder((origin + torch.arange(items, device=device)[:, None] * log_p.shape[1]).flatten())
    return [found[: min(beam_size, num_return)] for found in keep.sorted()]


class _Released:
    """Store of finished hypotheses under the reference's rules."""

    def __init__(self, items: int, beam_size: int):
        self.found: list[list[Hypothesis]] = [[] for _ in range(items)]
        self.open = set(range(items))

    @staticmethod
    def candidates(beam_size: int) -> int:
        return beam_size

    @property
    def done(self) -> bool:
        return not self.open

    def update(self, ids: Tensor, score: Tensor, ended: Tensor, *, is_last: bool) -> None:
        ended = ended.tolist()
        for item in sorted(self.open):
            stops = is_last or ended[item][0]
            for beam, end in enumerate(ended[item]):
                if end or stops:
                    self.found[item].append(Hypothesis(ids[item, beam].tolist(), score[item, beam].item()))
            if stops:
                self.open.remove(item)

    def sorted(self) -> list[list[Hypothesis]]:
        return [sorted(found, key=lambda h: -h.score) for found in self.found]


class _Standard(_Released):
    """Store under the conventional rules: at most beam_size hypotheses per item, ended ones leave the beam."""

    def __init__(self, items: int, beam_size: int):
        super().__init__(items, beam_size)
        self.beam_size = beam_size

    @staticmethod
    def candidates(beam_size: int) -> int:
        return 2 * beam_size

    def update(self, ids: Tensor, score: Tensor, ended: Tensor, *, is_last: bool) -> Tensor:
        """Returns which candidates go on, (B, beam_size) indices."""
        flags = ended.tolist()
        for item in sorted(self.open):
            found, num_running = self.found[item], 0
            for beam, end in enumerate(flags[item]):
                if end or (is_last and num_running < self.beam_size):
                    found.append(Hypothesis(ids[item, beam].tolist(), score[item, beam].item()))
                num_running += not end
            found.sort(key=lambda h: -h.score)
            del found[self.beam_size :]
            best_running = next((score[item, b].item() for b, end in enumerate(flags[item]) if not end), float("-inf"))
            if is_last or (len(found) == self.beam_size and found[-1].score >= best_running):
                self.open.remove(item)
        order = ended.to(torch.int8).argsort(dim=1, stable=True)  # candidates that go on, best first, then ended ones
        return order[:, : self.beam_size]


def _take(x: Tensor, beams: Tensor) -> Tensor:
    """x (B, beams, ...) at beams (B, n) -> (B, n, ...)."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], beams]


def _check(decoder, beam_size, min_length, max_length, num_return, decoding) -> None:
    if decoding not in ("released", "standard"):
        raise ValueError(f"beam_search: decoding must be 'released' or 'standard', got {decoding!r}")
    if beam_size < 1 or num_return < 1:
        raise ValueError(f"beam_search: beam_size and num_return must be at least 1, got {beam_size}, {num_return}")
    if not 0 <= min_length <= max_length or max_length < 1:
        raise ValueError(f"beam_search: need 0 <= min_length <= max_length >= 1, got {min_length} and {max_length}")
