"""Beam search over a decoder whose context is projected once and shared by all beams of an item.

A hypothesis of t new tokens scores sum(log p) / ((5 + t) / 6)^0.6 (Wu et al. 2016, eq. 14).
"""

from __future__ import annotations

import math
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


def check_lengths(name: str, min_length: int, max_length: int) -> None:
    if not 0 <= min_length <= max_length or max_length < 1:
        raise ValueError(f"{name}: need 0 <= min_length <= max_length >= 1, got {min_length} and {max_length}")


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
        num_return: at most beam_size are found.
        prefix: ids (B, P) to continue; default the start token alone. Lengths and scores count new tokens only.
        decoding: "released" keeps the rules of the reference: hypotheses that ended stay in the beam and go on, an item
            stops when its best beam ends, and then all its beams are stored, ended or not. "standard": ended hypotheses
            leave the beam; an item stops when its worst kept hypothesis beats every running beam.
    """
    if decoding not in _STORES:
        raise ValueError(f"beam_search: decoding must be one of {', '.join(_STORES)}, got {decoding!r}")
    if beam_size < 1 or num_return < 1:
        raise ValueError(f"beam_search: beam_size and num_return must be at least 1, got {beam_size}, {num_return}")
    check_lengths("beam_search", min_length, max_length)
    items, device = len(context), context.layers[0][0].device
    if items == 0:
        return []
    if prefix is None:
        prefix = torch.full((items, 1), decoder.start_id, device=device)
    store = _STORES[decoding](items, beam_size)
    cache = new_cache(decoder, prefix.shape[1] + max_length)
    ids, running = prefix[:, None], torch.zeros(items, 1, device=device)  # (B, beams, t), summed log p (B, beams)
    for s in range(max_length):
        new = ids if s == 0 else ids[:, :, -1:]
        log_p = step(decoder, new.flatten(0, 1), context, cache).unflatten(0, (items, -1))
        if s < min_length:
            log_p[..., decoder.end_id] = -1e20
        score = (running[..., None] + log_p).flatten(1) / length_penalty(s + 1)
        score, pick = score.topk(min(store.num_candidates, score.shape[1]), 1)
        origin, token = pick // log_p.shape[2], pick % log_p.shape[2]
        ids = torch.cat([_take(ids, origin), token[..., None]], 2)
        ended = token == decoder.end_id
        store.update(ids.tolist(), score.tolist(), ended.tolist(), is_last=s + 1 == max_length)
        if not store.open:
            break
        if store.drops_ended:  # candidates that go on, best first; an ended one fills a place that no other can take
            score, order = score.masked_fill(ended, -torch.inf).topk(min(beam_size, score.shape[1]), 1)
            ids, origin = _take(ids, order), _take(origin, order)
        running = score * length_penalty(s + 1)
        cache.reorder((origin + torch.arange(items, device=device)[:, None] * log_p.shape[1]).flatten())
    return [sorted(found, key=lambda h: -h.score)[: min(beam_size, num_return)] for found in store.found]


class _Released:
    """Finished hypotheses under the reference's rules."""

    drops_ended = False

    def __init__(self, items: int, beam_size: int):
        self.num_candidates = beam_size
        self.found: list[list[Hypothesis]] = [[] for _ in range(items)]
        self.open = set(range(items))

    def update(self, ids: list, scores: list, ended: list, *, is_last: bool) -> None:
        """Store what one step finished: candidates (B, n) best first, whether each ended; close items that are done."""
        for item in sorted(self.open):
            stops = is_last or ended[item][0]
            for row, score, end in zip(ids[item], scores[item], ended[item], strict=True):
                if end or stops:
                    self.found[item].append(Hypothesis(row, score))
            if stops:
                self.open.remove(item)


class _Standard:
    """Finished hypotheses under the conventional rules: the beam_size best of each item."""

    drops_ended = True

    def __init__(self, items: int, beam_size: int):
        self.num_candidates = 2 * beam_size  # at most beam_size of them end, so that as many go on
        self.beam_size = beam_size
        self.found: list[list[Hypothesis]] = [[] for _ in range(items)]
        self.open = set(range(items))

    def update(self, ids: list, scores: list, ended: list, *, is_last: bool) -> None:
        for item in sorted(self.open):
            candidates = [c for c in zip(ids[item], scores[item], ended[item], strict=True) if math.isfinite(c[1])]
            running = [c for c in candidates if not c[2]]
            done = candidates if is_last else [c for c in candidates if c[2]]
            found = self.found[item] + [Hypothesis(row, score) for row, score, _ in done]
            self.found[item] = found = sorted(found, key=lambda h: -h.score)[: self.beam_size]
            best_running = running[0][1] if running else -math.inf
            if is_last or (len(found) == self.beam_size and found[-1].score >= best_running):
                self.open.remove(item)


_STORES = {"released": _Released, "standard": _Standard}


def _take(x: Tensor, beams: Tensor) -> Tensor:
    """x (B, beams, ...) at beams (B, n) -> (B, n, ...)."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], beams]
