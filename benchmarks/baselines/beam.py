"""Beam search by the rules "released": the whole prefix of every beam is read again at every token."""

from __future__ import annotations

import torch
from torch import Tensor

from baselines.structure import PublishedDecoder
from mplug2.generation import Hypothesis


@torch.no_grad()
def beam_search(
    decoder: PublishedDecoder, tokens: Tensor, *, beam_size: int = 5, min_length: int = 1, max_length: int = 20
) -> list[list[Hypothesis]]:
    """The beam_size best hypotheses of every item of tokens (B, K, D), best first. Items that are done leave the batch;
    log p is made of the last position alone."""
    items, found = list(range(len(tokens))), [[] for _ in tokens]
    tiled = tokens.repeat_interleave(beam_size, 0)
    ids = torch.full((len(tiled), 1), decoder.start_id, device=tokens.device)
    running = torch.full((len(tokens), beam_size), -torch.inf, device=tokens.device)
    running[:, 0] = 0
    for num_new in range(1, max_length + 1):
        log_p = decoder(ids, tiled, num_last=1)[:, 0]
        if num_new <= min_length:
            log_p[:, decoder.end_id] = -1e20
        penalty = ((5 + num_new) / 6) ** 0.6
        score = (running.to(log_p.dtype)[..., None] + log_p.unflatten(0, (len(items), -1))) / penalty
        score, pick = score.flatten(1).topk(beam_size, 1)
        row = pick // log_p.shape[1] + beam_size * torch.arange(len(items), device=ids.device)[:, None]
        ids = torch.cat([ids[row.flatten()], (pick % log_p.shape[1]).view(-1, 1)], 1)
        running = score * penalty
        ended = ids[:, -1].view(score.shape) == decoder.end_id
        stops = ended[:, 0] | (num_new == max_length)
        _store(found, items, ids.view(*score.shape, -1), score, ended | stops[:, None])
        left = (~stops).nonzero()[:, 0].tolist()
        if not left:
            break
        if len(left) < len(items):
            items, running = [items[i] for i in left], running[left]
            ids, tiled = (x.unflatten(0, score.shape)[left].flatten(0, 1) for x in (ids, tiled))
    return [sorted(each, key=lambda h: -h.score)[:beam_size] for each in found]


def _store(found: list[list[Hypothesis]], items: list[int], ids: Tensor, score: Tensor, is_done: Tensor) -> None:
    for item, *rows in zip(items, ids.tolist(), score.tolist(), is_done.tolist(), strict=True):
        found[item] += [Hypothesis(row, s) for row, s, done in zip(*rows, strict=True) if done]
