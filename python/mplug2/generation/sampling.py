"""Sampling with temperature, top-k and top-p (nucleus) cuts."""

from __future__ import annotations

import torch
from torch import Tensor

from mplug2.generation.beam import Hypothesis, check_lengths
from mplug2.generation.cache import new_cache, step
from mplug2.modules.decoder import Context, Decoder


@torch.no_grad()
def sample(
    decoder: Decoder,
    context: Context,
    *,
    num_samples: int = 1,
    min_length: int = 1,
    max_length: int = 20,
    prefix: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> list[list[Hypothesis]]:
    """`num_samples` draws for every item of `context`, best first; the score is the mean log-probability per token.

    Args:
        min_length, max_length: new tokens at least and at most, end token included.
        prefix: ids (B, P) to continue; default the start token alone.
        temperature: logits are divided by it before the cuts.
        top_k: only the k likeliest tokens are drawn from.
        top_p: only the smallest set of likeliest tokens whose probability reaches p is drawn from.
        seed: makes the draws repeatable; None draws from torch's global generator.
    """
    check_lengths("sample", min_length, max_length)
    if num_samples < 1:
        raise ValueError(f"sample: num_samples must be at least 1, got {num_samples}")
    if temperature <= 0:
        raise ValueError(f"sample: temperature must be positive, got {temperature}")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(f"sample: top_k must be at least 1 and top_p in (0, 1], got {top_k}, {top_p}")
    items, device = len(context), context.layers[0][0].device
    if prefix is None:
        prefix = torch.full((items, 1), decoder.start_id, device=device)
    rows = items * num_samples
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    cache = new_cache(decoder, prefix.shape[1] + max_length)
    ids = prefix.repeat_interleave(num_samples, 0)
    total, ended = torch.zeros(rows, device=device), torch.zeros(rows, dtype=torch.bool, device=device)
    lengths = torch.zeros(rows, device=device)
    for s in range(max_length):
        log_p = step(decoder, ids if s == 0 else ids[:, -1:], context, cache)
        if s < min_length:
            log_p[:, decoder.end_id] = -torch.inf
        kept = cut(log_p / temperature, top_k, top_p)
        token = torch.multinomial(kept.softmax(-1), 1, generator=generator)
        total += log_p.gather(1, token)[:, 0].masked_fill(ended, 0)
        lengths += ~ended
        token = token.masked_fill(ended[:, None], decoder.end_id)
        ids = torch.cat([ids, token], 1)
        ended |= token[:, 0] == decoder.end_id
        if ended.all():
            break
    found = [
        Hypothesis(row[: prefix.shape[1] + int(n)], score)
        for row, n, score in zip(ids.tolist(), lengths.tolist(), (total / lengths).tolist(), strict=True)
    ]
    groups = (found[i : i + num_samples] for i in range(0, rows, num_samples))
    return [sorted(group, key=lambda h: -h.score) for group in groups]


def cut(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits (R, V) with everything outside the top-k and the nucleus at -inf."""
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[1]), 1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None:
        ordered, order = logits.sort(1, descending=True)
        p = ordered.softmax(1)
        outside = p.cumsum(1) - p >= top_p  # what stands before this token already reaches top_p
        logits = logits.masked_fill(outside.gather(1, order.argsort(1)), -torch.inf)
    return logits
