"""Beam search over a decoder whose context is projected once and shared by all beams of an item.

A hypothesis of t new tokens scores sum(log p) / ((5 + t) / 6)^0.6 (Wu et al. 2016, eq. 14).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mplug2.generation.engine import decode
from mplug2.generation.search import Hypothesis, Search
from mplug2.modules.decoder import Context, Decoder

DECODINGS = ("released", "standard")


def length_penalty(num_new: Tensor | int) -> Tensor | float:
    return ((5 + num_new) / 6) ** 0.6


class BeamSearch(Search):
    """Beams of every item and the best `beam_size` hypotheses that ended so far.

    Args:
        num_return: at most beam_size are found.
        decoding: "released" keeps the rules of the reference: hypotheses that ended stay in the beam and go on, an item
            stops when its best beam ends, and then all its beams are stored, ended or not. "standard": ended hypotheses
            leave the beam; an item stops when its worst kept hypothesis beats every running beam.
        options: see `Search`.
    """

    def __init__(
        self, decoder: Decoder, *, beam_size: int = 5, num_return: int = 1, decoding: str = "released", **options
    ):
        if decoding not in DECODINGS:
            raise ValueError(f"BeamSearch: decoding must be one of {', '.join(DECODINGS)}, got {decoding!r}")
        if beam_size < 1 or num_return < 1:
            raise ValueError(f"BeamSearch: beam_size and num_return must be at least 1, got {beam_size}, {num_return}")
        super().__init__(decoder, width=beam_size, **options)
        self.num_return = min(num_return, beam_size)
        self.drops_ended = decoding == "standard"
        # At most beam_size of twice as many end, so that as many go on.
        self.num_candidates = 2 * beam_size if self.drops_ended else beam_size

    def allocate(self, num_slots: int, device: torch.device, dtype: torch.dtype) -> None:
        super().allocate(num_slots, device, dtype)
        self.running = self._new(num_slots, self.width)  # summed log p of each beam
        self.found_score = self._new(num_slots, self.width)  # best first, -inf where none
        self.found_length = self._new(num_slots, self.width, dtype=torch.int64)
        self.found_ids = self._new(num_slots, self.width, self.capacity, dtype=torch.int64)

    def admit(self, slot: int) -> None:
        super().admit(slot)
        self.running[slot] = -torch.inf  # all beams are alike at first: only one counts
        self.running[slot, 0] = 0
        self.found_score[slot] = -torch.inf

    def advance(self, log_p: Tensor) -> Tensor:
        n = log_p.shape[0]
        ids, position, is_open, running = self.ids[:n], self.position[:n], self.is_open[:n], self.running[:n]
        # Counting the token chosen now; below 1 the prefix gives it, and the end token is held down as by min_length.
        num_new = position + 2 - self.prefix_length
        is_given = (num_new < 1)[:, None]
        penalty = length_penalty(num_new.clamp(min=1).to(log_p.dtype))[:, None]
        end = log_p[..., self.end_id]
        end.masked_fill_((num_new <= self.min_length)[:, None], -1e20)

        row_best, row_token = log_p.topk(min(self.num_candidates, log_p.shape[2]), 2)
        score = ((running[..., None] + row_best) / penalty[..., None]).flatten(1)
        score, pick = score.topk(self.num_candidates, 1)
        origin, token = pick // row_best.shape[2], row_token.flatten(1).gather(1, pick)
        candidates = _continue(ids, origin, token, position)
        ended = token == self.end_id
        is_last = num_new >= self.max_length
        self._store(candidates, score, ended, is_last)

        if self.drops_ended:  # candidates that go on, best first; an ended one fills a place that no other can take
            score, order = score.masked_fill(ended, -torch.inf).topk(self.width, 1)
            origin, candidates = origin.gather(1, order), candidates.gather(1, _wide(order, self.capacity))
        torch.where(is_given[..., None], ids, candidates, out=ids)
        torch.where(is_given, running, score * penalty, out=running)
        position += is_open
        return torch.where(is_given, torch.arange(self.width, device=origin.device), origin)

    def _store(self, ids: Tensor, score: Tensor, ended: Tensor, is_last: Tensor) -> None:
        """Keep what a step finished of candidates (n, C), best first; close items that are done."""
        n = len(score)
        is_open = self.is_open[:n]
        found_score, found_length, found_ids = self.found_score[:n], self.found_length[:n], self.found_ids[:n]
        stops = is_last if self.drops_ended else is_last | ended[:, 0]
        is_done = (ended | stops[:, None]) & is_open[:, None]
        length = (self.position[:n] + 2)[:, None].expand_as(score)
        # Stable: of equal scores the one found first, as in one list sorted at the end.
        scores = torch.cat([found_score, score.masked_fill(~is_done, -torch.inf)], 1)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        order = order[:, : self.width]
        found_score.copy_(scores[:, : self.width])
        found_length.copy_(torch.cat([found_length, length], 1).gather(1, order))
        found_ids.copy_(torch.cat([found_ids, ids], 1).gather(1, _wide(order, self.capacity)))
        if self.drops_ended:
            best_running = score.masked_fill(ended, -torch.inf).amax(1)
            stops = stops | (found_score[:, -1] >= best_running) & (found_score[:, -1] > -torch.inf)
        is_open &= ~stops

    def result(self, slot: int) -> list[Hypothesis]:
        scores = self.found_score[slot, : self.num_return].tolist()
        rows = zip(self.found_ids[slot].tolist(), self.found_length[slot].tolist(), scores, strict=False)
        # Where numbers are not finite the score is NaN, and the text means nothing.
        return [Hypothesis(ids[:length], score) for ids, length, score in rows if score != -torch.inf]


def beam_search(
    decoder: Decoder, context: Context, *, min_length: int = 1, max_length: int = 20, **options
) -> list[list[Hypothesis]]:
    """The best `num_return` hypotheses of every item of `context`, best first.

    Args:
        min_length: the end token is not chosen among the first min_length new tokens.
        max_length: new tokens at most, end token included.
        options: beam_size=5, num_return=1, decoding="released" or "standard": see `BeamSearch`; prefix: ids (B, P) to
            continue, default the start token alone. Lengths and scores count new tokens only.
    """
    search = BeamSearch(decoder, min_length=min_length, max_length=max_length, **options)
    return decode(decoder, context, search)


def _wide(index: Tensor, size: int) -> Tensor:
    """index (n, C) for a gather from (n, ..., size)."""
    return index[..., None].expand(-1, -1, size)


def _continue(ids: Tensor, origin: Tensor, token: Tensor, position: Tensor) -> Tensor:
    """ids (n, K, S) of the beams origin (n, C), with token behind `position`."""
    made = ids.gather(1, _wide(origin, ids.shape[2]))
    at = (position + 1).clamp(max=ids.shape[2] - 1)[:, None, None].expand(-1, origin.shape[1], 1)
    return made.scatter_(2, at, token[..., None])
