"""Ranking of a closed list: every shortlisted answer is read whole over a copy of the context of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from baselines.structure import PublishedDecoder


@torch.no_grad()
def rank_answers(
    decoder: PublishedDecoder, tokens: Tensor, answers: Tensor, *, num_return: int
) -> tuple[Tensor, Tensor]:
    """Indices and probabilities (B, k) of answers (A, S), padded with 0, over tokens (B, K, D), best first: log p(first
    token) + log p(whole answer) of the k whose first token is likeliest, softmax over them."""
    start = answers[:1, :1].expand(len(tokens), 1)
    first = decoder(start, tokens)[:, -1][:, answers[:, 1]]
    first, shortlist = (x[:, :num_return] for x in first.sort(dim=1, descending=True, stable=True))
    ids, tiled = answers[shortlist].flatten(0, 1), tokens.repeat_interleave(num_return, 0)
    log_p = decoder(ids, tiled, is_padded=True)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    whole = log_p.masked_fill(ids[:, 1:] == 0, 0).sum(1).view(first.shape)
    probs, order = torch.softmax(first + whole, 1).sort(dim=1, descending=True, stable=True)
    return shortlist.gather(1, order), probs
