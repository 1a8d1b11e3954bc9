"""Ranking of a closed list of answers by their likelihood, keys and values of the context shared by all candidates."""

from __future__ import annotations

import torch
from torch import Tensor

from mplug2.generation.cache import log_probs
from mplug2.modules.decoder import Context, Decoder

_ROWS = 256  # candidates of all items that are run through the decoder at once


@torch.no_grad()
def rank_answers(
    decoder: Decoder, context: Context, answers: Tensor, *, num_return: int, count_first_twice: bool = True
) -> tuple[Tensor, Tensor]:
    """The likeliest of some answers for every item: indices and probabilities, (B, k) each, best first.

    The rule of the reference: a shortlist of the k answers whose first token is likeliest (of equal ones those that
    stand first), then log p(first token) + log p(whole answer), softmax over the shortlist.

    Args:
        answers: (A, S) ids from the start token to the end token, padded with 0.
        num_return: k; at most A.
        count_first_twice: as the reference does; False ranks by log p(whole answer) alone.
    """
    if not 1 <= num_return <= answers.shape[0]:
        raise ValueError(f"rank_answers: num_return must be in 1..{answers.shape[0]}, got {num_return}")
    items = len(context)
    start = answers[:1, :1].expand(items, 1)
    first = log_probs(decoder.logits(decoder(start, context)[:, -1]))[:, answers[:, 1]]  # (B, A)
    first, shortlist = (x[:, :num_return] for x in first.sort(dim=1, descending=True, stable=True))
    scores = []
    for chosen in shortlist.split(max(1, _ROWS // max(1, items)), 1):
        ids = answers[chosen].flatten(0, 1)
        loss = decoder.loss(ids, context, ids.masked_fill(ids == 0, -100), reduction="row")
        scores.append(-loss.view(chosen.shape))
    score = torch.cat(scores, 1) + (first if count_first_twice else 0)
    probs, order = torch.softmax(score, 1).sort(dim=1, descending=True, stable=True)
    return shortlist.gather(1, order), probs
