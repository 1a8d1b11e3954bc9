"""Ranking of a closed list of answers by their likelihood, keys and values of the context shared by all candidates."""

from __future__ import annotations

import torch
from torch import Tensor

from mplug2.generation.cache import new_cache, step
from mplug2.modules.decoder import Context, Decoder


@torch.no_grad()
def rank_answers(decoder: Decoder, context: Context, answers: Tensor, *, num_return: int) -> tuple[Tensor, Tensor]:
    """The likeliest of some answers for every item: indices and probabilities, (B, k) each, best first.

    The rule of the reference: a shortlist of the k answers whose first token is likeliest, then
    log p(first token) + log p(whole answer), softmax over the shortlist. The first token counts twice.

    Args:
        answers: (A, S) ids from the start token to the end token, padded with 0.
        num_return: k; at most A.
    """
    if not 1 <= num_return <= answers.shape[0]:
        raise ValueError(f"rank_answers: num_return must be in 1..{answers.shape[0]}, got {num_return}")
    items = len(context)
    start = answers[:1, :1].expand(items, 1)
    first = step(decoder, start, context, new_cache(decoder, 1))[:, answers[:, 1]]  # (B, A)
    first, shortlist = first.topk(num_return, 1)
    ids = answers[shortlist].flatten(0, 1)
    loss = decoder.loss(ids, context, ids.masked_fill(ids == 0, -100), reduction="row").view(items, num_return)
    probs, order = torch.softmax(first - loss, 1).sort(dim=1, descending=True, stable=True)
    return shortlist.gather(1, order), probs
